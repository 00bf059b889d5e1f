"""A main process with three nodes: each task is reported once, whatever happens to a node.

Two nodes have machines in memory, whose agents run on the node. One has analysis guests in QEMU, from the CWD in
`$QEMU_CWD`. Each sample writes its number into a file, which the result server receives.
"""

import os
import re
import signal
import subprocess
import sys
import unittest
from collections import Counter
from pathlib import Path

from cuckoo_machinery.host import find_program

from .lab import Lab, TimeLine, wait_until
from .network import make_main_network

TASKS = 60
# The seconds of one analysis. An emulated guest is slow.
SECONDS = 12
# The longest time in which a node that is cut off is missed, and a node is back. In seconds.
NOTICED = 120

STARTED = re.compile(r"Assigning startable task to node\. task_id=(\S+) node=(\S+)")
REPORTED = re.compile(r"Setting task to reported\. task_id=(\S+)")
LOST = "Node is lost. Its tasks wait for another one. node={}"
READY = "Node is ready. node={}"


class Distributed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        make_main_network()

    def setUp(self):
        self.times = TimeLine()
        self.lab = Lab(self)
        self.has_passed = False
        self.addCleanup(self.show_outputs_after_a_failure)
        self.lab.add_node("first", "double").use_doubles()
        self.lab.add_node("second", "double").use_doubles()
        self.lab.add_node("real", "qemu").use_qemu(Path(os.environ["QEMU_CWD"]))
        self.lab.prepare()
        self.start(*self.lab.nodes.values())
        self.lab.start_main()
        self.times.note("main process and three nodes are ready")

    def show_outputs_after_a_failure(self):
        if not self.has_passed:
            for program in (self.lab.main, *(node.program for node in self.lab.nodes.values())):
                if program:
                    print(f"--- {program.root.name}\n{program.output()}", file=sys.stderr)

    # The log of the main process

    @property
    def log(self):
        return (self.lab.root / "log" / "cuckoo.log").read_text()

    def runs(self):
        """Returns the nodes to which each task was given, in order."""
        runs = {}
        for task, node in STARTED.findall(self.log):
            runs.setdefault(task, []).append(node)
        return runs

    def reported(self):
        """Returns how often each task was reported."""
        return Counter(REPORTED.findall(self.log))

    def wait_for_reports(self, count):
        wait_until(lambda: len(self.reported()) >= count, f"{count} tasks are reported", 900)

    def wait_for_log(self, text, count):
        wait_until(lambda: self.log.count(text) >= count, f"the log has {text!r} {count} times", NOTICED)

    # The nodes

    def start(self, *nodes):
        for node in nodes:
            node.start()
        for node in nodes:
            wait_until(node.answers, f"node {node.name} answers")

    def wait_until_busy(self, node):
        """Waits until both machines of the node have a task."""

        def tasks():
            return [task for task in map(self.lab.task, self.analyses) if task and task["state"] == "running"]

        wait_until(lambda: [task["node"] for task in tasks()].count(node.name) == 2, f"node {node.name} is busy")
        return {task["id"] for task in tasks() if task["node"] == node.name}

    def wait_until_ready(self, node, count):
        self.wait_for_log(READY.format(node.name), count)
        self.times.note(f"{node.name}: ready again")

    # The test

    def test_each_task_is_reported_once_when_nodes_come_and_go(self):
        first, second, real = self.lab.nodes.values()
        self.analyses = self.lab.submit(TASKS, SECONDS)
        self.times.note(f"{TASKS} tasks are submitted")
        self.wait_for_reports(6)

        interrupted = self.kill_and_start_again(first)
        interrupted |= self.cut_off(second)
        adopted, unsure = self.upgrade_host(real)
        drained = self.drain_and_upgrade(real)

        self.wait_for_reports(TASKS)
        self.times.note(f"{TASKS} tasks are reported")
        self.assert_each_task_is_reported_once(interrupted, adopted, unsure, drained)
        self.has_passed = True

    def kill_and_start_again(self, node):
        running = self.wait_until_busy(node)
        node.kill()
        self.times.note(f"{node.name}: killed, with {len(running)} tasks")
        self.wait_for_log(LOST.format(node.name), 1)
        self.times.note(f"{node.name}: missed by the main process")
        self.start(node)
        self.wait_until_ready(node, 2)
        return running

    def cut_off(self, node):
        running = self.wait_until_busy(node)
        node.network.cut()
        self.times.note(f"{node.name}: cut off, with {len(running)} tasks")
        self.wait_for_log(LOST.format(node.name), 1)
        self.times.note(f"{node.name}: missed by the main process")
        node.network.mend()
        self.times.note(f"{node.name}: connected again")
        self.wait_until_ready(node, 2)
        return running

    def drain_and_upgrade(self, node):
        running = self.wait_until_busy(node)
        runs = {task: self.runs()[task] for task in running}
        node.program.process.send_signal(signal.SIGUSR1)
        self.times.note(f"{node.name}: is being drained, with {len(running)} tasks")
        self.assertEqual(node.program.process.wait(NOTICED), 0, node.program.output())
        self.times.note(f"{node.name}: drained")
        self.start(node)
        self.wait_until_ready(node, 2)
        return runs

    def upgrade_host(self, node):
        """Replaces the node's host while tasks run, which keep their machines. Returns the adopted ones with their nodes,
        and those that may have ended before."""
        # The main process calls a task running before its upload, and while its result is fetched.
        wait_until(lambda: len(self.running_on(node)) == 2, f"both machines of node {node.name} run", NOTICED)
        running = self.running_on(node)
        command = [find_program(), "--cwd", str(node.root), "upgrade"]
        upgraded = subprocess.run(command, check=False, capture_output=True, text=True, timeout=NOTICED)
        self.assertEqual(upgraded.returncode, 0, upgraded.stdout + upgraded.stderr)
        adopted = self.running_on(node) & running
        self.times.note(f"{node.name}: host upgraded under {len(running)} tasks, of which it has adopted {len(adopted)}")
        self.assertTrue(adopted, "each task has ended before the upgrade")
        return {task: self.runs()[task] for task in adopted}, running - adopted

    def running_on(self, node):
        """Returns the tasks whose machines run, as the node's host sees them."""
        machines = node.client.request("list")["machines"]
        return {machine["locked_by"] for machine in machines if machine["locked"] and machine["state"] == "running"}

    def assert_each_task_is_reported_once(self, interrupted, adopted, unsure, drained):
        self.assertEqual(set(self.reported().values()), {1})
        runs = self.runs()
        for analysis, number in self.analyses.items():
            task = self.lab.task(analysis)
            self.assertEqual(task["state"], "reported", f"{task}, on {runs[task['id']]}")
            # An adopted run has a gap, which its report shows.
            if task["id"] not in unsure:
                self.assertEqual(bool(task["errors"]), task["id"] in adopted, f"{task}")
            self.assertEqual((task["path"] / "dropped" / "proof").read_text(), number)
        for task, nodes in {**adopted, **drained}.items():
            self.assertEqual(runs[task], nodes, "it ran again")
        repeated = {task: nodes for task, nodes in runs.items() if len(nodes) > 1}
        # A task may have ended just before its node was lost.
        self.assertTrue(set(repeated) & interrupted, f"{interrupted} were interrupted, and {repeated} repeated")
        nodes = Counter(nodes[-1] for nodes in runs.values())
        self.assertEqual(set(nodes), set(self.lab.nodes))
        self.times.note(f"reported by node: {dict(nodes)}; {len(repeated)} tasks ran twice or more: {repeated}")


if __name__ == "__main__":
    unittest.main()
