"""Processes and sockets of a killed node are cleared, and nothing else."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import unittest
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from unittest import mock

from cuckoo_machinery import leftovers
from cuckoo_machinery.leftovers import MAIN, NODE, InUse, Record, start_time
from tests.support import TIMEOUT, is_there, make_cwd

SLEEPER = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()",
]
# A node that records a worker, and is killed.
KILLED_NODE = """
import logging, os, signal, subprocess, sys
from cuckoo_machinery.leftovers import NODE, Record
record = Record(sys.argv[1], NODE, logging.getLogger())
record.claim()
worker = subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE)
worker.stdout.readline()
record.add(worker.pid, "Worker.start")
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class LeftoversTest(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cwd(self)
        self.sockets = self.cwd / "operational" / "sockets"
        self.sockets.mkdir(parents=True)
        self.log = mock.Mock()

    def record(self, role=NODE):
        record = Record(self.cwd, role, self.log)
        self.addCleanup(lambda: record._file and record.close())
        return record

    def killed_node(self, command=SLEEPER):
        """Returns the process id of a killed node's worker."""
        program = [sys.executable, "-c", KILLED_NODE, str(self.cwd), *command]
        done = subprocess.run(program, check=False, stdout=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual(done.returncode, -signal.SIGKILL)
        pid = int(done.stdout)
        self.addCleanup(_kill, pid)
        self.assertTrue(is_there(pid))
        return pid

    def said(self):
        return "\n".join(call.args[0] for call in self.log.warning.call_args_list)

    def bind(self, name, listens):
        bound = socket.socket(socket.AF_UNIX)
        self.addCleanup(bound.close)
        bound.bind(str(self.sockets / name))
        if listens:
            bound.listen(1)
        return bound


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Workers(LeftoversTest):
    def test_worker_is_ended_when_its_node_was_killed(self):
        pid = self.killed_node()
        self.record().claim()
        self.assertIsNone(start_time(pid))
        self.assertIn(f"Process {pid} (Worker.start), left by an earlier node, was ended by SIGTERM", self.said())

    def test_worker_is_killed_when_it_ignores_sigterm(self):
        pid = self.killed_node(STUBBORN)
        # The end by SIGKILL has a time of its own.
        with mock.patch.object(leftovers, "END_TIMEOUT", 0.1):
            self.record().claim()
        self.assertIsNone(start_time(pid))
        self.assertIn("was killed", self.said())

    def test_process_is_spared_when_its_id_was_used_again(self):
        pid = self.killed_node()
        path = self.cwd / "operational/generated/cuckoo-node-processes.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual([line["pid"] for line in lines][1:], [pid])
        for key, value in (("started", lines[1]["started"] + 1), ("boot", "another boot")):
            with self.subTest(key):
                path.write_text(json.dumps({**lines[1], key: value}) + "\n")
                record = self.record()
                record.claim()
                record.close()
                self.assertIsNotNone(start_time(pid))
        self.assertEqual(self.said(), "")

    def test_record_is_read_when_its_last_line_is_incomplete(self):
        pid = self.killed_node()
        with open(self.cwd / "operational/generated/cuckoo-node-processes.jsonl", "a") as record:
            record.write('{"pid": 1, "sta')
        self.record().claim()
        self.assertIsNone(start_time(pid))

    def test_record_is_read_when_a_line_is_torn_within_a_character(self):
        pid = self.killed_node()
        with open(self.cwd / "operational/generated/cuckoo-node-processes.jsonl", "ab") as record:
            record.write('{"pid": 1, "name": "é'.encode()[:-1])
        self.record().claim()
        self.assertIsNone(start_time(pid))

    def test_worker_is_spared_when_another_role_starts(self):
        pid = self.killed_node()
        self.record(MAIN).claim()
        self.assertIsNotNone(start_time(pid))

    def start_worker(self, record):
        patched = mock.patch.object(BaseProcess, "start", BaseProcess.start)
        patched.start()
        self.addCleanup(patched.stop)
        leftovers.record_workers([record], self.log)
        worker = get_context("fork").Process(target=signal.pause)
        worker.start()
        self.addCleanup(worker.join, TIMEOUT)
        self.addCleanup(worker.terminate)
        return worker

    def test_workers_are_recorded_when_multiprocessing_starts_them(self):
        record = self.record()
        record.claim()
        worker = self.start_worker(record)
        self.assertEqual([line["pid"] for line in record._recorded()], [os.getpid(), worker.pid])

    def test_worker_runs_when_it_cannot_be_recorded(self):
        record = self.record()
        record.claim()
        with mock.patch.object(record, "add", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            worker = self.start_worker(record)
        self.assertTrue(worker.is_alive())
        self.assertIn(f"Process {worker.pid} (pause) cannot be recorded", self.log.error.call_args.args[0])

    def test_start_time_is_none_when_the_process_has_ended(self):
        process = subprocess.Popen(["true"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self.assertIsNone(start_time(process.pid))  # a zombie
        process.wait()
        self.assertIsNone(start_time(process.pid))


class Locks(LeftoversTest):
    def test_claim_fails_with_the_process_when_another_node_runs(self):
        self.record().claim()
        self.record(MAIN).claim()
        with self.assertRaisesRegex(InUse, f"has a node already: process {os.getpid()}, since 20.*Stop it first"):
            self.record().claim()

    def test_claim_succeeds_when_the_other_node_has_ended(self):
        record = self.record()
        record.claim()
        record.close()
        self.record().claim()

    def test_claim_fails_with_the_path_when_the_record_is_not_a_file(self):
        (self.cwd / "operational/generated/cuckoo-node-processes.jsonl").mkdir(parents=True)
        with self.assertRaisesRegex(InUse, "cuckoo-node-processes.jsonl cannot be used"):
            self.record().claim()


class Sockets(LeftoversTest):
    def test_dead_sockets_are_removed_when_they_are_of_the_role(self):
        for name in ("taskrunner.sock", "resultserver.sock", "statecontroller.sock", "post0.sock", "qemu_a.sock"):
            self.bind(name, listens=True).close()
        (self.sockets / "nodestatecontroller.sock").write_text("no socket")
        self.record().claim()
        left = ["nodestatecontroller.sock", "post0.sock", "qemu_a.sock", "statecontroller.sock"]
        self.assertEqual(sorted(os.listdir(self.sockets)), left)
        self.assertIn("taskrunner.sock, left by an earlier node, was removed", self.said())
        self.record(MAIN).claim()
        self.assertEqual(sorted(os.listdir(self.sockets)), ["nodestatecontroller.sock", "qemu_a.sock"])

    def test_claim_fails_with_the_process_when_a_socket_has_a_listener(self):
        server = self.bind("taskrunner.sock", listens=True)
        with self.assertRaisesRegex(InUse, f"Process {os.getpid()} still listens on .*taskrunner.sock"):
            self.record().claim()
        server.setblocking(False)
        with self.assertRaises(BlockingIOError, msg="the listener got a connection"):
            server.accept()

    def test_claim_fails_when_a_listener_has_used_another_path(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.sockets)
        server = socket.socket(socket.AF_UNIX)
        self.addCleanup(server.close)
        # The kernel lists this path, which means nothing in another folder.
        server.bind("taskrunner.sock")
        server.listen(1)
        os.chdir(here)
        with self.assertRaisesRegex(InUse, "A process that cannot be found still listens on .*taskrunner.sock"):
            self.record().claim()
        self.assertIn("taskrunner.sock", os.listdir(self.sockets))


if __name__ == "__main__":
    unittest.main()
