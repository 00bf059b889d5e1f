"""Cuckoo3's own client has the same results with the host as with Cuckoo3's own manager.

Each case runs against both, on machines that behave the same. The tests compare success or failure, the reason,
the connection, and the state of the machine.
"""

import pickle
import re
import shutil
import tempfile
import threading
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from cuckoo.common import config, taskflow
from cuckoo.common.clients import ActionFailedError, MachineryManagerClient
from cuckoo.common.machines import States
from cuckoo.machineries import errors
from cuckoo.machineries.abstracts import Machinery
from cuckoo.node.machinery import MachineryManager
from cuckoo.node.taskrunner import TaskRunner

from cuckoo_machinery import taskrunner
from cuckoo_machinery.connection import Client, Connection, Unreachable, ask
from cuckoo_machinery.taskrunner import HostedTaskRunner, WaitingClient
from tests.support import TIMEOUT, FakeHost, make_cwd, start_other_host, write_machines

FAULTS = {
    "good": [],
    "no_start": ["restore_start"],
    "no_stop": ["stop"],
}


class MemoryMachinery(Machinery):
    """Machines in memory, driven by Cuckoo3's manager. It cannot start without a snapshot."""

    name = "memory"

    def init(self):
        self._states = {}

    def restore_start(self, machine):
        self._act(machine, "restore_start", States.RUNNING)

    def stop(self, machine):
        if self.state(machine) == States.POWEROFF:
            raise errors.MachineStateReachedError("it is off")
        self._act(machine, "stop", States.POWEROFF)

    def acpi_stop(self, machine):
        self._act(machine, "acpi_stop", States.POWEROFF)

    def state(self, machine):
        return self._states.get(machine.name, States.POWEROFF)

    def _act(self, machine, action, state):
        if action in FAULTS[machine.name]:
            raise errors.MachineryError("configured to fail")
        self._states[machine.name] = state


class CuckoosManager:
    """Cuckoo3's manager, in this process."""

    def __init__(self, case):
        folder = tempfile.mkdtemp(prefix="machinery-cwd.")
        case.addCleanup(shutil.rmtree, folder)
        self.path = Path(folder, "machinerymanager.sock")
        shared = {
            "platform": "linux", "os_version": "12", "tags": [], "snapshot": None, "architecture": "amd64",
            "interface": "lo", "agent_port": 8000, "mac_address": "",
        }  # fmt: skip
        machines = {
            name: {"label": name, "ip": f"10.0.0.{number}", **shared} for number, name in enumerate(FAULTS, start=1)
        }
        configured = mock.patch.dict(config._cache, {"machineries": {"memory.yaml": {"machines": machines}}})
        configured.start()
        case.addCleanup(configured.stop)
        infostream = SimpleNamespace(disabled_machine=lambda name, reason: None)
        self._manager = MachineryManager(self.path, SimpleNamespace(node=SimpleNamespace(infostream=infostream)))
        self._manager.load_machineries([MemoryMachinery], previous_machinelist=None)
        listening, create = threading.Event(), self._manager.create_socket
        self._manager.create_socket = lambda: (create(), listening.set())
        self._thread = threading.Thread(target=self._manager.start)
        self._thread.start()
        case.addCleanup(self._end)
        listening.wait(TIMEOUT)

    def _end(self):
        self._manager.stop()
        for thread in [self._thread, *self._manager.workers]:
            thread.join(TIMEOUT)

    def disable(self):
        self._manager.disable()

    def fate(self, name):
        """Returns the machine's availability and state."""
        machine = self._manager.machines.get_by_name(name)
        return machine.disabled, machine.machinery.state(machine)

    def wait_for(self, name, state):
        """Waits until the machine has that state."""
        deadline = time.monotonic() + TIMEOUT
        while self.fate(name)[1] != state and time.monotonic() < deadline:
            self._manager.wait_work_done()


