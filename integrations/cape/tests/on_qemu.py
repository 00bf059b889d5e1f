# SPDX-License-Identifier: GPL-3.0-or-later
"""CAPE on machines of QEMU, in the CWD that `$MACHINERY_CWD` names. The guests are not CAPE's: a test ends each task."""

import os
import signal
import unittest
from pathlib import Path

from tests.support import Host
from tests.test_machines import CapeCase


def qemu_of(machine):
    """Returns the process of a machine's QEMU."""
    folder = f"/machines/{machine}/"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "qemu-system" in command[0] and any(folder in word for word in command):
            if any(os.environ["MACHINERY_CWD"] in word for word in command):
                return int(process.name)
    raise AssertionError(f"machine {machine} has no QEMU")


class TestQemu(CapeCase):
    def setUp(self):
        self.host = Host(self, os.environ["MACHINERY_CWD"])
        self.names = [machine["name"] for machine in self.host.client.request("list")["machines"]]

    def test_twenty_tasks_complete(self):
        cape = self.start_cape()
        tasks = [cape.submit() for _ in range(20)]
        used = set()
        for task in tasks:
            used.add(cape.run_guest(task))
            self.assert_completed(cape.finish(task))
        self.assertEqual(used, set(self.names))
        for machine in self.host.client.request("list")["machines"]:
            self.assertEqual((machine["state"], machine["disabled"]), ("poweroff", False), machine)

    def test_task_gets_another_machine_when_a_snapshot_is_missing(self):
        cape = self.start_cape()
        name = self.names[0]
        snapshot = self.host.root / "machines" / name / "memory.snapshot"
        snapshot.rename(snapshot.with_suffix(".away"))
        task = cape.submit(machine=name)
        self.assertEqual(cape.finished(task)["status"], "pending")
        self.assertIn(cape.run_guest(task), self.names[1:])
        self.assert_completed(cape.finish(task))
        snapshot.with_suffix(".away").rename(snapshot)
        self.host.client.request("enable_machine", machine=name)
        self.assert_runs_on_all(cape)

    def test_task_fails_when_qemu_is_killed(self):
        cape = self.start_cape()
        task = cape.submit(machine=self.names[0])
        cape.run_guest(task)
        os.kill(qemu_of(self.names[0]), signal.SIGKILL)
        self.host.wait_for(self.names[0], lambda machine: machine["run_errors"])
        end = cape.finish(task)
        self.assertEqual(end["status"], "failed_analysis")
        self.assertIn("killed by signal 9", end["errors"][0])
        self.assert_runs_on_all(cape)

    def test_task_completes_with_an_error_when_another_host_adopts_its_run(self):
        cape = self.start_cape()
        task = cape.submit(machine=self.names[0])
        cape.run_guest(task)
        qemu = qemu_of(self.names[0])
        self.host.kill()
        self.host.start()
        self.assertEqual(self.host.machine(self.names[0])["state"], "running")
        self.assertEqual(qemu_of(self.names[0]), qemu)
        end = cape.finish(task)
        self.assertEqual(end["status"], "completed")
        self.assertEqual(len(end["errors"]), 1, end)
        self.assert_runs_on_all(cape)

    def assert_runs_on_all(self, cape):
        for name in self.names:
            task = cape.submit(machine=name)
            self.assertEqual(cape.run_guest(task), name)
            self.assert_completed(cape.finish(task))


if __name__ == "__main__":
    unittest.main()
