"""The programs `cuckoonode-hosted` and `cuckoo-hosted`.

They run Cuckoo3's `cuckoonode` and `cuckoo` with the same arguments, after replacing these names of Cuckoo3:

| name in Cuckoo3                                 | replacement                                    |
| ----------------------------------------------- | ---------------------------------------------- |
| `cuckoo.node.startup.start_machinerymanager`    | `manager.start_machinerymanager`               |
| `cuckoo.node.startup.start_remote`              | `startup.clearing_first`                       |
| `cuckoo.node.taskrunner.TaskRunner`             | `taskrunner.HostedTaskRunner`                  |
| `cuckoo.config.Machinery.constraints`           | accepts any name                               |
| `cuckoo.common.startup._load_machinery_configs` | reads the machineries that Cuckoo3 knows       |
| `cuckoo.startup.start_processing_handler`       | uses `workers.HostedWorkReceiver`              |
| `cuckoo.startup.start_cuckoo`                   | `startup.clearing_first`                       |
| `cuckoo.startup.start_cuckoo_controller`        | `startup.clearing_first`                       |
| `cuckoo.nodeclient.LocalStreamReceiver`         | `local_client.HostedStreamReceiver`            |
| `cuckoo.nodeclient.LocalNodeClient`             | `local_client.HostedLocalNodeClient`           |
| `cuckoo.node.webapi.API`, `StateSSE`            | `node_service.HostedAPI`, `HostedStateSSE`     |
| `cuckoo.node.control.TaskResultZipper`          | `node_service.HostedResultZipper`              |
| `cuckoo.startup.make_node_api_clients`          | `remote_client.make_node_api_clients`          |
| `cuckoo.startup.make_remote_node_clients`       | `remote_client.make_remote_node_clients`       |
| `cuckoo.scheduler.StartableTask`, `Scheduler`   | `scheduling.HostedStartableTask` and so on     |
| `cuckoo.taskqueue.TaskQuery.count_unscheduled`  | `scheduling.count_unscheduled`                 |

In the task runner's process, `cuckoo.common.taskflow.MachineryManagerClient` and `cuckoo.node.taskrunner._FlowRunner`
are replaced by those of `taskrunner`. `multiprocessing.process.BaseProcess.start` also records the new process.

Cuckoo3 looks up each name at its use. If a version of Cuckoo3 lacks a name, the programs fail at once, instead
of running with some of the replacements.
"""

import sys
from importlib import import_module

from .leftovers import MAIN, NODE

_REPLACED = (
    ("cuckoo.node.startup", "start_machinerymanager"),
    ("cuckoo.node.startup", "start_remote"),
    ("cuckoo.node.taskrunner", "TaskRunner"),
    ("cuckoo.node.taskrunner", "_FlowRunner"),
    ("cuckoo.common.taskflow", "MachineryManagerClient"),
    ("cuckoo.common.startup", "init_global_logging"),
    ("cuckoo.config", "Machinery"),
    ("cuckoo.common.startup", "_load_machinery_configs"),
)

_REPLACED_IN_NODE = (
    ("cuckoo.node.webapi", "API"),
    ("cuckoo.node.webapi", "StateSSE"),
    ("cuckoo.node.control", "TaskResultZipper"),
)

_REPLACED_IN_MAIN = (
    ("cuckoo.startup", "start_processing_handler"),
    ("cuckoo.startup", "start_cuckoo"),
    ("cuckoo.startup", "start_cuckoo_controller"),
    ("cuckoo.nodeclient", "LocalStreamReceiver"),
    ("cuckoo.nodeclient", "LocalNodeClient"),
    ("cuckoo.startup", "make_node_api_clients"),
    ("cuckoo.startup", "make_remote_node_clients"),
    ("cuckoo.scheduler", "StartableTask"),
    ("cuckoo.scheduler", "Scheduler"),
    ("cuckoo.taskqueue", "TaskQuery"),
)


def cuckoonode():
    """Runs Cuckoo3's node on the machinery host."""
    _use_the_host((*_REPLACED, *_REPLACED_IN_NODE))
    _use_hosted_node()
    from cuckoo.node.main import main

    main()


def cuckoo():
    """Runs Cuckoo3's main process and its own node on the machinery host."""
    _use_the_host((*_REPLACED, *_REPLACED_IN_MAIN))
    _use_hosted_workers()
    _use_hosted_nodes()
    from cuckoo.main import main

    main()


def _use_the_host(replaced):
    for module, name in replaced:
        _expect(module, name)
    from cuckoo.node import startup
    from cuckoo.node import taskrunner as cuckoo_taskrunner

    from . import configuration, manager, taskrunner
    from .startup import clearing_first

    startup.start_machinerymanager = manager.start_machinerymanager
    startup.start_remote = clearing_first(startup.start_remote, NODE)
    cuckoo_taskrunner.TaskRunner = taskrunner.HostedTaskRunner
    configuration.accept_all_machineries()


def _use_hosted_workers():
    from cuckoo import startup

    original = startup.start_processing_handler

    def start_processing_handler(cuckooctx):
        # This import is slow, and most commands of `cuckoo` process nothing.
        from . import workers

        workers.use_hosted_workers()
        original(cuckooctx)

    startup.start_processing_handler = start_processing_handler


def _use_hosted_node():
    from cuckoo.node import control, webapi

    from . import node_service

    webapi.API, webapi.StateSSE = node_service.HostedAPI, node_service.HostedStateSSE
    control.TaskResultZipper = node_service.HostedResultZipper


def _use_hosted_nodes():
    from cuckoo import nodeclient, scheduler, startup, taskqueue

    from . import local_client, remote_client, scheduling
    from .startup import clearing_first

    startup.start_cuckoo = clearing_first(startup.start_cuckoo, NODE, MAIN)
    startup.start_cuckoo_controller = clearing_first(startup.start_cuckoo_controller, MAIN)
    nodeclient.LocalStreamReceiver = local_client.HostedStreamReceiver
    nodeclient.LocalNodeClient = local_client.HostedLocalNodeClient
    startup.make_node_api_clients = remote_client.make_node_api_clients
    startup.make_remote_node_clients = remote_client.make_remote_node_clients
    scheduler.StartableTask = scheduling.HostedStartableTask
    scheduler.Scheduler = scheduling.HostedScheduler
    taskqueue.TaskQuery.count_unscheduled = scheduling.count_unscheduled


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
