"""A node of a main process on another computer: its results, and its end without the loss of a task.

    SIGUSR1 ─▶ no machines for new tasks ─▶ the tasks end ─▶ their results are fetched ─▶ SIGTERM
    SIGTERM ─▶ the tasks are cut short, without a result ─▶ the main process runs them on another node

A result belongs to the main process when it has fetched it. A node that ends before would take the result along.
"""

import json
import os
import signal
import threading
import time

from aiohttp import web
from cuckoo.common.importing import TaskResultZipper
from cuckoo.common.log import CuckooGlobalLogger
from cuckoo.common.storage import TaskPaths
from cuckoo.node.node import NodeTaskStates
from cuckoo.node.webapi import API, StateSSE

from .machines import remove_empty_capture

log = CuckooGlobalLogger(__name__)

# The time that the main process has to fetch the last results, in seconds.
FETCH_TIMEOUT = 120
# The interval of polling for the end of tasks, for which Cuckoo3 has no notification, in seconds.
POLL_INTERVAL = 0.5


class HostedResultZipper(TaskResultZipper):
    """Packs the result of a task as in Cuckoo3, which happens before the machine is released."""

    def make_zip(self, zip_path):
        """Packs the result, without an empty capture: Cuckoo3 takes that for a fault of the task."""
        remove_empty_capture(self.task_id)
        return super().make_zip(zip_path)


class HostedStateSSE(StateSSE):
    """Cuckoo3's event stream, which knows the results that the main process has not fetched."""

    def __init__(self, loop):
        super().__init__(loop)
        self.unfetched = set()

    def task_state(self, task_id, state):
        """Sends the state of a task."""
        if state in (NodeTaskStates.TASK_DONE, NodeTaskStates.TASK_FAILED):
            self.unfetched.add(task_id)
        super().task_state(task_id, state)

    def machine_changed(self, message):
        """Sends a message of `offers`. A main process without this package logs it as unknown."""
        self._add_stream_data(json.dumps(message))

    async def reset_stream(self):
        """Forgets the events and the results of earlier tasks."""
        self.unfetched.clear()
        await super().reset_stream()


class HostedAPI(API):
    """Cuckoo3's API of a node, with the signal that drains the node."""

    def __init__(self, nodectx, eventstreamer):
        super().__init__(nodectx, eventstreamer)
        self._is_draining = False
        signal.signal(signal.SIGUSR1, self._begin_to_drain)

    async def get_machines(self, request):
        """Sends the node's machines as in Cuckoo3. A node that drains shows them as disabled."""
        return web.json_response(self.ctx.machinery_manager.machines.described())

    async def task_result(self, request):
        """Sends the result of a task, and notes that it is fetched."""
        answer = await super().task_result(request)
        if not isinstance(answer, web.FileResponse):
            return answer
        task_id = request.match_info["task_id"]
        return _Result(TaskPaths.zipped_results(task_id), lambda: self.streamer.unfetched.discard(task_id))

    def _begin_to_drain(self, *_):
        if not self._is_draining:
            self._is_draining = True
            threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self):
        log.warning("The node is being drained: it ends after its tasks")
        self.ctx.machinery_manager.drain()
        while self._has_tasks():
            time.sleep(POLL_INTERVAL)
        deadline = time.monotonic() + FETCH_TIMEOUT
        while self._unfetched() and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL)
        left = self._unfetched()
        if left:
            log.error(f"The main process has not fetched results within {FETCH_TIMEOUT} s", tasks=left)
        log.warning("The node is drained, and ends")
        os.kill(os.getpid(), signal.SIGTERM)

    def _unfetched(self):
        """Returns the tasks whose results wait for the main process. It deletes those that it does not need."""
        return sorted(task for task in list(self.streamer.unfetched) if TaskPaths.zipped_results(task).exists())

    def _has_tasks(self):
        # Under this lock, Cuckoo3 ends a task and sends its state.
        tracker = self.ctx.node._task_tracker
        with tracker._lock:
            return bool(tracker.tasks) or self.ctx.machinery_manager.machines.has_tasks()


class _Result(web.FileResponse):
    def __init__(self, path, on_sent):
        super().__init__(path)
        self._on_sent = on_sent

    async def prepare(self, request):
        """Sends the whole file."""
        writer = await super().prepare(request)
        self._on_sent()
        return writer
