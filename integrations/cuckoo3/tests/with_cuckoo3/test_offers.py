"""Cuckoo3's main process follows the machines that its nodes offer."""

import asyncio
import threading
import time
import unittest
from types import SimpleNamespace
from unittest import mock

from cuckoo.common.machines import Machine, MachinesList
from cuckoo.common.route import Routes
from cuckoo.common.storage import TaskPaths
from cuckoo.node.node import Node as CuckooNode
from cuckoo.node.node import NodeError

from cuckoo_machinery import machines, offers
from cuckoo_machinery.connection import Client
from cuckoo_machinery.manager import HostedManager
from tests.support import TIMEOUT, write_machines
from tests.with_cuckoo3.support import PORT, Node, add_task, address, make_cuckoo_cwd

try:
    from cuckoo.nodeclient import NodeActionError, NodeClientLoop, NodeUnavailableError
    from cuckoo.scheduler import NodesTracker

    from cuckoo_machinery import local_client, remote_client
    from cuckoo_machinery.local_client import HostedLocalNodeClient, HostedStreamReceiver
    from cuckoo_machinery.node_requests import HostedNodeAPI
    from cuckoo_machinery.remote_client import HostedNodeClient
except ImportError as error:
    raise unittest.SkipTest(f"Cuckoo3's package core cannot be loaded: {error}") from None

TASK = "20260101-ABCDEF_1"


def machine(name, **keys):
    """Returns a machine of a node."""
    keys = {"ip": "10.0.0.1", "platform": "linux", "os_version": "12", "tags": {"a", "b"}, **keys}
    return Machine(name, f"{name}-label", state="poweroff", **keys)


def names(machines):
    return [machine.name for machine in machines]


class Messages(unittest.TestCase):
    """The node's messages, without a host."""

    def setUp(self):
        self.sent = []
        self.offers = offers.Offers(self.sent.append)
        self.machines = [machine("m"), machine("n")]
        self.update()
        self.sent.clear()

    def update(self):
        self.offers.update(self.machines, lambda task_id: task_id == TASK)
        sent, self.sent[:] = list(self.sent), []
        return [(message["type"], message.get("machine_name") or message["machine"]["name"]) for message in sent]

    def test_message_is_sent_when_another_program_locks_and_unlocks(self):
        self.machines[0].lock("somebody")
        self.assertEqual(self.update(), [("machine_offered", "m")])
        self.machines[0].clear_lock()
        self.assertEqual(self.update(), [("machine_offered", "m")])
        self.machines[1].reserve(TASK)
        self.assertEqual(self.update(), [("machine_offered", "n")])

    def test_message_is_not_sent_when_a_task_of_the_main_process_locks(self):
        self.machines[0].lock(TASK)
        self.machines[0].state = "running"
        self.machines[0].add_error("an error")
        self.assertEqual(self.update(), [])

    def test_message_is_sent_when_a_machine_is_enabled_and_not_when_it_is_disabled(self):
        self.machines[0].disable("strange")
        self.assertEqual(self.update(), [])
        self.machines[0].disabled = False
        self.assertEqual(self.update(), [("machine_offered", "m")])

    def test_all_machines_are_sent_again_when_changes_may_have_been_missed(self):
        self.offers.repeat()
        del self.machines[1]
        self.assertEqual(self.update(), [("machine_offered", "m"), ("machine_removed", "n")])
        self.assertEqual(self.update(), [])

    def test_message_has_no_errors(self):
        self.machines[0].errors = ["an error"]
        self.machines[0].reserve("somebody")
        self.offers.update(self.machines, lambda _: False)
        self.assertEqual([message["machine"]["errors"] for message in self.sent], [[]])

    def test_message_is_sent_when_a_reload_adds_changes_or_removes(self):
        self.machines[:] = [machine("n", tags={"b", "a"}), machine("o", disabled=True)]
        self.assertEqual(sorted(self.update()), [("machine_offered", "o"), ("machine_removed", "m")])
        self.machines[0] = machine("n", tags={"a"})
        self.assertEqual(self.update(), [("machine_offered", "n")])


class Refusals(unittest.TestCase):
    """The reasons of a node that refuses a machine or a task."""

    def test_refusal_of_a_machine_differs_from_that_of_a_task(self):
        for reason, is_refusal, is_passing in (
            ("Task cannot be started: Machine m is not available", True, True),
            ("Machine m is not available", True, True),
            (f"Failed to acquire machine m. {offers.HOST_IS_AWAY}. No machinery host answers", True, True),
            ("Task cannot be started: Failed to acquire machine m. 'Machine with name m does not exist'", True, False),
            ("Task cannot be started: Invalid or non-existing task json for task id x. Failed", False, False),
            ("Task cannot be started: Task x is already tracked", False, False),
        ):
            with self.subTest(reason):
                self.assertEqual((offers.is_refusal(reason), offers.is_passing(reason)), (is_refusal, is_passing))


