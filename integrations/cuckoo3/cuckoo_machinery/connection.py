"""Requests to the machinery host, and the events it sends.

The host answers on a Unix socket with one JSON object a line (docs/protocol.md). Each request here has
a connection of its own, which costs less than a tenth of a millisecond: so requests of many threads do
not wait for each other, and there is no connection to repair after a restart of the host.

    Client.request ──▶ connect ─▶ send ─▶ wait for the answer ─▶ close
    Client.subscribe ─▶ connect ─▶ send ─▶ Subscription: event, event, … until either side closes

Reading waits in the kernel until something arrives, the time is up or the host is gone.
"""

import itertools
import json
import socket
import time

# The time that the host has for a reply that needs no hypervisor, in seconds.
ANSWER = 30

_ids = itertools.count(1)


class HostError(Exception):
    """Something with the machinery host did not work."""


class OutOfReach(HostError):
    """No host answers, or it went away before it answered, or it did not answer in time."""


class Overdue(OutOfReach):
    """The host did not reply in time. The action may still happen."""


class Refused(HostError):
    """The host answered that it cannot, or will not. `reason` is the host's own."""

    def __init__(self, what, reason):
        super().__init__(f"The machinery host cannot {what}: {reason}")
        self.reason = reason


class Connection:
    """A connection to the host, for one thread at a time."""

    def __init__(self, path):
        self._path = path
        self._received = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise OutOfReach(
                f"No machinery host answers on {path}: {error}. Is `cuckoo-machinery serve` running?"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the connection. A thread that reads from it is woken."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the host was first
        self._socket.close()

    def send(self, message):
        """Sends one message."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, deadline=None):
        """The next message; waits for it until `deadline` (of `time.monotonic`), or for ever."""
        while b"\n" not in self._received:
            self._received += self._read(deadline)
        line, self._received = self._received.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise HostError(f"What answers on {self._path} does not speak JSON: {line[:200]!r}") from error
        if not isinstance(message, dict):
            raise HostError(f"What answers on {self._path} does not send JSON objects: {line[:200]!r}")
        return message

    def answer(self, identity, deadline=None):
        """The answer to the request with that id. A host that is too busy answers without one."""
        while True:
            message = self.receive(deadline)
            if "event" not in message and message.get("id", identity) == identity:
                message.pop("id", None)
                return message

    def _read(self, deadline):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise self._overdue()
        try:
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
        except socket.timeout:
            raise self._overdue() from None
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost("it closed the connection")
        return data

    def _lost(self, why):
        return OutOfReach(f"The connection to the machinery host on {self._path} is lost: {why}")

    def _overdue(self):
        return Overdue(f"The machinery host on {self._path} has not answered in time")


class Subscription:
    """The host's events, one after the other, until the connection ends."""

    def __init__(self, connection):
        self._connection = connection

    def __iter__(self):
        while True:
            try:
                yield self._connection.receive()
            except HostError:
                return

    def close(self):
        """Ends it, also while another thread waits for the next event."""
        self._connection.close()


class Client:
    """Asks the host whose socket is `path`. May be used by any number of threads at once."""

    def __init__(self, path):
        self.path = path

    def request(self, action, timeout=ANSWER, **keys):
        """The host's answer to `action`, which has succeeded.

        Raises `Refused` if it has not, and `OutOfReach` if there is no answer within `timeout` seconds
        (None: wait as long as the host is there).
        """
        message = {"action": action, **{key: value for key, value in keys.items() if value is not None}}
        return _succeeded(message, ask(self.path, message, timeout))

    def subscribe(self):
        """The host's events from now on."""
        connection = Connection(self.path)
        try:
            message = {"action": "subscribe"}
            _succeeded(message, _ask(connection, message, ANSWER))
        except HostError:
            connection.close()
            raise
        return Subscription(connection)


def ask(path, message, timeout=ANSWER):
    """Sends one message to the host whose socket is `path`, and returns its answer, whatever it is."""
    with Connection(path) as connection:
        return _ask(connection, message, timeout)


def send(path, message):
    """Sends one message and leaves; the host does what it says."""
    with Connection(path) as connection:
        connection.send(message)


def _ask(connection, message, timeout):
    identity = next(_ids)
    deadline = None if timeout is None else time.monotonic() + timeout
    connection.send({**message, "id": identity})
    return connection.answer(identity, deadline)


def _succeeded(message, answer):
    if answer.get("success") is True:
        return answer
    what = message["action"]
    if "machine" in message:
        what += f" {message['machine']}"
    raise Refused(what, answer.get("reason") or f"it gave no reason, but {answer!r}")
