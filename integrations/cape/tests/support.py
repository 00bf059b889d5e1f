# SPDX-License-Identifier: GPL-3.0-or-later
"""Helpers of the tests: a host, a PostgreSQL, and a CAPE that was copied from the checkout in `$CAPE_SOURCE`."""

import json
import os
import pwd
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PACKAGE.parent / "cuckoo3"))

from cuckoo_machinery.connection import Client, ask  # noqa: E402
from cuckoo_machinery.host import Child, find_program  # noqa: E402

# The timeout of every wait; no test measures speed.
TIMEOUT = 300

# The folders of CAPE that its main process and its Linux analyser use.
CAPE_PARTS = ["lib", "modules", "conf", "utils", "dev_utils", "data", "custom", "extra", "analyzer/linux", "cuckoo.py"]

CUCKOO_CONF = """\
[cuckoo]
machinery = {machinery}
machinery_screenshots = {screenshots}
ignore_signals = no
freespace = 0
max_machines_count = 0
max_vmstartup_count = 200
tmppath = {folder}
[resultserver]
ip = {resultserver}
[database]
connection = {database}
"""

OTHER_CONFS = {
    "reporting": "[mongodb]\nenabled = no\n",
    "routing": "[routing]\nroute = none\n",
    "auxiliary": "[sniffer]\nenabled = no\n",
    "web": "[linux]\nenabled = yes\n",
}


def address(number):
    """Returns one of the loopback addresses of this test process."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 14) % 64}.{(pid >> 6) % 256}.{pid % 64 * 4 + number}"


class Postgres:
    """A PostgreSQL with a socket in its own folder, and without a port."""

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="machinery-pg.")
        self._as_user = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._databases = 0
        self._run("initdb", "-D", f"{self._folder}/data", "-U", "cape", "-A", "trust", "--no-sync")
        options = f"-c listen_addresses= -c fsync=off -c max_connections=300 -k {self._folder}"
        self._run("pg_ctl", "-D", f"{self._folder}/data", "-l", f"{self._folder}/log", "-w", "-o", options, "start")

    def _run(self, program, *args):
        found = shutil.which(program) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{program}")), default="")
        if not found:
            raise FileNotFoundError(f"PostgreSQL's {program} is missing: apt-get install postgresql")
        done = subprocess.run([*self._as_user, found, *args], cwd="/", capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def new_database(self):
        """Makes an empty database, and returns its URL."""
        self._databases += 1
        self._run("createdb", "-h", self._folder, "-U", "cape", f"cape{self._databases}")
        return f"postgresql://cape@/cape{self._databases}?host={self._folder}"

    def end(self):
        """Ends the server, and removes its files."""
        try:
            self._run("pg_ctl", "-D", f"{self._folder}/data", "-w", "-m", "immediate", "stop")
        finally:
            shutil.rmtree(self._folder)


def make_cwd(case, machines, more=""):
    """Makes a CWD with machines of the double, and the text of `machinery-host.yaml`; removed with the test."""
    root = Path(tempfile.mkdtemp(prefix="machinery-cwd."))
    case.addCleanup(shutil.rmtree, root)
    (root / "conf" / "machineries").mkdir(parents=True)
    (root / ".cuckoocwd").touch()
    (root / "conf" / "cuckoo.yaml").write_text(
        f"machineries: [double]\nresultserver: {{listen_ip: {address(0)}, listen_port: 2042}}\n"
        "tcpdump: {enabled: false, path: /bin/true}\n"
    )
    (root / "conf" / "machinery-host.yaml").write_text(more)
    write_machines(root, machines)
    return root


def write_machines(root, machines):
    """Writes the machines of the double: names, and further YAML keys."""
    lines = ["interface: lo", "machines:"]
    for number, (name, keys) in enumerate(machines.items(), start=1):
        shared = {"label": f"{name}-label", "ip": f"10.0.{number // 200}.{number % 200 + 1}", "platform": "linux"}
        own = ", ".join(f"{key}: {value}" for key, value in {**shared, "os_version": '"12"', **keys}.items())
        lines.append(f"  {name}: {{{own}}}")
    (root / "conf" / "machineries" / "double.yaml").write_text("\n".join(lines) + "\n")


class Host:
    """The machinery host of a CWD, which ends with the test."""

    def __init__(self, case, root):
        self.root = Path(root)
        self.client = Client(self.root / "operational" / "sockets" / "machinerymanager.sock", restart_timeout=TIMEOUT)
        self._case = case
        self._child = None
        case.addCleanup(self.end)
        self.start()

    def start(self):
        """Starts the host."""
        self._child = Child(find_program(), self.root)
        self._case.assertTrue(self._child.is_ready(TIMEOUT), self._child.failure)

    def end(self):
        """Ends the host."""
        self._child.end()

    def kill(self):
        """Kills the host, and waits for its end."""
        os.kill(self._child.pid, signal.SIGKILL)
        self._child.end()

    def ask(self, message):
        """Returns the host's answer to a message, also a failure."""
        return ask(self.client.path, message)

    def machine(self, name):
        """Returns the host's description of a machine."""
        return next(machine for machine in self.client.request("list")["machines"] if machine["name"] == name)

    def wait_for(self, name, is_as_expected):
        """Waits until the machine is as expected, and returns it. Each event of the host is a reason to look."""
        events = self.client.subscribe()
        timer = threading.Timer(TIMEOUT, events.close)
        timer.start()
        try:
            machine = self.machine(name)
            arriving = iter(events)
            while not is_as_expected(machine):
                if next(arriving, None) is None:
                    raise AssertionError(f"machine {name} stays as it is: {machine}")
                machine = self.machine(name)
            return machine
        finally:
            timer.cancel()
            events.close()