class Lists(unittest.TestCase):
    """The main process's list of machines."""

    def setUp(self):
        self.machines = MachinesList()
        for name in ("m", "n"):
            self.machines.add_machine(machine(name))
        self.machines.clear_updated()

    def follow(self, kind, **keys):
        offers.apply_message(self.machines, {"type": kind, **keys}, lambda task_id: task_id == TASK)
        self.assertTrue(self.machines.updated)

    def offer(self, described):
        self.follow("machine_offered", machine=described.to_dict())

    def test_machine_is_not_available_while_another_program_has_it(self):
        held = machine("m")
        held.lock("somebody")
        self.offer(held)
        self.assertEqual(names(self.machines.get_available()), ["n"])
        self.assertFalse(offers.is_offered(self.machines, "m"))
        self.offer(machine("m"))
        self.assertEqual(names(self.machines.get_available()), ["m", "n"])

    def test_own_lock_is_kept_when_a_message_comes(self):
        task_machine = self.machines.acquire_available(TASK, "m")
        described = machine("m", ip="10.0.0.9")
        described.lock(TASK)
        for text in (described, machine("m", ip="10.0.0.9")):
            self.offer(text)
            self.assertEqual((task_machine.locked_by, task_machine.reserved), (TASK, False))
        self.assertTrue(offers.is_offered(self.machines, "m"))
        self.assertEqual(task_machine.ip, "10.0.0.9")
        self.machines.release(task_machine)
        self.assertTrue(task_machine.available)

    def test_machine_is_available_when_it_is_enabled_again(self):
        self.machines.mark_disabled(self.machines.get_by_name("m"), "strange")
        self.offer(machine("m"))
        self.assertTrue(self.machines.get_by_name("m").available)

    def test_machine_is_found_when_it_was_added_and_not_when_it_was_removed(self):
        added = machine("o", platform="windows", mac_address="02:00:00:00:00:0a")
        self.offer(added)
        found = self.machines.find(platform="windows")
        self.assertEqual((found.name, found.mac_address), ("o", "02:00:00:00:00:0a"))
        held = self.machines.acquire_available(TASK, "m")
        self.follow("machine_removed", machine_name="m")
        self.assertEqual(names(self.machines.machines), ["n", "o"])
        self.machines.release(held)
        self.assertFalse(offers.is_offered(self.machines, "m"))


class Context:
    """The context of a main process, whose scheduler counts the changes."""

    def __init__(self):
        self.changes = threading.Semaphore(0)
        self.scheduler = SimpleNamespace(inform_change=self.changes.release, unqueue_task=lambda _: None)
        self.nodes = NodesTracker(self)


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.cwd = make_cuckoo_cwd(self, {"m": {"ip": address(1)}, "n": {"ip": address(2)}})
        self.ctx = Context()
        self.requeued = []

    def wait_for(self, *available):
        """Waits until these machines are available to the main process. Each change must wake the scheduler."""
        deadline = time.monotonic() + TIMEOUT
        while names(self.node.machines.get_available()) != list(available):
            left = deadline - time.monotonic()
            self.assertTrue(self.ctx.changes.acquire(timeout=max(0, left)), self.node.machines.to_dictlist())

    def follow_changes(self):
        """Checks that the main process follows each kind of change."""
        self.wait_for("m", "n")
        self.request("acquire", name="m", task_id="somebody")
        self.wait_for("n")
        self.request("reserve", machine="n", task_id="somebody")
        self.wait_for()
        self.request("unlock", machine="m")
        self.wait_for("m")
        self.request("unreserve", machine="n")
        self.wait_for("m", "n")
        self.request("disable_machine", machine="m", reason="strange")
        self.wait_for("n")
        self.assertIn("strange", self.node.machines.get_by_name("m").disable_reason)
        self.request("enable_machine", machine="m")
        self.wait_for("m", "n")
        write_machines(self.cwd, {"n": {"ip": address(2)}, "o": {"ip": address(3), "platform": "windows"}})
        self.request("reload")
        self.wait_for("n", "o")
        self.assertTrue(self.ctx.nodes.nodeinfos.find_support(_Platform("windows"), None)[0])
        self.assertTrue(self.ctx.nodes.nodeinfos.should_dump())
        write_machines(self.cwd, {"n": {"ip": address(2)}})
        self.request("reload")
        self.wait_for("n")

    def startable(self, machine_name):
        """Returns a task that has the machine in the main process's list."""
        held = self.node.machines.acquire_available(TASK, machine_name)
        return SimpleNamespace(
            task=SimpleNamespace(id=TASK, analysis_id=TASK.split("_")[0]),
            machine=held,
            requeue=lambda: self.requeued.append(TASK),
            close=lambda: self.node.machines.release(held),
            fail=self.fail,
        )


class _Platform:
    def __init__(self, platform):
        self.platform, self.os_version, self.tags = platform, "", []


