"""Cuckoo3's scheduler, which does not miss a change.

Cuckoo3's scheduler waits for an event, looks for work, and then clears the event. A change during its look is lost, and
a task waits up to 60 seconds. Here each wait clears the event as it ends, so that the next one sees any later change.
"""

import threading

from cuckoo.scheduler import Scheduler


class ChangeEvent(threading.Event):
    """An event whose `wait` clears it."""

    def wait(self, timeout=None):
        """Waits for the event, and clears it."""
        was_set = super().wait(timeout)
        super().clear()
        return was_set

    def clear(self):
        """Keeps a change that has come since the last wait."""


class HostedScheduler(Scheduler):
    """Cuckoo3's scheduler with such an event."""

    def __init__(self, cuckooctx, taskqueue):
        super().__init__(cuckooctx, taskqueue)
        self._change_event = ChangeEvent()
