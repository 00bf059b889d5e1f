"""Remote nodes of Cuckoo3's main process. A task whose node is lost runs again, and each task is reported once.

    away ─▶ reset ─▶ its stream is open ─▶ its machines are listed ─▶ ready ─┐
     ▲                                                                       │ the stream ends or is silent,
     └──────────────────── its tasks wait again ◀────────────────────────────┘ or a request gets no answer

The coroutines of a node run in one thread, so that a loss happens between two steps of a task:

| the task             | belongs to       | at a loss                                              |
| -------------------- | ---------------- | ------------------------------------------------------ |
| is uploaded, or runs | `assigned_tasks` | waits again                                            |
| has ended            | `_finish`        | waits again if its result cannot be fetched            |

A node that was away has its work reset, so that nothing of a task is left that runs elsewhere.
"""

import asyncio

from cuckoo.common import config, shutdown
from cuckoo.common.clients import (
    APIBadRequestError,
    APIDoesNotExistError,
    APIError,
    ClientError,
    ResultRetrieverClient,
)
from cuckoo.common.importing import AnalysisImportError, NodeWorkZipper
from cuckoo.common.log import CuckooGlobalLogger
from cuckoo.common.node import NodeInfo
from cuckoo.common.startup import StartupError
from cuckoo.common.storage import Paths, UnixSocketPaths, random_filename
from cuckoo.node.node import NodeMsgTypes
from cuckoo.nodeclient import NodeActionError, NodeClientLoop, NodeUnavailableError, RemoteNodeClient

from . import offers
from .node_requests import TRANSFER_TIMEOUT, EventStream, HostedNodeAPI, MachineRefused, NodeAway

log = CuckooGlobalLogger(__name__)

# The pause between two attempts to reach a node that is away, or to use a machine that it offers and refuses,
# in seconds.
RETRY_INTERVAL = 5
# Cuckoo3's result retriever sometimes drops one of two requests that come at once.
FETCH_ATTEMPTS = 3
FETCH_INTERVAL = 1


