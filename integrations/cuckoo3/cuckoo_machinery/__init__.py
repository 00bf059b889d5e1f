"""Cuckoo3 on the machinery host `cuckoo-machinery`.

Cuckoo3's node drives its machines with a machinery manager of its own. This package puts the machinery
host in its place, at run time: no file of Cuckoo3 is changed, and what is started without this package
works as before.

    cuckoonode-hosted ─┬─ node ──── HostedManager ── HostedMachines ─┐
    (or cuckoo-hosted) │                 │                           │ lock, unlock, events …
                       │               Host ─ starts, supervises ─▶ cuckoo-machinery serve
                       └─ task runner ── WaitingClient ──────────────┘ restore_start, stop

| module          | what it holds                                             | needs Cuckoo3 |
| --------------- | --------------------------------------------------------- | ------------- |
| `connection`    | requests to the host, and its events                      | no            |
| `host`          | a running host: found or started, and kept running        | no            |
| `machines`      | Cuckoo3's list of machines, as a mirror of the host's     | yes           |
| `manager`       | what the node expects of its machinery manager            | yes           |
| `taskrunner`    | a task runner that waits for the host's answers           | yes           |
| `configuration` | machineries that Cuckoo3 does not know                    | yes           |
| `workers`       | the same, in the processes of Cuckoo3 that process results | yes          |
| `commands`      | the programs `cuckoonode-hosted` and `cuckoo-hosted`      | yes           |
"""

__version__ = "0.1.0"
