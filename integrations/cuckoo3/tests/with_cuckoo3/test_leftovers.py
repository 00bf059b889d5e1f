"""A node and a main process start again on a CWD after they were killed."""

import json
import os
import signal
import unittest

from cuckoo_machinery.leftovers import start_time
from tests.support import TIMEOUT, wait_until_gone
from tests.with_cuckoo3.support import AGENT_PORT, Node, address, make_cuckoo_cwd, process_behind
from tests.with_cuckoo3.test_node import TASKS


class Killed(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cuckoo_cwd(self, {"good": {"ip": address(1), "agent_port": AGENT_PORT}})
        self.sockets = self.cwd / "operational" / "sockets"

    def workers(self):
        """Returns the recorded workers of the node."""
        lines = (self.cwd / "operational/generated/cuckoo-node-processes.jsonl").read_text().splitlines()
        return {line["name"]: line["pid"] for line in map(json.loads, lines[1:])}

    def kill(self, node):
        os.kill(node.process.pid, signal.SIGKILL)
        node.process.wait()

    def test_node_starts_again_when_it_was_killed_during_a_task(self):
        node = Node(self, self.cwd)
        node.wait_until_it_answers()
        host = process_behind(self.sockets / "machinerymanager.sock")
        self.addCleanup(lambda: start_time(host) and os.kill(host, signal.SIGTERM))
        self.assertEqual(node.start_task(TASKS[0], "good")[0], 200)
        node.wait_for_machine("good", state="running")
        workers = self.workers()
        self.assertEqual(sorted(workers), ["HostedTaskRunner.start", "ResultServer.start"])
        self.kill(node)
        self.assertIn("taskrunner.sock", os.listdir(self.sockets))

        # Each says that it uses the host that is there, and the first one clears the rest.
        again = Node(self, self.cwd)
        again.wait_until_it_answers()
        for name, pid in workers.items():
            wait_until_gone(pid)
            self.assertIn(f"Process {pid} ({name}), left by an earlier node, was ended by SIGTERM", again.output())
        self.assertIn("nodestatecontroller.sock, left by an earlier node, was removed", again.output())
        self.assertIn(f"is used: process {host}", again.output())
        machine = again.machines()["good"]
        self.assertEqual((machine["locked"], machine["state"]), (False, "poweroff"))

        # A second node of the CWD is refused with the first one's process, and disturbs nothing.
        second = Node(self, self.cwd)
        self.assertNotEqual(second.process.wait(TIMEOUT), 0)
        self.assertIn(f"has a node already: process {again.process.pid}, since", second.output())
        self.assertEqual(again.start_task(TASKS[1], "good")[0], 200)
        again.wait_for_machine("good", state="running")
        self.assertEqual(again.end(), 0, again.output())
        self.assertEqual(os.listdir(self.sockets), ["machinerymanager.sock"])
        os.kill(host, signal.SIGTERM)
        wait_until_gone(host)


if __name__ == "__main__":
    unittest.main()
