# Copyright (C) 2026 the authors of cuckoo-machinery
# SPDX-License-Identifier: GPL-3.0-or-later
"""CAPEv2's machinery module for the machinery host `cuckoo-machinery`.

CAPE keeps a row for each machine in its database, and gives a task a machine whose row is not locked. The host decides
whether the machine can run. This module keeps the two in step, and never removes a row:

    CAPE starts ─▶ each machine is reserved for this CAPE, or withheld
    task ─▶ start: lock, restore ─▶ the guest runs ─▶ stop: power off, run errors, unlock ─▶ row free
               │ failed
               ├─▶ the machine can still be reserved: only the task fails
               └─▶ it cannot: the row stays locked (withheld), and the task gets another machine
    each search for a machine ─▶ a withheld machine that can be reserved again: row free

The reservation keeps other programs away between the runs, also while CAPE is down. The lock delimits a run: the host
collects the run's errors under it. CAPE retries a task after `CuckooMachineError`, and fails it after another error.
"""

import logging
import tempfile
import time
from contextlib import suppress

from PIL import Image

from lib.cuckoo.common.abstracts import Machinery
from lib.cuckoo.common.constants import CUCKOO_ROOT
from lib.cuckoo.common.exceptions import CuckooCriticalError, CuckooMachineError, CuckooOperationalError

from .machinery_client import ANSWER_TIMEOUT, Client, HostError, Refused

log = logging.getLogger(__name__)

# All in seconds.
# The time that a host which is away has to come back; `patience` in hosted.conf.
PATIENCE = 120
# The interval at which withheld machines are checked.
CHECK_INTERVAL = 1

# The longest message in CAPE's table of errors.
MAX_ERROR = 1024


