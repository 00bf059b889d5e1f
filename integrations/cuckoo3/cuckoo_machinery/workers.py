"""The processes of Cuckoo3 that process results.

They read the whole configuration, each by itself, so they too must take machineries that Cuckoo3 does not
know. As with the task runner, their class is how code of ours gets into them.
"""

from cuckoo import runprocessing
from cuckoo.runprocessing import WorkReceiver

from .configuration import accept_all_machineries


class HostedWorkReceiver(WorkReceiver):
    """Cuckoo3's worker, which takes all machineries."""

    def start(self):
        """Runs in the worker's process."""
        accept_all_machineries()
        super().start()


def use_hosted_workers():
    """From now on, in this process."""
    runprocessing.WorkReceiver = HostedWorkReceiver
