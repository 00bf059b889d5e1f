"""Cuckoo3's scheduler, which loses no task of a lost node and no change.

| in Cuckoo3                                                    | here                                      |
| ------------------------------------------------------------- | ----------------------------------------- |
| a task leaves the queue before its result has been fetched    | afterwards, so that it can run again      |
| a task that is requeued at once ends as "running"             | stays "pending"                           |
| a change during a search is forgotten, for up to a minute     | causes another search                     |
| at its start, any number of waiting tasks counts as one       | all are counted                           |
"""

import threading
from collections import Counter

from cuckoo.common.log import CuckooGlobalLogger
from cuckoo.scheduler import Scheduler, StartableTask
from cuckoo.taskqueue import QueuedTask

log = CuckooGlobalLogger(__name__)

# A task that takes its node down each time must not run for ever.
MAX_RUNS = 5

_lost_runs = Counter()


class HostedStartableTask(StartableTask):
    """A task with its machine, whose machine is free before the task leaves the queue."""

    def __init__(self, cuckooctx, queued_task, machine, node):
        super().__init__(cuckooctx, queued_task, machine, node)
        # Set when the node has accepted the task.
        self.has_started = False
        self._holds_machine = True
        self._is_closed = False
        # The order of the states "running" and "pending" is that of the events.
        self._state_lock = threading.Lock()

    def task_running(self):
        """Sets the task's state, unless it waits again already."""
        with self._state_lock:
            if not self._requeued:
                super().task_running()

    def requeue(self):
        """Makes the task wait again. A task that was lost too often fails."""
        if self.has_started:
            _lost_runs[self.task.id] += 1
        if _lost_runs[self.task.id] < MAX_RUNS:
            with self._state_lock:
                super().requeue()
            return
        self.fail(f"The node was lost during the task, {MAX_RUNS} times")

    def fail(self, reason):
        """Ends the task with an error, in Cuckoo3's report."""
        log.error("Task has failed", task_id=self.task.id, node=self.node.name, reason=reason)
        self.errtracker.fatal_error(reason)
        self.close()
        self.ctx.state_controller.task_failed(task_id=self.task.id, analysis_id=self.task.analysis_id)

    def release_machine(self):
        """Frees the machine for the next task."""
        if self._holds_machine:
            self._holds_machine = False
            self.node.machines.release(self.machine)
            self.ctx.scheduler.inform_change()

    def release_resources(self):
        """Frees the machine, and removes the task from the queue unless it waits again."""
        if self._released:
            return
        self._released = True
        self.release_machine()
        if not self._requeued:
            self.ctx.scheduler.unqueue_task(self.task.id)
            self.ctx.scheduler.inform_change()

    def close(self):
        """Ends this run of the task, once."""
        if not self._is_closed:
            self._is_closed = True
            super().close()


class Changes(threading.Event):
    """An event that is over when it is noticed. Cuckoo3 clears it after its search, with the changes since."""

    def wait(self, timeout=None):
        """Waits for a change, and forgets it."""
        noticed = super().wait(timeout)
        super().clear()
        return noticed

    def clear(self):
        """Keeps a change that nobody has noticed."""


class HostedScheduler(Scheduler):
    """Cuckoo3's scheduler, which notices each change."""

    def __init__(self, cuckooctx, taskqueue):
        super().__init__(cuckooctx, taskqueue)
        self._change_event = Changes()


def count_unscheduled(query):
    """Replaces `TaskQuery.count_unscheduled`, which counts the rows of a count."""
    return query._ses.query(QueuedTask).filter_by(scheduled=False).count()
