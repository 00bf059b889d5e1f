"""The programs `cuckoonode-hosted` and `cuckoo-hosted`.

They run Cuckoo3's `cuckoonode` and `cuckoo` with the same arguments, after replacing these names:

| name in Cuckoo3                                 | replacement                                    |
| ----------------------------------------------- | ---------------------------------------------- |
| `cuckoo.node.startup.start_machinerymanager`    | `manager.start_machinerymanager`               |
| `cuckoo.node.startup.start_remote`              | first clears what a killed node has left       |
| `cuckoo.node.taskrunner.TaskRunner`             | `taskrunner.HostedTaskRunner`                  |
| `cuckoo.node.webapi.StateSSE`                   | `eventstream.HostedStateSSE`                   |
| `cuckoo.config.Machinery.constraints`           | accepts any name                               |
| `cuckoo.common.startup._load_machinery_configs` | reads the machineries that Cuckoo3 knows       |
| `cuckoo.startup.start_cuckoo`, `start_cuckoo_controller` | first clear what a killed process has left |
| `cuckoo.startup.start_processing_handler`       | uses `workers.HostedWorkReceiver`              |
| `cuckoo.nodeclient.LocalStreamReceiver`         | `nodeclients.HostedStreamReceiver`             |
| `cuckoo.nodeclient.LocalNodeClient`             | `nodeclients.HostedLocalNodeClient`            |
| `cuckoo.nodeclient.RemoteNodeClient`            | `nodeclients.HostedRemoteNodeClient`           |
| `cuckoo.scheduler.Scheduler`                    | `scheduler.HostedScheduler`                    |

In the task runner's process, `cuckoo.common.taskflow.MachineryManagerClient` and `cuckoo.node.taskrunner._FlowRunner`
are replaced by those of `taskrunner`. `multiprocessing.process.BaseProcess.start` also records the new process.

Cuckoo3 looks up each name at its use. If a version of Cuckoo3 lacks a name, the programs fail at once, instead
of running with some of the replacements.
"""

import sys
from importlib import import_module

from .leftovers import MAIN, NODE, InUse, Record, record_workers

_REPLACED = (
    ("cuckoo.node.startup", "start_machinerymanager"),
    ("cuckoo.node.startup", "start_remote"),
    ("cuckoo.node.taskrunner", "TaskRunner"),
    ("cuckoo.node.taskrunner", "_FlowRunner"),
    ("cuckoo.node.webapi", "StateSSE"),
    ("cuckoo.common.taskflow", "MachineryManagerClient"),
    ("cuckoo.common.startup", "init_global_logging"),
    ("cuckoo.config", "Machinery"),
    ("cuckoo.common.startup", "_load_machinery_configs"),
)
_REPLACED_IN_MAIN = (
    ("cuckoo.startup", "start_cuckoo"),
    ("cuckoo.startup", "start_cuckoo_controller"),
    ("cuckoo.startup", "start_processing_handler"),
    ("cuckoo.nodeclient", "LocalStreamReceiver"),
    ("cuckoo.nodeclient", "LocalNodeClient"),
    ("cuckoo.nodeclient", "RemoteNodeClient"),
    ("cuckoo.scheduler", "Scheduler"),
)


def cuckoonode():
    """Runs Cuckoo3's node on the machinery host."""
    _use_the_host(_REPLACED)
    from cuckoo.node.main import main

    main()


def cuckoo():
    """Runs Cuckoo3's main process and its own node on the machinery host."""
    _use_the_host((*_REPLACED, *_REPLACED_IN_MAIN))
    _use_in_main()
    from cuckoo.main import main

    main()


def _use_the_host(replaced):
    for module, name in replaced:
        _expect(module, name)
    from cuckoo.node import startup, webapi
    from cuckoo.node import taskrunner as cuckoo_taskrunner

    from . import configuration, eventstream, manager, taskrunner

    startup.start_machinerymanager = manager.start_machinerymanager
    startup.start_remote = _clearing_first(startup.start_remote, NODE)
    cuckoo_taskrunner.TaskRunner = taskrunner.HostedTaskRunner
    webapi.StateSSE = eventstream.HostedStateSSE
    configuration.accept_all_machineries()


def _use_in_main():
    from cuckoo import nodeclient, startup
    from cuckoo import scheduler as cuckoo_scheduler

    from . import nodeclients, scheduler

    startup.start_cuckoo = _clearing_first(startup.start_cuckoo, NODE, MAIN)
    startup.start_cuckoo_controller = _clearing_first(startup.start_cuckoo_controller, MAIN)
    nodeclient.LocalStreamReceiver = nodeclients.HostedStreamReceiver
    nodeclient.LocalNodeClient = nodeclients.HostedLocalNodeClient
    nodeclient.RemoteNodeClient = nodeclients.HostedRemoteNodeClient
    cuckoo_scheduler.Scheduler = scheduler.HostedScheduler
    _use_hosted_workers(startup)


def _use_hosted_workers(startup):
    original = startup.start_processing_handler

    def start_processing_handler(cuckooctx):
        # This import is slow, and most commands of `cuckoo` process nothing.
        from . import workers

        workers.use_hosted_workers()
        original(cuckooctx)

    startup.start_processing_handler = start_processing_handler


def _clearing_first(original, *roles):
    """Returns the function `original`, which starts Cuckoo3, after what was left of these roles is cleared."""

    def start(*args, **kwargs):
        from cuckoo.common import startup

        init_global_logging = startup.init_global_logging

        # It is the first step of each start. The later ones expect that the sockets are free.
        def init_logging_and_clear(*args, **kwargs):
            init_global_logging(*args, **kwargs)
            _clear(roles)

        startup.init_global_logging = init_logging_and_clear
        original(*args, **kwargs)

    return start


def _clear(roles):
    from cuckoo.common.log import CuckooGlobalLogger
    from cuckoo.common.startup import StartupError
    from cuckoo.common.storage import cuckoocwd

    records = [Record(cuckoocwd.root, role, CuckooGlobalLogger(__name__)) for role in roles]
    try:
        for record in records:
            record.claim()
    except InUse as error:
        raise StartupError(error) from error
    record_workers(records)


def _expect(module, name):
    try:
        found = import_module(module)
    except ImportError as error:
        sys.exit(
            f"Cuckoo3 cannot be loaded by {sys.executable}: {error}. "
            "Install cuckoo-machinery into the environment that Cuckoo3 is installed in"
        )
    if not hasattr(found, name):
        sys.exit(
            f"This Cuckoo3 has no {module}.{name}, which cuckoo-machinery replaces. "
            "Its version is not supported: use Cuckoo3's own programs, or another version of cuckoo-machinery"
        )
