"""Helpers of the tests with Cuckoo3: a CWD that Cuckoo3 made, tasks of a node, and a running node."""

import json
import os
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

import yaml
from cuckoo.common import startup, storage
from cuckoo.common.strictcontainer import Analysis, Settings, SubmittedURL, TargetURL, Task

from tests.support import TIMEOUT, end_program, write_machines

PACKAGE = Path(__file__).resolve().parents[2]
PORT = 8090
AGENT_PORT = 8000


def address(number):
    """Returns one of the four loopback addresses of this test process."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 14) % 128}.{(pid >> 6) % 256}.{pid % 64 * 4 + number}"


def make_cuckoo_cwd(case, machines):
    """Makes a CWD by Cuckoo3, with the double machinery; removed with the test."""
    folder = tempfile.mkdtemp(prefix="machinery-cwd.")
    case.addCleanup(shutil.rmtree, folder)
    root = Path(folder, "cwd")
    storage.cuckoocwd.create(root)
    storage.cuckoocwd.set(root)
    startup.create_configurations()
    # Cuckoo3 requires the folder of its monitor for Windows, which these tests do not use.
    (root / "monitor").mkdir()
    # Its worker for post-processing requires the folder of its signatures.
    (root / "signatures" / "cuckoo" / "pattern" / "network").mkdir(parents=True)
    change_yaml(root / "conf" / "cuckoo.yaml", _for_tests)
    write_machines(root, machines)
    return root


def _for_tests(values):
    values["machineries"] = ["double"]
    values["resultserver"]["listen_ip"] = address(0)
    # Cuckoo3 requires that it exists, and does not use it.
    values["tcpdump"] = {"enabled": False, "path": "/bin/true"}


def change_yaml(path, change):
    """Changes a configuration file."""
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))


def process_behind(path):
    """Returns the id of the process that listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", credentials)[0]


def add_task(root, task_id, folder="nodework"):
    """Writes the files of a task into the folder of a node's tasks."""
    analysis_id, number = task_id.split("_")
    day, identifier = analysis_id.split("-")
    path = root / "storage" / folder / day / identifier
    (path / f"task_{number}").mkdir(parents=True)
    for name in ("logs", "events", "dropped", "screenshots", "memory"):
        (path / f"task_{number}" / name).mkdir()
    settings = Settings(
        timeout=5, enforce_timeout=False, dump_memory=False, priority=1, options={}, platforms=[], manual=False,
        orig_filename=False,
    )  # fmt: skip
    Analysis(
        id=analysis_id, kind="standard", state="tasks_pending", settings=settings, created_on=datetime.now(),
        category="url", submitted=SubmittedURL(url="http://192.0.2.1/", category="url"),
        target=TargetURL(url="http://192.0.2.1/", platforms=[]),
    ).to_file(path / "analysis.json")  # fmt: skip
    Task(
        id=task_id, analysis_id=analysis_id, kind="standard", state="pending", number=int(number), platform="linux",
        os_version="12",
    ).to_file(path / f"task_{number}" / "task.json")  # fmt: skip


class Agent:
    """A listener in the place of a guest's agent. Cuckoo3 then considers the machine online, has nothing to run
    in it, and ends the task."""

    def __init__(self, case, ip):
        self._listener = socket.create_server((ip, AGENT_PORT))
        case.addCleanup(self._listener.close)


class Node:
    """A process of `cuckoonode-hosted` on a CWD."""

    def __init__(self, case, root, command="cuckoonode", *args):
        self._case = case
        self._key = yaml.safe_load((root / "conf" / "distributed.yaml").read_text())["node_settings"]["api_key"]
        self.root = root
        self._log = tempfile.TemporaryFile()
        case.addCleanup(self._log.close)
        program = f"import sys; from cuckoo_machinery.commands import {command}; sys.argv[0] = '{command}'; {command}()"
        args = args or ("-h", address(0), "-p", str(PORT))
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "TMPDIR": str(root.parent)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "--cwd", str(root), "-d", *args],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        case.addCleanup(self.end)

    def end(self):
        """Ends the node, and returns its exit code."""
        return end_program(self.process, self.output)

    def output(self):
        """Returns the node's output."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait_for_output(self, words):
        """Polls until the output contains these words."""
        deadline = time.monotonic() + TIMEOUT
        while words not in self.output():
            self._case.assertLess(time.monotonic(), deadline, f"{words!r} is not in:\n{self.output()}")
            time.sleep(0.05)

    def wait_until_it_answers(self):
        """Polls until the API answers."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                return self.ask("GET", "/ping")
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the node does not answer:\n{self.output()}") from None
                time.sleep(0.1)

    def ask(self, method, path, body=None):
        """Sends a request to the API, and returns the status and the body of the answer."""
        try:
            with self._open(method, path, body, TIMEOUT) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def machines(self):
        """Returns the node's machines, by name."""
        status, body = self.ask("GET", "/machines")
        self._case.assertEqual(status, 200)
        return {machine["name"]: machine for machine in json.loads(body)}

    def wait_for_machine(self, name, **keys):
        """Polls until the API shows the machine with these keys."""
        deadline = time.monotonic() + TIMEOUT
        while not keys.items() <= self.machines()[name].items():
            self._case.assertLess(time.monotonic(), deadline, f"the node shows {self.machines()[name]}")
            time.sleep(0.05)

    def start_task(self, task_id, machine):
        """Writes a task, and starts it."""
        add_task(self.root, task_id)
        return self.ask("POST", f"/task/{task_id}/start", json.dumps({"machine_name": machine}).encode())

    def events(self):
        """Subscribes to the node's event stream."""
        return EventStream(self._case, self._open("GET", "/events", None, TIMEOUT))

    def _open(self, method, path, body, timeout):
        headers = {"Authorization": f"token {self._key}", "Content-Type": "application/json"}
        url = f"http://{address(0)}:{PORT}{path}"
        return urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=timeout)


class EventStream:
    """The events that a node sends to Cuckoo3's main process."""

    def __init__(self, case, stream):
        self._events = queue.Queue()
        self._stream = stream
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for line in self._stream:
                if line.startswith(b"data:"):
                    self._events.put(json.loads(line[5:]))
        except OSError:
            pass

    def wait_for(self, **keys):
        """Returns the next event with these keys."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            event = self._events.get(timeout=max(0.001, deadline - time.monotonic()))
            if keys.items() <= event.items():
                return event
