"""The machinery manager that Cuckoo3's node expects, implemented by the host.

    node starts ─▶ attach ─▶ what an earlier node left is stopped and unlocked ─▶ tasks
    reset       ─▶ disable ─▶ wait_work_done ─▶ shutdown_all ─▶ enable: locks that are left are released
    node stops  ─▶ stop (10) ─▶ shutdown_all (999) ─▶ let_go (1000): our own host is ended

Cuckoo3 forgets who had which machine when it is started; the host does not. So a machine that is locked
by a task of Cuckoo3 which this node knows nothing of is free: its task ended with an earlier node. Locks
with other names are somebody else's and are left alone.

The host's switch (disable, enable) is not kept over its restart, so it is set again whenever a host is
attached. Nothing here raises towards a reset of the node: half-way through, it could not be resumed.
"""

import re
from concurrent.futures import ThreadPoolExecutor

from cuckoo.common import shutdown
from cuckoo.common.log import CuckooGlobalLogger
from cuckoo.common.startup import StartupError
from cuckoo.common.storage import TASK_ID_REGEX, cuckoocwd

from .connection import HostError
from .host import Host, Listener
from .machines import HostedMachines

log = CuckooGlobalLogger(__name__)

# In seconds. An action waits for its turn and then for its hypervisor.
ACTION_LIMIT = 300
IDLE_LIMIT = 1800

_task_id = re.compile(TASK_ID_REGEX)


class HostedManager(Listener):
    """Takes the place of Cuckoo3's MachineryManager in a node."""

    def __init__(self, nodectx):
        self.ctx = nodectx
        self.enabled = True
        self.host = Host(cuckoocwd.root, self, log)
        self.machines = HostedMachines(self.host, self._tell_disabled)
        self._is_attached = False
        self._stopping = False

    def start(self):
        """Returns when a host answers and its machines are known."""
        self.host.attach()
        self._is_attached = True
        log.info("Loaded analysis machines", amount=self.machines.count())

    # For the node

    def disable(self):
        """No action but stops from now on."""
        self.enabled = False
        self._try("disable")
        log.warning("Machinery manager disabled")

    def enable(self):
        """Actions again. The node does this at the end of a reset, when it has no tasks."""
        self.enabled = True
        self.machines.forget_tasks()
        self._try("enable")
        self._try_to_free_what_is_left()
        log.warning("Machinery manager enabled")

    def wait_work_done(self):
        """Waits until no action runs or waits for its turn."""
        self._try("wait_idle", timeout=IDLE_LIMIT)

    def shutdown_all(self):
        """Stops all machines."""
        if not self._is_attached:
            return
        log.info("Stopping all machines")
        self._try("shutdown_all", timeout=ACTION_LIMIT)
        if self._stopping:
            self.machines.forget_tasks()
            self._try_to_free_what_is_left()

    def stop(self):
        """The node is being stopped: no machine is given to a task any more."""
        self._stopping = True
        self.machines.close()

    def let_go(self):
        """Nothing of Cuckoo3 needs the host any more."""
        self.host.detach()

    # For the host

    def attached(self):
        """A host answers, a new one perhaps."""
        request = self.host.client.request
        request("enable" if self.enabled else "disable")
        self._free_what_is_left()
        self.machines.mirror(request("list")["machines"])

    def heard(self, event):
        """Something happened: to a machine, to events themselves, or to the configuration."""
        kind = event["event"]
        if kind in ("lagged", "lost", "reloaded"):
            self.machines.mirror(self.host.client.request("list")["machines"])
            return
        if kind == "capture_failed":
            log.error("Network capture failed", machine=event["machine"], error=event["reason"])
        self.machines.heard(event)

    def _tell_disabled(self, name, reason):
        log.error("Machine is disabled", machine=name, reason=reason)
        # There is no node while Cuckoo3 starts, and whoever asks it for machines then sees it.
        if self.ctx.node and not self._stopping:
            self.ctx.node.infostream.disabled_machine(name, reason)

    def _try(self, action, **keys):
        try:
            self.host.client.request(action, **keys)
        except HostError as error:
            log.error(f"The machinery host did not {action}", error=error)

    def _try_to_free_what_is_left(self):
        try:
            self._free_what_is_left()
        except HostError as error:
            # It is tried again when the host is back.
            log.error("Machines may still be locked for tasks that have ended", error=error)

    def _free_what_is_left(self):
        left = [machine for machine in self.host.client.request("list")["machines"] if self._is_left(machine)]
        if left:
            with ThreadPoolExecutor(max_workers=8) as pool:
                list(pool.map(self._free, left))

    def _is_left(self, machine):
        task_id = machine["locked_by"]
        return bool(_task_id.fullmatch(task_id)) and not self.machines.is_of_this_node(task_id)

    def _free(self, machine):
        name, task_id = machine["name"], machine["locked_by"]
        log.warning("Freeing a machine whose task has ended", machine=name, task_id=task_id)
        self._try("stop", machine=name, timeout=ACTION_LIMIT)
        self._try("unlock", machine=name, task_id=task_id)


def start_machinerymanager(nodectx):
    """Takes the place of the function of that name in `cuckoo.node.startup`."""
    manager = HostedManager(nodectx)
    nodectx.machinery_manager = manager
    shutdown.register_shutdown(manager.stop)
    shutdown.register_shutdown(manager.shutdown_all, order=999)
    shutdown.register_shutdown(manager.let_go, order=1000)
    try:
        manager.start()
    except HostError as error:
        raise StartupError(str(error)) from error
