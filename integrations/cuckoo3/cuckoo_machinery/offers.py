"""The machines that a node offers to Cuckoo3's main process.

Cuckoo3's main process copies the node's machines at its start, and receives only one kind of change: a machine was
disabled. The node therefore also sends it two messages of this package, in the same stream:

    host ─ event ─▶ HostedMachines ─▶ Offers.update ─ message ─▶ main process: update, remove
                                        │
                                        └ only differences, without the locks of the main process's own tasks

| message           | sent when                                                                  |
| ----------------- | -------------------------------------------------------------------------- |
| `machine_offered` | a machine is new, is enabled, or another program locks, reserves or frees it |
| `machine_removed` | a reload has removed the machine                                           |

The main process has its own locks, which it sets before the node does. It keeps a machine that another program has
as reserved: Cuckoo3 itself never reserves machines, and does not use reserved ones.

A node can refuse a machine that it has offered. The task then waits again, if it may get a machine later.
"""

import re
import threading

from cuckoo.common.machines import Machine

OFFERED, REMOVED = KINDS = ("machine_offered", "machine_removed")

# A part of the reason with which a node refuses all its machines for now.
HOST_IS_AWAY = "The machinery host takes no task now"

# Cuckoo3's reasons of a node that refuses a machine. With its other reasons, it refuses the task.
_REFUSED = re.compile(r"(Task cannot be started: )?(Machine .+ is not available$|Failed to acquire machine )")

# The main process has its own locks. The others do not decide about a task.
_OWN = ("locked", "locked_by", "action_lock")
_IRRELEVANT = ("state", "errors", "locked", "locked_by", "reserved", "reserved_by")


class Offers:
    """The machines that the main process knows of. `send` sends it a message."""

    def __init__(self, send):
        self._send = send
        self._known = {}
        # A reset of the node is another thread than the host's events.
        self._lock = threading.Lock()

    def repeat(self):
        """Makes the next call send all machines: changes may have been missed."""
        with self._lock:
            self._known = dict.fromkeys(self._known)

    def update(self, machines, is_own):
        """Sends the changes since the last call. `is_own` reports whether a task is one of the main process."""
        with self._lock:
            self._update(machines, is_own)

    def _update(self, machines, is_own):
        offers = {machine.name: _offer(machine, is_own) for machine in machines}
        for machine in machines:
            offer, known = offers[machine.name], self._known.get(machine.name)
            # Cuckoo3's own message reports that a known machine is disabled.
            if offer != known and not (known and offer["disabled"]):
                # The errors decide nothing there, and each message would repeat them.
                self._send({"type": OFFERED, "machine": {**machine.to_dict(), "errors": []}})
        for name in self._known.keys() - offers.keys():
            self._send({"type": REMOVED, "machine_name": name})
        self._known = offers


def _offer(machine, is_own):
    offer = {key: value for key, value in machine.to_dict().items() if key not in _IRRELEVANT}
    return {**offer, "tags": set(machine.tags), "holder": _holder(machine, is_own)}


def _holder(machine, is_own):
    """Returns the name of the other program that has the machine, or an empty string."""
    if machine.reserved:
        return machine.reserved_by or "unknown"
    return machine.locked_by if machine.locked and not is_own(machine.locked_by) else ""


def make_machine(described):
    """Returns a machine of Cuckoo3 as described by the host or by a node."""
    machine = Machine.from_dict({**described, "interface": described["interface"] or ""})
    # Machine.from_dict ignores it.
    machine.mac_address = described["mac_address"] or ""
    return machine


def update_machine(machines, described, is_own):
    """Adds or changes a machine in the main process's list `machines`."""
    new = make_machine(described)
    holder = _holder(new, is_own)
    new.clear_lock()
    new.clear_reservation()
    if holder:
        new.reserve(holder)
    with machines._machines_lock:
        for machine in machines.machines:
            if machine.name == new.name:
                vars(machine).update({key: value for key, value in vars(new).items() if key not in _OWN})
                machines.set_updated()
                return
        machines.add_machine(new)


def remove_machine(machines, name):
    """Removes a machine from the main process's list."""
    with machines._machines_lock:
        machines._machines = [machine for machine in machines.machines if machine.name != name]
        machines.set_updated()


def apply_message(machines, message, is_own):
    """Applies a message of the node to the main process's list."""
    if message["type"] == REMOVED:
        remove_machine(machines, message["machine_name"])
    else:
        update_machine(machines, message["machine"], is_own)


def replace_machines(machines, described, is_own):
    """Makes the main process's list equal to the node's."""
    names = {machine["name"] for machine in described}
    for machine in list(machines.machines):
        if machine.name not in names:
            remove_machine(machines, machine.name)
    for machine in described:
        update_machine(machines, machine, is_own)


def prepare(machines):
    """Prepares a copy of the node's list for the main process, before it has a task: the locks are other programs'."""
    described = machines.to_dictlist()
    for machine in machines.machines:
        machine.clear_lock()
    replace_machines(machines, described, is_own=lambda _: False)


def is_offered(machines, name):
    """Reports whether the node offers the machine, apart from locks of the main process."""
    for machine in machines.machines:
        if machine.name == name:
            return not machine.disabled and not machine.reserved
    return False


def is_refusal(reason):
    """Reports whether a node has refused a machine, and not the task."""
    return bool(_REFUSED.match(reason))


def is_passing(reason):
    """Reports whether the node may give this machine later: somebody was faster, or the host is away."""
    return HOST_IS_AWAY in reason or reason.endswith("is not available")