class HostedNodeClient(RemoteNodeClient):
    """Replaces Cuckoo3's client of a remote node."""

    def __init__(self, cuckooctx, nodeapi_client, loop_wrapper):
        super().__init__(cuckooctx, nodeapi_client, loop_wrapper)
        self.events = EventStream(nodeapi_client, self._on_event, self._event_read_end)
        # Not ready until it is restored for the first time.
        self._resetting = True
        self._is_restoring = False
        # The analyses with files on the node that nobody needs.
        self._obsolete = set()
        # The changes of machines that came while the list was requested, which may be older than they are.
        self._deferred = []
        self._is_listing = False
        self._list_lock = asyncio.Lock()
        # The number of times that the node was lost. The failure of an earlier connection says nothing about this one.
        self._losses = 0

    # The node

    async def connect(self):
        """Makes the node ready. A node that is away is tried again in the background."""
        if not await self._is_restored():
            await self.loop_wrapper.newtask(self._restore)

    async def _on_event(self, event):
        is_of_task = event.get("type") == NodeMsgTypes.TASK_STATE
        if self._resetting:
            # A node that is not ready has no tasks.
            if not is_of_task:
                self._deferred.append(event)
        elif self._is_listing and not is_of_task:
            self._deferred.append(event)
        else:
            await self._handle(event)

    async def _handle(self, event):
        if event.get("type") not in offers.KINDS:
            await self._event_msg(event)
        else:
            offers.apply_message(self.machines, event, self.assigned_tasks.have_task)
        # A machine that is disabled is a change as well.
        if event.get("type") != NodeMsgTypes.TASK_STATE:
            self.ctx.nodes.ready_cb(self)

    async def _handle_deferred(self):
        deferred, self._deferred = self._deferred, []
        for event in deferred:
            await self._handle(event)

    async def _event_read_end(self):
        self._events_open = False
        self._losses += 1
        if self.events.stopped:
            return
        self._resetting = True
        requeued = self.assigned_tasks.requeue_all()
        self._obsolete.update(task.task.analysis_id for task in requeued)
        log.error("Node is lost. Its tasks wait for another one", node=self.name, tasks=[t.task.id for t in requeued])
        self.ctx.scheduler.inform_change()
        await self.loop_wrapper.newtask(self._restore)

    async def _lose(self, reason, losses):
        """Gives the node up, because it may have work that this process does not know. The end of the stream requeues
        its tasks. A node that was lost since it had been lost `losses` times is another one already."""
        if losses != self._losses:
            return
        log.error("Node does not answer as expected", node=self.name, reason=reason)
        await self.events.close()

    async def _restore(self):
        if self._is_restoring:
            return
        self._is_restoring = True
        try:
            while not self.events.stopped and not await self._is_restored():
                await asyncio.sleep(RETRY_INTERVAL)
        finally:
            self._is_restoring = False

    async def _is_restored(self):
        """Tries to make the node ready."""
        try:
            if not await self.client.is_new():
                log.info("Resetting a node", node=self.name)
                await self.client.a_reset()
            await self._delete_obsolete_files()
            self._deferred = []
            await self.events.open()
            self._events_open = True
            await self.loop_wrapper.newtask(self.events.read, stopper_cb=self.events.stop)
            info = await asyncio.get_running_loop().run_in_executor(None, self._read_info)
        except Exception as error:
            # The next attempt may succeed.
            log.error(f"Node is away. Trying again in {RETRY_INTERVAL} s", node=self.name, error=error)
            await self.events.close()
            return False
        if not self._events_open:
            return False
        if self._info:
            self.ctx.nodes.nodeinfos.remove_nodeinfo(self._info)
        self._info = info
        self._resetting = False
        await self._handle_deferred()
        log.info("Node is ready", node=self.name, machines=info.machines_list.count())
        self.ctx.nodes.ready_cb(self)
        return True

    def _read_info(self):
        machines, routes = self._retrieve_machine_list(), self._retrieve_available_routes()
        offers.prepare(machines)
        return NodeInfo(name=self.name, version="", machines_list=machines, routes=routes)

    async def _read_machines_again(self):
        """Makes the list of machines equal to the node's."""
        async with self._list_lock:
            losses = self._losses
            self._is_listing = True
            try:
                described = await self.client.read_machines()
                # A node that was lost meanwhile may be restored already, with a newer list.
                if self.ready and losses == self._losses:
                    offers.replace_machines(self.machines, described, self.assigned_tasks.have_task)
            finally:
                self._is_listing = False
                if self.ready:
                    await self._handle_deferred()
                    self.ctx.nodes.ready_cb(self)

    async def _delete_obsolete_files(self):
        for analysis_id in list(self._obsolete):
            await self._delete_files(analysis_id)
            self._obsolete.discard(analysis_id)
            self.assigned_tasks.remove_history(analysis_id)

    async def _delete_files(self, analysis_id):
        try:
            await self.client.a_delete_analysis_work(analysis_id)
        except APIDoesNotExistError:
            pass
        except APIError as error:
            log.warning("Cannot delete an analysis on a node", node=self.name, analysis_id=analysis_id, error=error)

    # The start of a task

    def add_task(self, startable_task):
        """Starts a task on the node. Its machine is locked in this process."""
        if not self.ready:
            raise NodeUnavailableError("The node is away")
        task = startable_task.task
        self.assigned_tasks.track_assigned(startable_task)
        try:
            # An earlier upload of the task may still have its own.
            path = Paths.exported(f"{task.id}.{random_filename('zip')}")
            nodework = NodeWorkZipper(task.analysis_id, task.id).make_zip(path)
        except AnalysisImportError as error:
            raise NodeActionError(f"Cannot pack the task. {error}") from error
        self.loop_wrapper.newtask_threadsafe(self._upload_and_start, args=(nodework, startable_task))

    async def _upload_and_start(self, nodework, startable_task):
        losses = self._losses
        try:
            with nodework:
                # The node may have been lost before the task belonged to it.
                if self.ready:
                    await self._upload(nodework, startable_task.task)
            if self._is_assigned(startable_task):
                await self._start(startable_task)
        except NodeAway as error:
            self._requeue(startable_task)
            await self._lose(error, losses)
        except ClientError as error:
            # A task that the loss of the node has taken runs elsewhere.
            if self._end(startable_task):
                startable_task.fail(f"Node {self.name} refuses the task. {error}")
        finally:
            nodework.delete()

    async def _upload(self, nodework, task):
        try:
            await self.client.upload_taskwork(nodework.path)
        except APIBadRequestError:
            # An earlier node, which was killed, may have left files of the task.
            await self._delete_files(task.analysis_id)
            await self.client.upload_taskwork(nodework.path)

    async def _start(self, startable_task):
        if not self.ready:
            return self._requeue(startable_task)
        task, machine = startable_task.task, startable_task.machine
        try:
            await self.client.start_task(task.id, machine.name)
        except MachineRefused as error:
            await self._use_another_machine(startable_task, error)
        else:
            startable_task.has_started = True

    async def _use_another_machine(self, startable_task, refusal):
        """Makes the task wait again. The node drains, somebody else has taken the machine, or its host is away."""
        machine = startable_task.machine
        log.warning("Node does not give the machine", node=self.name, machine=machine.name, error=refusal)
        await self._read_machines_again()
        if self.ready and offers.is_offered(self.machines, machine.name):
            if not offers.is_passing(refusal.reason):
                raise refusal
            # The machine stays locked here, so that no other task tries it at once.
            await asyncio.sleep(RETRY_INTERVAL)
        self._obsolete.add(startable_task.task.analysis_id)
        self._requeue(startable_task)

    def _is_assigned(self, startable_task):
        task_id = startable_task.task.id
        return self.assigned_tasks.have_task(task_id) and self.assigned_tasks.get_assigned(task_id) is startable_task

    def _end(self, startable_task):
        """Takes the task from the node, unless a loss of the node was faster."""
        is_assigned = self._is_assigned(startable_task)
        if is_assigned:
            self.assigned_tasks.untrack_assigned(startable_task.task.id)
        return is_assigned

    def _requeue(self, startable_task):
        if self._end(startable_task):
            startable_task.requeue()
            startable_task.close()

    # The end of a task

    async def _task_done(self, task_id):
        await self._finish(task_id, self.ctx.state_controller.task_done)

    async def _task_failed(self, task_id, retrieve_result=True):
        if retrieve_result:
            await self._finish(task_id, self.ctx.state_controller.task_failed)
        else:
            await super()._task_failed(task_id, retrieve_result=False)

    async def _finish(self, task_id, report):
        if not self.assigned_tasks.have_task(task_id):
            return
        losses = self._losses
        startable_task = self.assigned_tasks.get_assigned(task_id)
        self.assigned_tasks.untrack_assigned(task_id)
        startable_task.release_machine()
        try:
            await self._fetch_result(task_id)
        except NodeAway as error:
            self._obsolete.add(startable_task.task.analysis_id)
            startable_task.requeue()
            startable_task.close()
            return await self._lose(error, losses)
        except ClientError as error:
            startable_task.fail(f"The result on node {self.name} cannot be fetched. {error}")
            return
        startable_task.close()
        report(task_id=task_id, analysis_id=startable_task.task.analysis_id)

    async def _fetch_result(self, task_id):
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                request = ResultRetrieverClient.retrieve_result(
                    UnixSocketPaths.result_retriever(), task_id, self.client.name
                )
                return await asyncio.wait_for(request, TRANSFER_TIMEOUT)
            except (ClientError, OSError, ValueError, asyncio.TimeoutError) as error:
                log.warning("Cannot fetch a result", node=self.name, task_id=task_id, attempt=attempt, error=error)
                failure = error
            await self.client.expect_answer()
            await asyncio.sleep(FETCH_INTERVAL)
        raise ClientError(str(failure))


