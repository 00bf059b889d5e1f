"""Cuckoo3's own machinery manager with its own client, on a CWD's qemu machines.

    python cuckoo3.py CWD MACHINE

Writes `ready`. Runs each action that it reads as a line from standard input, and writes the seconds of the
client's call, for which Cuckoo3's task flow waits. Stops the machines and ends with its input.
"""

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from cuckoo.common import config, storage
from cuckoo.common.clients import MachineryManagerClient
from cuckoo.machineries.modules.qemu import QEMU
from cuckoo.node.machinery import MachineryManager


def main(cwd, machine):
    storage.cuckoocwd.set(cwd)
    config.load_config(storage.Paths.config(file="qemu.yaml", subpkg="machineries"), subpkg="machineries")
    path = storage.UnixSocketPaths.machinery_manager()
    path.parent.mkdir(parents=True, exist_ok=True)
    infostream = SimpleNamespace(disabled_machine=lambda *_: None)
    manager = MachineryManager(path, SimpleNamespace(node=SimpleNamespace(infostream=infostream)))
    manager.load_machineries([QEMU], previous_machinelist=None)
    listening, create_socket = threading.Event(), manager.create_socket
    manager.create_socket = lambda: (create_socket(), listening.set())
    accepting = threading.Thread(target=manager.start)
    accepting.start()
    try:
        listening.wait()
        print("ready", flush=True)
        serve(MachineryManagerClient(path), machine)
    finally:
        manager.shutdown_all()
        manager.stop()
        for thread in (accepting, *manager.workers):
            thread.join()


def serve(client, machine):
    for line in sys.stdin:
        begun = time.perf_counter()
        client.machine_action(line.strip(), machine)
        print(time.perf_counter() - begun, flush=True)


main(Path(sys.argv[1]), sys.argv[2])
