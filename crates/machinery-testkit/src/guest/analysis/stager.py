#!/bin/python -S
"""The stand-in for Cuckoo's stager for Windows. Starts the monitor, and then the sample.

It runs in the folder of the payload. A sandbox takes a line with "Failed to" for a failed start."""

import json
import os
import subprocess
import sys

FOLDER = "/desktop"


def main():
    with open("settings.json") as file:
        settings = json.load(file)
    with open(os.devnull, "r+b") as null:
        quiet = {"stdin": null, "stdout": null, "stderr": null, "close_fds": True}
        # A restored machine has the time of its snapshot.
        subprocess.call(["date", "-s", settings["clock"]], **quiet)
        sample = os.path.join(FOLDER, settings["target"])
        os.rename("payload.dat", sample)
        os.chmod(sample, 0o755)
        arguments = [sys.executable, "-S", "threemon.sys", settings["host"], sample]
        monitor = subprocess.Popen(arguments, **dict(quiet, stdout=subprocess.PIPE))
        if monitor.stdout.readline() != b"ready\n":
            sys.exit("Failed to start the monitor")
        subprocess.Popen([sample], cwd=FOLDER, **quiet)


try:
    main()
except Exception as error:
    sys.exit("Failed to start the sample: %s" % error)
