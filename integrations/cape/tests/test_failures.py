# SPDX-License-Identifier: GPL-3.0-or-later
"""Failures of machines, guests, the host and CAPE: each costs at most one task, and no machine of the pool."""

import unittest

from tests.support import Cape, export, write_machines
from tests.test_machines import CapeCase

FAILS_ONCE = {"faults": "{restore_start: fail}", "fault_times": 1}
# A failed machine could heal before the test looks at it.
STAYS_DISABLED = "heal: off\n"


class TestStart(CapeCase):
    """A start that fails."""

    def assert_runs_on(self, machine):
        """Expects that a task which may only use this machine completes."""
        task = self.cape.submit(machine=machine)
        self.assertEqual(self.cape.run_guest(task), machine)
        self.assert_completed(self.cape.finish(task))

    def test_task_gets_another_machine_when_a_start_disables_its_own(self):
        host = self.start_host({"m1": FAILS_ONCE, "m2": {}}, STAYS_DISABLED)
        cape = self.start_cape()
        task = cape.submit(machine="m1")
        self.assertEqual(cape.finished(task)["status"], "pending")
        self.assertEqual(cape.run_guest(task), "m2")
        self.assert_completed(cape.finish(task))
        # CAPE uses the machine without a restart.
        host.client.request("enable_machine", machine="m1")
        self.assert_runs_on("m1")

    def test_task_waits_when_the_only_machine_fails_and_heals(self):
        self.start_host({"m1": FAILS_ONCE})
        cape = self.start_cape()
        task = cape.submit()
        self.assertEqual(cape.finished(task)["status"], "pending")
        self.assertEqual(cape.run_guest(task), "m1")
        self.assert_completed(cape.finish(task))

    def test_only_the_task_fails_when_its_machine_stays_available(self):
        self.start_host({"m1": {"faults": "{restore_start: not_now}", "fault_times": 1}})
        cape = self.start_cape()
        task = cape.submit()
        end = cape.finished(task)
        self.assertEqual(end["status"], "failed_analysis")
        self.assertIn("restore_start m1", end["errors"][0])
        self.assert_runs_on("m1")

    def test_task_waits_when_the_manager_is_disabled(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape()
        host.client.request("disable")
        task = cape.submit()
        self.assertEqual(cape.finished(task)["status"], "pending")
        host.client.request("enable")
        self.assertEqual(cape.run_guest(task), "m1")
        self.assert_completed(cape.finish(task))

    def test_machine_that_an_operator_disabled_is_used_when_it_is_enabled(self):
        host = self.start_host({"m1": {}, "m2": {}})
        host.client.request("disable_machine", machine="m1", reason="under repair")
        cape = self.start_cape()
        task = cape.submit()
        self.assertEqual(cape.run_guest(task), "m2")
        waiting = cape.submit()
        host.client.request("enable_machine", machine="m1")
        self.assertEqual(cape.run_guest(waiting), "m1")
        for number in (task, waiting):
            self.assert_completed(cape.finish(number))

    def test_machine_is_used_again_when_its_guest_does_not_answer(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape()
        task = cape.submit()
        cape.guest(task, "start")
        cape.do(task, "time out")
        # CAPE only logs this.
        self.assert_completed(cape.finished(task))
        machine = host.machine("m1")
        self.assertEqual((machine["state"], machine["locked_by"]), ("poweroff", ""))
        self.assert_runs_on("m1")

    def test_machine_is_withheld_when_its_stop_fails(self):
        host = self.start_host({"m1": {"faults": "{stop: fail}", "fault_times": 1}}, STAYS_DISABLED)
        cape = self.start_cape()
        task = cape.submit()
        cape.run_guest(task)
        cape.do(task, "finish")
        self.assertEqual(cape.finished(task)["status"], "completed")
        self.assertTrue(host.machine("m1")["disabled"])
        task = cape.submit()
        self.assertEqual(cape.finished(task)["status"], "pending")
        host.client.request("enable_machine", machine="m1")
        self.assertEqual(cape.run_guest(task), "m1")
        self.assert_completed(cape.finish(task))


    def test_task_completes_with_the_error_when_its_run_is_only_incomplete(self):
        host = self.start_host({"m1": {"faults": "{screenshot: panic}", "fault_times": 1}})
        cape = self.start_cape()
        task = cape.submit()
        cape.run_guest(task)
        self.assertFalse(host.ask({"action": "screenshot", "machine": "m1", "path": str(host.root / "screen")})["success"])
        # The guest is off at the end of the task, which is no loss.
        host.client.request("stop", machine="m1")
        end = cape.finish(task)
        self.assertEqual((end["status"], len(end["errors"])), ("completed", 1), end)
        self.assertIn("screenshot", end["errors"][0])


class TestHost(CapeCase):
    """A host that ends."""

    def test_start_waits_when_the_host_restarts(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape()
        host.end()
        task = cape.submit()
        cape.wait_for_log("Task #1: Starting analysis")
        host.start()
        self.assertEqual(cape.run_guest(task), "m1")
        self.assert_completed(cape.finish(task))

    def test_task_waits_when_the_host_is_away_for_longer_than_the_patience(self):
        host = self.start_host({"m1": {}, "m2": {}})
        cape = self.start_cape(patience=0)
        host.end()
        task = cape.submit()
        for _ in range(2):
            self.assertEqual(cape.finished(task)["status"], "pending")
        host.start()
        self.assertIn(cape.run_guest(task), ("m1", "m2"))
        self.assert_completed(cape.finish(task))

    def test_task_fails_when_its_machine_is_lost_with_the_host(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape()
        task = cape.submit()
        cape.run_guest(task)
        host.kill()
        host.start()
        end = cape.finish(task)
        self.assertEqual(end["status"], "failed_analysis")
        self.assertTrue(end["errors"], end)
        again = cape.submit()
        self.assertEqual(cape.run_guest(again), "m1")
        self.assert_completed(cape.finish(again))

    def test_task_fails_when_the_host_is_away_at_its_end(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape(patience=0)
        task = cape.submit()
        cape.run_guest(task)
        host.kill()
        end = cape.finish(task)
        self.assertEqual(end["status"], "failed_analysis")
        self.assertIn("No machinery host answers", end["errors"][0])
        host.start()
        again = cape.submit()
        self.assertEqual(cape.run_guest(again), "m1")
        self.assert_completed(cape.finish(again))


class TestCape(CapeCase):
    """A CAPE that ends, or may not start."""

    def refusal(self, conf):
        """Returns the reason why CAPE does not start."""
        cape = Cape(self, conf, self.postgres.new_database(), patience=0)
        event = cape.start()
        self.assertEqual(event["event"], "refused")
        return event["reason"]

    def test_machines_are_used_again_when_cape_was_killed(self):
        host = self.start_host({"m1": {}, "m2": {}})
        cape = self.start_cape()
        task = cape.submit()
        lost = cape.run_guest(task)
        cape.kill()
        machine = host.machine(lost)
        self.assertEqual((machine["state"], machine["locked_by"]), ("running", f"cape:{cape.root}"))
        self.assertEqual(cape.start()["event"], "ready")
        machine = host.machine(lost)
        self.assertEqual((machine["state"], machine["locked_by"]), ("poweroff", ""))
        for name in ("m1", "m2"):
            task = cape.submit(machine=name)
            self.assertEqual(cape.run_guest(task), name)
            self.assert_completed(cape.finish(task))

    def test_other_machines_are_free_when_the_stop_of_one_fails_at_the_end(self):
        host = self.start_host({"m1": {"faults": "{stop: fail}"}, "m2": {}}, STAYS_DISABLED)
        cape = self.start_cape()
        owner = f"cape:{cape.root}"
        # As during an analysis, for whose end CAPE would wait.
        for name in ("m1", "m2"):
            host.client.request("lock", machine=name, task_id=owner)
            host.client.request("restore_start", machine=name)
        self.assertEqual(cape.end(), 0)
        self.assertEqual(host.machine("m1")["reserved_by"], owner)
        self.assertIn("Machine m1 is still reserved", cape.log())
        machine = host.machine("m2")
        self.assertEqual((machine["state"], machine["locked_by"], machine["reserved_by"]), ("poweroff", "", ""))

    def test_cape_does_not_start_when_another_program_has_a_machine(self):
        host = self.start_host({"m1": {}, "m2": {}})
        conf = export(host.root)
        host.client.request("lock", machine="m2", task_id="20261124-ABCDEF_1")
        reason = self.refusal(conf)
        self.assertIn("m2", reason)
        self.assertIn("20261124-ABCDEF_1", reason)
        host.client.request("unlock", machine="m2")
        host.client.request("reserve", machine="m2", task_id="other")
        self.assertIn("other", self.refusal(conf))
        self.assertEqual(host.machine("m2")["state"], "poweroff")

    def test_other_programs_are_refused_while_cape_has_the_machines(self):
        host = self.start_host({"m1": {}})
        cape = self.start_cape()
        answer = host.ask({"action": "acquire", "task_id": "20261124-ABCDEF_1", "name": "m1"})
        self.assertIn(f"reserved by cape:{cape.root}", answer["reason"])

    def test_cape_does_not_start_when_its_machines_differ_from_those_of_the_host(self):
        host = self.start_host({"m1": {}, "m2": {}})
        conf = export(host.root)
        host.end()
        write_machines(host.root, {"m1": {"ip": "10.9.9.9"}})
        host.start()
        reason = self.refusal(conf)
        self.assertIn("m1 has another address", reason)
        self.assertIn("m2 is no machine of the host", reason)
        self.assertIn("cuckoo-machinery export cape", reason)

    def test_cape_does_not_start_when_the_host_is_away(self):
        host = self.start_host({"m1": {}})
        conf = export(host.root)
        host.end()
        self.assertIn("No machinery host answers", self.refusal(conf))


if __name__ == "__main__":
    unittest.main()
