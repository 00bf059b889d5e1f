"""The node's manager, and its mirror of the host's machines."""

import os
import signal
import unittest
from types import SimpleNamespace
from unittest import mock

from cuckoo import config as cuckoo_config
from cuckoo.common import config, startup
from cuckoo.common.machines import (
    MachineListDumper,
    MachineListError,
    MachinesList,
    find_in_lists,
    read_machines_dump,
    serialize_machinelists,
)
from cuckoo.common.startup import StartupError
from cuckoo.common.storage import Paths, TaskPaths

from cuckoo_machinery import machines as machines_module
from cuckoo_machinery import manager as module
from cuckoo_machinery.configuration import accept_all_machineries
from cuckoo_machinery.connection import Unreachable, Refused
from cuckoo_machinery.machines import MAX_ERRORS
from cuckoo_machinery.manager import HostedManager, start_machinerymanager
from tests.support import EventRecorder, start_other_host, write_machines
from tests.with_cuckoo3.support import change_yaml, make_cuckoo_cwd, process_behind

TASK = "20260101-ABCDEF_1"
OTHER_TASK = "20260101-ABCDEF_2"

MACHINES = {
    "win": {"platform": "windows", "os_version": '"10"', "tags": "[office, dotnet]", "mac_address": '"02:00:00:00:00:0A"'},
    "lin_1": {"tags": "[gcc]"},
    "lin_2": {"os_version": '"13"', "faults": "{restore_start: fail}", "fault_times": 1},
}  # fmt: skip


class RecordingManager(HostedManager):
    """A manager that records its events."""

    def __init__(self, nodectx):
        super().__init__(nodectx)
        self.recorder = EventRecorder()

    def attached(self):
        super().attached()
        self.recorder.attached()

    def heard(self, event):
        super().heard(event)
        self.recorder.heard(event)


