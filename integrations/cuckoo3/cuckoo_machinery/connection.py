"""Requests to the machinery host, and the events it sends.

The host answers on a Unix socket with one JSON object per line (docs/protocol.md). Each request has its own
connection, which takes less than a tenth of a millisecond. Requests of several threads therefore do not wait
for each other, and no connection has to be repaired after a restart of the host.

    Client.request ──▶ connect ─▶ send ─▶ wait for the answer ─▶ close
    Client.subscribe ─▶ connect ─▶ send ─▶ Subscription: event, event, … until either side closes

A request may pass an open file, which the host writes in place of a path. The file then belongs to this process's user,
whichever user the host is. A host that knows no descriptors ignores the file and uses the path.

A read waits in the kernel until data arrives, the timeout passes or the host ends.
"""

import array
import itertools
import json
import socket
import time

# The timeout of requests that need no hypervisor, in seconds.
ANSWER_TIMEOUT = 30

# A part of the reason for which a host that ends refuses an action.
ASK_AGAIN = "ask again when it is back"

# The time that a host which restarts has to come back, in seconds.
RESTART_TIMEOUT = 15

# The pause before a message is repeated, in seconds.
RETRY_INTERVAL = 0.2

_ids = itertools.count(1)


class HostError(Exception):
    """A failure of the machinery host or of the connection to it."""


class Unreachable(HostError):
    """No host answers, or it ended before it answered, or it did not answer in time."""


class Lost(Unreachable):
    """The host closed the connection before it answered."""


class TimedOut(Unreachable):
    """The host did not answer in time. The action may still run."""


class Refused(HostError):
    """The host refused the request, or the action failed. `reason` is the host's own."""

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
            raise Unreachable(
                f"No machinery host answers on {path}: {error}. Is `cuckoo-machinery serve` running?"
            ) from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the connection, and wakes a thread that reads from it."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the host has closed it already
        self._socket.close()

    def send(self, message, file=None):
        """Sends one message; passes `file`, an open file or its descriptor, if there is one."""
        line = json.dumps(message).encode() + b"\n"
        try:
            if file is not None:
                number = file if isinstance(file, int) else file.fileno()
                # socket.send_fds is new in Python 3.9.
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [number]))
                line = line[self._socket.sendmsg([line], [rights]) :]
            self._socket.sendall(line)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, deadline=None):
        """Returns the next message; waits until `deadline` (of `time.monotonic`), or for ever."""
        while b"\n" not in self._received:
            self._received += self._read(deadline)
        line, self._received = self._received.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise HostError(f"The process that answers on {self._path} does not send JSON: {line[:200]!r}") from error
        if not isinstance(message, dict):
            raise HostError(f"The process that answers on {self._path} does not send JSON objects: {line[:200]!r}")
        return message

    def answer(self, identity, deadline=None):
        """Returns the answer to the request with that id. An overloaded host answers without an id."""
        while True:
            message = self.receive(deadline)
            if "event" not in message and message.get("id", identity) == identity:
                message.pop("id", None)
                return message

    def _read(self, deadline):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise self._timed_out()
        try:
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
        except socket.timeout:
            raise self._timed_out() from None
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost("it closed the connection")
        return data

    def _lost(self, why):
        return Lost(f"The connection to the machinery host on {self._path} is lost: {why}")

    def _timed_out(self):
        return TimedOut(f"The machinery host on {self._path} has not answered in time")


class Subscription:
    """Iterates over the host's events, until the connection ends."""

    def __init__(self, connection):
        self._connection = connection

    def __iter__(self):
        while True:
            try:
                yield self._connection.receive()
            except HostError:
                return

    def close(self):
        """Ends the subscription, also while another thread waits for the next event."""
        self._connection.close()


class Client:
    """A client of the host whose socket is `path`. Any number of threads may use it at once.

    A host that is away when a request is sent has `restart_timeout` seconds to come back.
    """

    def __init__(self, path, restart_timeout=0):
        self.path = path
        self.restart_timeout = restart_timeout

    def request(self, action, timeout=ANSWER_TIMEOUT, file=None, **keys):
        """Returns the host's answer to `action`, if it is a success.

        The host writes into `file`, an open file or its descriptor, in place of the file that `keys` name.
        Raises `Refused` for another answer, and `Unreachable` if there is none within `timeout` seconds (None:
        wait as long as the host runs).
        """
        message = {"action": action, **{key: value for key, value in keys.items() if value is not None}}
        return _succeeded(message, ask(self.path, message, timeout, file, self.restart_timeout))

    def subscribe(self):
        """Subscribes to the host's events."""
        connection = Connection(self.path)
        try:
            message = {"action": "subscribe"}
            _succeeded(message, _ask(connection, message, ANSWER_TIMEOUT))
        except HostError:
            connection.close()
            raise
        return Subscription(connection)


def ask(path, message, timeout=ANSWER_TIMEOUT, file=None, restart_timeout=0):
    """Sends one message to the host whose socket is `path`, and returns its answer, also a failure.

    A host that is about to be replaced takes no action. The message is then repeated until the new host answers. Such a
    host also closes connections whose message it has not read, so a message is repeated once on a new connection. That
    harms nothing: a task may repeat each of its actions. A host that is away has `restart_timeout` seconds to come back.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    was_lost = False
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        try:
            with _connected(path, restart_timeout if left is None else min(left, restart_timeout)) as connection:
                left = None if deadline is None else deadline - time.monotonic()
                answer = _ask(connection, message, left, file)
        except Lost:
            if was_lost:
                raise
            was_lost = True
            continue
        if ASK_AGAIN not in (answer.get("reason") or "") or (left is not None and left <= RETRY_INTERVAL):
            return answer
        time.sleep(RETRY_INTERVAL)


def send(path, message, restart_timeout=0):
    """Sends one message without waiting for the answer. A host that is away has `restart_timeout` seconds to come back."""
    with _connected(path, restart_timeout) as connection:
        connection.send(message)


def _connected(path, restart_timeout):
    until = time.monotonic() + restart_timeout
    while True:
        try:
            return Connection(path)
        except Unreachable:
            if time.monotonic() + RETRY_INTERVAL > until:
                raise
        time.sleep(RETRY_INTERVAL)


def _ask(connection, message, timeout, file=None):
    identity = next(_ids)
    deadline = None if timeout is None else time.monotonic() + timeout
    passed = {} if file is None else {"fd": True}
    connection.send({**message, **passed, "id": identity}, file)
    return connection.answer(identity, deadline)


def _succeeded(message, answer):
    if answer.get("success") is True:
        return answer
    what = message["action"]
    if "machine" in message:
        what += f" {message['machine']}"
    raise Refused(what, answer.get("reason") or f"it gave no reason, but {answer!r}")
