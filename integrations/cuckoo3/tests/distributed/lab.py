"""A main process, its nodes, and what happens to the tasks."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from cuckoo.common import startup, storage

from cuckoo_machinery.connection import Client
from tests.support import TIMEOUT, end_program
from tests.with_cuckoo3.support import AGENT_PORT, PACKAGE, change_yaml
from tests.with_cuckoo3.test_main import make_databases

from .network import BRIDGE, RESULT_SERVER, NodeNetwork

API_PORT = 8090
# The machines of each node.
MACHINES = 2
API_KEY = "key of {}"
AGENT = PACKAGE.parents[1] / "crates/machinery-testkit/src/guest/analysis/agent.py"

# Stands in for the machine: runs the sample, and sends what it writes from the machine's address.
STAGER = """\
#!{python}
import json, os, socket, subprocess, sys
subprocess.run([sys.executable, "payload.dat"], check=True)
host, port = json.load(open("settings.json"))["host"].split(":")
server = socket.create_connection((host, int(port)), source_address=(os.environ["MACHINE"], 0))
server.sendall(b"FILE\\nfiles/proof\\n" + open("proof", "rb").read())
server.close()
"""

# The sample, which runs in machines of QEMU and in the place of others. Cuckoo3 takes scripts of Python for programs.
SAMPLE = """\
#!/bin/python -S
import sys


def main():
    with open("proof", "w") as proof:
        proof.write("{number}")


