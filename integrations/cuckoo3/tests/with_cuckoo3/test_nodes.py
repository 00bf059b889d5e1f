"""The main process's side of a remote node, without the node: tasks that lose it, results, restores."""

import asyncio
import http.server
import threading
import unittest
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

from cuckoo.common.clients import APIBadRequestError, ClientError
from cuckoo.common.machines import Machine, MachinesList
from cuckoo.common.route import Routes
from cuckoo.nodeclient import NodeClientLoop

from cuckoo_machinery import node_api, nodes, scheduling
from cuckoo_machinery.node_api import EventStream, HostedNodeAPI, NodeAway
from cuckoo_machinery.nodes import HostedNodeClient
from cuckoo_machinery.scheduling import MAX_RUNS, Changes, HostedStartableTask
from tests.support import TIMEOUT

TASK = "20260101-ABCDEF_1"


def machine():
    return Machine(name="m", label="m", ip="192.0.2.1", platform="windows", os_version="10", tags=set())


class FakeStream:
    """An event stream without events, which ends when it is closed."""

    def __init__(self, on_end):
        self._on_end = on_end
        self._ended = None
        self.stopped = False

    async def open(self):
        self._ended = asyncio.Event()

    async def read(self):
        await self._ended.wait()
        await self._on_end()

    async def close(self):
        if self._ended:
            self._ended.set()

    async def stop(self):
        self.stopped = True
        await self.close()


def fake_api():
    """Returns the API of a node that does as it is asked."""
    machines = MachinesList()
    machines.add_machine(machine())
    api = mock.AsyncMock(spec=HostedNodeAPI)
    api.name = "node"
    api.is_new.return_value = True
    api.machine_list = mock.Mock(return_value=machines)
    api.available_routes = mock.Mock(return_value=Routes([]))
    return api


class NodeTest(unittest.TestCase):
    def setUp(self):
        self.api = fake_api()
        self.ctx = SimpleNamespace(scheduler=mock.Mock(), state_controller=mock.Mock(), nodes=mock.Mock())
        for name, value in {"RETRY_INTERVAL": 0, "FETCH_INTERVAL": 0}.items():
            patched = mock.patch.object(nodes, name, value)
            patched.start()
            self.addCleanup(patched.stop)
        patched = mock.patch.dict(scheduling._lost_runs, clear=True)
        patched.start()
        self.addCleanup(patched.stop)
        self.fetch = mock.AsyncMock()
        patched = mock.patch.object(nodes.ResultRetrieverClient, "retrieve_result", self.fetch)
        patched.start()
        self.addCleanup(patched.stop)

    def run_with_node(self, act):
        """Runs `act(node)` with a node that is ready."""

        async def run():
            loop = asyncio.get_running_loop()
            node = HostedNodeClient(self.ctx, self.api, NodeClientLoop(loop))
            node.events = FakeStream(node._event_read_end)
            await node.connect()
            self.assertTrue(node.ready)
            await asyncio.wait_for(act(node), TIMEOUT)
            await node.events.stop()

        with mock.patch.object(nodes, "UnixSocketPaths"):
            asyncio.run(run())

    def assign(self, node):
        """Returns a task that belongs to the node, with its machine."""
        chosen = node.machines.acquire_available(TASK, platform="windows")
        queued = SimpleNamespace(id=TASK, analysis_id=TASK.split("_")[0])
        task = HostedStartableTask(self.ctx, queued, chosen, node)
        node.assigned_tasks.track_assigned(task)
        return task

    async def start(self, node, task):
        await node._upload_and_start(mock.MagicMock(), task)

    async def wait_for_restore(self, node):
        while self.ctx.nodes.ready_cb.call_count < 2:
            await asyncio.sleep(0)
        self.assertTrue(node.ready)

    def assert_waits_again(self, task):
        self.ctx.scheduler.requeue_task.assert_called_once_with(TASK)
        self.ctx.scheduler.unqueue_task.assert_not_called()
        self.ctx.state_controller.task_pending.assert_called_once()
        self.ctx.state_controller.task_failed.assert_not_called()
        self.assertFalse(task.machine.locked)


class Losing(NodeTest):
    def assert_task_runs_elsewhere_without_an_answer_to(self, request):
        request.side_effect = NodeAway("no answer")

        async def act(node):
            task = self.assign(node)
            await self.start(node, task)
            self.assert_waits_again(task)
            # The node may have the task nevertheless.
            self.api.is_new.return_value = False
            await self.wait_for_restore(node)
            self.api.a_reset.assert_awaited_once()

        self.run_with_node(act)

    def test_task_waits_again_when_its_upload_gets_no_answer(self):
        self.assert_task_runs_elsewhere_without_an_answer_to(self.api.upload_taskwork)

    def test_task_waits_again_when_its_start_gets_no_answer(self):
        self.assert_task_runs_elsewhere_without_an_answer_to(self.api.start_task)

    def test_running_task_waits_again_when_the_stream_ends(self):
        async def act(node):
            task = self.assign(node)
            await self.start(node, task)
            await node.events.close()
            await self.wait_for_restore(node)
            self.assert_waits_again(task)
            self.api.a_delete_analysis_work.assert_awaited_once_with(TASK.split("_")[0])

        self.run_with_node(act)

    def test_task_fails_when_it_has_lost_its_node_too_often(self):
        async def act(node):
            for _ in range(MAX_RUNS):
                task = self.assign(node)
                task.has_started = True
                with mock.patch.object(task.errtracker, "to_file"), mock.patch("cuckoo.scheduler.TaskPaths"):
                    node._requeue(task)
            self.assertEqual(self.ctx.scheduler.requeue_task.call_count, MAX_RUNS - 1)
            self.ctx.scheduler.unqueue_task.assert_called_once_with(TASK)
            self.ctx.state_controller.task_failed.assert_called_once()

        self.run_with_node(act)

    def test_restore_is_repeated_when_the_reset_fails(self):
        async def act(node):
            self.api.is_new.return_value = False
            self.api.a_reset.side_effect = [NodeAway("no answer"), ClientError("status 500"), None]
            await node.events.close()
            await self.wait_for_restore(node)
            self.assertEqual(self.api.a_reset.await_count, 3)

        self.run_with_node(act)


