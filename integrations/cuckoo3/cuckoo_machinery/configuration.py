"""Machineries that Cuckoo3 does not know.

Cuckoo3 refuses a name in `machineries` for which it has no module, and reads the configuration of each listed
machinery. Both would exclude the host's plugins. Cuckoo3 therefore accepts every name, and reads only the
configurations that it knows. The host refuses a name without a plugin, with the reason. Cuckoo3 still
checks the machineries that it knows, so that the CWD also works without the host.

The list may also be empty: with `--distributed`, only nodes have machines. A node and a main process with its own node
still need one, which the host says.
"""

from cuckoo import config as cuckoo_config
from cuckoo.common import config, startup
from cuckoo.machineries import config as machineries_config


def accept_all_machineries():
    """Makes this process accept all machineries."""
    cuckoo_config.Machinery.constraints = config.String.constraints
    cuckoo_config.typeloaders["cuckoo.yaml"]["machineries"].allow_empty = True
    startup._load_machinery_configs = _load_known_machinery_configs


def _load_known_machinery_configs():
    for machinery in config.cfg("cuckoo", "machineries"):
        name = f"{machinery}.yaml"
        if name in machineries_config.typeloaders:
            startup.load_configuration(name, subpkg="machineries")
