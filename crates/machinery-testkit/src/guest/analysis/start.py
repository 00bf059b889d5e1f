"""Starts the agent in this folder as on Windows: paths have backslashes, and every file may be executed.

A sandbox expects Windows in the machine, and Cuckoo's agent leaves both to the system."""

import os
import subprocess

AGENT = os.path.abspath("agent.py")


def native(path):
    return path.replace("\\", "/")


class Popen(subprocess.Popen):
    def __init__(self, args, **options):
        if not isinstance(args, list):
            args = native(args)
            os.chmod(args, 0o755)
        super(Popen, self).__init__(args, **options)


def with_native_path(function):
    return lambda path, *rest: function(native(path), *rest)


with open(AGENT) as source:
    code = compile(source.read(), AGENT, "exec")
for module, name in ((os, "chmod"), (os, "remove"), (os.path, "isdir"), (os.path, "isfile")):
    setattr(module, name, with_native_path(getattr(module, name)))
subprocess.Popen = Popen
exec(code, {"__name__": "__main__", "__file__": AGENT})
