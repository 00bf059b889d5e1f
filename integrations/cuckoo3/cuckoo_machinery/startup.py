"""The start of Cuckoo3, after the leftovers of a killed process are cleared."""

from cuckoo.common import startup
from cuckoo.common.log import CuckooGlobalLogger
from cuckoo.common.startup import StartupError
from cuckoo.common.storage import cuckoocwd

from .leftovers import InUse, Record, record_workers

log = CuckooGlobalLogger(__name__)


def clearing_first(original, *roles):
    """Returns `original`, a function of Cuckoo3 that starts it, which first clears the leftovers of these roles."""

    def start(*args, **kwargs):
        init_global_logging = startup.init_global_logging

        # The logging is the first step of each start, and knows the CWD. Later steps need free sockets.
        def init_logging_and_clear(*args, **kwargs):
            init_global_logging(*args, **kwargs)
            _clear(roles)

        startup.init_global_logging = init_logging_and_clear
        return original(*args, **kwargs)

    return start


def _clear(roles):
    records = [Record(cuckoocwd.root, role, log) for role in roles]
    try:
        for record in records:
            record.claim()
    except InUse as error:
        raise StartupError(error) from error
    record_workers(records, log)
