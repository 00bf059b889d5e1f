"""A machinery host for one CWD: found or started, and kept running.

    attach ─▶ does a host answer? ──yes──▶ used ────────┐
                      │ no                              ▼
                      └─▶ started, READY=1 ─────▶ attached: events are heard
                               ▲                        │ the connection ends
                               │                        ▼
                 no host came back ◀── a pause ◀────── gone
    detach ─▶ a host that was started here is ended with SIGTERM and stops its machines first;
              one that somebody else runs goes on

One thread hears the events. The end of their stream is how the end of a host is noticed, whoever runs
it. A host that was started here says `READY=1` on a socket of ours, the way of systemd; a thread that
waits for its process says on the same socket when that ends, so that a start waits for one thing only.

The host has a session of its own: Ctrl-C in the terminal is for Cuckoo3, which ends in good order and
then ends the host.
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

from .connection import Client, HostError, OutOfReach, Refused

PROGRAM = "cuckoo-machinery"
PROGRAM_VARIABLE = "CUCKOO_MACHINERY"
# More options for a host that is started here, as in a shell: `-v --allow-insecure-plugins`.
OPTIONS_VARIABLE = "CUCKOO_MACHINERY_OPTIONS"

# All in seconds.
START_LIMIT = 120
# A host stops its machines first, which takes up to a minute, and then shuts its plugins down.
END_LIMIT = 100
# The time that a host which somebody else runs has to come back, in seconds.
COMEBACK = 5
# A host that ran this long has not failed to start.
STEADY = 60
LONGEST_PAUSE = 30
# The pause between two checks for a host that somebody else starts or ends: it cannot notify us.
LOOK_AGAIN = 0.2


def find_program():
    """The program `cuckoo-machinery`: the one in `$CUCKOO_MACHINERY`, else the one in the PATH."""
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
    """The options in `$CUCKOO_MACHINERY_OPTIONS`, which the host gets beside `--cwd`."""
    given = os.environ.get(OPTIONS_VARIABLE, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise HostError(f"${OPTIONS_VARIABLE} is {given!r}: {error}. Quote it as in a shell") from error


class Listener:
    """Receives notifications about a host. All calls come from one thread at a time."""

    def attached(self):
        """A host answers, anew perhaps: nothing that was known about it need be true any more."""

    def heard(self, event):
        """An event of the host."""


class Host:
    """The host of the CWD `cwd`. `client` asks it."""

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
        """Returns whether the host was started here."""
        return self._child is not None

    def attach(self):
        """Sees to it that a host answers, and hears its events from then on."""
        self._bring_up(comeback=0)
        self._listen()
        self._thread = threading.Thread(target=self._attend, name="machinery-host", daemon=True)
        self._thread.start()

    def detach(self):
        """Releases the host, and ends it if it was started here. May be called at any time."""
        self._ending.set()
        with self._attached:
            self._attached.notify_all()
        if self._events:
            self._events.close()
        self._end_child()
        if self._thread:
            self._thread.join(END_LIMIT)
            # One that was just being started.
            self._end_child()

    def request_patiently(self, action, patience=30, **keys):
        """As `client.request`, but asks again when a host that went away is back."""
        until = time.monotonic() + patience
        while True:
            before = self._attachments
            try:
                return self.client.request(action, **keys)
            except OutOfReach:
                if not self._comes_back(before, until):
                    raise

    def _comes_back(self, before, until):
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

    def _attend(self):
        while not self._ending.is_set():
            since = time.monotonic()
            self._hear()
            self._events.close()
            if time.monotonic() - since >= STEADY:
                self._failures = 0
            self._bring_back()

    def _hear(self):
        for event in self._events:
            try:
                self._listener.heard(event)
            except Exception as error:
                # One event that cannot be dealt with must not be the end of all.
                self._log.exception(f"An event of the machinery host was not dealt with: {event}: {error}")

    def _bring_back(self):
        what = f"The machinery host {self._whose()} is gone"
        while not self._ending.is_set():
            pause = min(2**self._failures, LONGEST_PAUSE)
            self._failures += 1
            self._log.error(f"{what}. One is looked for in {pause} s, and started if there is none")
            if self._ending.wait(pause):
                return
            try:
                self._bring_up(COMEBACK)
                self._listen()
            except Exception as error:
                # The next attempt may succeed.
                what = f"The machinery host did not come back: {error}"
            else:
                self._log.warning(f"The machinery host {self._whose()} is attached")
                return

    def _whose(self):
        if self._child:
            return f"of {self._cwd} that was started here (process {self._child.pid})"
        return f"of {self._cwd} that somebody else runs"

    def _bring_up(self, comeback):
        """Returns when a host answers. Another's, which was there before, gets some time to come back."""
        begin = time.monotonic()
        while not self._answers():
            waited = time.monotonic() - begin
            if self._ending.is_set():
                raise HostError("Cuckoo's node is being stopped")
            if waited > START_LIMIT:
                raise OutOfReach(
                    f"A machinery host holds {self._lock_path}, but has not answered for {START_LIMIT} s. "
                    "Look at its log, or end it"
                )
            # A CWD has one host. One that holds it comes up or goes down.
            if (not self._child and waited < comeback) or self._is_held():
                self._ending.wait(LOOK_AGAIN)
            else:
                self._start()
        if self._child and self._child.has_ended():
            # Somebody was quicker.
            self._child = None

    def _answers(self):
        try:
            self.client.request("version")
        except OutOfReach:
            return False
        except Refused as error:
            raise HostError(
                f"What answers on {self.client.path} is no machinery host: {error.reason}. "
                "Stop Cuckoo's own node first, if it runs"
            ) from error
        return True

    @property
    def _lock_path(self):
        return self._cwd / "operational" / "generated" / "machinery-host" / "lock"

    def _is_held(self):
        try:
            with open(self._lock_path) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError as error:
            raise HostError(
                f"The lock of the machinery host cannot be looked at: {error}. "
                "Cuckoo's node and the host must be run by the same user"
            ) from error
        return False

    def _start(self):
        if self._child:
            self._child.end()
        self._child = Child(find_program(), self._cwd, more_options())
        if self._child.is_ready(START_LIMIT):
            self._log.info(
                f"The machinery host of {self._cwd} is started: process {self._child.pid}, log {self._child.log_path}"
            )
            return
        child, self._child = self._child, None
        child.end()
        # Of two that are started at the same time, one has to go: no failure, the other is used.
        if not self._is_held():
            raise HostError(f"The machinery host of {self._cwd} could not be started. {child.failure()}")

    def _end_child(self):
        if self._child and not self._child.end():
            self._log.error(
                f"The machinery host of {self._cwd}, process {self._child.pid}, did not end within "
                f"{END_LIMIT} s and was killed. Machines may be left; its next start ends them"
            )


