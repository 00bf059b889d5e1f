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

from cuckoo.common.clients import APIBadRequestError, APIError, ClientError
from cuckoo.common.machines import Machine, MachinesList
from cuckoo.common.route import Routes
from cuckoo.nodeclient import NodeClientLoop

from cuckoo_machinery import node_requests, remote_client, scheduling
from cuckoo_machinery.node_requests import EventStream, HostedNodeAPI, MachineRefused, NodeAway
from cuckoo_machinery.remote_client import HostedNodeClient, make_remote_node_clients
from cuckoo_machinery.offers import HOST_IS_AWAY
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

    @property
    def has_ended(self):
        return self._ended.is_set()

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
    api.read_machines.side_effect = machines.copy().to_dictlist
    return api


class NodeTest(unittest.TestCase):
    def setUp(self):
        self.api = fake_api()
        self.ctx = SimpleNamespace(scheduler=mock.Mock(), state_controller=mock.Mock(), nodes=mock.Mock())
        for name, value in {"RETRY_INTERVAL": 0, "FETCH_INTERVAL": 0}.items():
            self.patch(remote_client, name, value)
        patched = mock.patch.dict(scheduling._lost_runs, clear=True)
        patched.start()
        self.addCleanup(patched.stop)
        self.fetch = mock.AsyncMock()
        self.patch(remote_client.ResultRetrieverClient, "retrieve_result", self.fetch)

    def patch(self, place, name, value):
        patched = mock.patch.object(place, name, value)
        patched.start()
        self.addCleanup(patched.stop)

    def run_with_node(self, act):
        """Runs `act(node)` with a node that is ready."""

        async def run():
            loop = asyncio.get_running_loop()
            node = HostedNodeClient(self.ctx, self.api, NodeClientLoop(loop))
            node.events = FakeStream(node._event_read_end)
            self.node = node
            await node.connect()
            self.assertTrue(node.ready)
            await asyncio.wait_for(act(node), TIMEOUT)
            await node.events.stop()

        with mock.patch.object(remote_client, "UnixSocketPaths"):
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

    def lose_and_restore_before(self, error):
        """Returns a request during which the node is lost and restored, and which fails afterwards."""

        async def request(*_):
            await self.node.events.close()
            await self.wait_for_restore(self.node)
            raise error

        return request

    def test_task_does_not_fail_when_its_lost_node_has_taken_it(self):
        self.api.upload_taskwork.side_effect = self.lose_and_restore_before(APIError("status 500"))

        async def act(node):
            task = self.assign(node)
            await self.start(node, task)
            self.assert_waits_again(task)

        self.run_with_node(act)

    def test_new_connection_stays_when_a_request_of_an_earlier_one_fails(self):
        self.api.upload_taskwork.side_effect = self.lose_and_restore_before(NodeAway("no answer"))

        async def act(node):
            await self.start(node, self.assign(node))
            self.assertFalse(node.events.has_ended)
            self.assertTrue(node.ready)

        self.run_with_node(act)

    def test_new_connection_stays_when_an_earlier_result_cannot_be_fetched(self):
        self.fetch.side_effect = ClientError("connection refused")
        self.api.expect_answer.side_effect = self.lose_and_restore_before(NodeAway("no answer"))

        async def act(node):
            task = self.assign(node)
            await node._task_done(TASK)
            self.assert_waits_again(task)
            self.assertFalse(node.events.has_ended)

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
    def offered(self, **keys):
        """Returns the description of the node's machines."""
        return [{**machine().to_dict(), **keys}]

    def test_task_waits_again_when_somebody_else_has_the_machine(self):
        self.api.start_task.side_effect = MachineRefused("Machine m is not available")
        self.api.read_machines.side_effect = [self.offered(locked=True, locked_by="somebody")]

        async def act(node):
            task = self.assign(node)
            await self.start(node, task)
            self.assert_waits_again(task)
            self.assertTrue(node.ready)
            self.assertEqual(node.machines.available_count, 0)
            # The end of the other lock makes it available again.
            await node._on_event({"type": "machine_offered", "machine": self.offered()[0]})
            self.assertEqual(node.machines.available_count, 1)

        self.run_with_node(act)

    def test_machine_stays_available_when_the_node_offers_it_again(self):
        self.api.start_task.side_effect = MachineRefused(f"Failed to acquire machine m. {HOST_IS_AWAY}")

        async def act(node):
            for _ in range(MAX_RUNS + 1):
                await self.start(node, self.assign(node))
                self.assertEqual(node.machines.available_count, 1)
            self.ctx.state_controller.task_failed.assert_not_called()
            self.assertEqual(self.ctx.scheduler.requeue_task.call_count, MAX_RUNS + 1)

        self.run_with_node(act)

    def test_change_during_the_list_is_applied_after_it(self):
        self.api.start_task.side_effect = MachineRefused("Machine m is not available")

        async def act(node):
            async def read():
                await node._on_event({"type": "machine_offered", "machine": self.offered()[0]})
                return self.offered(locked=True, locked_by="somebody")

            self.api.read_machines.side_effect = read
            await self.start(node, self.assign(node))
            self.assertEqual(node.machines.available_count, 1)

        self.run_with_node(act)

    def assert_only_the_task_fails_after(self, refusal):
        self.api.start_task.side_effect = refusal

        async def act(node):
            task = self.assign(node)
            with mock.patch.object(task.errtracker, "to_file"), mock.patch("cuckoo.scheduler.TaskPaths"):
                await self.start(node, task)
            self.ctx.scheduler.requeue_task.assert_not_called()
            self.ctx.state_controller.task_failed.assert_called_once()
            self.assertEqual(node.machines.available_count, 1)

        self.run_with_node(act)

    def test_only_the_task_fails_when_the_node_refuses_it(self):
        self.assert_only_the_task_fails_after(APIBadRequestError("Task cannot be started: Invalid task json"))

    def test_only_the_task_fails_when_the_machine_is_refused_for_good(self):
        self.assert_only_the_task_fails_after(MachineRefused("Failed to acquire machine m. The path is not allowed"))

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


