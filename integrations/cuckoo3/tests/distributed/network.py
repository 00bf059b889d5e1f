"""A network of the main process and its nodes.

The test runs in namespaces of its own for network, mounts and processes, so that all of it ends with the test:

    main: this namespace, bridge `lab` 10.77.0.1 ─┬─ link ─ node's namespace, 10.77.0.11, bridge `br0` 10.66.0.1
                                                  └─ …                                    └─ tap1 10.66.0.11 …
"""

import os
import socket
import subprocess

MAIN_ADDRESS = "10.77.0.1"
# The network of the testkit's guests. It is the same in each node: the networks of machines are separate.
BRIDGE = "br0"
BRIDGE_MAC = "52:54:00:42:00:01"
RESULT_SERVER = "10.66.0.1"

HOW_TO_RUN = (
    "Run it as root in a network of its own: unshare --net --mount --pid --fork --kill-child --mount-proc "
    "sh -c 'python -m unittest discover -v -t . -s tests/distributed; exit $?'"
)


def ip(*arguments):
    """Runs `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def make_main_network():
    """Makes the bridge of the main process."""
    if os.geteuid() != 0 or [name for _, name in socket.if_nameindex()] != ["lo"]:
        raise AssertionError(f"This test changes the network. {HOW_TO_RUN}")
    os.makedirs("/run/netns", exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run/netns"], check=True)
    ip("link", "set", "lo", "up")
    ip("link", "add", "lab", "type", "bridge")
    ip("address", "add", f"{MAIN_ADDRESS}/24", "dev", "lab")
    ip("link", "set", "lab", "up")


class NodeNetwork:
    """The network of a node with a tap for each of `machines` machines. Machines in memory have no address of their own:
    the node gets `their_addresses`, so that an agent can listen there."""

    def __init__(self, name, number, machines, their_addresses):
        self.name = name
        self.address = f"10.77.0.{10 + number}"
        self.machines = [f"10.66.0.{11 + machine}" for machine in range(machines)]
        self._link = f"to-{name}"
        ip("netns", "add", name)
        ip("link", "add", self._link, "master", "lab", "type", "veth", "peer", "name", "uplink", "netns", name)
        ip("link", "set", self._link, "up")
        self._inside("link", "set", "lo", "up")
        self._inside("address", "add", f"{self.address}/24", "dev", "uplink")
        self._inside("link", "set", "uplink", "up")
        self._inside("link", "add", BRIDGE, "type", "bridge")
        self._inside("link", "set", BRIDGE, "address", BRIDGE_MAC)
        for address in (RESULT_SERVER, *(self.machines if their_addresses else ())):
            self._inside("address", "add", f"{address}/24", "dev", BRIDGE)
        self._inside("link", "set", BRIDGE, "up")
        for tap in range(1, machines + 1):
            self._inside("tuntap", "add", f"tap{tap}", "mode", "tap")
            self._inside("link", "set", f"tap{tap}", "master", BRIDGE, "up")

    def _inside(self, *arguments):
        ip("-n", self.name, *arguments)

    def run(self, command, **options):
        """Starts a program in this network."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def processes(self):
        """Returns the ids of all processes in this network."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def cut(self):
        """Cuts the node off."""
        ip("link", "set", self._link, "down")

    def mend(self):
        """Connects the node again."""
        ip("link", "set", self._link, "up")
