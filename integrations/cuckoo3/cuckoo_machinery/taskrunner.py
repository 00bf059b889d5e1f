"""A task runner that waits for the host's answers instead of looking for them once a second.

Cuckoo3's client reads, sleeps a second, and reads again: a restore of a tenth of a second takes it a
second. Its task runner is a process of its own, started anew, so nothing that was replaced in the node is
replaced there. But it is handed over as an object, whose class that process imports from here; the class
puts the waiting client where Cuckoo3's task flows look for theirs, and goes on as Cuckoo3's does.
"""

from cuckoo.common import taskflow
from cuckoo.common.clients import ActionFailedError, MachineryManagerClient, ServerResponseError
from cuckoo.node.taskrunner import TaskRunner

from .connection import HostError, Overdue, ask, send


class WaitingClient(MachineryManagerClient):
    """Cuckoo3's client of the machinery manager, with an answer when there is one."""

    def machine_action(self, action, machine_name, wait_response=True, timeout=120):
        """As in Cuckoo3: returns when the action has succeeded, or, without `wait_response`, at once."""
        message = {"action": action, "machine": machine_name}
        try:
            if not wait_response:
                return send(self.sockpath, message)
            answer = ask(self.sockpath, message, timeout if timeout > 0 else None)
        except Overdue as error:
            raise ActionFailedError(
                f"Response for machine action {action} for {machine_name} took longer than {timeout} seconds"
            ) from error
        except HostError as error:
            raise ActionFailedError(f"Machine action {action} for {machine_name} failed. {error}") from error
        if "success" not in answer:
            raise ServerResponseError(f"The answer {answer!r} does not say whether it is a success")
        if not answer["success"]:
            reason = answer.get("reason", "")
            raise ActionFailedError(f"Machine action {action} for {machine_name} failed. Reason: {reason}")
        return None


class HostedTaskRunner(TaskRunner):
    """Cuckoo3's task runner, with the waiting client."""

    def start(self):
        """Runs in the task runner's process."""
        taskflow.MachineryManagerClient = WaitingClient
        super().start()
