"""Cuckoo3's processing workers.

Each worker process reads the whole configuration, so it must also accept machineries that Cuckoo3 does not
know. The class of the worker runs code of this package in that process, as with the task runner.
"""

from cuckoo import runprocessing
from cuckoo.runprocessing import WorkReceiver

from .configuration import accept_all_machineries


class HostedWorkReceiver(WorkReceiver):
    """Cuckoo3's worker, which accepts all machineries."""

    def start(self):
        """Runs in the worker's process."""
        accept_all_machineries()
        super().start()


def use_hosted_workers():
    """Makes this process start such workers."""
    runprocessing.WorkReceiver = HostedWorkReceiver
