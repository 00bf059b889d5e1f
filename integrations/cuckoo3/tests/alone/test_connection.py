"""Requests and events, with a host and with a misbehaving fake of one."""

import itertools
import json
import os
import queue
import tempfile
import threading
import time
import unittest
from pathlib import Path

from cuckoo_machinery.connection import ASK_AGAIN, Client, HostError, Unreachable, TimedOut, Refused, ask, send
from tests.support import TIMEOUT, FakeHost, make_cwd, start_other_host


class WithAFakeHost(unittest.TestCase):
    def client(self, answers):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name, "sock")
        FakeHost(self, path, answers)
        return Client(path)

    def test_request_fails_when_no_host_answers(self):
        with self.assertRaises(Unreachable) as caught:
            Client("/none/such.sock").request("list")
        self.assertIn("/none/such.sock", str(caught.exception))
        self.assertIn("cuckoo-machinery serve", str(caught.exception))

    def test_request_ignores_events_and_other_answers(self):
        def answers(line):
            identity = json.loads(line)["id"]
            lines = [{"event": "state"}, {"id": "another", "success": False}, {"id": identity, "success": True}]
            return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

        self.assertEqual(self.client(answers).request("list"), {"success": True})

    def test_answer_without_an_id_is_accepted_from_an_overloaded_host(self):
        client = self.client(lambda _: b'{"success": false, "reason": "too many connections"}\n')
        with self.assertRaises(Refused) as caught:
            client.request("stop", machine="win10_1")
        self.assertEqual(caught.exception.reason, "too many connections")
        self.assertIn("stop win10_1", str(caught.exception))

    def test_request_fails_when_the_host_closes_the_connection(self):
        for answer in (None, b'{"succ'):
            lines = iter([answer, None])
            client = self.client(lambda _, lines=lines: next(lines))
            with self.assertRaises(Unreachable):
                client.request("list", timeout=0.2)

    def test_request_is_repeated_when_the_host_is_about_to_be_replaced(self):
        refused = {"success": False, "reason": f"the host is shutting down: {ASK_AGAIN}"}
        lines = iter([refused, refused, {"success": True}, refused])
        client = self.client(lambda _: json.dumps(next(lines)).encode() + b"\n")
        self.assertEqual(client.request("restore_start", machine="m"), {"success": True})
        with self.assertRaises(Refused):
            client.request("restore_start", machine="m", timeout=0.1)

    def test_request_is_repeated_once_when_its_connection_is_lost(self):
        lines = iter([None, b'{"success": true}\n'])
        self.assertEqual(self.client(lambda _: next(lines)).request("list"), {"success": True})

    def test_request_times_out_when_the_host_does_not_answer(self):
        with self.assertRaises(TimedOut):
            self.client(lambda _: b"").request("list", timeout=0.05)

    def test_request_fails_when_the_answer_is_no_json_object(self):
        for answer in (b"hello\n", b"[1]\n"):
            with self.assertRaises(HostError) as caught:
                self.client(lambda _, answer=answer: answer).request("list")
            self.assertIn(answer.strip().decode(), str(caught.exception))

    def test_long_answers_are_complete(self):
        machines = ["x" * 1000] * 1000
        answer = json.dumps({"success": True, "machines": machines}).encode() + b"\n"
        self.assertEqual(self.client(lambda _: answer).request("list")["machines"], machines)


