# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole analyses of Linux samples in parallel, by CAPE's own guest manager, agent and analyser, on machines of QEMU."""

import hashlib
import json
import os
import unittest

from tests.support import Cape, Host, export
from tests.test_machines import CapeCase

# Runs a copy of a program, and leaves files. The marker is another one in each analysis.
SAMPLE = """\
#!/bin/sh
cp /bin/cat /tmp/copied-{marker}
/tmp/copied-{marker} /proc/sys/kernel/ostype > /tmp/dropped-{marker}
echo {marker} >> /tmp/dropped-{marker}
"""
DROPPED = "Linux\n{marker}\n"
MARKERS = ("aardvark", "zebra")


class TestLinux(CapeCase):
    def test_analyses_run_in_parallel_with_their_own_results(self):
        self.host = Host(self, os.environ["MACHINERY_CWD"])
        cape = Cape(
            self, export(self.host.root), self.postgres.new_database(), resultserver=os.environ["CAPE_RESULTSERVER"]
        )
        self.assertEqual(cape.start(guests="own")["event"], "ready")
        tasks = {self.submit(cape, marker): marker for marker in MARKERS}
        for machine in ("m1", "m2"):
            self.host.wait_for(machine, lambda machine: machine["state"] == "running")
        self.assertEqual(self.host.machine("m1")["state"], "running")
        ends = [cape.finished(task) for task in tasks]
        for end in ends:
            self.assert_completed(end)
        self.assertEqual({end["machine"] for end in ends}, {"m1", "m2"})
        for task, marker in tasks.items():
            self.assert_results(cape.storage(task), marker)

    def submit(self, cape, marker):
        sample = cape.folder / f"{marker}.sh"
        sample.write_text(SAMPLE.format(marker=marker))
        return cape.submit(sample, package="bash", timeout=30)

    def assert_results(self, folder, marker):
        """Expects the calls, the files and the memory of this analysis, and nothing of the other one."""
        calls = (folder / "logs" / "strace.log").read_text()
        self.assertIn(f'execve("/tmp/copied-{marker}"', calls)
        dropped = DROPPED.format(marker=marker).encode()
        file = folder / "files" / hashlib.sha256(dropped).hexdigest()
        self.assertEqual(file.read_bytes(), dropped)
        paths = {json.loads(line)["filepath"] for line in (folder / "files.json").read_text().splitlines()}
        self.assertLessEqual({f"/tmp/copied-{marker}", f"/tmp/dropped-{marker}"}, paths)
        for other in MARKERS:
            if other != marker:
                self.assertNotIn(other, calls + "".join(paths))


if __name__ == "__main__":
    unittest.main()
