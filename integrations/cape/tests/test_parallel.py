# SPDX-License-Identifier: GPL-3.0-or-later
"""A hundred machines in memory, which start without waiting for each other."""

import unittest

from tests.test_machines import CapeCase

MACHINES = 100
# These starts do not end during the test.
STUCK = 10
MORE = "max_parallel_restores: 200\ntimeouts: {restore_start: 3600}\n"


class TestParallel(CapeCase):
    def test_machines_start_when_starts_of_others_hang(self):
        names = [f"m{number}" for number in range(MACHINES)]
        stuck = {"faults": "{restore_start: hang}"}
        machines = {name: stuck if number < STUCK else {} for number, name in enumerate(names)}
        host = self.start_host(machines, MORE)
        # Neither may wait for the starts that hang.
        self.addCleanup(host.kill)
        cape = self.start_cape()
        self.addCleanup(cape.kill)
        for name in names[:STUCK]:
            cape.submit(machine=name)
            host.wait_for(name, lambda machine: machine["state"] == "starting")
        tasks = [cape.submit(machine=name) for name in names[STUCK:]]
        # All guests are up before any of them continues.
        self.assertEqual([cape.guest(task, "start") for task in tasks], names[STUCK:])
        for task in tasks:
            cape.do(task, "answer")
        for task in tasks:
            cape.guest(task, "run")
            self.assert_completed(cape.finish(task))
        states = {machine["name"]: machine["state"] for machine in host.client.request("list")["machines"]}
        self.assertEqual({states[name] for name in names[:STUCK]}, {"starting"})
        self.assertEqual({states[name] for name in names[STUCK:]}, {"poweroff"})


if __name__ == "__main__":
    unittest.main()
