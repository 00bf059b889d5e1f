"""A host is found or started, and supervised until `detach`."""

import os
import shutil
import signal
import stat
import threading
import unittest
from pathlib import Path
from unittest import mock

from cuckoo_machinery import host as module
from cuckoo_machinery.connection import HostError, Unreachable
from cuckoo_machinery.host import Host, find_program
from tests.support import TIMEOUT, EventRecorder, FakeHost, is_there, make_cwd, start_other_host, write_machines


class HostTest(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cwd(self)

    def host(self, recorder=None):
        host = Host(self.cwd, recorder)
        self.addCleanup(host.detach)
        return host

    def assert_nothing_is_abandoned(self, pid):
        self.assertFalse(is_there(pid))
        self.assertEqual(os.listdir(self.cwd / "operational/sockets"), [])


class Starting(HostTest):
    def test_attach_starts_a_host_when_none_runs(self):
        host = self.host()
        host.attach()
        self.assertTrue(host.is_own)
        pid = host._child.pid
        self.assertEqual(host.client.request("list")["machines"][0]["name"], "m")
        self.assertEqual(os.getsid(pid), pid, "Ctrl-C would reach it")
        self.assertIn("ready", (self.cwd / "log/machinery-host.log").read_text())
        host.client.request("restore_start", machine="m")
        host.detach()
        self.assert_nothing_is_abandoned(pid)
        host.detach()

    def test_attach_uses_a_running_host_and_detach_keeps_it(self):
        other = start_other_host(self, self.cwd)
        host = self.host()
        host.attach()
        self.assertFalse(host.is_own)
        host.detach()
        self.assertTrue(is_there(other.pid))
        self.assertTrue(host.client.request("version")["success"])

    def test_attach_starts_a_host_when_another_was_killed(self):
        other = start_other_host(self, self.cwd)
        os.kill(other.pid, signal.SIGKILL)
        other.end()
        self.assertEqual(os.listdir(self.cwd / "operational/sockets"), ["machinerymanager.sock"])
        host = self.host()
        host.attach()
        self.assertTrue(host.is_own)

    def test_attach_starts_one_host_when_called_concurrently(self):
        hosts = [self.host() for _ in range(5)]
        failures = []

        def attach(host):
            try:
                host.attach()
            except HostError as error:
                failures.append(error)

        threads = [threading.Thread(target=attach, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        self.assertEqual(failures, [])
        self.assertEqual(sorted(host.is_own for host in hosts), [False] * 4 + [True])
        for host in hosts:
            self.assertTrue(host.client.request("version")["success"])

    def test_attach_fails_when_the_program_is_missing(self):
        with mock.patch.dict(os.environ, {"PATH": "/none"}):
            os.environ.pop("CUCKOO_MACHINERY", None)
            with self.assertRaises(HostError) as caught:
                self.host().attach()
            self.assertIn("not in the PATH", str(caught.exception))
            self.assertIn("$CUCKOO_MACHINERY", str(caught.exception))
            os.environ["CUCKOO_MACHINERY"] = "/none/such"
            with self.assertRaises(HostError) as caught:
                self.host().attach()
            self.assertIn("/none/such", str(caught.exception))

    def test_program_is_found_in_the_path(self):
        program = Path(find_program()).absolute()
        with mock.patch.dict(os.environ, {"PATH": f"/none:{program.parent}"}):
            os.environ.pop("CUCKOO_MACHINERY", None)
            self.assertEqual(find_program(), str(program))

    def test_attach_fails_with_the_hosts_output_when_it_cannot_start(self):
        write_machines(self.cwd, {"m": {"platfrom": "linux"}})
        with self.assertRaises(HostError) as caught:
            self.host().attach()
        self.assertIn("platfrom", str(caught.exception))
        self.assertIn("machinery-host.log", str(caught.exception))

    def test_attach_fails_with_the_exit_code_when_the_program_is_no_host(self):
        program = self.cwd / "program"
        program.write_text("#!/bin/sh\nexit 3\n")
        program.chmod(stat.S_IRWXU)
        other_program = mock.patch.dict(os.environ, {"CUCKOO_MACHINERY": str(program)})
        with other_program, self.assertRaises(HostError) as caught:
            self.host().attach()
        self.assertIn("It wrote: nothing\n(exit code 3;", str(caught.exception))

    def test_host_gets_options_when_the_variable_has_some(self):
        program = Path(find_program()).absolute()
        plugins = self.cwd / "plugins of ours"
        plugins.mkdir()
        shutil.copy(program.parent / "libmachinery_double.so", plugins)
        plugins.chmod(0o777)
        options = f"-v --plugin-dir '{plugins}'"
        with mock.patch.dict(os.environ, {"CUCKOO_MACHINERY_OPTIONS": options}):
            with self.assertRaises(HostError) as caught:
                self.host().attach()
            self.assertIn("--allow-insecure-plugins", str(caught.exception))
            self.assertIn("$CUCKOO_MACHINERY_OPTIONS", str(caught.exception))
            os.environ["CUCKOO_MACHINERY_OPTIONS"] = f"{options} --allow-insecure-plugins"
            host = self.host()
            host.attach()
            self.assertTrue(host.is_own)
        self.assertIn("DEBUG", (self.cwd / "log/machinery-host.log").read_text())

    def test_attach_fails_when_options_are_quoted_wrongly(self):
        with mock.patch.dict(os.environ, {"CUCKOO_MACHINERY_OPTIONS": "--plugin-dir '/x"}):
            with self.assertRaises(HostError) as caught:
                self.host().attach()
        self.assertIn("$CUCKOO_MACHINERY_OPTIONS", str(caught.exception))

    def test_attach_fails_when_another_program_answers(self):
        host = self.host()
        host.client.path.parent.mkdir(parents=True)
        answer = b'{"success": false, "reason": "Missing action or machine name"}\n'
        FakeHost(self, host.client.path, lambda _: answer)
        with self.assertRaises(HostError) as caught:
            host.attach()
        self.assertIn("Stop Cuckoo's own node first", str(caught.exception))


class Supervising(HostTest):
    def test_own_host_is_restarted_when_it_was_killed(self):
        recorder = EventRecorder()
        host = self.host(recorder)
        host.attach()
        recorder.wait_for("attached")
        host.client.request("acquire", task_id="t", name="m")
        killed = host._child.pid
        with self.assertLogs(module.__name__, "ERROR") as logs:
            os.kill(killed, signal.SIGKILL)
            recorder.wait_for("attached")
        self.assertIn(f"process {killed}) is lost", logs.output[0])
        self.assertTrue(host.is_own)
        self.assertNotEqual(host._child.pid, killed)
        self.assertEqual(host.client.request("list")["machines"][0]["locked_by"], "t")
        host.client.request("restore_start", machine="m")
        recorder.wait_for("state", machine="m", state="running")
        pid = host._child.pid
        host.detach()
        self.assert_nothing_is_abandoned(pid)

    def test_request_is_retried_when_the_host_was_killed(self):
        host = self.host()
        host.attach()
        host.client.request("acquire", task_id="t", name="m")
        os.kill(host._child.pid, signal.SIGKILL)
        self.assertTrue(host.request_with_retries("unlock", retry_for=TIMEOUT, machine="m")["success"])

    def test_pauses_grow_when_restarts_repeat(self):
        recorder = EventRecorder()
        host = self.host(recorder)
        host.attach()
        recorder.wait_for("attached")
        with self.assertLogs(module.__name__, "ERROR") as logs:
            for _ in range(2):
                os.kill(host._child.pid, signal.SIGKILL)
                recorder.wait_for("attached")
        self.assertEqual([line.split(" in ")[1][:3] for line in logs.output], ["0 s", "1 s"])

    def test_another_s_host_is_awaited_when_it_restarts(self):
        recorder = EventRecorder()
        other = start_other_host(self, self.cwd)
        host = self.host(recorder)
        host.attach()
        recorder.wait_for("attached")
        with self.assertLogs(module.__name__, "ERROR"):
            other.end()
            start_other_host(self, self.cwd)
            recorder.wait_for("attached")
        self.assertFalse(host.is_own)

    def test_own_host_is_started_when_another_s_stays_away(self):
        recorder = EventRecorder()
        other = start_other_host(self, self.cwd)
        host = self.host(recorder)
        host.attach()
        recorder.wait_for("attached")
        with mock.patch.object(module, "RESTART_GRACE", 0), self.assertLogs(module.__name__, "ERROR"):
            other.end()
            recorder.wait_for("attached")
        self.assertTrue(host.is_own)

    def test_start_is_retried_when_it_fails(self):
        recorder = EventRecorder()
        host = self.host(recorder)
        host.attach()
        recorder.wait_for("attached")
        with self.assertLogs(module.__name__, "ERROR") as logs:
            write_machines(self.cwd, {"m": {"platfrom": "linux"}})
            with mock.patch.object(host._log, "error", wraps=host._log.error) as error:
                reported_twice = threading.Event()
                error.side_effect = lambda _: reported_twice.set() if error.call_count == 2 else None
                os.kill(host._child.pid, signal.SIGKILL)
                self.assertTrue(reported_twice.wait(TIMEOUT))
                self.assertIn("platfrom", error.call_args[0][0])
            host._log.error("the test changes the configuration")
            write_machines(self.cwd, {"m": {}})
            recorder.wait_for("attached")
        self.assertTrue(logs.output)

    def test_detach_ends_the_pause_before_a_restart(self):
        host = self.host()
        host.attach()
        pid = host._child.pid
        with self.assertLogs(module.__name__, "ERROR"), mock.patch.object(host._ending, "wait") as wait:
            in_pause, released = threading.Event(), threading.Event()

            def pause(_):
                in_pause.set()
                return released.wait(TIMEOUT)

            wait.side_effect = pause
            os.kill(pid, signal.SIGKILL)
            self.assertTrue(in_pause.wait(TIMEOUT))
            host._ending.set()
            released.set()
            host.detach()
        with self.assertRaises(Unreachable):
            host.client.request("version")
        self.assertFalse(is_there(pid))

    def test_events_continue_when_a_listener_raises(self):
        recorder = EventRecorder()
        heard, failing = recorder.heard, threading.Event()

        def hear(event):
            if not failing.is_set():
                failing.set()
                raise ValueError("the listener failed")
            heard(event)

        recorder.heard = hear
        host = self.host(recorder)
        host.attach()
        with self.assertLogs(module.__name__, "ERROR") as logs:
            host.client.request("restore_start", machine="m")
            recorder.wait_for("state", state="running")
        self.assertIn("the listener failed", logs.output[0])


if __name__ == "__main__":
    unittest.main()