class Refusing(NodeTest):
    def test_task_waits_again_when_the_node_does_not_give_the_machine(self):
        self.api.start_task.side_effect = APIBadRequestError("not available")

        async def act(node):
            task = self.assign(node)
            await self.start(node, task)
            self.assert_waits_again(task)
            self.assertTrue(node.ready)
            self.assertIn("not available", task.machine.disable_reason)

        self.run_with_node(act)

    def test_upload_is_repeated_when_the_node_has_files_of_the_task(self):
        self.api.upload_taskwork.side_effect = [APIBadRequestError("exists"), None]

        async def act(node):
            await self.start(node, self.assign(node))
            self.api.a_delete_analysis_work.assert_awaited_once()
            self.api.start_task.assert_awaited_once_with(TASK, "m")

        self.run_with_node(act)


class Finishing(NodeTest):
    def test_machine_is_free_before_the_result_is_fetched(self):
        async def act(node):
            task = self.assign(node)

            async def fetch(*_):
                self.assertFalse(task.machine.locked)
                self.ctx.scheduler.unqueue_task.assert_not_called()

            self.fetch.side_effect = fetch
            await node._task_done(TASK)
            self.ctx.scheduler.unqueue_task.assert_called_once_with(TASK)
            self.ctx.state_controller.task_done.assert_called_once()
            # A repeated event changes nothing.
            await node._task_done(TASK)
            self.ctx.state_controller.task_done.assert_called_once()

        self.run_with_node(act)

    def test_task_waits_again_when_the_node_is_away_with_its_result(self):
        self.fetch.side_effect = ClientError("connection refused")
        self.api.expect_answer.side_effect = NodeAway("no answer")

        async def act(node):
            task = self.assign(node)
            await node._task_done(TASK)
            self.assert_waits_again(task)
            self.ctx.state_controller.task_done.assert_not_called()

        self.run_with_node(act)

    def test_result_is_fetched_again_when_the_node_answers(self):
        self.fetch.side_effect = [ClientError("connection lost"), None]

        async def act(node):
            self.assign(node)
            await node._task_done(TASK)
            self.ctx.state_controller.task_done.assert_called_once()

        self.run_with_node(act)


@contextmanager
def server(answer):
    """Runs an HTTP server whose requests `answer` handles; yields its address."""
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.server_port}"
        finally:
            listener.shutdown()
            thread.join()


class Requests(unittest.TestCase):
    def test_stream_ends_when_the_node_is_silent(self):
        ended = threading.Event()
        self.addCleanup(ended.set)
        received = []

        def answer(handler):
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b': ping\n\nid: 2\ndata: {"type": "x"}\n\n')
            handler.wfile.flush()
            ended.wait(TIMEOUT)

        async def on_event(event):
            received.append(event)

        async def read(url):
            on_end = mock.AsyncMock()
            stream = EventStream(HostedNodeAPI(url, "key", "node"), on_event, on_end)
            await stream.open()
            await asyncio.wait_for(stream.read(), TIMEOUT)
            on_end.assert_awaited_once()
            ended.set()

        with server(answer) as url, mock.patch.object(node_api, "SILENCE_TIMEOUT", 0.2):
            asyncio.run(read(url))
        self.assertEqual(received, [{"type": "x"}])

    def test_result_is_not_there_when_it_is_incomplete(self):
        def answer(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", "10")
            handler.end_headers()
            handler.wfile.write(b"part")

        with server(answer) as url, TemporaryDirectory() as folder:
            path = Path(folder, "result.zip")
            with self.assertRaises(ClientError):
                HostedNodeAPI(url, "key", "node").download_result(TASK, path)
            self.assertFalse(path.exists())


class Scheduling(unittest.TestCase):
    def test_change_during_a_search_is_kept(self):
        changes = Changes()
        changes.set()
        self.assertTrue(changes.wait(TIMEOUT))
        changes.set()
        changes.clear()
        self.assertTrue(changes.wait(0))
        self.assertFalse(changes.wait(0))

    def test_task_that_waits_again_is_not_running(self):
        ctx = SimpleNamespace(scheduler=mock.Mock(), state_controller=mock.Mock())
        task = HostedStartableTask(ctx, SimpleNamespace(id=TASK, analysis_id="a"), machine(), mock.Mock())
        task.requeue()
        task.task_running()
        ctx.state_controller.task_running.assert_not_called()


if __name__ == "__main__":
    unittest.main()