sys.exit(main())
# {padding}
"""


class TimeLine:
    """The events of the test with their times, in seconds since its begin."""

    def __init__(self):
        self._begin = time.time()
        self._lines = []

    def note(self, text, at=None):
        """Adds an event, and prints it."""
        seconds = (at or time.time()) - self._begin
        self._lines.append((seconds, text))
        print(f"{seconds:7.1f} s  {text}", file=sys.stderr, flush=True)


def wait_until(is_so, what, limit=TIMEOUT):
    """Polls: Cuckoo3 sends no notifications."""
    deadline = time.monotonic() + limit
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {limit} s")
        time.sleep(0.1)


def make_cwd(folder, name, machineries):
    """Makes a CWD by Cuckoo3."""
    root = folder / name
    storage.cuckoocwd.create(root)
    storage.cuckoocwd.set(root)
    startup.create_configurations()

    def change(values):
        values["machineries"] = machineries
        values["resultserver"]["listen_ip"] = RESULT_SERVER
        # Cuckoo3 requires that it exists.
        values["tcpdump"] = {"enabled": False, "path": "/bin/true"}

    change_yaml(root / "conf" / "cuckoo.yaml", change)
    return root


def make_monitor(root):
    """Makes a stager, and a monitor that is never used."""
    monitor = root / "monitor" / "windows" / "amd64"
    for path, text in {
        "default": "threemon",
        "threemon/default_stager": "1",
        "threemon/default_monitor": "1",
        "threemon/stager/1/tmstage.exe": STAGER.format(python=sys.executable),
        "threemon/monitor/1/threemon.sys": "",
    }.items():
        file = monitor / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


class Program:
    """A program of Cuckoo3 on the host, on a CWD."""

    def __init__(self, root, command, *args, run=subprocess.Popen):
        self.root = root
        program = f"import sys; from cuckoo_machinery.commands import {command}; sys.argv[0] = '{command}'; {command}()"
        self._output = open(root / "output", "ab")
        self.process = run(
            [sys.executable, "-c", program, "--cwd", str(root), "-d", *args],
            env={**os.environ, "PYTHONPATH": str(PACKAGE), "TMPDIR": str(root.parent), "CUCKOO_CWD": str(root)},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def end(self):
        """Ends the program, and returns its exit code."""
        self._output.close()
        return end_program(self.process, self.output)

    def output(self):
        """Returns the end of the output of all programs on this CWD."""
        return (self.root / "output").read_text(errors="replace")[-8000:]


class Node:
    """A node in its own network."""

    def __init__(self, lab, name, machinery):
        self.name = name
        self._case = lab.case
        self.network = NodeNetwork(name, len(lab.nodes) + 1, MACHINES, their_addresses=machinery == "double")
        self.root = make_cwd(lab.folder, name, [machinery])
        change_yaml(self.root / "conf" / "distributed.yaml", self._set_key)
        self.program = None
        self._agents = []

    @property
    def url(self):
        """The address of the node's API."""
        return f"http://{self.network.address}:{API_PORT}"

    def _set_key(self, values):
        values["node_settings"]["api_key"] = API_KEY.format(self.name)

    def use_doubles(self):
        """Configures machines in memory, with an agent on the node for each."""
        shared = {"agent_port": AGENT_PORT, "platform": "windows", "os_version": "10"}
        names = [f"{self.name}_{number}" for number in range(MACHINES)]
        machines = {
            name: {"label": name, "ip": address, **shared} for name, address in zip(names, self.network.machines)
        }
        path = self.root / "conf" / "machineries" / "double.yaml"
        path.write_text(yaml.safe_dump({"interface": BRIDGE, "machines": machines}))
        make_monitor(self.root)
        self._agents = [self._start_agent(address) for address in self.network.machines]

    def _start_agent(self, address):
        environment = {**os.environ, "MACHINE": address, "TMPDIR": str(self.root.parent)}
        agent = self.network.run(
            [sys.executable, str(AGENT), "--again", address, str(AGENT_PORT)],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        self._case.addCleanup(agent.wait)
        self._case.addCleanup(agent.kill)
        return agent

    def use_qemu(self, cwd):
        """Takes the analysis guests of another CWD."""
        values = yaml.safe_load((cwd / "conf" / "machineries" / "qemu.yaml").read_text())
        values["machines"] = {f"{self.name}_{name}": machine for name, machine in values["machines"].items()}
        (self.root / "conf" / "machineries" / "qemu.yaml").write_text(yaml.safe_dump(values))
        shutil.copy(cwd / "conf" / "machinery-host.yaml", self.root / "conf")
        shutil.copytree(cwd / "monitor", self.root / "monitor", dirs_exist_ok=True)

    def start(self):
        """Starts the node."""
        self.program = Program(
            self.root, "cuckoonode", "-h", self.network.address, "-p", str(API_PORT), run=self.network.run
        )
        self._case.addCleanup(self.program.end)

    @property
    def client(self):
        """A client of the node's host."""
        return Client(self.root / "operational" / "sockets" / "machinerymanager.sock")

    def answers(self):
        """Reports whether the node's API answers."""
        if self.program.process.poll() is not None:
            raise AssertionError(f"node {self.name} has ended:\n{self.program.output()}")
        try:
            socket.create_connection((self.network.address, API_PORT), timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self):
        """Ends the node as a power failure does: everything but the stand-ins of its machines."""
        agents = {agent.pid for agent in self._agents}
        for pid in self.network.processes():
            if pid not in agents:
                os.kill(pid, signal.SIGKILL)
        self.program.process.wait()


class Lab:
    """A main process without machines, and its nodes."""

    def __init__(self, case):
        self.case = case
        self.folder = Path(tempfile.mkdtemp(prefix="machinery-lab."))
        # After the end of all programs.
        case.addCleanup(shutil.rmtree, self.folder)
        self.root = make_cwd(self.folder, "main", [])
        for folder in ("monitor", "signatures/cuckoo/pattern/network"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.nodes = {}
        self.main = None

    def add_node(self, name, machinery):
        """Makes a node."""
        self.nodes[name] = node = Node(self, name, machinery)
        return node

    def prepare(self):
        """Configures the main process for its nodes."""
        storage.cuckoocwd.set(self.root)
        remote = {name: {"api_url": node.url, "api_key": API_KEY.format(name)} for name, node in self.nodes.items()}
        change_yaml(self.root / "conf" / "distributed.yaml", lambda values: values.update(remote_nodes=remote))
        make_databases()

    def start_main(self):
        """Starts the main process."""
        self.main = Program(self.root, "cuckoo", "--distributed")
        self.case.addCleanup(self.main.end)
        # The scheduler writes it.
        wait_until(storage.Paths.nodeinfos_dump().exists, "the main process has started")

    def submit(self, count, seconds):
        """Submits samples, each of which runs for that many seconds; returns their numbers, by analysis."""
        paths = {}
        for number in map(str, range(count)):
            path = self.folder / "samples" / number / "sample.exe"
            path.parent.mkdir(parents=True)
            path.write_text(SAMPLE.format(number=number, padding="x" * 200))
            paths[str(path)] = number
        program = "from cuckoo_machinery.commands import cuckoo; cuckoo()"
        command = [sys.executable, "-c", program, "--cwd", str(self.root), "submit", "--orig-filename"]
        command += ["--timeout", str(seconds), "--platform", "windows,10", *paths]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=TIMEOUT)
        self.case.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        analyses = {id: paths[path] for id, path in re.findall(r"(\d{8}-\w+) -> (\S+\.exe)", done.stdout)}
        self.case.assertEqual(len(analyses), count, done.stdout + done.stderr)
        return analyses

    def task(self, analysis_id):
        """Returns the state of the task of an analysis; `None` while it has none."""
        day, identifier = analysis_id.split("-")
        path = self.root / "storage" / "analyses" / day / identifier / "task_1"
        try:
            return {**json.loads((path / "task.json").read_text()), "path": path}
        except (OSError, ValueError):
            return None
