"""The event stream of a node, on which it also offers its machines to a remote main process."""

import json

from cuckoo.node.webapi import StateSSE


class HostedStateSSE(StateSSE):
    """Cuckoo3's event stream, with the messages of `offers`. A main process without this package logs them as
    unknown."""

    def machine_changed(self, message):
        """Sends a message of `offers`."""
        self._add_stream_data(json.dumps(message))
