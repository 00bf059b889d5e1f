# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs CAPE with guests that a test controls: `python driver.py CAPE_FOLDER CONTROL_SOCKET`.

CAPE's own code runs, from its scheduler to the module. Two methods of its guest manager are replaced: they report to the
test, and wait for its command. With `CAPE_GUESTS=own` nothing is replaced. Both sides send a JSON object a line:

    test:  {"submit": {…}}                    this: {"event": "submitted", "task": 1}
                                                    {"event": "machine", "task": 1, "phase": "start"}
                                                    {"event": "machine", "task": 1, "phase": "runs"}
           {"task": 1, "do": "answer"}              {"event": "guest", "task": 1, "machine": "m1", "phase": "start"}
           {"task": 1, "do": "finish"}              {"event": "guest", "task": 1, "machine": "m1", "phase": "run"}
                                                    {"event": "machine", "task": 1, "phase": "stop"}
                                                    {"event": "machine", "task": 1, "phase": "off"}
                                                    {"event": "finished", "task": 1, "status": "completed", …}

Each event has the time of the system's monotonic clock, `at`. A command `{"do": "finish", "after": 12}` takes effect after 12
seconds.
"""

import json
import os
import queue
import socket
import sys
import threading
import time
from collections import defaultdict

ROOT, CONTROL = sys.argv[1:3]
sys.path.insert(0, ROOT)
os.chdir(ROOT)

import cuckoo as cape  # noqa: E402
from lib.cuckoo.common.exceptions import CuckooCriticalError, CuckooGuestCriticalTimeout  # noqa: E402
from lib.cuckoo.core import analysis_manager  # noqa: E402
from lib.cuckoo.core.database import Database  # noqa: E402
from lib.cuckoo.core.guest import GuestManager  # noqa: E402
from lib.cuckoo.core.machinery_manager import MachineryManager  # noqa: E402
from lib.cuckoo.core.scheduler import Scheduler  # noqa: E402


class Test:
    """The connection to the test."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._sending = threading.Lock()
        self._commands = defaultdict(queue.Queue)

    def report(self, event, **keys):
        """Sends an event."""
        line = json.dumps({"event": event, "at": time.monotonic(), **keys}).encode() + b"\n"
        with self._sending:
            self._socket.sendall(line)

    def command(self, task):
        """Waits for the test's next command about this task."""
        return self._commands[task].get()

    def serve(self):
        """Reads commands until the test ends."""
        for line in self._socket.makefile():
            command = json.loads(line)
            if "submit" in command:
                self._submit(command["submit"])
            else:
                self._commands[command["task"]].put(command)
        os._exit(3)

    def _submit(self, keys):
        with Database().session.begin():
            task = Database().add_path(**keys)
        self.report("submitted", task=task)


class Guest(GuestManager):
    """A guest that does what the test says."""

    def start_analysis(self, options):
        if self._ask("start")["do"] == "time out":
            raise CuckooGuestCriticalTimeout(f"Machine {self.vmid}: the guest does not answer")

    def wait_for_completion(self):
        while True:
            command = self._ask("run")
            if command["do"] == "finish":
                time.sleep(command.get("after", 0))
                return
            if command["do"] == "screenshot":
                self.analysis_manager.screenshot_machine()

    def _ask(self, phase):
        test.report("guest", task=self.task_id, machine=self.vmid, phase=phase)
        return test.command(self.task_id)


def reported(action, begin, end):
    """Returns an action on a machine that also reports its begin, and its end unless it fails."""

    def act(manager, machine):
        thread = threading.current_thread()
        if not isinstance(thread, analysis_manager.AnalysisManager):
            # CAPE's main thread stops a stuck machine.
            return action(manager, machine)
        test.report("machine", task=thread.task.id, phase=begin)
        action(manager, machine)
        test.report("machine", task=thread.task.id, phase=end)

    return act


def report_end(scheduler, manager):
    """Reports the end of a task, whose status and errors are in the database."""
    FINISHED(scheduler, manager)
    with Database().session.begin():
        task = Database().view_task(manager.task.id)
        errors = [error.message for error in Database().view_errors(task.id)]
    status = "pending" if manager.is_pending else task.status
    test.report("finished", task=task.id, machine=manager.machine.label, status=status, errors=errors)


def launch_analysis(manager):
    """Runs an analysis. A task that gets another machine is pending, and may be "running" at once."""
    manager.is_pending = False
    try:
        LAUNCH(manager)
    except analysis_manager.CuckooDeadMachine:
        manager.is_pending = True
        raise


def report_ready(scheduler, *args):
    """Reports that CAPE waits for tasks and signals."""
    Scheduler.do_main_loop_work = WORK
    test.report("ready")
    return WORK(scheduler, *args)


test = Test(CONTROL)
if os.environ.get("CAPE_GUESTS") != "own":
    analysis_manager.GuestManager = Guest
MachineryManager.start_machine = reported(MachineryManager.start_machine, "start", "runs")
MachineryManager.stop_machine = reported(MachineryManager.stop_machine, "stop", "off")
FINISHED, Scheduler.analysis_finished = Scheduler.analysis_finished, report_end
WORK, Scheduler.do_main_loop_work = Scheduler.do_main_loop_work, report_ready
Manager = analysis_manager.AnalysisManager
LAUNCH, Manager.launch_analysis = Manager.launch_analysis, launch_analysis
try:
    cape.cuckoo_init(debug=True)
    threading.Thread(target=test.serve, daemon=True).start()
    cape.cuckoo_main()
except CuckooCriticalError as error:
    causes = [str(error), str(error.__cause__ or "")]
    test.report("refused", reason=": ".join(filter(None, causes)))
    sys.exit(1)