class OurHost:
    """The host, with the double machinery."""

    def __init__(self, case):
        root = make_cwd(case)
        keys = {name: "{" + ", ".join(f"{action}: fail" for action in faults) + "}" for name, faults in FAULTS.items()}
        machines = {name: {"faults": faults} for name, faults in keys.items()}
        machines["good"]["delays_ms"] = "{restore_start: 100}"
        write_machines(root, machines, "capabilities: {norestore_start: false}")
        start_other_host(case, root)
        self.path = root / "operational/sockets/machinerymanager.sock"
        self._client = Client(self.path)
        self._events = self._client.subscribe()
        case.addCleanup(self._events.close)

    def disable(self):
        self._client.request("disable")

    def fate(self, name):
        """Returns the machine's availability and state."""
        machines = {machine["name"]: machine for machine in self._client.request("list")["machines"]}
        return machines[name]["disabled"], machines[name]["state"]

    def wait_for(self, name, state):
        """Waits until the machine has that state."""
        wanted = {"event": "state", "machine": name, "state": state}
        next(event for event in self._events if event == wanted)


def outcome(act, *args, **keys):
    """Returns the result as Cuckoo3's task flow sees it."""
    try:
        act(*args, **keys)
    except ActionFailedError as error:
        return kind(str(error).split("Reason: ")[-1])
    return "success"


def kind(reason):
    """Returns the part of the reason that both sides share."""
    if re.search("support", reason):
        return "not supported"
    if "configured to fail" in reason:
        return "the machinery's own error"
    # Cuckoo3 sends the text of a KeyError, which is in quotes.
    return reason.strip("'")


def talk(path, *messages):
    """Returns the answers to these messages on one connection, and its state after them."""
    with Connection(path) as connection:

        def answer(message):
            connection.send(message)
            answer = connection.receive(time.monotonic() + TIMEOUT)
            return answer["success"], kind(answer.get("reason", ""))

        answers = [answer(message) for message in messages]
        try:
            answer({"action": "stop", "machine": "good"})
        except Unreachable:
            return answers, "closed"
        return answers, "open"


class Parity(unittest.TestCase):
    def both(self, case):
        """Asserts that a case has the same result with both managers, and returns it."""
        with self.subTest(case=case.__name__):
            expected = case(CuckoosManager(self))
            self.assertEqual(case(OurHost(self)), expected)
            return expected

    def test_actions(self):
        def actions(manager):
            client = MachineryManagerClient(manager.path)
            return [
                outcome(client.restore_start, "good"),
                manager.fate("good"),
                outcome(client.stop, "good"),
                manager.fate("good"),
                outcome(client.stop, "good"),
                outcome(client.restore_start, "good"),
                outcome(client.acpi_stop, "good"),
                manager.fate("good"),
                outcome(client.norestore_start, "good"),
                manager.fate("good"),
            ]

        got = self.both(actions)
        self.assertEqual(got[0], "success")
        self.assertEqual(got[-2:], ["not supported", (False, "poweroff")])

    def test_machinery_failures(self):
        def failures(manager):
            client = MachineryManagerClient(manager.path)
            return [
                outcome(client.restore_start, "no_start"),
                manager.fate("no_start"),
                outcome(client.restore_start, "no_stop"),
                outcome(client.stop, "no_stop"),
                manager.fate("no_stop")[0],
                outcome(client.restore_start, "nope"),
            ]

        got = self.both(failures)
        self.assertEqual(got[:2], ["the machinery's own error", (True, "poweroff")])
        self.assertEqual(got[3:5], ["the machinery's own error", True])
        self.assertIn("nope", got[5])

    def test_refused_requests(self):
        refused = [
            {"action": "restore_start"},
            {"machine": "good"},
            {"other": 1},
            {"action": "", "machine": ""},
            {"action": "dance", "machine": "good"},
            {"action": "dance", "machine": "nope"},
            {"action": "restore_start", "machine": "nope"},
        ]

        def refusals(manager):
            return [talk(manager.path, message) for message in refused]

        got = self.both(refusals)
        self.assertEqual([state for _, state in got], ["closed"] * 5 + ["open"] * 2)

    def test_disabled_manager(self):
        def disabled(manager):
            client = MachineryManagerClient(manager.path)
            started = outcome(client.restore_start, "good")
            manager.disable()
            return [
                started,
                outcome(client.restore_start, "good"),
                talk(manager.path, {"action": "acpi_stop", "machine": "good"}),
                talk(manager.path, {"machine": "good"}),
                talk(manager.path, {"action": "stop"}),
                outcome(client.stop, "good"),
                manager.fate("good"),
            ]

        self.assertEqual(self.both(disabled)[1], "Machinery manager is disabled")

    def test_requests_on_one_connection(self):
        def several(manager):
            return talk(
                manager.path,
                {"action": "restore_start", "machine": "good"},
                {"action": "stop", "machine": "good"},
                {"action": "restore_start", "machine": "nope"},
                {"action": "restore_start", "machine": "good"},
            )

        self.assertEqual(self.both(several)[1], "open")

    def test_client_that_disconnects_is_served(self):
        def leaves(manager):
            client = MachineryManagerClient(manager.path)
            client.restore_start("good", wait_response=False)
            manager.wait_for("good", "running")
            client.stop("good", wait_response=False)
            manager.wait_for("good", "poweroff")
            return manager.fate("good")

        self.assertEqual(self.both(leaves), (False, "poweroff"))


