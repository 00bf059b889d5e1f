"""Machineries that Cuckoo3 does not know.

Cuckoo3 refuses a name in `machineries` for which it has no module, and reads the configuration of every
machinery that is listed. Both would keep out the backends that the host takes in as plugins. So a name is
left to the host, which refuses one without a plugin and says why, and Cuckoo3 reads the machineries that
it knows. It still checks those, so that a CWD that works here works without the host, too.
"""

from cuckoo import config as cuckoo_config
from cuckoo.common import config, startup
from cuckoo.machineries import config as machineries_config


def accept_all_machineries():
    """From now on, in this process."""
    cuckoo_config.Machinery.constraints = config.String.constraints
    startup._load_machinery_configs = _load_known_machinery_configs


def _load_known_machinery_configs():
    for machinery in config.cfg("cuckoo", "machineries"):
        name = f"{machinery}.yaml"
        if name in machineries_config.typeloaders:
            startup.load_configuration(name, subpkg="machineries")
