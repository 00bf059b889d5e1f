"""Helpers of the tests: a CWD of the double machinery, another's host, and an event recorder."""

import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from cuckoo_machinery.host import Child, Listener, find_program

# The timeout of every wait; no test measures speed.
TIMEOUT = 60

CUCKOO_YAML = """\
machineries:
- double
resultserver:
  listen_ip: 127.0.0.1
  listen_port: 2042
tcpdump:
  enabled: false
  path: /usr/bin/tcpdump
"""


def machines_yaml(machines, more=""):
    """Returns the text of double.yaml for `machines`: names, and further YAML keys."""
    lines = ["interface: lo", more, "machines:"]
    for number, (name, keys) in enumerate(machines.items(), start=1):
        shared = {"ip": f"10.0.0.{number}", "platform": "linux", "os_version": '"12"'}
        own = ", ".join(f"{key}: {value}" for key, value in {**shared, **keys}.items())
        lines.append(f"  {name}: {{label: {name}-label, {own}}}")
    return "\n".join(lines) + "\n"


def make_cwd(case, machines=None):
    """Makes a CWD with these machines, removed with the test."""
    root = Path(tempfile.mkdtemp(prefix="machinery-cwd."))
    case.addCleanup(shutil.rmtree, root)
    (root / "conf" / "machineries").mkdir(parents=True)
    (root / ".cuckoocwd").touch()
    (root / "conf" / "cuckoo.yaml").write_text(CUCKOO_YAML)
    write_machines(root, machines or {"m": {}})
    return root


def write_machines(root, machines, more=""):
    """Writes double.yaml."""
    (root / "conf" / "machineries" / "double.yaml").write_text(machines_yaml(machines, more))


def end_program(process, output):
    """Ends a program by SIGTERM, and kills its process group after a timeout. Returns its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"{process.args} did not end:\n{output()}") from None


def start_other_host(case, root):
    """Starts a host of that CWD that is not the adapter's; it ends with the test, if not earlier."""
    host = Child(find_program(), root)
    case.addCleanup(host.end)
    if not host.is_ready(TIMEOUT):
        case.fail(host.failure())
    return host


def is_there(pid):
    """Reports whether the process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid):
    """Waits for the end of a process, which need not be a child."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([watched], [], [], TIMEOUT)[0]:
            raise AssertionError(f"process {pid} has not ended")
    finally:
        os.close(watched)


class EventRecorder(Listener):
    """Records the events of a host, and waits for them."""

    def __init__(self):
        self._events = queue.Queue()

    def attached(self):
        self._events.put({"event": "attached"})

    def heard(self, event):
        self._events.put(event)

    def wait_for(self, kind, **keys):
        """Returns the next event of that kind with these keys; drops other events."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            event = self._events.get(timeout=max(0.001, deadline - time.monotonic()))
            if event["event"] == kind and keys.items() <= event.items():
                return event


class FakeHost:
    """Listens on the socket of a host. `answers` returns the answer to a line: bytes to send, or None to
    close the connection."""

    def __init__(self, case, path, answers):
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        case.addCleanup(self._listener.close)
        # Wakes the thread that waits for the next connection.
        case.addCleanup(self._listener.shutdown, socket.SHUT_RDWR)
        self._listener.bind(str(path))
        self._listener.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    answer = self._answers(line)
                    if answer is None:
                        break
                    connection.sendall(answer)
