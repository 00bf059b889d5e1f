"""Cuckoo3's list of machines, as a mirror of the host's.

The host owns the locks and the availability of machines, which outlive both the node and the host. The node's
`MachinesList` mirrors them:

    acquire_available, release, mark_disabled ─▶ host ─▶ event ─▶ mirror ─▶ find, get_available, …

Only `mirror` and `heard` write to the list, and only the thread that receives the host's events calls them. A
requested change returns after the mirror shows it, so that a caller that releases a machine sees it released.
A `Machine` object stays the same while the host has a machine of that name.
"""

import os
import threading

from cuckoo.common.machines import MachineListError, MachinesList
from cuckoo.common.storage import TaskPaths

from .connection import RESTART_TIMEOUT, Client, HostError, Refused, Unreachable
from .offers import HOST_IS_AWAY, make_machine

# The maximum delay between an answer and the mirror, in seconds.
MIRROR_TIMEOUT = 5

# The reason for which a node that drains or ends offers no machine.
CLOSED = "The node is being drained or stopped"

# The latest errors of a machine that are kept, as in the host.
MAX_ERRORS = 20

# Reasons of the host for a machine that is not available now. Other reasons are failures.
_NOT_NOW = ("No machine is ", "Machine {name} is unavailable")

# A reason of the host for all machines, until somebody enables it.
_DISABLED = "manager is disabled"

# Reasons for an unlock that has nothing to do: the lock is gone, or is another task's.
_NOT_LOCKED_BY_TASK = ("Machine is not locked", "Machine is locked by")


class HostedMachines(MachinesList):
    """The machines of `host`. `on_disabled` is called with the name and reason of each disabled machine."""

    def __init__(self, host, on_disabled=lambda name, reason: None):
        super().__init__()
        self._host = host
        self._on_disabled = on_disabled
        self._changed = threading.Condition(self._machines_lock)
        # The tasks of this node that have or request a machine.
        self._tasks = set()
        # The task of each machine that this node has locked. The mirror may show another one after a forced unlock.
        self._holders = {}
        self._closed = False

    # For the node

    def acquire_available(self, task_id, name="", platform="", os_version="", tags=frozenset()):
        """Acquires a machine as in Cuckoo3. The host chooses by the same rules, and locks."""
        if name:
            self.get_by_name(name)
        if self._closed:
            raise MachineListError(CLOSED)
        self._tasks.add(task_id)
        try:
            described = self._ask_for_one(task_id, name, platform, os_version, tags)
        except MachineListError:
            self._tasks.discard(task_id)
            raise
        if described is None:
            self._tasks.discard(task_id)
            if name:
                # The main process looks at the mirror to find out whether the task can have the machine later.
                self._wait_for_mirror(name, lambda machine: not machine.available)
            return None
        self._holders[described["name"]] = task_id
        return self._wait_for_mirror(described["name"], lambda machine: machine.locked_by == task_id)

    def release(self, machine):
        """Releases a machine as in Cuckoo3. Waits for a host that is being restarted: otherwise the machine
        would stay locked. A machine that was unlocked by force is released already, whoever has it now."""
        task_id = self._holders.get(machine.name)
        if task_id is None:
            raise MachineListError(f"Cannot unlock machine {machine.name}. It is not locked by a task of this node")
        try:
            self._host.request_with_retries("unlock", machine=machine.name, task_id=task_id)
        except Refused as error:
            # The answer to an earlier attempt may also have been lost with its host.
            if not any(reason in error.reason for reason in _NOT_LOCKED_BY_TASK):
                raise MachineListError(error.reason) from error
        except HostError as error:
            raise MachineListError(f"Cannot unlock machine {machine.name}. {error}") from error
        self._holders.pop(machine.name, None)
        self._tasks.discard(task_id)
        remove_empty_capture(task_id)
        self._wait_for_mirror(machine.name, lambda machine: machine.locked_by != task_id)

    def mark_disabled(self, machine, reason):
        """Disables a machine as in Cuckoo3."""
        try:
            self._host.request_with_retries("disable_machine", machine=machine.name, reason=str(reason))
        except HostError as error:
            raise MachineListError(f"Cannot disable machine {machine.name}. {error}") from error
        self._wait_for_mirror(machine.name, lambda machine: machine.disabled)

    # For the main process

    def described(self):
        """Returns the description of all machines at one moment. A node that drains or ends offers none of them."""
        with self._machines_lock:
            described = self.to_dictlist()
        if self._closed:
            for machine in described:
                machine.update(disabled=True, disabled_reason=CLOSED)
        return described

    # For the manager

    def is_of_this_node(self, task_id):
        """Reports whether the task got its machine from this node."""
        return task_id in self._tasks

    def has_tasks(self):
        """Reports whether a task of this node has a machine, or waits for one."""
        return bool(self._tasks)

    def forget_tasks(self):
        """Forgets all tasks, which no longer have machines."""
        self._tasks.clear()
        self._holders.clear()

    @property
    def is_closed(self):
        """Reports whether tasks get no machines any more."""
        return self._closed

    def close(self):
        """Refuses machines to tasks from now on."""
        self._closed = True

    def mirror(self, described):
        """Replaces the mirror by the host's description of all machines."""
        lost = []
        with self._changed:
            known = {machine.name: machine for machine in self._machines}
            machines = [_brought_up_to_date(known.get(d["name"]), d, lost) for d in described]
            self._machines = machines
            self.loaded = self.loaded or bool(machines)
            self._updated_now()
        for machine in lost:
            self._on_disabled(machine.name, machine.disable_reason)

    def heard(self, event):
        """Applies an event of one machine."""
        change = _CHANGES.get(event["event"])
        if not change:
            return
        with self._changed:
            machine = self.get_by_name(event["machine"])
            was_disabled = machine.disabled
            change(machine, event)
            self._updated_now()
        if machine.disabled and not was_disabled:
            self._on_disabled(machine.name, machine.disable_reason)

    def _updated_now(self):
        self.set_updated()
        self._changed.notify_all()

    def _ask_for_one(self, task_id, name, platform, os_version, tags):
        wanted = {"name": name} if name else {"platform": platform, "os_version": os_version, "tags": list(tags)}
        paths = _paths(task_id)
        try:
            with _CaptureFile(paths.get("pcap_path")) as file:
                # A host that restarts must not fail the tasks of the queue one after the other.
                request = Client(self._host.client.path, RESTART_TIMEOUT).request
                machine = request("acquire", file=file.descriptor, task_id=task_id, **wanted, **paths)["machine"]
                file.keep()
            return machine
        except Refused as error:
            if error.reason.startswith(tuple(text.format(name=name) for text in _NOT_NOW)):
                return None
            if _DISABLED in error.reason:
                raise MachineListError(f"{HOST_IS_AWAY}. {error.reason}") from error
            raise MachineListError(error.reason) from error
        except Unreachable as error:
            raise MachineListError(f"{HOST_IS_AWAY}. {error}") from error
        except HostError as error:
            raise MachineListError(f"No machine for task {task_id}. {error}") from error

    def _wait_for_mirror(self, name, as_expected):
        """Waits until the mirror shows the host's answer, and returns the machine."""
        with self._changed:
            self._changed.wait_for(lambda: as_expected(self.get_by_name(name)), MIRROR_TIMEOUT)
            return self.get_by_name(name)