def export(root):
    """Returns `hosted.conf` of the running host."""
    command = [find_program(), "--cwd", str(root), "export", "cape"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout


class Cape:
    """A CAPE of its own, with the module in its folder. `conf` is the configuration of its machinery."""

    def __init__(
        self,
        case,
        conf,
        database,
        machinery="hosted",
        patience=TIMEOUT,
        screenshots="off",
        resultserver=None,
        timeouts="",
    ):
        self.folder = Path(tempfile.mkdtemp(prefix="machinery-cape."))
        case.addCleanup(shutil.rmtree, self.folder)
        source = Path(os.environ["CAPE_SOURCE"])
        self.root = self.folder / "cape"
        for part in CAPE_PARTS:
            (self.root / part).parent.mkdir(parents=True, exist_ok=True)
            if (source / part).is_dir():
                # A link may lead to a part that is not used.
                shutil.copytree(source / part, self.root / part, symlinks=True)
            else:
                shutil.copy(source / part, self.root / part)
        for file in ("hosted.py", "machinery_client.py"):
            shutil.copy(PACKAGE / file, self.root / "modules" / "machinery")
        (self.folder / "conf").mkdir()
        values = dict(folder=self.folder, database=database, machinery=machinery, screenshots=screenshots)
        cuckoo_conf = CUCKOO_CONF.format(resultserver=resultserver or address(0), **values)
        confs = {**OTHER_CONFS, "cuckoo": cuckoo_conf + timeouts}
        confs[machinery] = conf.replace("[hosted]", f"[hosted]\npatience = {patience}")
        for name, text in confs.items():
            (self.folder / "conf" / f"{name}.conf").write_text(text)
        self._sample = 0
        case.addCleanup(self.end)
        self._process = None

    def start(self, guests="test"):
        """Starts CAPE, and waits until it has its machines. Returns the event `ready` or `refused`."""
        path = str(self.folder / "control")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(1)
            environment = {
                **os.environ,
                "CAPE_DISABLE_ROOT_CONFIGS": "1",
                "CAPE_CD": str(self.folder / "conf"),
                "CAPE_AS_ROOT": "1",
                "CAPE_GUESTS": guests,
                "PYTHONDONTWRITEBYTECODE": "1",
            }
            driver = str(PACKAGE / "tests" / "driver.py")
            with open(self.folder / "output", "ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, driver, str(self.root), path], env=environment, stdout=output, stderr=output
                )
            listener.settimeout(TIMEOUT)
            self._control, _ = listener.accept()
        os.remove(path)
        self._events = queue.Queue()
        self._kept = []
        threading.Thread(target=self._read, args=(self._control.makefile(),), daemon=True).start()
        return self.wait_for(("ready", "refused"))

    def _read(self, lines):
        for line in lines:
            self._events.put(json.loads(line))
        self._events.put({"event": "ended"})

    def wait_for(self, kinds, **keys):
        """Returns the first event of these kinds with these keys. Keeps other events."""
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        deadline = time.monotonic() + TIMEOUT
        for number, event in enumerate(self._kept):
            if event["event"] in kinds and keys.items() <= event.items():
                return self._kept.pop(number)
        while True:
            try:
                event = self._events.get(timeout=max(0.001, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no event {kinds} {keys}; kept {self._kept}\n{self.log()}") from None
            if event["event"] in kinds and keys.items() <= event.items():
                return event
            if event["event"] == "ended":
                raise AssertionError(f"CAPE has ended without {kinds} {keys}\n{self.log()}")
            self._kept.append(event)

    def submit(self, sample=None, **keys):
        """Submits a file, and returns the task's number."""
        if sample is None:
            self._sample += 1
            sample = self.folder / f"sample{self._sample}"
            sample.write_text(f"#!/bin/sh\n# {self._sample}\n")
        self._send({"submit": {"file_path": str(sample), "platform": "linux", **keys}})
        return self.wait_for("submitted")["task"]

    def guest(self, task, phase):
        """Waits until the guest of that task is in that phase, and returns the name of its machine."""
        return self.wait_for("guest", task=task, phase=phase)["machine"]

    def do(self, task, what, **keys):
        """Gives the guest of that task a command."""
        self._send({"task": task, "do": what, **keys})

    def run_guest(self, task):
        """Has the guest answer, and waits until it runs the sample. Returns the name of its machine."""
        self.guest(task, "start")
        self.do(task, "answer")
        return self.guest(task, "run")

    def finish(self, task):
        """Ends the guest's analysis, and returns the event of the task's end."""
        self.do(task, "finish")
        return self.finished(task)

    def finished(self, task):
        """Waits for the end of a task's analysis."""
        return self.wait_for("finished", task=task)

    def storage(self, task):
        """Returns the folder of a task's results."""
        return self.root / "storage" / "analyses" / str(task)

    def wait_for_log(self, words):
        """Waits until CAPE's output has these words. CAPE sends no event of them."""
        deadline = time.monotonic() + TIMEOUT
        while words not in self.log():
            if time.monotonic() > deadline:
                raise AssertionError(f"CAPE does not log {words!r}:\n{self.log()}")
            time.sleep(0.05)

    def _send(self, command):
        self._control.sendall(json.dumps(command).encode() + b"\n")

    def log(self):
        """Returns CAPE's output."""
        return (self.folder / "output").read_text(errors="replace")

    def kill(self):
        """Kills CAPE."""
        self._process.kill()
        self._end_control()

    def end(self):
        """Has CAPE end, and returns its exit code."""
        if self._process is None:
            return None
        self._process.terminate()
        return self._end_control()

    def _end_control(self):
        try:
            code = self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"CAPE does not end:\n{self.log()}") from None
        finally:
            self._control.close()
            self._process = None
        return code
