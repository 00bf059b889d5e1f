"""Cuckoo3 on the machinery host `cuckoo-machinery`.

Cuckoo3's node drives its machines with its own machinery manager. This package replaces that manager by the
machinery host at run time. It changes no file of Cuckoo3, and affects no program that is started without it.

    cuckoonode-hosted ─┬─ node ──── HostedManager ── HostedMachines ─┐
    (or cuckoo-hosted) │                 │                           │ lock, unlock, events …
                       │               Host ─ starts, supervises ─▶ cuckoo-machinery serve
                       └─ task runner ── WaitingClient ──────────────┘ restore_start, stop

| module          | content                                                    | needs Cuckoo3 |
| --------------- | ---------------------------------------------------------- | ------------- |
| `connection`    | requests to the host, and its events                       | no            |
| `host`          | a running host: found or started, and supervised           | no            |
| `leftovers`     | processes and sockets of a killed node                     | no            |
| `machines`      | Cuckoo3's list of machines, as a mirror of the host's      | yes           |
| `manager`       | the node's machinery manager, on the host                  | yes           |
| `offers`        | the machines that a node offers to the main process        | yes           |
| `local_client`  | a main process that follows its own node                   | yes           |
| `node_service`  | a node of a main process elsewhere, and its drain          | yes           |
| `node_requests` | requests of a main process to remote nodes, with timeouts  | yes           |
| `remote_client` | a main process that loses no task of a lost node           | yes           |
| `scheduling`    | its scheduler                                              | yes           |
| `taskrunner`    | a task runner that waits for answers, and reads run errors | yes           |
| `startup`       | the start of Cuckoo3, after leftovers are cleared          | yes           |
| `configuration` | machineries that Cuckoo3 does not know                     | yes           |
| `workers`       | such machineries, in Cuckoo3's processing workers          | yes           |
| `commands`      | the programs `cuckoonode-hosted` and `cuckoo-hosted`       | yes           |
"""

__version__ = "0.2.0"
