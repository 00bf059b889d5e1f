"""Cuckoo3's main process as a client of its nodes: it follows the machines that they offer.

    local node  ─ machine_changed ─▶ HostedStreamReceiver ─▶ HostedLocalNodeClient ──┐
    remote node ─ event stream ────▶ HostedRemoteNodeClient ─────────────────────────┴▶ list of machines, scheduler

Another program can lock a machine between the scheduler's choice and the node's lock. The node then refuses the task,
and Cuckoo3 would fail it. The main process queues the task again, if the node does not offer the machine any more.
"""

from threading import Lock

from cuckoo.common.clients import ClientError
from cuckoo.common.log import CuckooGlobalLogger
from cuckoo.nodeclient import (
    LocalNodeClient,
    LocalStreamReceiver,
    NodeActionError,
    NodeUnavailableError,
    RemoteNodeClient,
)

from . import offers

log = CuckooGlobalLogger(__name__)


class HostedStreamReceiver(LocalStreamReceiver):
    """Receives the messages of the node in this process."""

    def machine_changed(self, _):
        """Follows the node's machines. Before there is a client, its start reads them."""
        if self.node_client:
            self.node_client.follow()

    def set_client(self, localnodeclient):
        """Sets the client, as in Cuckoo3, which may have missed changes."""
        super().set_client(localnodeclient)
        localnodeclient.follow()


class HostedLocalNodeClient(LocalNodeClient):
    """The client of the node in this process."""

    def __init__(self, cuckooctx, localnode):
        self._following = Lock()
        super().__init__(cuckooctx, localnode)

    def follow(self):
        """Makes the list of machines equal to the node's, and the scheduler look at it."""
        mirror = self.node.ctx.machinery_manager.machines
        # An older state of the node must not replace a newer one.
        with self._following:
            offers.replace(self.machines, mirror.described(), self.assigned_tasks.have_task)
        self.ctx.nodes.ready_cb(self)

    def add_task(self, startable_task):
        """Starts a task as in Cuckoo3. A task whose machine is gone is queued again."""
        try:
            super().add_task(startable_task)
        except NodeActionError as error:
            self.follow()
            if offers.is_offered(self.machines, startable_task.machine.name):
                raise
            self.assigned_tasks.untrack_assigned(startable_task.task.id)
            raise NodeUnavailableError(str(error)) from error


class HostedRemoteNodeClient(RemoteNodeClient):
    """The client of a remote node."""

    def init(self):
        """Reads the node's machines as in Cuckoo3. Locks that they have are other programs'."""
        super().init()
        self._replace([machine.to_dict() for machine in self.machines.machines])

    async def start_reader(self):
        """Opens the event stream as in Cuckoo3, and reads the changes before it was open."""
        await super().start_reader()
        self._read_machines()

    async def _event_msg(self, msgdict):
        kind = msgdict.get("type")
        if kind not in (offers.OFFERED, offers.REMOVED):
            await super()._event_msg(msgdict)
            return
        try:
            if kind == offers.OFFERED:
                offers.apply(self.machines, msgdict["machine"], self.assigned_tasks.have_task)
            else:
                offers.remove(self.machines, msgdict["machine_name"])
        except (KeyError, TypeError) as error:
            log.error("Unusable message of a node", node=self.name, message=msgdict, error=repr(error))
            return
        log.debug("Received machine change", node=self.name, change=kind)
        if self.ready:
            self.ctx.nodes.ready_cb(self)

    async def _start_task(self, startable_task):
        if await super()._start_task(startable_task):
            return True
        try:
            self._read_machines()
            if offers.is_offered(self.machines, startable_task.machine.name):
                return False
            # The node refuses the next upload while it has the files of this one.
            await self.client.a_delete_analysis_work(startable_task.task.analysis_id)
        except (NodeActionError, ClientError) as error:
            log.warning("A task cannot be queued again", task_id=startable_task.task.id, node=self.name, error=error)
            return False
        log.warning("Queueing a task again: its machine is gone", task_id=startable_task.task.id, node=self.name)
        self.assigned_tasks.untrack_assigned(startable_task.task.id)
        self.assigned_tasks.remove_history(startable_task.task.analysis_id)
        startable_task.requeue()
        startable_task.close()
        # Another node tracks the task from now on.
        return True

    def _read_machines(self):
        self._replace([machine.to_dict() for machine in self._retrieve_machine_list().machines])

    def _replace(self, described):
        offers.replace(self.machines, described, self.assigned_tasks.have_task)
