"""Prints the files of this Python that some scripts need, one path a line.

    python collect.py SCRIPT...

They are the interpreter, the modules that the scripts import, and the shared libraries of both."""

import modulefinder
import os
import re
import subprocess
import sys

# Loaded by name, and not by an import.
CODECS = ("ascii", "cp437", "hex_codec", "idna", "latin_1", "utf_8")


def modules(scripts):
    for module in list(sys.modules.values()):
        yield getattr(module, "__file__", None)
    for script in scripts:
        finder = modulefinder.ModuleFinder(excludes=["tkinter"])
        for codec in CODECS:
            finder.import_hook("encodings." + codec)
        finder.run_script(script)
        for module in finder.modules.values():
            if module.__file__ != script:
                yield module.__file__


def libraries(program):
    listed = subprocess.Popen(["ldd", program], stdout=subprocess.PIPE).communicate()[0].decode()
    return re.findall(r"(/\S+) \(0x", listed)


found = {re.sub("c$", "", path) for path in modules(sys.argv[1:]) if path and path.endswith((".py", ".pyc", ".so"))}
programs = [sys.executable] + [path for path in found if path.endswith(".so")]
for program in programs:
    found.update(libraries(program))
found.discard(os.path.abspath(__file__))
found.add(sys.executable)
print("\n".join(sorted(found)))