class ManagerTest(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cuckoo_cwd(self, MACHINES)
        self.disabled, self.changes = [], []
        infostream = SimpleNamespace(
            disabled_machine=lambda *event: self.disabled.append(event),
            receiver=SimpleNamespace(machine_changed=self.changes.append),
        )
        self.nodectx = SimpleNamespace(node=SimpleNamespace(infostream=infostream))

    def start(self):
        manager = RecordingManager(self.nodectx)
        self.addCleanup(manager.detach)
        manager.start()
        manager.recorder.wait_for("attached")
        self.request = manager.host.client.request
        return manager

    def kill_host(self, manager):
        os.kill(process_behind(manager.host.client.path), signal.SIGKILL)

    def names(self, machines):
        return [machine.name for machine in machines]


class Machines(ManagerTest):
    def test_list_has_cuckoos_machines(self):
        machines = self.start().machines
        self.assertTrue(machines.loaded)
        self.assertEqual((machines.count(), machines.available_count), (3, 3))
        win = machines.get_by_name("win")
        self.assertEqual((win.platform, win.os_version, win.tags), ("windows", "10", {"office", "dotnet"}))
        self.assertEqual((win.mac_address, win.interface, win.agent_port), ("02:00:00:00:00:0a", "lo", 8000))
        self.assertEqual((win.machinery_name, win.state), ("double", "poweroff"))
        self.assertIs(machines.find(platform="windows"), win)
        self.assertEqual(self.names(machines.get_available()), ["win", "lin_1", "lin_2"])
        self.assertEqual(machines.get_platforms_versions(), {"windows": {"10"}, "linux": {"12", "13"}})
        self.assertEqual(machines.find(tags={"gcc"}).name, "lin_1")
        self.assertEqual(find_in_lists([machines], platform="linux", os_version="13").name, "lin_2")
        self.assertEqual(machines.to_dictlist(), serialize_machinelists(machines))
        with self.assertRaises(KeyError):
            machines.get_by_name("nope")

    def test_list_can_be_dumped_and_read(self):
        machines = self.start().machines
        dumper = MachineListDumper()
        dumper.add_machinelist(machines)
        self.assertTrue(machines.updated and dumper.should_dump())
        dumper.make_dump(Paths.machinestates())
        self.assertFalse(machines.updated)
        self.assertEqual(self.names(read_machines_dump(Paths.machinestates()).machines), ["win", "lin_1", "lin_2"])
        machines.acquire_available(TASK, "win")
        self.assertTrue(machines.updated)

    def test_acquire_chooses_like_cuckoo(self):
        machines = self.start().machines
        for wanted in (
            {"platform": "linux"},
            {"platform": "linux", "os_version": "13"},
            {"platform": "linux", "tags": {"gcc"}},
            {"tags": {"office"}},
            {"os_version": "13"},
            {"name": "lin_2", "platform": "windows"},
            {"platform": "macos"},
            {"tags": {"none"}},
            {},
        ):
            with self.subTest(wanted=wanted):
                expected = machines.copy().acquire_available(TASK, **wanted)
                machine = machines.acquire_available(TASK, **wanted)
                self.assertEqual(machine and machine.name, expected and expected.name)
                if machine:
                    self.assertIs(machine, machines.get_by_name(machine.name))
                    self.assertEqual((machine.locked, machine.locked_by, machine.available), (True, TASK, False))
                    machines.release(machine)
                    self.assertEqual((machine.locked, machine.locked_by, machine.available), (False, "", True))

    def test_acquire_fails_when_another_task_has_the_machine(self):
        machines = self.start().machines
        win = machines.acquire_available(TASK, "win")
        self.assertIsNone(machines.acquire_available(OTHER_TASK, "win"))
        self.assertIsNone(machines.acquire_available(OTHER_TASK, platform="windows"))
        with self.assertRaises(KeyError):
            machines.acquire_available(OTHER_TASK, "nope")
        machines.release(win)
        self.assertIs(machines.acquire_available(OTHER_TASK, "win"), win)

    def test_machine_of_another_program_is_left_alone_when_the_lock_was_forced(self):
        manager = self.start()
        win = manager.machines.acquire_available(TASK, "win")
        self.request("unlock", machine="win")
        self.request("acquire", name="win", task_id="somebody")
        manager.recorder.wait_for("locked", task_id="somebody")
        manager.machines.release(win)
        self.assertEqual((win.locked_by, manager.machines.has_tasks()), ("somebody", False))

    def test_machine_is_released_once_when_the_lock_was_forced(self):
        manager = self.start()
        win = manager.machines.acquire_available(TASK, "win")
        self.request("unlock", machine="win")
        manager.recorder.wait_for("unlocked")
        manager.machines.release(win)
        self.assertFalse(manager.machines.has_tasks())
        with self.assertRaisesRegex(MachineListError, "not locked"):
            manager.machines.release(win)

    def test_acquire_waits_when_the_host_restarts(self):
        manager = self.start()
        self.kill_host(manager)
        self.assertEqual(manager.machines.acquire_available(TASK, "win").locked_by, TASK)

    def test_machines_are_disabled_for_the_main_process_when_the_node_ends(self):
        manager = self.start()
        manager.stop()
        self.assertEqual({machine["disabled"] for machine in manager.machines.described()}, {True})
        self.assertTrue(manager.machines.get_by_name("win").available)

    def test_latest_errors_are_kept_when_there_are_too_many(self):
        manager = self.start()
        for number in range(MAX_ERRORS + 3):
            manager.machines.heard({"event": "run_error", "machine": "win", "task_id": TASK, "reason": str(number)})
        errors = manager.machines.get_by_name("win").errors
        self.assertEqual((len(errors), errors[-1]), (MAX_ERRORS, str(MAX_ERRORS + 2)))

    @mock.patch.object(machines_module, "RESTART_TIMEOUT", 0)
    def test_machine_list_error_is_raised_when_the_host_refuses(self):
        manager = self.start()
        machines = manager.machines
        with self.assertRaisesRegex(MachineListError, "not locked"):
            machines.release(machines.get_by_name("win"))
        manager.disable()
        with self.assertRaisesRegex(MachineListError, "disabled"):
            machines.acquire_available(TASK, "win")
        manager.enable()
        machines.acquire_available(TASK, "win")
        manager.stop()
        with self.assertRaisesRegex(MachineListError, "drained or stopped"):
            machines.acquire_available(OTHER_TASK, "lin_1")
        manager.detach()
        manager.machines._closed = False
        with self.assertRaisesRegex(MachineListError, "machinerymanager.sock"):
            machines.acquire_available(OTHER_TASK, "lin_1")

    def test_copy_is_an_independent_list(self):
        machines = self.start().machines
        copy = machines.copy()
        self.assertIs(type(copy), MachinesList)
        machine = copy.acquire_available(TASK, "win")
        copy.mark_disabled(copy.get_by_name("lin_1"), "main's own knowledge")
        self.assertTrue(machine.locked)
        self.assertEqual(machines.available_count, 3)
        self.assertEqual([machine["locked"] for machine in self.request("list")["machines"]], [False] * 3)

    def test_mirror_shows_changes_of_other_clients(self):
        manager = self.start()
        win = manager.machines.get_by_name("win")
        self.request("reserve", machine="win", task_id="somebody")
        manager.recorder.wait_for("reserved")
        self.assertEqual((win.reserved_by, win.unavailable_reason), ("somebody", "Machine is reserved by somebody"))
        self.request("lock", machine="win", task_id="somebody")
        self.request("restore_start", machine="win")
        manager.recorder.wait_for("state", state="running")
        self.assertEqual((win.locked_by, win.state), ("somebody", "running"))
        self.request("unlock", machine="win")
        self.request("unreserve", machine="win")
        manager.recorder.wait_for("unreserved")
        self.assertTrue(win.available)
        manager.heard({"event": "lost", "count": 3})
        self.assertIs(manager.machines.get_by_name("win"), win)

    def test_mirror_shows_a_reloaded_configuration(self):
        manager = self.start()
        win = manager.machines.get_by_name("win")
        yaml = self.cwd / "conf" / "machineries" / "double.yaml"
        change_yaml(yaml, lambda values: values["machines"]["win"].update(tags=["new"]))
        self.request("reload")
        manager.recorder.wait_for("reloaded")
        self.assertEqual((manager.machines.get_by_name("win"), list(win.tags)), (win, ["new"]))

    def test_disabled_machine_is_available_when_it_is_enabled(self):
        manager = self.start()
        win = manager.machines.get_by_name("win")
        manager.machines.mark_disabled(win, "looks strange")
        self.assertEqual((win.disabled, win.disable_reason), (True, "looks strange"))
        self.assertIsNone(manager.machines.acquire_available(TASK, "win"))
        self.request("enable_machine", machine="win")
        manager.recorder.wait_for("enabled")
        self.assertTrue(win.available)
        self.assertIs(manager.machines.acquire_available(TASK, "win"), win)

    def test_dump_is_written_to_the_task_s_folder(self):
        machines = self.start().machines
        TaskPaths.path(TASK).mkdir(parents=True)
        machines.acquire_available(TASK, "win")
        self.request("restore_start", machine="win")
        self.request("dump_memory", machine="win")
        self.assertTrue(TaskPaths.memory_dump(TASK).exists())
        # A task id that is not Cuckoo3's has no folder.
        self.assertEqual(machines.acquire_available("by hand", "lin_1").locked_by, "by hand")
        self.request("restore_start", machine="lin_1")
        with self.assertRaisesRegex(Refused, "path"):
            self.request("dump_memory", machine="lin_1")


class Manager(ManagerTest):
    def test_node_is_notified_when_a_machine_is_disabled(self):
        manager = self.start()
        with self.assertRaises(Refused) as caught:
            self.request("restore_start", machine="lin_2")
        manager.recorder.wait_for("disabled", machine="lin_2")
        self.assertEqual([name for name, _ in self.disabled], ["lin_2"])
        self.assertIn(self.disabled[0][1], caught.exception.reason)

    def test_machine_is_disabled_in_quarantine_and_available_when_it_has_healed(self):
        manager = self.start()
        lin = manager.machines.get_by_name("lin_2")
        with self.assertRaises(Refused):
            self.request("restore_start", machine="lin_2")
        manager.recorder.wait_for("quarantined", machine="lin_2")
        self.assertTrue(lin.disabled)
        self.assertIsNone(manager.machines.acquire_available(TASK, "lin_2"))
        manager.recorder.wait_for("healed", machine="lin_2")
        self.assertEqual((lin.available, lin.disabled, lin.disable_reason, lin.state), (True, False, "", "poweroff"))
        self.assertIs(manager.machines.acquire_available(TASK, "lin_2"), lin)
        self.assertEqual([name for name, _ in self.disabled], ["lin_2"])

    def test_quarantine_is_mirrored_when_the_host_is_killed(self):
        write_machines(self.cwd, {**MACHINES, "lin_2": {"faults": "{restore_start: fail}"}})
        manager = self.start()
        with self.assertRaises(Refused):
            self.request("restore_start", machine="lin_2")
        manager.recorder.wait_for("quarantined", machine="lin_2")
        write_machines(self.cwd, {**MACHINES, "lin_2": {}})
        self.kill_host(manager)
        manager.recorder.wait_for("attached")
        self.assertTrue(manager.machines.get_by_name("lin_2").disabled)
        manager.recorder.wait_for("healed", machine="lin_2")
        self.assertFalse(manager.machines.get_by_name("lin_2").disabled)

    def test_disabled_machine_is_mirrored_when_there_is_no_node(self):
        self.nodectx.node = None
        manager = self.start()
        self.request("disable_machine", machine="win", reason="early")
        manager.recorder.wait_for("disabled")
        self.assertEqual(self.disabled, [])
        self.assertFalse(manager.machines.copy().get_by_name("win").available)

    def test_reset_stops_and_unlocks_machines_of_tasks(self):
        manager = self.start()
        machine = manager.machines.acquire_available(TASK, "win")
        manager.machines.acquire_available("by hand", "lin_1")
        self.request("restore_start", machine="win")
        manager.disable()
        with self.assertRaisesRegex(Refused, "disabled"):
            self.request("restore_start", machine="win")
        manager.wait_work_done()
        manager.shutdown_all()
        manager.enable()
        manager.recorder.wait_for("unlocked", machine="win")
        self.assertEqual((machine.state, machine.locked), ("poweroff", False))
        self.assertEqual(manager.machines.get_by_name("lin_1").locked_by, "by hand")
        self.request("restore_start", machine="win")

    def test_locks_are_kept_when_the_host_is_killed(self):
        manager = self.start()
        machines = manager.machines
        win, lin = machines.acquire_available(TASK, "win"), machines.acquire_available(OTHER_TASK, "lin_1")
        self.request("restore_start", machine="win")
        # A lock of an earlier node's task.
        self.request("lock", machine="lin_2", task_id="20251231-ABCDEF_1")
        manager.disable()
        self.kill_host(manager)
        # The release waits for the host.
        machines.release(lin)
        self.assertFalse(lin.locked)
        manager.recorder.wait_for("attached")
        self.assertEqual((win.locked_by, win.state), (TASK, "poweroff"))
        self.assertIs(machines.get_by_name("win"), win)
        self.assertFalse(machines.get_by_name("lin_2").locked)
        with self.assertRaisesRegex(Refused, "disabled"):
            self.request("restore_start", machine="win")
        manager.enable()
        manager.wait_work_done()

    def test_mirror_is_replaced_when_a_host_has_other_machines(self):
        manager = self.start()
        lin = manager.machines.get_by_name("lin_1")
        write_machines(self.cwd, {"new": {}, "lin_1": {"ip": "10.9.9.9"}})
        self.kill_host(manager)
        manager.recorder.wait_for("attached")
        self.assertEqual(self.names(manager.machines.machines), ["new", "lin_1"])
        self.assertIs(manager.machines.get_by_name("lin_1"), lin)
        self.assertEqual(lin.ip, "10.9.9.9")

    def test_all_machines_are_offered_again_when_changes_may_have_been_missed(self):
        manager = self.start()

        def after(change):
            self.changes.clear()
            change()
            return sorted(message["machine"]["name"] for message in self.changes)

        def restart():
            self.kill_host(manager)
            manager.recorder.wait_for("attached")

        everything = sorted(MACHINES)
        self.assertEqual(after(lambda: manager.heard({"event": "lagged", "count": 3})), everything)
        self.assertEqual(after(manager.enable), everything)
        self.assertEqual(after(restart), everything)
        self.assertEqual(after(lambda: manager.heard({"event": "reloaded"})), [])

    def test_reset_raises_nothing_when_the_host_is_unreachable(self):
        manager = self.start()
        with mock.patch.object(manager.host.client, "request", side_effect=Unreachable("gone")):
            manager.disable()
            manager.wait_work_done()
            manager.shutdown_all()
            manager.enable()
        self.assertTrue(manager.enabled)

    def test_failed_capture_is_logged(self):
        def capture(values):
            values["tcpdump"] = {"enabled": True, "path": "/bin/false"}

        change_yaml(self.cwd / "conf" / "cuckoo.yaml", capture)
        manager = self.start()
        TaskPaths.path(TASK).mkdir(parents=True)
        machine = manager.machines.acquire_available(TASK, "win")
        with mock.patch.object(module.log, "error") as error:
            self.request("restore_start", machine="win")
            reason = manager.recorder.wait_for("capture_failed")["reason"]
            manager.recorder.wait_for("state", state="running")
        error.assert_called_once_with("Run is incomplete", machine="win", task_id=TASK, error=reason)
        self.assertEqual((machine.state, machine.errors), ("running", [reason]))

    def test_manager_is_stopped_in_the_order_of_the_node_s_shutdown(self):
        with mock.patch.object(module.shutdown, "register_shutdown") as register:
            start_machinerymanager(self.nodectx)
        manager = self.nodectx.machinery_manager
        self.addCleanup(manager.detach)
        self.assertEqual(
            register.mock_calls,
            [
                mock.call(manager.stop),
                mock.call(manager.shutdown_all, order=999),
                mock.call(manager.detach, order=1000),
            ],
        )
        host = process_behind(manager.host.client.path)
        manager.stop()
        manager.shutdown_all()
        self.assertEqual(process_behind(manager.host.client.path), host)
        manager.detach()
        self.assertEqual(os.listdir(self.cwd / "operational" / "sockets"), [])

    def test_another_s_host_runs_on_when_the_node_stops(self):
        other = start_other_host(self, self.cwd)
        manager = self.start()
        manager.machines.acquire_available(TASK, "win")
        manager.stop()
        manager.shutdown_all()
        manager.detach()
        self.assertFalse(other.has_ended())
        self.assertEqual([machine["locked"] for machine in self.request("list")["machines"]], [False] * 3)

    def test_startup_error_is_raised_when_the_host_cannot_start(self):
        write_machines(self.cwd, {"win": {"platfrom": "windows"}})
        with mock.patch.object(module.shutdown, "register_shutdown"), self.assertRaisesRegex(StartupError, "platfrom"):
            start_machinerymanager(self.nodectx)
        manager = self.nodectx.machinery_manager
        manager.stop()
        manager.shutdown_all()
        manager.detach()


class Configuration(ManagerTest):
    def test_unknown_machineries_are_accepted(self):
        with self.assertRaisesRegex(StartupError, "'double' does not exist"):
            startup.load_configuration("cuckoo.yaml")
        for owner, name in ((cuckoo_config.Machinery, "constraints"), (startup, "_load_machinery_configs")):
            self.addCleanup(setattr, owner, name, getattr(owner, name))
        accept_all_machineries()
        startup.load_configuration("cuckoo.yaml")
        startup._load_machinery_configs()
        self.assertEqual(config.cfg("cuckoo", "machineries"), ["double"])
        # Cuckoo3 still checks the machineries that it knows.
        change_yaml(self.cwd / "conf" / "cuckoo.yaml", lambda values: values.update(machineries=["double", "qemu"]))
        startup.load_configuration("cuckoo.yaml")
        with self.assertRaisesRegex(StartupError, "qemu.yaml"):
            startup._load_machinery_configs()


if __name__ == "__main__":
    unittest.main()