class Starting(NodeTest):
    def test_main_process_starts_when_the_first_node_is_ready(self):
        slow = fake_api()
        slow.name = "slow"
        slow.is_new.return_value = False
        reset = slow.a_reset.side_effect = mock.AsyncMock(side_effect=asyncio.Event().wait)
        self.patch(remote_client, "EventStream", lambda _api, _on_event, on_end: FakeStream(on_end))
        self.patch(remote_client.shutdown, "register_shutdown", mock.Mock())
        (first, second), wrapper = make_remote_node_clients(self.ctx, [slow, self.api])
        try:
            self.assertFalse(first.ready)
            self.assertTrue(second.ready)
            reset.assert_awaited_once()
        finally:
            wrapper.stop()
            wrapper.start()


@contextmanager
def server(answer):
    """Runs an HTTP server whose requests `answer` handles; yields its address."""
    methods = {"do_GET": answer, "do_POST": answer, "log_message": lambda *_: None}
    handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods)
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

        # The limit also holds for the first event, which a busy computer sends late.
        with server(answer) as url, mock.patch.object(node_requests, "SILENCE_TIMEOUT", 5):
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


    def test_download_fails_when_the_disk_is_full(self):
        def answer(handler):
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b"x" * 100_000)

        with server(answer) as url, TemporaryDirectory() as folder:
            path = Path(folder, "result.zip")
            Path(f"{path}.partial").symlink_to("/dev/full")
            with self.assertRaisesRegex(ClientError, "No space left"):
                HostedNodeAPI(url, "key", "node").download_result(TASK, path)
            self.assertEqual(list(Path(folder).iterdir()), [])

    def test_upload_may_take_longer_than_other_requests(self):
        may_answer = threading.Event()
        self.addCleanup(may_answer.set)

        def answer(handler):
            handler.rfile.read(int(handler.headers["Content-Length"]))
            may_answer.wait(TIMEOUT)
            handler.send_response(200)
            handler.end_headers()

        async def upload(url, path):
            uploading = asyncio.ensure_future(HostedNodeAPI(url, "key", "node").upload_taskwork(path))
            # The default limit passes meanwhile.
            await asyncio.wait([uploading], timeout=0.5)
            may_answer.set()
            await asyncio.wait_for(uploading, TIMEOUT)

        default = node_requests.aiohttp.ClientTimeout(total=0.1)
        with mock.patch("aiohttp.client.DEFAULT_TIMEOUT", default), server(answer) as url:
            with TemporaryDirectory() as folder:
                path = Path(folder, "work.zip")
                path.write_bytes(b"zip")
                asyncio.run(upload(url, path))

    def test_refusal_of_a_machine_is_recognized(self):
        def answer(handler):
            handler.rfile.read(int(handler.headers["Content-Length"]))
            handler.send_response(400)
            handler.end_headers()
            handler.wfile.write(b'{"error": "Task cannot be started: Machine m is not available"}')

        with server(answer) as url, self.assertRaises(MachineRefused) as caught:
            asyncio.run(HostedNodeAPI(url, "key", "node").start_task(TASK, "m"))
        self.assertEqual(caught.exception.reason, "Task cannot be started: Machine m is not available")


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
