"""The machinery host of one CWD: found or started, and supervised.

    attach ─▶ does a host answer? ──yes──▶ used ────────┐
                      │ no                              ▼
                      └─▶ started, READY=1 ─────▶ attached: events arrive
                               ▲                        │ the connection ends
                               │                        ▼
                 no host came back ◀── a pause ◀────── lost
    detach ─▶ a host that was started here gets SIGTERM, stops its machines and ends;
              another's host runs on

One thread receives the events. The end of their stream shows the end of any host. A host that was started here
sends `READY=1` to a socket of this process, as it would to systemd. A thread that waits for the host's process
reports its end to the same socket, so that a start waits for a single socket.

The host has its own session: Ctrl-C in the terminal reaches only Cuckoo3, which shuts down in order and then
ends the host.
"""

import fcntl
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from .connection import Client, HostError, Unreachable, Refused

PROGRAM = "cuckoo-machinery"
PROGRAM_VARIABLE = "CUCKOO_MACHINERY"
# Further options of a host that is started here, quoted as in a shell: `-v --allow-insecure-plugins`.
OPTIONS_VARIABLE = "CUCKOO_MACHINERY_OPTIONS"

# All in seconds.
START_TIMEOUT = 120
# A host first stops its machines, which takes up to a minute, and then shuts its plugins down.
END_TIMEOUT = 100
# The time in which another's host may come back.
RESTART_GRACE = 5
# A host that ran this long was started successfully.
STABLE_AFTER = 60
MAX_PAUSE = 30
# The interval of polling for another's host, which sends no notification.
POLL_INTERVAL = 0.2


def find_program():
    """Returns the program `cuckoo-machinery`: the one in `$CUCKOO_MACHINERY`, or the one in the PATH."""
    given = os.environ.get(PROGRAM_VARIABLE)
    found = shutil.which(given or PROGRAM)
    if found:
        return found
    if given:
        raise HostError(f"${PROGRAM_VARIABLE} is {given}, which is no program. Set it to {PROGRAM}'s path")
    raise HostError(
        f"The program {PROGRAM} is not in the PATH. Install it there, or set ${PROGRAM_VARIABLE} to its path"
    )


