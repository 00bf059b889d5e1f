"""Cuckoo3's main process as a client of the node in the same process: it follows the machines that the node offers.

    node ─ machine_changed ─▶ HostedStreamReceiver ─▶ HostedLocalNodeClient.follow ─▶ list of machines, scheduler

Another program can lock a machine between the scheduler's choice and the node's lock, or the host can be away. The node
then refuses the machine, and Cuckoo3 would fail the task. The main process queues it again.
"""

import time
from threading import Lock

from cuckoo.nodeclient import LocalNodeClient, LocalStreamReceiver, NodeActionError, NodeUnavailableError

from . import offers

# The pause before a task that got no machine is queued again, while the node still offers the machine, in seconds.
RETRY_INTERVAL = 5


class HostedStreamReceiver(LocalStreamReceiver):
    """Receives the messages of the node in this process."""

    def machine_changed(self, _):
        """Follows the node's machines. Before there is a client, its start reads them."""
        if self.node_client:
            self.node_client.follow()

    def disabled_machine(self, machine_name, reason):
        """Marks a machine as disabled, as in Cuckoo3, and wakes the scheduler."""
        super().disabled_machine(machine_name, reason)
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
        offers.prepare(self.machines)

    def follow(self):
        """Makes the list of machines equal to the node's, and the scheduler look at it."""
        mirror = self.node.ctx.machinery_manager.machines
        # An older state of the node must not replace a newer one.
        with self._following:
            offers.replace_machines(self.machines, mirror.described(), self.assigned_tasks.have_task)
        self.ctx.nodes.ready_cb(self)

    def add_task(self, startable_task):
        """Starts a task as in Cuckoo3. A task whose machine the node refuses for now is queued again."""
        try:
            super().add_task(startable_task)
        except NodeActionError as error:
            reason = str(error)
            self.follow()
            is_offered = offers.is_offered(self.machines, startable_task.machine.name)
            if not offers.is_refusal(reason) or (is_offered and not offers.is_passing(reason)):
                raise
            if is_offered:
                time.sleep(RETRY_INTERVAL)
            self.assigned_tasks.untrack_assigned(startable_task.task.id)
            raise NodeUnavailableError(reason) from error