class Child:
    """A host's process."""

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
            self._clear_away()
            raise HostError(f"The machinery host of {cwd} could not be started: {error}") from error
        self.pid = self._process.pid
        threading.Thread(target=self._wait, name="machinery-host-end", daemon=True).start()

    def _run(self, command):
        self.log_path.parent.mkdir(exist_ok=True)
        with open(self.log_path, "ab") as log:
            self._log_start = os.fstat(log.fileno()).st_size
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
            sender.sendto(b"ENDED=1", self._address)
        self._ended.set()

    def _clear_away(self):
        self._notices.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def has_ended(self):
        """Returns whether its process has ended."""
        return self._ended.is_set()

    def is_ready(self, limit):
        """Waits until it answers; false if it ends before, or is not ready within `limit` seconds."""
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
        """Ends it in good order, if it has not ended; false if it had to be killed."""
        try:
            self._process.send_signal(signal.SIGTERM)
        except ProcessLookupError:
            # It has ended just now; Python before 3.9 sends all the same.
            pass
        in_order = self._ended.wait(END_LIMIT)
        if not in_order:
            self._process.kill()
            self._ended.wait()
        self._clear_away()
        return in_order

    def failure(self):
        """Returns the last lines of its log."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_start)
            said = log.read().decode(errors="replace").strip()
        return (
            f"It said: {said[-2000:] or 'nothing'}\n(exit code {self._process.poll()}; log {self.log_path}; "
            f"it gets the options in ${OPTIONS_VARIABLE})"
        )