def more_options():
    """Returns the options in `$CUCKOO_MACHINERY_OPTIONS`, which the host gets beside `--cwd`."""
    given = os.environ.get(OPTIONS_VARIABLE, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise HostError(f"${OPTIONS_VARIABLE} is {given!r}: {error}. Quote it as in a shell") from error


class Listener:
    """Receives events of a host. All calls come from one thread at a time."""

    def attached(self):
        """Handles a new host, whose state may differ from that of an earlier one."""

    def heard(self, event):
        """Handles an event of the host."""


class Host:
    """The host of the CWD `cwd`. `client` sends it requests."""

    def __init__(self, cwd, listener=None, log=None):
        self._cwd = Path(cwd).absolute()
        self._listener = listener or Listener()
        self._log = log or logging.getLogger(__name__)
        self._child = None
        self._events = None
        self._thread = None
        self._failures = 0
        self._ending = threading.Event()
        self._attached = threading.Condition()
        self._attachments = 0
        self.client = Client(self._cwd / "operational" / "sockets" / "machinerymanager.sock")

    @property
    def is_own(self):
        """Reports whether the host was started here."""
        return self._child is not None

    def attach(self):
        """Finds or starts a host, and receives its events from then on."""
        self._ensure_host(grace=0)
        if not self.is_own:
            self._log.info(self._use())
        self._listen()
        self._thread = threading.Thread(target=self._supervise, name="machinery-host", daemon=True)
        self._thread.start()

    def detach(self):
        """Stops the supervision, and ends a host that was started here. May be called at any time."""
        self._ending.set()
        with self._attached:
            self._attached.notify_all()
        if self._events:
            self._events.close()
        self._end_child()
        if self._thread:
            self._thread.join(END_TIMEOUT)
            # A host whose start was under way.
            self._end_child()

    def request_with_retries(self, action, retry_for=30, **keys):
        """Sends a request like `client.request`, and repeats it when a lost host is back."""
        until = time.monotonic() + retry_for
        while True:
            before = self._attachments
            try:
                return self.client.request(action, **keys)
            except Unreachable:
                if not self._is_reattached(before, until):
                    raise

    def _is_reattached(self, before, until):
        def known():
            return self._attachments > before or self._ending.is_set()

        with self._attached:
            self._attached.wait_for(known, max(0, until - time.monotonic()))
            return self._attachments > before

    def _listen(self):
        self._events = self.client.subscribe()
        if self._ending.is_set():
            self._events.close()
        try:
            self._listener.attached()
        except Exception:
            self._events.close()
            raise
        with self._attached:
            self._attachments += 1
            self._attached.notify_all()

    def _supervise(self):
        while not self._ending.is_set():
            since = time.monotonic()
            self._process_events()
            self._events.close()
            if time.monotonic() - since >= STABLE_AFTER:
                self._failures = 0
            self._reattach()

    def _process_events(self):
        for event in self._events:
            try:
                self._listener.heard(event)
            except Exception as error:
                # A failure with one event must not end the supervision.
                self._log.exception(f"An event of the machinery host could not be handled: {event}: {error}")

    def _reattach(self):
        what = f"The machinery host {self._description()} is lost"
        while not self._ending.is_set():
            # A host that has been replaced answers at once.
            pause = min(2 ** (self._failures - 1), MAX_PAUSE) if self._failures else 0
            self._failures += 1
            self._log.error(f"{what}. Looking for a host in {pause} s, and starting one if there is none")
            if self._ending.wait(pause):
                return
            try:
                self._ensure_host(RESTART_GRACE)
                self._listen()
            except Exception as error:
                # The next attempt may succeed.
                what = f"The machinery host did not come back: {error}"
            else:
                self._log.warning(f"The machinery host {self._description()} is attached")
                return

    def _description(self):
        if self._child:
            return f"of {self._cwd} that was started here (process {self._child.pid})"
        return f"of {self._cwd} that somebody else runs"

    def _use(self):
        version = self.client.request("version")
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(version.get("started", 0) / 1000))
        return (
            f"A machinery host of {self._cwd} that runs already is used: process {version.get('pid', 'unknown')}, "
            f"since {started}, started by {version.get('started_by') or 'an unknown program'}. It runs on when this "
            "process ends: `cuckoo-machinery shutdown` ends it"
        )

    def _ensure_host(self, grace):
        """Finds or starts a host. Another's host has `grace` seconds to come back."""
        begin = time.monotonic()
        while not self._answers():
            waited = time.monotonic() - begin
            if self._ending.is_set():
                raise HostError("Cuckoo's node is being stopped")
            if waited > START_TIMEOUT:
                raise Unreachable(
                    f"A machinery host holds {self._lock_path}, but has not answered for {START_TIMEOUT} s. "
                    "Look at its log, or end it"
                )
            # A CWD has one host. A host with the lock is starting or shutting down.
            if (not self._child and waited < grace) or self._is_held():
                self._ending.wait(POLL_INTERVAL)
            else:
                self._start()
        if self._child and self._child.has_ended():
            # Another host was faster.
            self._child = None

    def _answers(self):
        try:
            self.client.request("version")
        except Unreachable:
            return False
        except Refused as error:
            raise HostError(
                f"The process that answers on {self.client.path} is no machinery host: {error.reason}. "
                "Stop Cuckoo's own node first, if it runs"
            ) from error
        return True

    @property
    def _lock_path(self):
        return self._cwd / "operational" / "generated" / "machinery-host" / "lock"

    def _is_held(self):
        try:
            with open(self._lock_path, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except PermissionError:
            # The host is another user's, so none can be started here.
            return True
        except BlockingIOError:
            return True
        except OSError as error:
            raise HostError(
                f"The lock of the machinery host cannot be read: {error}. "
                "Cuckoo's node and the host must be run by the same user"
            ) from error
        return False

    def _start(self):
        if self._child:
            self._child.end()
        self._child = Child(find_program(), self._cwd, more_options())
        if self._child.is_ready(START_TIMEOUT):
            self._log.info(
                f"The machinery host of {self._cwd} is started: process {self._child.pid}, log {self._child.log_path}"
            )
            return
        child, self._child = self._child, None
        child.end()
        # Of two hosts that start at the same time, one fails, and the other is used.
        if not self._is_held():
            raise HostError(f"The machinery host of {self._cwd} could not be started. {child.failure()}")

    def _end_child(self):
        if self._child and not self._child.end():
            self._log.error(
                f"The machinery host of {self._cwd}, process {self._child.pid}, did not end within "
                f"{END_TIMEOUT} s and was killed. Machines may still run: `cuckoo-machinery end-runs` ends them"
            )


class Child:
    """The process of a host."""

    def __init__(self, program, cwd, options=()):
        self._folder = tempfile.mkdtemp(prefix="cuckoo-machinery.")
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = os.path.join(self._folder, "notify")
        self._ended = threading.Event()
        self.log_path = Path(cwd) / "log" / "machinery-host.log"
        try:
            self._notices.bind(self._address)
            self._process = self._run([program, "--cwd", str(cwd), *options, "serve"])
        except OSError as error:
            self._remove_files()
            raise HostError(f"The machinery host of {cwd} could not be started: {error}") from error
        self.pid = self._process.pid
        threading.Thread(target=self._wait, name="machinery-host-end", daemon=True).start()

    def _run(self, command):
        self.log_path.parent.mkdir(exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            return subprocess.Popen(
                command,
                env={**os.environ, "NOTIFY_SOCKET": self._address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self):
        self._process.wait()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            try:
                sender.sendto(b"ENDED=1", socket.MSG_DONTWAIT, self._address)
            except BlockingIOError:
                pass  # other messages wake the reader
        self._ended.set()

    def _remove_files(self):
        self._notices.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def has_ended(self):
        """Reports whether the process has ended."""
        return self._ended.is_set()

    def is_ready(self, limit):
        """Waits until the host is ready; false if it ends before, or after `limit` seconds."""
        deadline = time.monotonic() + limit
        while True:
            self._notices.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                notice = self._notices.recv(4096).split()
            except socket.timeout:
                return False
            if b"READY=1" in notice:
                return True
            if b"ENDED=1" in notice:
                return False

    def end(self):
        """Shuts the host down, if it runs; false if it had to be killed."""
        try:
            self._process.send_signal(signal.SIGTERM)
        except ProcessLookupError:
            # The process has just ended; Python before 3.9 does not detect that.
            pass
        in_order = self._ended.wait(END_TIMEOUT)
        if not in_order:
            self._process.kill()
            self._ended.wait()
        self._remove_files()
        return in_order

    def failure(self):
        """Returns the output of a failed start, and its exit code."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_start)
            output = log.read().decode(errors="replace").strip()
        return (
            f"It wrote: {output[-2000:] or 'nothing'}\n(exit code {self._process.poll()}; log {self.log_path}; "
            f"it gets the options in ${OPTIONS_VARIABLE})"
        )
