"""A network of the main process and its nodes.

The test runs in namespaces of its own for network, mounts and processes, so that all of it ends with the test:

    main: this namespace, bridge `lab` 10.77.0.1 ─┬─ link ─ node's namespace, 10.77.0.11, bridge `machines` 10.78.0.1
                                                  └─ …                                    └─ addresses of its machines
"""

import os
import socket
import subprocess

MAIN_ADDRESS = "10.77.0.1"
# The same in each node: the networks of their machines are separate.
RESULT_SERVER = "10.78.0.1"

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
    """The network of a node, with addresses for `machines` machines."""

    def __init__(self, name, number, machines):
        self.name = name
        self.address = f"10.77.0.{10 + number}"
        self.machines = [f"10.78.0.{10 + machine}" for machine in range(machines)]
        self._link = f"to-{name}"
        ip("netns", "add", name)
        ip("link", "add", self._link, "master", "lab", "type", "veth", "peer", "name", "uplink", "netns", name)
        ip("link", "set", self._link, "up")
        self._inside("link", "set", "lo", "up")
        self._inside("address", "add", f"{self.address}/24", "dev", "uplink")
        self._inside("link", "set", "uplink", "up")
        self._inside("link", "add", "machines", "type", "bridge")
        for address in (RESULT_SERVER, *self.machines):
            self._inside("address", "add", f"{address}/24", "dev", "machines")
        self._inside("link", "set", "machines", "up")
        for tap in range(machines):
            self._inside("tuntap", "add", f"tap{tap}", "mode", "tap")
            self._inside("link", "set", f"tap{tap}", "master", "machines", "up")

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