class Local(ClientTest):
    def setUp(self):
        super().setUp()
        nodectx = SimpleNamespace(node=None, routes=Routes([]))
        self.manager = nodectx.machinery_manager = HostedManager(nodectx)
        self.addCleanup(self.manager.detach)
        self.manager.start()
        self.request = self.manager.host.client.request
        self.nodectx = nodectx

    def start_client(self):
        receiver = HostedStreamReceiver()
        self.nodectx.node = CuckooNode(self.nodectx, receiver)
        # It has no client yet, and gets a change.
        self.request("acquire", name="m", task_id="somebody")
        self.node = HostedLocalNodeClient(self.ctx, self.nodectx.node)
        receiver.set_client(self.node)
        self.ctx.nodes.add_node(self.node)
        self.wait_for("n")
        self.request("unlock", machine="m")
        self.wait_for("m", "n")

    def test_main_process_follows_its_own_node(self):
        self.start_client()
        self.follow_changes()

    def test_task_waits_again_when_another_program_was_faster(self):
        self.start_client()
        add_task(self.cwd, TASK, folder="analyses")
        startable = self.startable("m")
        self.request("acquire", name="m", task_id="somebody")
        with self.assertRaises(NodeUnavailableError):
            self.node.add_task(startable)
        self.assertFalse(self.node.assigned_tasks.have_task(TASK))
        startable.close()
        self.wait_for("n")
        self.request("unlock", machine="m")
        self.wait_for("m", "n")

    @mock.patch.object(local_client, "RETRY_INTERVAL", 0)
    @mock.patch.object(machines, "RESTART_TIMEOUT", 0)
    def test_task_waits_again_when_the_host_takes_none(self):
        self.start_client()
        add_task(self.cwd, TASK, folder="analyses")
        for change in (lambda: self.request("disable"), self.manager.detach):
            change()
            startable = self.startable("m")
            with self.assertRaises(NodeUnavailableError):
                self.node.add_task(startable)
            self.assertFalse(self.node.assigned_tasks.have_task(TASK))
            startable.close()
        self.wait_for("m", "n")

    def test_task_fails_when_the_node_cannot_start_it(self):
        self.start_client()
        add_task(self.cwd, TASK, folder="analyses")
        TaskPaths.taskjson(TASK).write_text("{}")
        with self.assertRaises(NodeActionError) as caught:
            self.node.add_task(self.startable("m"))
        self.assertIsInstance(caught.exception.args[0], NodeError)
        self.assertNotIsInstance(caught.exception, NodeUnavailableError)


class Remote(ClientTest):
    def setUp(self):
        super().setUp()
        process = Node(self, self.cwd)
        process.wait_until_it_answers()
        self.request = Client(self.cwd / "operational/sockets/machinerymanager.sock").request
        loop = asyncio.new_event_loop()
        wrapper = NodeClientLoop(loop)
        api = HostedNodeAPI(f"http://{address(0)}:{PORT}", process._key, node_name="remote")
        # A lock that is there before the main process.
        self.request("acquire", name="m", task_id="somebody")
        self.node = HostedNodeClient(self.ctx, api, wrapper)
        self.ctx.nodes.add_node(self.node)
        loop.run_until_complete(self.node.connect())
        thread = threading.Thread(target=wrapper.start, daemon=True)
        thread.start()
        self.addCleanup(thread.join, TIMEOUT)
        self.addCleanup(wrapper.stop)
        self.wait_for("n")
        self.request("unlock", machine="m")

    def start_task(self, startable):
        """Starts a task whose files are on the node."""
        with mock.patch.object(self.node.client, "upload_taskwork", mock.AsyncMock()):
            started = self.node._upload_and_start(mock.MagicMock(), startable)
            asyncio.run_coroutine_threadsafe(started, self.node.loop_wrapper.loop).result(TIMEOUT)

    def test_main_process_follows_a_remote_node(self):
        self.follow_changes()

    @mock.patch.object(remote_client, "RETRY_INTERVAL", 0)
    def test_machine_is_used_again_when_the_manager_was_disabled(self):
        self.wait_for("m", "n")
        add_task(self.cwd, TASK)
        self.request("disable")
        startable = self.startable("m")
        self.node.assigned_tasks.track_assigned(startable)
        self.start_task(startable)
        self.assertEqual(self.requeued, [TASK])
        self.request("enable")
        self.wait_for("m", "n")

    def test_only_the_task_fails_when_the_node_cannot_start_it(self):
        self.wait_for("m", "n")
        add_task(self.cwd, TASK)
        (self.cwd / "storage/nodework/20260101/ABCDEF/task_1/task.json").write_text("{}")
        startable = self.startable("m")
        startable.fail = mock.Mock(side_effect=lambda _: startable.close())
        self.node.assigned_tasks.track_assigned(startable)
        self.start_task(startable)
        self.assertIn("task json", startable.fail.call_args.args[0])
        self.assertEqual(self.requeued, [])
        self.wait_for("m", "n")

    def test_task_waits_again_when_another_program_was_faster(self):
        self.wait_for("m", "n")
        add_task(self.cwd, TASK)
        startable = self.startable("m")
        self.node.assigned_tasks.track_assigned(startable)
        self.request("acquire", name="m", task_id="somebody")
        self.start_task(startable)
        self.assertEqual(self.requeued, [TASK])
        self.assertFalse(self.node.assigned_tasks.have_task(TASK))
        self.wait_for("n")
        self.request("unlock", machine="m")
        self.wait_for("m", "n")


if __name__ == "__main__":
    unittest.main()
