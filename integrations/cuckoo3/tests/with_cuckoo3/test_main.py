"""Cuckoo3's main process with its own node, on the host: its scheduler acquires machines for tasks.

The tests add tasks to its queue: the stages before it need more of Cuckoo3 than its packages core and
processing, which are enough for its processing workers.
"""

import os
import time
import unittest
from datetime import datetime

from cuckoo.common import startup
from cuckoo.common.db import DBMS, dbms
from cuckoo.common.safelist import safelistdb
from cuckoo.common.storage import Paths, TaskPaths
from cuckoo.common.strictcontainer import Task

from cuckoo_machinery.host import Host
from tests.support import TIMEOUT, EventRecorder, start_other_host, write_machines
from tests.with_cuckoo3.support import AGENT_PORT, Agent, Node, add_task, address, make_cuckoo_cwd

try:
    from cuckoo import runprocessing, taskqueue  # noqa: F401
except ImportError as error:
    raise unittest.SkipTest(f"Cuckoo3's packages core and processing cannot be loaded: {error}") from None

TASK, OTHER_TASK, LAST_TASK = "20260101-ABCDEF_1", "20260101-ABCDEG_1", "20260101-ABCDEH_1"


def make_databases():
    """Creates the databases, like `cuckoomigrate database all` for a new CWD."""
    startup.init_database(migration_check=False)
    dbms.cleanup()
    startup.init_safelist_db(migration_check=False)
    safelistdb.cleanup()
    queue = DBMS()
    queue.initialize(f"sqlite:///{Paths.queuedb()}", tablebaseclass=taskqueue.Base, migration_check=False)
    queue.cleanup()


def queue_task(root, task_id, platform):
    """Queues a task, which Cuckoo3 runs when it starts."""
    add_task(root, task_id, folder="analyses")
    taskqueue.TaskQueue(Paths.queuedb()).queue_task(
        task_id, "standard", datetime.now(), task_id.split("_")[0], 1, platform, "", set(), None
    )


class Main(unittest.TestCase):
    def setUp(self):
        self.machines = {
            "good": {"ip": address(1), "agent_port": AGENT_PORT},
            "bad": {"ip": address(2), "platform": "windows", "faults": "{restore_start: fail}"},
        }
        self.cwd = make_cuckoo_cwd(self, self.machines)
        make_databases()

    def test_tasks_acquire_and_release_their_machines(self):
        queue_task(self.cwd, TASK, "linux")
        queue_task(self.cwd, OTHER_TASK, "windows")
        # Another's host, so that the test receives its events from the start.
        other = start_other_host(self, self.cwd)
        # The tasks run concurrently, so each has its own recorder.
        recorder, other_recorder = EventRecorder(), EventRecorder()
        for listener in (other_recorder, recorder):
            observer = Host(self.cwd, listener)
            self.addCleanup(observer.detach)
            observer.attach()
        main = Node(self, self.cwd, "cuckoo", "--cancel-abandoned")
        recorder.wait_for("locked", machine="good", task_id=TASK)
        recorder.wait_for("state", machine="good", state="running")
        Agent(self, address(1))
        recorder.wait_for("unlocked", machine="good")
        other_recorder.wait_for("disabled", machine="bad")
        main.wait_for_output("Received machine disable event")
        self.assertEqual(main.end(), 0, main.output())
        self.assertTrue(observer.client.request("list")["machines"][1]["disabled"])
        self.assertFalse(other.has_ended())
        # Cuckoo3 leaves the socket of a worker that did not start.
        left = [name for name in os.listdir(self.cwd / "operational" / "sockets") if not name.startswith("post")]
        self.assertEqual(left, ["machinerymanager.sock"])

    def failed_task(self, task_id):
        """Polls until the main process has set the task to failed."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            task = Task.from_file(TaskPaths.taskjson(task_id))
            if task.state == "fatal_error":
                return task
            self.assertLess(time.monotonic(), deadline, task.to_dict())
            time.sleep(0.1)

    def test_tasks_get_machines_that_were_not_offered_at_the_start(self):
        for task_id, platform in ((TASK, "linux"), (OTHER_TASK, "windows"), (LAST_TASK, "darwin")):
            queue_task(self.cwd, task_id, platform)
        start_other_host(self, self.cwd)
        recorder = EventRecorder()
        observer = Host(self.cwd, recorder)
        self.addCleanup(observer.detach)
        observer.attach()
        request = observer.client.request
        request("disable_machine", machine="good", reason="strange")
        request("acquire", name="bad", task_id="somebody")
        main = Node(self, self.cwd, "cuckoo", "--cancel-abandoned")
        main.wait_for_output("No available machines")
        Agent(self, address(1))
        Agent(self, address(2))

        request("enable_machine", machine="good")
        recorder.wait_for("locked", machine="good", task_id=TASK)
        request("unlock", machine="bad")
        recorder.wait_for("locked", machine="bad", task_id=OTHER_TASK)
        added = {"ip": address(3), "platform": "darwin", "agent_port": AGENT_PORT, "poweroff_after_ms": 100}
        write_machines(self.cwd, {**self.machines, "added": added})
        request("reload")
        recorder.wait_for("locked", machine="added", task_id=LAST_TASK)
        # It is lost during the run, which the task shows.
        reason = recorder.wait_for("run_error", machine="added")["reason"]
        Agent(self, address(3))
        self.assertIn(f"The run is incomplete: {reason}", self.failed_task(LAST_TASK).errors.errors)
        self.assertEqual(main.end(), 0, main.output())


if __name__ == "__main__":
    unittest.main()