class Hosted(Machinery):
    """The machines of a machinery host, whose socket hosted.conf names."""

    module_name = "hosted"

    # The host's states.
    RUNNING = "running"
    PAUSED = "paused"
    POWEROFF = "poweroff"
    ABORTED = "error"

    def __init__(self):
        super().__init__()
        own = self.options.get(self.module_name)
        if not own.get("socket"):
            raise CuckooCriticalError(
                f"{self.module_name}.conf has no socket. Write it with `cuckoo-machinery export cape`"
            )
        self._host = Client(own["socket"], restart_timeout=int(own.get("patience", PATIENCE)))
        # Another CAPE on this computer has another folder.
        self._owner = f"cape:{CUCKOO_ROOT}"
        # The task that each machine was last given to.
        self._tasks = {}
        # The machines whose latest run this process has begun. CAPE stops a stuck run twice.
        self._runs = set()
        # The machines whose row stays locked until the host can reserve them.
        self._withheld = set()
        self._next_check = 0

    # Called by CAPE's main thread.

    def _initialize_check(self):
        """Reserves the configured machines, and stops those that run.

        @raise CuckooCriticalError: if the host is away, or its machines differ from the configured ones.
        """
        try:
            hosted = self._hosted_machines()
            self._compare(hosted)
            for row in self.machines():
                self._claim(row, hosted[row.label])
            super()._initialize_check()
        except HostError as error:
            raise CuckooCriticalError(f"CAPE cannot use the machinery host: {error}") from error

    def find_machine_to_service_task(self, task):
        """Finds a machine as CAPE does, after withheld machines that work again were returned."""
        self._return_machines()
        row = super().find_machine_to_service_task(task)
        if row:
            self._tasks[row.label] = task.id
        return row

    def shutdown(self):
        """Stops this CAPE's machines, and cancels their reservations."""
        self._host.restart_timeout = 0
        try:
            machines = self._hosted_machines()
        except HostError as error:
            log.warning("The machines are still reserved for this CAPE, whose next start uses them: %s", error)
            return
        for name, machine in machines.items():
            try:
                if machine["locked_by"] == self._owner:
                    self._end(name)
                if machine["reserved_by"] == self._owner:
                    self._ask("unreserve", machine=name)
            except HostError as error:
                log.warning("Machine %s is still reserved for this CAPE, whose next start uses it: %s", name, error)

    # Called by the thread of a task.

    def start(self, label=None):
        """Restores a machine to its snapshot and resumes it.

        @raise CuckooMachineError: if the host does not give the machine to CAPE; it is withheld.
        @raise CuckooOperationalError: if the restore failed, and the machine is still available.
        """
        self._runs.discard(label)
        try:
            self._unlock(label)
            self._ask("lock", machine=label, task_id=self._owner)
            self._runs.add(label)
            self._act("restore_start", label)
        except HostError as error:
            self._runs.discard(label)
            if self._can_be_reserved(label):
                self._add_error(label, error)
                raise CuckooOperationalError(str(error)) from error
            raise CuckooMachineError(str(error)) from error

    def stop(self, label=None):
        """Powers a machine off, and ends its run.

        @raise CuckooMachineError: if the machine cannot be stopped.
        @raise CuckooOperationalError: if the machine was lost during the run, or the host is away: the task fails.
        """
        is_run = label in self._runs
        failure = None
        try:
            try:
                self._act("stop", label)
            except Refused as error:
                failure = error
            machine = self._hosted_machines().get(label, {}) if is_run else {}
            self._unlock(label)
        except HostError as error:
            self._add_error(label, error)
            raise CuckooOperationalError(f"The outcome of the run on {label} is unknown: {error}") from error
        errors = machine.get("run_errors", [])
        for error in errors:
            self._add_error(label, error)
        if machine.get("run_lost", False):
            raise CuckooOperationalError(f"Machine {label} was lost during the analysis: {'; '.join(errors)}")
        if failure:
            raise CuckooMachineError(str(failure)) from failure

    def delete_machine(self, name):
        """Decides about a machine that CAPE takes for dead: its row stays, and is free if the machine is available."""
        label = str(self.options.get(name)[self.LABEL])
        if label in self._runs:
            with suppress(HostError):
                self._end(label)
        if self._can_be_reserved(label):
            self.db.unlock_machine(self.db.view_machine_by_label(label))
            log.warning("Machine %s is still available at the host, and stays in the pool", label)
        else:
            self._withheld.add(label)
            log.warning("Machine %s is withheld from tasks until the host can reserve it", label)

    def screenshot(self, label, path):
        """Writes the guest's screen as a JPEG file."""
        with tempfile.TemporaryFile() as png:
            self._act("screenshot", label, png)
            png.seek(0)
            with Image.open(png) as image:
                image.convert("RGB").save(path, "JPEG")

    def dump_memory(self, label, path):
        """Writes the guest's memory as an ELF file, which belongs to CAPE's user."""
        with open(path, "wb") as dump:
            try:
                self._act("dump_memory", label, dump)
            except HostError as error:
                raise CuckooMachineError(str(error)) from error

    # Called by both.

    def _list(self):
        return list(self._hosted_machines())

    def _status(self, label):
        return self._ask("state", machine=label)["state"]

    def shutdown_running_machines(self, configured_vms):
        """Does nothing: `_claim` has stopped the machines. A withheld machine is the host's own concern."""

    # Of this module.

    def _act(self, action, label, file=None):
        """Runs an action, as long as the host lets it: the host has a timeout for each."""
        return self._host.request(action, None, file, machine=label)

    def _ask(self, action, **keys):
        """Sends a request that is no action. A host that is away has its time to come back."""
        return self._host.request(action, ANSWER_TIMEOUT + self._host.restart_timeout, **keys)

    def _hosted_machines(self):
        return {machine["name"]: machine for machine in self._ask("list")["machines"]}

    def _compare(self, hosted):
        faults = []
        for row in self.machines():
            machine = hosted.get(row.label)
            if not machine:
                faults.append(f"{row.label} is no machine of the host")
            elif (row.ip, row.platform) != (machine["ip"], machine["platform"]):
                faults.append(f"{row.label} has another address or platform at the host")
        if faults:
            raise CuckooCriticalError(
                f"{self.module_name}.conf differs from the machinery host: {', '.join(faults)}. "
                "Write it anew with `cuckoo-machinery export cape`"
            )

    def _claim(self, row, machine):
        """Reserves a machine at the start of CAPE. A disabled one is withheld; one in other hands stops CAPE."""
        holders = {machine["reserved_by"] or self._owner, machine["locked_by"] or self._owner} - {self._owner}
        if holders:
            raise CuckooCriticalError(
                f"Machine {row.label} of the machinery host is in use by {' and '.join(holders)}. Release it there, "
                f"or remove it from {self.module_name}.conf"
            )
        self._unlock(row.label)
        try:
            self._ask("reserve", machine=row.label, task_id=self._owner)
            self._act("stop", row.label)
        except Refused as error:
            log.warning("Machine %s is withheld from tasks until the host can reserve it: %s", row.label, error)
            self._withheld.add(row.label)
            self.db.lock_machine(row)

    def _return_machines(self):
        """Frees the rows of withheld machines that the host can reserve again."""
        if not self._withheld or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + CHECK_INTERVAL
        try:
            hosted = Client(self._host.path).request("list")["machines"]
        except HostError as error:
            log.debug("Withheld machines are not checked: %s", error)
            return
        for label in self._withheld & {machine["name"] for machine in hosted if not machine["disabled"]}:
            if self._can_be_reserved(label):
                self.db.unlock_machine(self.db.view_machine_by_label(label))
                self._withheld.discard(label)
                log.info("Machine %s is available again", label)

    def _can_be_reserved(self, label):
        """Reports whether the host has the machine for CAPE's next task. Does not wait for a host that is away."""
        host = Client(self._host.path)
        try:
            with suppress(Refused):
                host.request("unlock", machine=label, task_id=self._owner)
            host.request("reserve", machine=label, task_id=self._owner)
        except HostError as error:
            log.debug("Machine %s cannot be reserved: %s", label, error)
            return False
        return True

    def _end(self, label):
        self._runs.discard(label)
        self._act("stop", label)
        self._unlock(label)

    def _unlock(self, label):
        # The answer to an earlier attempt may have been lost with its host.
        with suppress(Refused):
            self._ask("unlock", machine=label, task_id=self._owner)

    def _add_error(self, label, error):
        task = self._tasks.get(label)
        if task is not None:
            self.db.add_error(str(error)[:MAX_ERROR], task)
