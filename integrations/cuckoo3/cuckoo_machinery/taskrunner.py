"""A task runner that waits for the host's answers instead of polling once a second.

Cuckoo3's client polls with a pause of a second, so that a restore of a tenth of a second takes a second. The
task runner is a new process, in which the node's replacements have no effect. The node passes it as a pickled
object, whose class the new process imports from this module. That class replaces the client of Cuckoo3's task
flows by the waiting one.
"""

from cuckoo.common import taskflow
from cuckoo.common.clients import ActionFailedError, MachineryManagerClient, ServerResponseError
from cuckoo.node.taskrunner import TaskRunner

from .connection import RESTART_TIMEOUT, HostError, TimedOut, ask, send


class WaitingClient(MachineryManagerClient):
    """Cuckoo3's client of the machinery manager, which waits for the answer instead of polling."""

    def machine_action(self, action, machine_name, wait_response=True, timeout=120):
        """Requests an action as in Cuckoo3, and returns after its success; without `wait_response` at once."""
        message = {"action": action, "machine": machine_name}
        try:
            if not wait_response:
                return send(self.sockpath, message, RESTART_TIMEOUT)
            limit = timeout if timeout > 0 else None
            answer = ask(self.sockpath, message, limit, restart_timeout=RESTART_TIMEOUT)
        except TimedOut as error:
            raise ActionFailedError(
                f"Response for machine action {action} for {machine_name} took longer than {timeout} seconds"
            ) from error
        except HostError as error:
            raise ActionFailedError(f"Machine action {action} for {machine_name} failed. {error}") from error
        if "success" not in answer:
            raise ServerResponseError(f"The answer {answer!r} has no `success`")
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

    def stop(self):
        """Ends the task runner. The tasks that run are cut short and have no result, so that they run again."""
        for flow in self.active_flows:
            flow.task_success = flow.task_failed = flow.taskflow.log.close
        super().stop()