def make_node_api_clients():
    """Replaces the function of that name in `cuckoo.startup`, which fails if one node is away."""
    nodes = config.cfg("distributed.yaml", "remote_nodes")
    return [HostedNodeAPI(node["api_url"], node["api_key"], node_name=name) for name, node in nodes.items()]


def make_remote_node_clients(cuckooctx, node_api_clients):
    """Replaces the function of that name in `cuckoo.startup`, which fails if one node is away."""
    loop = asyncio.new_event_loop()
    wrapper = NodeClientLoop(loop)
    shutdown.register_shutdown(wrapper.stop)
    nodes = [HostedNodeClient(cuckooctx, api, wrapper) for api in node_api_clients]
    for node in nodes:
        cuckooctx.nodes.add_node(node)

    async def connect():
        # A reset can take long, so that the first node that is ready suffices. The others follow in the same loop.
        ended = asyncio.Queue()
        for node in nodes:
            await wrapper.newtask(node.connect, done_cb=lambda: ended.put_nowait(None))
        for _ in nodes:
            await ended.get()
            if any(node.ready for node in nodes):
                return

    loop.run_until_complete(connect())
    if not any(node.ready for node in nodes):
        names = ", ".join(node.name for node in nodes) or "none is configured"
        raise StartupError(f"No node answers ({names}). Check remote_nodes in conf/distributed.yaml, and the nodes")
    return nodes, wrapper