class Waiting(unittest.TestCase):
    """The waiting client has the results of Cuckoo3's own, sooner."""

    def setUp(self):
        self.host = OurHost(self)

    def test_waiting_client_has_the_same_results(self):
        own, waiting = MachineryManagerClient(self.host.path), WaitingClient(self.host.path)
        for action, name in (
            ("restore_start", "good"),
            ("stop", "good"),
            ("stop", "nope"),
            ("norestore_start", "good"),
            ("dance", "good"),
            ("restore_start", ""),
            ("restore_start", "no_start"),
        ):
            with self.subTest(action=action, machine=name):
                seen = []
                for client in (own, waiting):
                    try:
                        seen.append(client.machine_action(action, name))
                    except ActionFailedError as error:
                        seen.append(str(error))
                self.assertEqual(seen[0], seen[1])

    def test_waiting_client_returns_sooner(self):
        took = []
        for client in (MachineryManagerClient(self.host.path), WaitingClient(self.host.path)):
            began = time.monotonic()
            client.restore_start("good")
            took.append(time.monotonic() - began)
            client.stop("good")
        own, waiting = took
        print(f"a restore_start of 0.1 s takes Cuckoo3's client {own:.2f} s, and ours {waiting:.2f} s", flush=True)
        self.assertLess(waiting, own / 2)

    def test_action_runs_when_its_response_is_not_awaited(self):
        events = Client(self.host.path).subscribe()
        self.addCleanup(events.close)
        self.assertIsNone(WaitingClient(self.host.path).restore_start("good", wait_response=False))
        self.assertEqual([event["state"] for _, event in zip(range(2), events)], ["starting", "running"])

    def test_action_fails_when_no_answer_comes(self):
        with self.assertRaisesRegex(ActionFailedError, "/none/such.sock"):
            WaitingClient("/none/such.sock").restore_start("good")
        for wait in (True, False):
            with self.assertRaises(ActionFailedError):
                WaitingClient("/none/such.sock").stop("good", wait_response=wait)
        at_once = mock.patch.object(taskrunner, "ask", lambda path, message, _, **keys: ask(path, message, 0, **keys))
        with at_once, self.assertRaisesRegex(ActionFailedError, "took longer than 120 seconds"):
            WaitingClient(self.host.path).restore_start("good")

    def test_action_fails_when_the_host_closes_the_connection(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name, "sock")
        FakeHost(self, path, lambda _: None)
        with self.assertRaisesRegex(ActionFailedError, "is lost"):
            WaitingClient(path).restore_start("good")

    def test_task_runner_process_uses_the_waiting_client(self):
        runner = pickle.loads(pickle.dumps(HostedTaskRunner("sock", None)))
        original = taskflow.MachineryManagerClient
        self.addCleanup(setattr, taskflow, "MachineryManagerClient", original)
        with mock.patch.object(TaskRunner, "start") as start:
            runner.start()
        start.assert_called_once()
        self.assertIs(taskflow.MachineryManagerClient, WaitingClient)


if __name__ == "__main__":
    unittest.main()
