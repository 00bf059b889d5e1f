"""Errors of a run reach the task's own error file, by Cuckoo3's own thread of a task on a real host."""

import json
import os
import signal
import unittest
import zipfile
from types import SimpleNamespace
from unittest import mock

from cuckoo.common import task as cuckoo_task
from cuckoo.common import taskflow
from cuckoo.common.importing import TaskResultZipper
from cuckoo.common.storage import TaskPaths
from cuckoo.common.strictcontainer import Task
from cuckoo.node import taskrunner as cuckoo_taskrunner
from cuckoo.node.taskflow import StandardTask

from cuckoo_machinery import taskrunner
from cuckoo_machinery.connection import Client, Refused
from cuckoo_machinery.offers import make_machine
from cuckoo_machinery.taskrunner import HostedFlowRunner, HostedTaskRunner, WaitingClient
from tests.support import machines_yaml, start_other_host
from tests.with_cuckoo3.support import AGENT_PORT, Agent, add_task, address, change_yaml, make_cuckoo_cwd

TASK, OTHER_TASK = "20260101-ABCDEF_1", "20260101-ABCDEG_1"


class Flow(StandardTask):
    """A flow whose payload is a function of the test."""

    payload = None

    def machine_online(self):
        type(self).payload()


class RunTest(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cuckoo_cwd(
            self,
            {
                "m": {"ip": address(1), "agent_port": AGENT_PORT, "faults": "{screenshot: panic}"},
                "short": {"ip": address(2), "agent_port": AGENT_PORT, "poweroff_after_ms": 100},
            },
        )
        # A guest of this machinery powers itself off as one of QEMU does.
        guest = {"ip": address(3), "agent_port": AGENT_PORT, "poweroff_after_ms": 100, "snapshot": 1}
        (self.cwd / "conf" / "machineries" / "example.yaml").write_text(machines_yaml({"guest": guest}))
        change_yaml(self.cwd / "conf" / "cuckoo.yaml", lambda values: values.update(machineries=["double", "example"]))
        add_task(self.cwd, TASK, folder="analyses")
        self.host = start_other_host(self, self.cwd)
        self.client = Client(self.cwd / "operational/sockets/machinerymanager.sock")
        for number in (1, 2, 3):
            Agent(self, address(number))
        self.patch(cuckoo_taskrunner, "ResultServerClient", mock.Mock())
        self.patch(taskflow, "MachineryManagerClient", WaitingClient)

    def patch(self, place, name, value):
        patched = mock.patch.object(place, name, value)
        patched.start()
        self.addCleanup(patched.stop)

    def run_task(self, payload, machine="m"):
        """Runs a task, and returns its end and its errors."""
        machine = make_machine(self.client.request("acquire", task_id=TASK, name=machine)["machine"])
        server = SimpleNamespace(socket_path="none")
        runner = HostedFlowRunner(Flow, TASK, TASK.split("_")[0], machine, server)
        runner.analysis.settings.timeout = 0
        self.patch(Flow, "payload", staticmethod(payload))
        ends = []
        runner.task_success, runner.task_failed = lambda: ends.append("done"), lambda: ends.append("failed")
        runner.run()
        self.assertEqual(len(ends), 1)
        path = TaskPaths.runerr_json(TASK)
        return ends[0], json.loads(path.read_text()) if path.exists() else None

    def replace_host(self):
        os.kill(self.host.pid, signal.SIGKILL)
        self.host.end()
        self.host = start_other_host(self, self.cwd)


class Runs(RunTest):
    def test_task_has_no_errors_when_its_run_was_whole(self):
        self.assertEqual(self.run_task(lambda: None), ("done", None))

    def test_task_has_no_errors_when_its_guest_powers_itself_off(self):
        events = self.client.subscribe()
        self.addCleanup(events.close)

        def wait_for_end():
            next(e for e in events if e["event"] == "state" and (e["machine"], e["state"]) == ("guest", "poweroff"))

        self.assertEqual(self.run_task(wait_for_end, "guest"), ("done", None))

    def test_task_fails_with_the_reason_when_its_machine_is_lost(self):
        events = self.client.subscribe()
        self.addCleanup(events.close)
        end, errors = self.run_task(lambda: next(e for e in events if e["event"] == "run_error"), "short")
        self.assertEqual(end, "failed")
        self.assertIn("machine 'short': the state became poweroff by itself", errors["errors"][0])
        self.assertIn("The run was lost before the end of the task: machine 'short'", errors["fatal"][0]["error"])

    def test_task_fails_with_the_reason_when_the_host_was_killed_during_its_run(self):
        end, errors = self.run_task(self.replace_host)
        self.assertEqual(end, "failed")
        self.assertIn("the host has ended during its run", errors["errors"][0])
        self.assertIn("The run was lost before the end of the task", errors["fatal"][0]["error"])
        # A remote main process gets the zipped result.
        path = self.cwd / "result.zip"
        TaskResultZipper(TASK).make_zip(path)
        with zipfile.ZipFile(path) as result:
            self.assertEqual(json.loads(result.read("run_errors.json")), errors)
        # The main process reads the file at the task's end.
        task = Task.from_file(TaskPaths.taskjson(TASK))
        cuckoo_task.merge_run_errors(task)
        self.assertEqual(task.errors.to_dict(), errors)

    def test_task_is_done_with_the_error_when_its_run_goes_on_after_it(self):
        path = str(self.cwd / "storage" / "picture.png")

        def disable():
            with self.assertRaises(Refused):
                self.client.request("screenshot", machine="m", path=path)
            self.assertEqual(self.client.request("state", machine="m")["state"], "running")

        end, errors = self.run_task(disable)
        self.assertEqual((end, errors["fatal"]), ("done", []))
        self.assertIn("screenshot", errors["errors"][0])

    def test_task_is_done_with_the_error_when_its_incomplete_run_has_ended(self):
        def disable_and_stop():
            with self.assertRaises(Refused):
                path = str(self.cwd / "storage" / "picture.png")
                self.client.request("screenshot", machine="m", path=path)
            self.client.request("stop", machine="m")

        end, errors = self.run_task(disable_and_stop)
        self.assertEqual((end, errors["fatal"]), ("done", []))

    def test_task_fails_when_another_task_has_its_machine(self):
        def take_it():
            self.client.request("unlock", machine="m")
            self.client.request("acquire", name="m", task_id=OTHER_TASK)
            self.client.request("restore_start", machine="m")

        end, errors = self.run_task(take_it)
        # The run is that task's.
        self.assertEqual(self.client.request("state", machine="m")["state"], "running")
        self.assertEqual(end, "failed")
        self.assertIn(f"task {OTHER_TASK} has locked it", errors["fatal"][0]["error"])

    def test_task_has_an_error_when_the_host_gives_no_list(self):
        self.patch(taskrunner, "RESTART_TIMEOUT", 0)
        end, errors = self.run_task(self.host.end)
        self.assertEqual(end, "failed")
        self.assertIn("The run may be incomplete", errors["errors"][0])


class Process(unittest.TestCase):
    def test_tasks_have_no_result_when_a_reset_cuts_them_short(self):
        runner = HostedTaskRunner("sock", None)
        flow = mock.Mock(spec=HostedFlowRunner, task=mock.Mock(), taskflow=mock.Mock())
        runner.active_flows.append(flow)
        runner.socks_readers = {"sock": mock.Mock()}
        runner.handle_message("sock", {"action": "stopall"})
        flow.stop.assert_called_once_with()
        for end in (flow.task_success, flow.task_failed):
            self.assertIs(end, flow.taskflow.log.close)

    def test_task_runner_process_uses_the_flow_runner(self):
        self.addCleanup(setattr, cuckoo_taskrunner, "_FlowRunner", cuckoo_taskrunner._FlowRunner)
        with mock.patch.object(cuckoo_taskrunner.TaskRunner, "start"):
            HostedTaskRunner("sock", None).start()
        self.assertIs(cuckoo_taskrunner._FlowRunner, HostedFlowRunner)


if __name__ == "__main__":
    unittest.main()
