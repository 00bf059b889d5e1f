"""The programs `cuckoonode-hosted` and `cuckoo-hosted`.

They are Cuckoo3's `cuckoonode` and `cuckoo`, with the same arguments, after a few of Cuckoo3's names have
been given another value:

| name in Cuckoo3                                 | becomes                                        |
| ----------------------------------------------- | ---------------------------------------------- |
| `cuckoo.node.startup.start_machinerymanager`    | `manager.start_machinerymanager`               |
| `cuckoo.node.taskrunner.TaskRunner`             | `taskrunner.HostedTaskRunner`                  |
| `cuckoo.config.Machinery.constraints`           | takes any name                                 |
| `cuckoo.common.startup._load_machinery_configs` | reads those that Cuckoo3 knows                 |
| `cuckoo.startup.start_processing_handler`       | first: `workers.HostedWorkReceiver` is used    |

Cuckoo3 looks all of them up when it uses them. Should another version of Cuckoo3 not have one of them,
that is said at once, instead of running with half of it.
"""

import sys
from importlib import import_module

_REPLACED = (
    ("cuckoo.node.startup", "start_machinerymanager"),
    ("cuckoo.node.taskrunner", "TaskRunner"),
    ("cuckoo.common.taskflow", "MachineryManagerClient"),
    ("cuckoo.config", "Machinery"),
    ("cuckoo.common.startup", "_load_machinery_configs"),
)


def cuckoonode():
    """Cuckoo3's node, on the machinery host."""
    _use_the_host(_REPLACED)
    from cuckoo.node.main import main

    main()


def cuckoo():
    """Cuckoo3's main process with its own node, on the machinery host."""
    _use_the_host((*_REPLACED, ("cuckoo.startup", "start_processing_handler")))
    _use_hosted_workers()
    from cuckoo.main import main

    main()


def _use_the_host(replaced):
    for module, name in replaced:
        _expect(module, name)
    from cuckoo.node import startup
    from cuckoo.node import taskrunner as cuckoo_taskrunner

    from . import configuration, manager, taskrunner

    startup.start_machinerymanager = manager.start_machinerymanager
    cuckoo_taskrunner.TaskRunner = taskrunner.HostedTaskRunner
    configuration.accept_all_machineries()


def _use_hosted_workers():
    from cuckoo import startup

    original = startup.start_processing_handler

    def start_processing_handler(cuckooctx):
        # Loads much, and most commands of `cuckoo` process nothing.
        from . import workers

        workers.use_hosted_workers()
        original(cuckooctx)

    startup.start_processing_handler = start_processing_handler


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
            f"This Cuckoo3 has no {module}.{name}, in whose place cuckoo-machinery puts its own. "
            "Its version does not fit: use Cuckoo3's own programs, or another version of cuckoo-machinery"
        )
