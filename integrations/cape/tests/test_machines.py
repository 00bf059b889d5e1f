# SPDX-License-Identifier: GPL-3.0-or-later
"""CAPE's scheduler and machinery manager on machines in memory."""

import unittest

from PIL import Image

from tests.support import Cape, Host, Postgres, export, make_cwd

OWNER = "cape:"


class CapeCase(unittest.TestCase):
    """A test with a database, and at most one host and one CAPE."""

    @classmethod
    def setUpClass(cls):
        cls.postgres = Postgres()
        cls.addClassCleanup(cls.postgres.end)

    def start_host(self, machines, more=""):
        self.host = Host(self, make_cwd(self, machines, more))
        return self.host

    def start_cape(self, **settings):
        self.cape = Cape(self, export(self.host.root), self.postgres.new_database(), **settings)
        self.assertEqual(self.cape.start()["event"], "ready")
        return self.cape

    def assert_completed(self, event):
        self.assertEqual((event["status"], event["errors"]), ("completed", []), event)


class TestMachines(CapeCase):
    def test_machines_are_reserved_for_cape_until_it_ends(self):
        host = self.start_host({"m1": {}, "m2": {}})
        cape = self.start_cape()
        for machine in host.client.request("list")["machines"]:
            self.assertEqual(machine["reserved_by"], f"{OWNER}{cape.root}")
        self.assertEqual(cape.end(), 0)
        for machine in host.client.request("list")["machines"]:
            self.assertEqual((machine["reserved_by"], machine["locked_by"]), ("", ""))

    def test_task_runs_under_a_lock_and_leaves_the_machine_off(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape()
        for _ in range(2):
            task = cape.submit()
            self.assertEqual(cape.run_guest(task), "m1")
            machine = host.machine("m1")
            self.assertEqual((machine["state"], machine["locked_by"]), ("running", f"{OWNER}{cape.root}"))
            self.assert_completed(cape.finish(task))
            machine = host.machine("m1")
            self.assertEqual((machine["state"], machine["locked_by"]), ("poweroff", ""))

    def test_screenshot_is_a_jpeg_and_dump_is_a_file_of_cape(self):
        self.start_host({"m1": {}})
        cape = self.start_cape(screenshots="on")
        task = cape.submit(memory=True)
        cape.run_guest(task)
        cape.storage(task).joinpath("shots").mkdir(exist_ok=True)
        cape.do(task, "screenshot")
        cape.guest(task, "run")
        self.assert_completed(cape.finish(task))
        with Image.open(cape.storage(task) / "shots" / "0001.jpg") as image:
            self.assertEqual(image.format, "JPEG")
        self.assertGreater((cape.storage(task) / "memory.dmp").stat().st_size, 0)


if __name__ == "__main__":
    unittest.main()