def remove_empty_capture(task_id):
    """Removes a task's capture file if nothing was captured. Cuckoo3 does not expect an empty file."""
    _remove_if_empty(_paths(task_id).get("pcap_path"))


def _paths(task_id):
    """Returns the paths of a task's files; none if the id is not Cuckoo3's."""
    try:
        return {
            "pcap_path": os.path.abspath(TaskPaths.pcap(task_id)),
            "memory_dump_path": os.path.abspath(TaskPaths.memory_dump(task_id)),
        }
    except ValueError:
        return {}


class _CaptureFile:
    """The file of a task's capture, open for the host, with this process's rights. Without a path, or in a folder
    that does not exist, there is no file, and the host gets only the path."""

    def __init__(self, path):
        self._path = path
        self._is_kept = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self.descriptor = os.open(path, flags, 0o644) if path else None
        except OSError:
            self.descriptor = None

    def keep(self):
        """Keeps the file: the host has it."""
        self._is_kept = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.descriptor is None:
            return
        os.close(self.descriptor)
        if not self._is_kept:
            _remove_if_empty(self._path)


def _remove_if_empty(path):
    try:
        if path and os.path.getsize(path) == 0:
            os.remove(path)
    except OSError:
        pass  # there is none, or Cuckoo3 has moved it


def _brought_up_to_date(machine, described, lost):
    new = make_machine(described)
    if not machine:
        return new
    if new.disabled and not machine.disabled:
        lost.append(machine)
    # This lock is Cuckoo3's own, and may be held.
    del new.action_lock
    vars(machine).update(vars(new))
    return machine


def _state(machine, event):
    machine.state = event["state"]


def _disabled(machine, event):
    machine.disable(event["reason"])


def _enabled(machine, _):
    # By an operator, or because the machine has healed. The events of a quarantine come beside `disabled` and this one.
    machine.disabled = False
    machine.disable_reason = ""


def _locked(machine, event):
    machine.lock(event["task_id"])


def _unlocked(machine, _):
    machine.clear_lock()


def _reserved(machine, event):
    machine.reserve(event["task_id"])


def _unreserved(machine, _):
    machine.clear_reservation()


def _run_error(machine, event):
    machine.errors = [*machine.errors, event["reason"]][-MAX_ERRORS:]


_CHANGES = {
    "state": _state,
    "disabled": _disabled,
    "enabled": _enabled,
    "locked": _locked,
    "unlocked": _unlocked,
    "reserved": _reserved,
    "unreserved": _unreserved,
    "run_error": _run_error,
}