class WithAHost(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cwd(self, {f"m{number}": {} for number in range(8)})
        self.client = Client(self.cwd / "operational/sockets/machinerymanager.sock")
        self.host = start_other_host(self, self.cwd)

    def test_dump_is_written_into_a_passed_file(self):
        self.client.request("restore_start", machine="m1")
        with tempfile.TemporaryFile() as file:
            self.client.request("dump_memory", machine="m1", file=file)
            self.assertEqual(os.pread(file.fileno(), 4, 0), b"\x7fELF")
            # The host writes from the beginning.
            self.client.request("screenshot", machine="m1", file=file.fileno())
            self.assertEqual(os.pread(file.fileno(), 4, 0), b"\x89PNG")

    def test_capture_gets_a_passed_file(self):
        with tempfile.TemporaryFile() as file:
            self.client.request("lock", machine="m1", task_id="t", file=file)
            with self.assertRaisesRegex(Refused, "same passed file"):
                self.client.request("lock", machine="m2", task_id="t2", file=file)

    def test_host_that_knows_no_descriptors_uses_the_path(self):
        lines = []

        def answers(line):
            lines.append(json.loads(line))
            return json.dumps({"success": True, "id": lines[-1]["id"]}).encode() + b"\n"

        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name, "sock")
        FakeHost(self, path, answers)
        with tempfile.TemporaryFile() as file:
            Client(path).request("screenshot", machine="m", file=file, path="/x")
        self.assertEqual((lines[0]["path"], lines[0]["fd"]), ("/x", True))

    def test_threads_get_their_own_answers(self):
        names = [f"m{number}" for number in range(8)]
        got = queue.Queue()

        def restore(name):
            for _ in range(10):
                self.client.request("restore_start", machine=name)
                got.put(self.client.request("state", machine=name)["state"])
                self.client.request("stop", machine=name)

        threads = [threading.Thread(target=restore, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        self.assertEqual([got.get(block=False) for _ in range(80)], ["running"] * 80)

    def test_requests_succeed_while_the_host_is_replaced(self):
        stop, failures, count = threading.Event(), [], itertools.count()

        def request():
            while not stop.is_set():
                try:
                    self.client.request("list")
                    next(count)
                except HostError as error:
                    failures.append(error)

        threads = [threading.Thread(target=request) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            before = self.client.request("version")["started"]
            self.client.request("upgrade")
            while self.client.request("version")["started"] == before:
                pass
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
        self.assertEqual(failures, [])
        self.assertGreater(next(count), 10)

    def test_refusal_has_the_hosts_reason(self):
        with self.assertRaises(Refused) as caught:
            self.client.request("stop", machine="nope")
        self.assertEqual(caught.exception.reason, "Machine with name nope does not exist")

    def test_action_runs_when_its_answer_is_not_awaited(self):
        events = self.client.subscribe()
        self.addCleanup(events.close)
        send(self.client.path, {"action": "restore_start", "machine": "m3"})
        states = [event["state"] for _, event in zip(range(2), events)]
        self.assertEqual(states, ["starting", "running"])

    def test_ask_returns_the_answer_unchanged(self):
        answer = ask(self.client.path, {"action": "dance", "machine": "m1"})
        self.assertEqual(answer, {"success": False, "reason": "No such action"})

    def test_events_end_when_the_host_ends_or_the_subscription_closes(self):
        for end in ("close", "host"):
            events = self.client.subscribe()
            reader = threading.Thread(target=list, args=(events,))
            reader.start()
            if end == "close":
                events.close()
            else:
                self.host.end()
            reader.join(TIMEOUT)
            self.assertFalse(reader.is_alive(), end)
            events.close()

    def test_request_succeeds_when_the_host_has_restarted(self):
        self.assertTrue(self.client.request("version")["success"])
        self.host.end()
        with self.assertRaises(Unreachable):
            self.client.request("version")
        start_other_host(self, self.cwd)
        self.assertTrue(self.client.request("version")["success"])

    def test_action_succeeds_when_the_host_restarts_meanwhile(self):
        self.host.end()
        restart = threading.Timer(0.3, start_other_host, (self, self.cwd))
        restart.start()
        self.addCleanup(restart.join)
        message = {"action": "restore_start", "machine": "m1"}
        self.assertEqual(ask(self.client.path, message, restart_timeout=TIMEOUT), {"success": True})

    def test_client_waits_for_a_host_that_is_away(self):
        self.host.end()
        restart = threading.Timer(0.3, start_other_host, (self, self.cwd))
        restart.start()
        self.addCleanup(restart.join)
        client = Client(self.client.path, restart_timeout=TIMEOUT)
        self.assertTrue(client.request("list")["success"])

    def test_ask_returns_within_its_timeout(self):
        began = time.monotonic()
        with self.assertRaises(Unreachable):
            ask(self.client.path, {"action": "restore_start", "machine": "m1"}, timeout=0)
        self.assertLess(time.monotonic() - began, TIMEOUT)


if __name__ == "__main__":
    unittest.main()
