"""The machinery manager of Cuckoo3's node, on the host.

    node starts ─▶ attach ─▶ stop and unlock machines of an earlier node ─▶ tasks
    reset       ─▶ disable ─▶ wait_work_done ─▶ shutdown_all ─▶ enable: release abandoned locks
    node stops  ─▶ stop (10) ─▶ shutdown_all (999) ─▶ detach (1000): end our own host

Cuckoo3 forgets its locks when it restarts; the host does not. A machine that is locked by an unknown task of
Cuckoo3 is therefore free: its task ended with an earlier node. Locks with other names are kept.

The host does not save its switch (disable, enable), so each new host gets it again. The methods raise nothing
into a reset of the node, which could not be resumed half-way.
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
from .offers import Offers

log = CuckooGlobalLogger(__name__)

# In seconds. An action waits in its queue and then for its hypervisor.
ACTION_TIMEOUT = 300
IDLE_TIMEOUT = 1800

_task_id = re.compile(TASK_ID_REGEX)


class HostedManager(Listener):
    """Replaces Cuckoo3's MachineryManager in a node."""

    def __init__(self, nodectx):
        self.ctx = nodectx
        self.enabled = True
        self.host = Host(cuckoocwd.root, self, log)
        self.machines = HostedMachines(self.host, self._report_disabled)
        self._offers = Offers(self._send_to_main)
        self._is_attached = False
        self._stopping = False

    def start(self):
        """Attaches to a host, and reads its machines."""
        self.host.attach()
        self._is_attached = True
        log.info("Loaded analysis machines", amount=self.machines.count())

    # For the node

    def disable(self):
        """Refuses all actions except stops."""
        self.enabled = False
        self._try("disable")
        log.warning("Machinery manager disabled")

    def enable(self):
        """Accepts actions again. The node calls this at the end of a reset, when it has no tasks."""
        self.enabled = True
        self.machines.forget_tasks()
        self._try("enable")
        self._try_to_free_what_is_abandoned()
        self._offers.repeat()
        self._offer()
        log.warning("Machinery manager enabled")

    def wait_work_done(self):
        """Waits until no action runs or is queued."""
        self._try("wait_idle", timeout=IDLE_TIMEOUT)

    def shutdown_all(self):
        """Stops all machines."""
        if not self._is_attached:
            return
        log.info("Stopping all machines")
        self._try("shutdown_all", timeout=ACTION_TIMEOUT)
        if self._stopping:
            self.machines.forget_tasks()
            self._try_to_free_what_is_abandoned()

    def stop(self):
        """Refuses machines to tasks, because the node is being stopped."""
        self._stopping = True
        self.machines.close()

    def drain(self):
        """Refuses machines to tasks, and removes them from the main process's list."""
        self.machines.close()
        for machine in self.machines.machines:
            self.ctx.node.infostream.disabled_machine(machine.name, "The node is being drained")

    def detach(self):
        """Detaches from the host at the end of Cuckoo3."""
        self.host.detach()

    # For the host

    def attached(self):
        """Prepares a new host for this node."""
        request = self.host.client.request
        request("enable" if self.enabled else "disable")
        self._free_what_is_abandoned()
        self._offers.repeat()
        self._mirror()

    def heard(self, event):
        """Applies an event of a machine, of lost events, or of the configuration."""
        kind = event["event"]
        if kind in ("lagged", "lost", "reloaded"):
            if kind != "reloaded":
                # A lock and its end may both be among the lost events.
                self._offers.repeat()
            self._mirror()
            return
        # A failed capture is one of them.
        if kind == "run_error":
            log.error("Run is incomplete", machine=event["machine"], task_id=event["task_id"], error=event["reason"])
        self.machines.heard(event)
        self._offer()

    def _mirror(self):
        self.machines.mirror(self.host.client.request("list")["machines"])
        self._offer()

    def _offer(self):
        self._offers.update(self.machines.machines, self.machines.is_of_this_node)

    def _send_to_main(self, message):
        # A node that drains or ends offers nothing.
        if self.ctx.node and not self.machines.is_closed:
            self.ctx.node.infostream.receiver.machine_changed(message)

    def _report_disabled(self, name, reason):
        log.error("Machine is disabled", machine=name, reason=reason)
        # There is no node while Cuckoo3 starts. It reads the disabled machine later.
        if self.ctx.node and not self._stopping:
            self.ctx.node.infostream.disabled_machine(name, reason)

    def _try(self, action, **keys):
        try:
            self.host.client.request(action, **keys)
        except HostError as error:
            log.error(f"The machinery host failed to {action}", error=error)

    def _try_to_free_what_is_abandoned(self):
        try:
            self._free_what_is_abandoned()
        except HostError as error:
            # Attaching to the next host frees them.
            log.error("Machines may still be locked for tasks that have ended", error=error)

    def _free_what_is_abandoned(self):
        left = [machine for machine in self.host.client.request("list")["machines"] if self._is_abandoned(machine)]
        if left:
            with ThreadPoolExecutor(max_workers=8) as pool:
                list(pool.map(self._free, left))

    def _is_abandoned(self, machine):
        task_id = machine["locked_by"]
        return bool(_task_id.fullmatch(task_id)) and not self.machines.is_of_this_node(task_id)

    def _free(self, machine):
        name, task_id = machine["name"], machine["locked_by"]
        log.warning("Freeing a machine whose task has ended", machine=name, task_id=task_id)
        self._try("stop", machine=name, timeout=ACTION_TIMEOUT)
        self._try("unlock", machine=name, task_id=task_id)


def start_machinerymanager(nodectx):
    """Replaces the function of that name in `cuckoo.node.startup`."""
    manager = HostedManager(nodectx)
    nodectx.machinery_manager = manager
    shutdown.register_shutdown(manager.stop)
    shutdown.register_shutdown(manager.shutdown_all, order=999)
    shutdown.register_shutdown(manager.detach, order=1000)
    try:
        manager.start()
    except HostError as error:
        raise StartupError(str(error)) from error
