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
from collections import Counter

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
from .node_api import TRANSFER_TIMEOUT, EventStream, HostedNodeAPI, NodeAway

log = CuckooGlobalLogger(__name__)

# The pause between two attempts to reach a node that is away, in seconds.
RETRY_INTERVAL = 5
# Cuckoo3's result retriever sometimes drops one of two requests that come at once.
FETCH_ATTEMPTS = 3
FETCH_INTERVAL = 1


class HostedNodeClient(RemoteNodeClient):
    """Replaces Cuckoo3's client of a remote node."""

    def __init__(self, cuckooctx, nodeapi_client, loop_wrapper):
        super().__init__(cuckooctx, nodeapi_client, loop_wrapper)
        self.events = EventStream(nodeapi_client, self._heard, self._event_read_end)
        # Not ready until it is restored for the first time.
        self._resetting = True
        self._is_restoring = False
        # The analyses with files on the node that nobody needs.
        self._left = set()
        # The changes of machines that came while the list was requested.
        self._missed = []
        # The number of changes of each machine.
        self._changes = Counter()

    # The node

    async def connect(self):
        """Makes the node ready. A node that is away is tried again in the background."""
        if not await self._is_restored():
            await self.loop_wrapper.newtask(self._restore)

    async def _heard(self, event):
        if not self._resetting:
            await self._handle(event)
        elif event.get("type") != NodeMsgTypes.TASK_STATE:
            # A node that is not ready has no tasks. Its list of machines may be older than this change.
            self._missed.append(event)

    async def _handle(self, event):
        if event.get("type") not in offers.KINDS:
            await self._event_msg(event)
            return
        self._changes[offers.follow(self.machines, event, self.assigned_tasks.have_task)] += 1
        self.ctx.nodes.ready_cb(self)

    async def _event_read_end(self):
        self._events_open = False
        if self.events.stopped:
            return
        self._resetting = True
        requeued = self.assigned_tasks.requeue_all()
        self._left.update(task.task.analysis_id for task in requeued)
        log.error("Node is lost. Its tasks wait for another one", node=self.name, tasks=[t.task.id for t in requeued])
        self.ctx.scheduler.inform_change()
        await self.loop_wrapper.newtask(self._restore)

    async def _lose(self, reason):
        """Gives the node up, because it may have work that this process does not know. The end of the stream requeues
        its tasks."""
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
            await self._delete_left_files()
            self._missed = []
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
        for event in self._missed:
            await self._handle(event)
        log.info("Node is ready", node=self.name, machines=info.machines_list.count())
        self.ctx.nodes.ready_cb(self)
        return True

    def _read_info(self):
        machines, routes = self._retrieve_machine_list(), self._retrieve_available_routes()
        offers.begin(machines)
        return NodeInfo(name=self.name, version="", machines_list=machines, routes=routes)

    async def _delete_left_files(self):
        for analysis_id in list(self._left):
            await self._delete_files(analysis_id)
            self._left.discard(analysis_id)
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
        try:
            with nodework:
                # The node may have been lost before the task belonged to it.
                if self.ready:
                    await self._upload(nodework, startable_task.task)
            if self._is_assigned(startable_task):
                await self._start(startable_task)
        except NodeAway as error:
            self._requeue(startable_task)
            await self._lose(error)
        except ClientError as error:
            self._end(startable_task)
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
        changes = self._changes[machine.name]
        try:
            await self.client.start_task(task.id, machine.name)
        except APIBadRequestError as error:
            # The node drains, or somebody else has taken the machine.
            log.warning("Node does not give the machine", node=self.name, machine=machine.name, error=error)
            # The node's next message about the machine may still be on its way.
            if self._changes[machine.name] == changes:
                self.machines.mark_disabled(machine, f"Node {self.name} does not give the machine to a task: {error}")
            self._left.add(task.analysis_id)
            return self._requeue(startable_task)
        startable_task.has_started = True

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
        startable_task = self.assigned_tasks.get_assigned(task_id)
        self.assigned_tasks.untrack_assigned(task_id)
        startable_task.release_machine()
        try:
            await self._fetch_result(task_id)
        except NodeAway as error:
            self._left.add(startable_task.task.analysis_id)
            startable_task.requeue()
            startable_task.close()
            return await self._lose(error)
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
        await asyncio.gather(*(node.connect() for node in nodes))

    loop.run_until_complete(connect())
    if not any(node.ready for node in nodes):
        names = ", ".join(node.name for node in nodes) or "none is configured"
        raise StartupError(f"No node answers ({names}). Check remote_nodes in conf/distributed.yaml, and the nodes")
    return nodes, wrapper
