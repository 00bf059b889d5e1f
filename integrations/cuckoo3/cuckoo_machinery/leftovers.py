"""Processes and sockets of Cuckoo3 that a killed node or main process has left in a CWD.

Cuckoo3 starts workers as processes of their own: the result server, the task runner, the processing workers. They
outlive a killed node, and Cuckoo3 refuses to start while their sockets exist.

    start ─▶ lock ──held──▶ InUse: that process still runs
               │ free
               ▼
             end the recorded workers ─▶ remove dead sockets ─▶ record this process, then each worker it starts

A record is a file in operational/generated with one JSON line per process: its id, and its start time in ticks since
the boot. The kernel gives ids to new processes again, but not with the same start time. The kernel releases the lock
of the file when its process ends, however it ends.

A node and a main process may share a CWD, so each role has its own record and sockets.
"""

import fcntl
import json
import os
import re
import signal
import socket
import stat
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

# The time that workers have to end after SIGTERM, in seconds. The task runner waits 10 seconds for each task.
END_TIMEOUT = 30
# The time that the kernel has to end them after SIGKILL, in seconds.
KILL_TIMEOUT = 30
# The interval of looking for their end: they are no children of this process, and Python 3.8 has no pidfds.
POLL_INTERVAL = 0.05

NODE, MAIN = "node", "main"

_SOCKETS = {
    NODE: re.compile(r"(taskrunner|nodestatecontroller|resultserver)\.sock"),
    MAIN: re.compile(r"(statecontroller|resultretriever|(identification|pre|post)\d+)\.sock"),
}
_WORDS = {NODE: "node", MAIN: "main process"}
# The flag of a listening socket in /proc/net/unix.
_LISTENS = 0x10000


class InUse(Exception):
    """Another process still uses the CWD."""


class Record:
    """The record of the processes of one role in the CWD `cwd`."""

    def __init__(self, cwd, role, log):
        self._cwd = Path(cwd).absolute()
        self._role = role
        self._log = log
        self._path = self._cwd / "operational" / "generated" / f"cuckoo-{role}-processes.jsonl"
        self._file = None

    @property
    def path(self):
        """The file of the record."""
        return self._path

    def claim(self):
        """Takes the CWD for this process, and clears what an earlier one has left. Raises InUse."""
        self._lock()
        self._end_workers()
        self._remove_dead_sockets()
        self._file.truncate(0)
        self.add(os.getpid(), f"Cuckoo3's {_WORDS[self._role]}")

    def add(self, pid, name):
        """Records a process."""
        started = start_time(pid)
        if started is not None:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            line = {"pid": pid, "started": started, "boot": _boot(), "name": name, "since": since}
            # One write for each line: several threads start workers.
            os.write(self._file.fileno(), json.dumps(line).encode() + b"\n")

    def close(self):
        """Releases the lock."""
        self._file.close()

    def _lock(self):
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+", encoding="utf-8", errors="replace")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = next(iter(self._recorded()), {})
            self._file.close()
            raise InUse(
                f"The CWD {self._cwd} has a {_WORDS[self._role]} already: process {owner.get('pid', 'unknown')}, "
                f"since {owner.get('since', 'an unknown time')}. Stop it first"
            ) from None
        except OSError as error:
            raise InUse(
                f"The record {self._path} cannot be used: {error}. Start Cuckoo3 as the user that owns the CWD"
            ) from error

    def _recorded(self):
        self._file.seek(0)
        for line in self._file:
            try:
                process = json.loads(line)
                int(process["pid"]), process["started"], process["boot"]
            except (ValueError, KeyError, TypeError):
                continue  # the process was killed while it wrote this line
            yield process

    def _end_workers(self):
        left = [process for process in self._recorded() if process["pid"] != os.getpid() and _is_there(process)]
        for process in left:
            self._signal(process, signal.SIGTERM)
        deadline = time.monotonic() + END_TIMEOUT
        for process in left:
            how = "ended by SIGTERM"
            if not _wait_for_end(process, deadline):
                how = "killed: it did not end by SIGTERM"
                self._signal(process, signal.SIGKILL)
                _wait_for_end(process, time.monotonic() + KILL_TIMEOUT)
            self._log.warning(
                f"Process {process['pid']} ({process.get('name')}), left by an earlier {_WORDS[self._role]}, was {how}"
            )

    def _signal(self, process, number):
        try:
            os.kill(process["pid"], number)
        except ProcessLookupError:
            pass
        except PermissionError as error:
            raise InUse(
                f"Process {process['pid']} is left by an earlier {_WORDS[self._role]}, and belongs to another user. "
                "End it first"
            ) from error

    def _remove_dead_sockets(self):
        folder = self._cwd / "operational" / "sockets"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not _SOCKETS[self._role].fullmatch(path.name) or not stat.S_ISSOCK(path.lstat().st_mode):
                continue
            listener = _listener(path)
            if listener:
                raise InUse(
                    f"{listener} still listens on {path}. Stop the Cuckoo3 that it belongs to, or end it, "
                    "if that is gone"
                )
            path.unlink(missing_ok=True)
            self._log.warning(f"The socket {path}, left by an earlier {_WORDS[self._role]}, was removed")


def record_workers(records, log):
    """Records each process that this one starts by `multiprocessing`."""
    original = BaseProcess.start

    def start(process):
        # The start removes the target.
        name = getattr(getattr(process, "_target", None), "__qualname__", process.name)
        original(process)
        for record in records:
            try:
                record.add(process.pid, name)
            except OSError as error:
                # The worker runs already. Only a start after a kill would miss it.
                log.error(f"Process {process.pid} ({name}) cannot be recorded in {record.path}: {error}")

    BaseProcess.start = start


def start_time(pid):
    """Returns the start time of a process in ticks since the boot, or None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is a name in parentheses, which may contain any character.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _boot():
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _is_there(process):
    return process["boot"] == _boot() and process["started"] == start_time(process["pid"])


def _wait_for_end(process, deadline):
    while _is_there(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True


def _listener(path):
    """Returns a description of the process that listens on a socket; `None` if the socket is dead."""
    inode = _listening_inode(path)
    if inode:
        return _owner_of(inode)
    # The listener may have another network namespace, or have used another path.
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    except OSError as error:
        return f"A process that cannot be found ({error})"
    return "A process that cannot be found"


def _listening_inode(path):
    # A connection would disturb the listener: Cuckoo3's servers expect a message on each.
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        fields = line.split(None, 7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENS and _is_same_file(fields[7], path):
            return fields[6]
    return None


def _is_same_file(bound, path):
    try:
        return os.path.samefile(bound, path)
    except (OSError, ValueError):
        return False


def _owner_of(inode):
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(entry) == f"socket:[{inode}]":
                return f"Process {entry.parts[2]}"
        except OSError:
            continue  # the file or the process is gone, or another user's
    return "A process of another user"
