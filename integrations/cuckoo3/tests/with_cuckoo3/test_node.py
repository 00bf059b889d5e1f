"""A process of Cuckoo3's node on the host."""

import io
import json
import os
import signal
import unittest
import zipfile
from unittest import mock

from cuckoo.common.storage import TaskPaths
from cuckoo.node.node import NodeTaskStates

from cuckoo_machinery import host as module
from cuckoo_machinery.host import Host
from cuckoo_machinery.node_service import HostedAPI, HostedStateSSE
from tests.support import TIMEOUT, EventRecorder, start_other_host, wait_until_gone
from tests.with_cuckoo3.support import AGENT_PORT, Agent, Node, address, make_cuckoo_cwd, process_behind

TASKS = [f"20260101-ABCDE{number}_1" for number in range(10)]


class NodeTest(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cuckoo_cwd(
            self,
            {
                "good": {"ip": address(1), "agent_port": AGENT_PORT},
                "bad": {"ip": address(2), "faults": "{restore_start: fail}"},
                "other": {"ip": address(3)},
            },
        )

    @property
    def sockets(self):
        return self.cwd / "operational" / "sockets"

    def start_node(self):
        node = Node(self, self.cwd)
        node.wait_until_it_answers()
        return node

    def watch(self):
        """Records events of the node's host, also after a restart."""
        recorder = EventRecorder()
        observer = Host(self.cwd, recorder)
        self.addCleanup(observer.detach)
        # Only the node may start a host.
        patched = mock.patch.object(module, "RESTART_GRACE", TIMEOUT)
        patched.start()
        self.addCleanup(patched.stop)
        observer.attach()
        recorder.wait_for("attached")
        self.assertFalse(observer.is_own)
        return observer.client, recorder

    def assert_nothing_is_abandoned(self, node, host):
        self.assertEqual(node.end(), 0, node.output())
        wait_until_gone(host)
        self.assertEqual(os.listdir(self.sockets), [], node.output())


class TaskTest(NodeTest):
    def test_task_holds_its_machine_while_it_runs(self):
        node = self.start_node()
        host = process_behind(self.sockets / "machinerymanager.sock")
        machines = node.machines()
        self.assertEqual(list(machines), ["good", "bad", "other"])
        self.assertEqual(machines["good"]["machinery_name"], "double")
        events = node.events()
        _, recorder = self.watch()

        self.assertEqual(node.start_task(TASKS[0], "good"), (200, b""))
        recorder.wait_for("locked", machine="good", task_id=TASKS[0])
        recorder.wait_for("state", machine="good", state="running")
        events.wait_for(type="task_state", task_id=TASKS[0], state="task_running")
        self.assertEqual(node.machines()["good"]["locked_by"], TASKS[0])
        node.wait_for_machine("good", state="running")
        # Another task does not get it.
        status, body = node.start_task(TASKS[1], "good")
        self.assertEqual(status, 400)
        self.assertIn("not available", json.loads(body)["error"])

        Agent(self, address(1))
        recorder.wait_for("state", machine="good", state="poweroff")
        recorder.wait_for("unlocked", machine="good")
        events.wait_for(type="task_state", task_id=TASKS[0], state="task_failed")
        self.assertFalse(node.machines()["good"]["locked"])
        self.assertEqual(node.ask("GET", f"/task/{TASKS[0]}")[0], 200)

        # A machine that fails is disabled, and Cuckoo3's main process is notified.
        self.assertEqual(node.start_task(TASKS[2], "bad")[0], 200)
        event = events.wait_for(type="machine_disabled", machine_name="bad")
        events.wait_for(type="task_state", task_id=TASKS[2], state="task_failed")
        self.assertTrue(node.machines()["bad"]["disabled"])
        self.assertEqual(node.machines()["bad"]["disabled_reason"], event["reason"])

        self.assertEqual(node.start_task(TASKS[3], "nope")[0], 400)
        self.assert_nothing_is_abandoned(node, host)

    def test_machine_stays_enabled_when_the_host_is_killed_during_a_task(self):
        node = self.start_node()
        events = node.events()
        client, recorder = self.watch()
        self.assertEqual(node.start_task(TASKS[0], "good")[0], 200)
        recorder.wait_for("state", machine="good", state="running")

        os.kill(process_behind(client.path), signal.SIGKILL)
        recorder.wait_for("attached")
        self.assertEqual(client.request("list")["machines"][0]["locked_by"], TASKS[0])
        Agent(self, address(1))
        recorder.wait_for("unlocked", machine="good")
        events.wait_for(type="task_state", task_id=TASKS[0], state="task_failed")
        # The main process shows the lost run with the result.
        with zipfile.ZipFile(io.BytesIO(node.ask("GET", f"/task/{TASKS[0]}")[1])) as result:
            errors = json.loads(result.read("run_errors.json"))["errors"]
        self.assertIn("the host has ended during its run", errors[0])

        self.assertEqual(node.start_task(TASKS[1], "good")[0], 200)
        recorder.wait_for("state", machine="good", state="running")
        events.wait_for(type="task_state", task_id=TASKS[1], state="task_failed")
        self.assertFalse(node.machines()["good"]["locked"])
        self.assert_nothing_is_abandoned(node, process_behind(client.path))


class Draining(unittest.TestCase):
    def test_node_waits_only_for_results_that_exist(self):
        make_cuckoo_cwd(self, {"m": {}})
        self.addCleanup(signal.signal, signal.SIGUSR1, signal.getsignal(signal.SIGUSR1))
        streamer = HostedStateSSE(mock.Mock())
        api = HostedAPI(mock.Mock(), streamer)
        with mock.patch.object(streamer, "_add_stream_data"):
            for task in TASKS[:2]:
                streamer.task_state(task, NodeTaskStates.TASK_DONE)
        path = TaskPaths.zipped_results(TASKS[0])
        path.parent.mkdir(parents=True)
        path.touch()
        self.assertEqual(api._unfetched(), [TASKS[0]])

    def test_machines_are_disabled_for_the_main_process_when_the_node_drains(self):
        cwd = make_cuckoo_cwd(self, {"m": {"ip": address(1)}})
        node = Node(self, cwd)
        node.wait_until_it_answers()
        main_process = node.events()
        # The node waits for this task's end, which needs the agent.
        self.assertEqual(node.start_task(TASKS[0], "m")[0], 200)
        self.assertFalse(node.machines()["m"]["disabled"])
        node.process.send_signal(signal.SIGUSR1)
        main_process.wait_for(type="machine_disabled", machine_name="m")
        self.assertTrue(node.machines()["m"]["disabled"])


class Lifecycle(NodeTest):
    def test_reset_frees_abandoned_machines(self):
        node = self.start_node()
        client, recorder = self.watch()
        # A task that the node no longer has.
        client.request("acquire", name="good", task_id=TASKS[0])
        client.request("restore_start", machine="good")
        client.request("acquire", name="other", task_id="somebody else's")
        self.assertEqual(node.ask("POST", "/reset"), (200, b""))
        recorder.wait_for("state", machine="good", state="poweroff")
        recorder.wait_for("unlocked", machine="good")
        machines = {machine["name"]: machine for machine in client.request("list")["machines"]}
        self.assertFalse(machines["good"]["locked"])
        self.assertEqual(machines["other"]["locked_by"], "somebody else's")
        self.assertEqual(node.ask("GET", "/state"), (200, b'{"state": "waiting_main"}'))
        Agent(self, address(1))
        self.assertEqual(node.start_task(TASKS[1], "good")[0], 200)
        recorder.wait_for("state", machine="good", state="running")
        recorder.wait_for("unlocked", machine="good")

    def test_node_frees_abandoned_machines_of_a_running_host(self):
        other = start_other_host(self, self.cwd)
        client, recorder = self.watch()
        client.request("acquire", name="good", task_id=TASKS[0])
        client.request("restore_start", machine="good")
        client.request("acquire", name="other", task_id="somebody else's")
        client.request("disable_machine", machine="bad", reason="looked strange")
        client.request("disable")
        node = self.start_node()
        machines = node.machines()
        self.assertEqual((machines["good"]["locked"], machines["good"]["state"]), (False, "poweroff"))
        self.assertEqual(machines["other"]["locked_by"], "somebody else's")
        self.assertEqual(machines["bad"]["disabled_reason"], "looked strange")

        self.assertEqual(node.start_task(TASKS[1], "good")[0], 200)
        recorder.wait_for("locked", machine="good", task_id=TASKS[1])
        recorder.wait_for("state", machine="good", state="running")
        Agent(self, address(1))
        self.assertEqual(node.end(), 0, node.output())
        self.assertFalse(other.has_ended())
        machines = {machine["name"]: machine for machine in client.request("list")["machines"]}
        self.assertEqual((machines["good"]["locked"], machines["good"]["state"]), (False, "poweroff"))
        self.assertEqual(os.listdir(self.sockets), ["machinerymanager.sock"])

    def test_node_fails_with_the_reason_when_no_host_can_start(self):
        yaml = self.cwd / "conf" / "machineries" / "double.yaml"
        yaml.write_text(yaml.read_text().replace("platform", "platfrom"))
        node = Node(self, self.cwd)
        self.assertNotEqual(node.process.wait(TIMEOUT), 0)
        self.assertIn("platfrom", node.output())
        self.assertEqual(os.listdir(self.sockets), [])


if __name__ == "__main__":
    unittest.main()
