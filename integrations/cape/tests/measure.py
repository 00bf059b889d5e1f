# SPDX-License-Identifier: GPL-3.0-or-later
"""Measures tasks of CAPE: `python -m tests.measure MACHINERY.conf TASKS SECONDS`.

CAPE's own code runs with the module that the name of the file says. All tasks are submitted at once, and each runs for that
many seconds. The guests are not CAPE's. Writes a JSON list with an object for each task, the times of its phases in seconds:

    {"submitted": …, "start": …, "runs": …, "stop": …, "off": …, "finished": …}
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tests.support import Cape, Postgres


def run_tasks(cape, count, seconds):
    """Runs the tasks to their ends, and returns the times of each one."""
    times = {}
    for _ in range(count):
        submitted = time.monotonic()
        times[cape.submit(platform="windows")] = {"submitted": submitted}
    running = set(times)
    while running:
        event = cape.wait_for(("machine", "guest", "finished"))
        task = event["task"]
        if event["event"] == "guest":
            cape.do(task, "answer" if event["phase"] == "start" else "finish", after=seconds)
        elif event["event"] == "machine":
            times[task][event["phase"]] = event["at"]
        elif (event["status"], event["errors"]) == ("completed", []):
            times[task]["finished"] = event["at"]
            running.remove(task)
        else:
            raise AssertionError(f"task {task} has failed: {event}\n{cape.log()}")
    return list(times.values())


def main(conf, count, seconds):
    with contextlib.ExitStack() as ends:
        case = SimpleNamespace(addCleanup=ends.callback)
        postgres = Postgres()
        case.addCleanup(postgres.end)
        cape = Cape(case, conf.read_text(), postgres.new_database(), machinery=conf.stem)
        event = cape.start()
        if event["event"] != "ready":
            raise AssertionError(f"CAPE does not start: {event}\n{cape.log()}")
        print(json.dumps(run_tasks(cape, count, seconds)))


main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
