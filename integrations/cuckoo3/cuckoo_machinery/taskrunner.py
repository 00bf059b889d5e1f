"""A task runner that waits for the host's answers, and asks it whether a task's run was whole.

Cuckoo3's client polls with a pause of a second, so that a restore of a tenth of a second takes a second. The
task runner is a new process, in which the node's replacements have no effect. The node passes it as a pickled
object, whose class the new process imports from this module. That class replaces the client of Cuckoo3's task
flows by the waiting one, and the thread that runs a flow by one that asks for errors of the run:

    run a task ─▶ stop the machine ─▶ list: `run_errors`, `run_lost` ─▶ run_errors.json of the task ─▶ state, zipped result

The thread writes that file before it reports the task's end, so the zipped result of a remote node has it, too.
"""

from cuckoo.common import taskflow
from cuckoo.common.clients import ActionFailedError, MachineryManagerClient, ServerResponseError
from cuckoo.node import taskrunner
from cuckoo.node.taskrunner import TaskRunner, _FlowRunner

from .connection import ANSWER_TIMEOUT, RESTART_TIMEOUT, HostError, TimedOut, ask, send


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


class HostedFlowRunner(_FlowRunner):
    """Cuckoo3's thread that runs a task, and adds the host's errors of the run to the task's own.

    An error is shown in the task's report. A run that is lost fails the task, which then has no report and no score:
    Cuckoo3 shows the error in its place. The first error is the cause of the others.
    """

    def stop_machine(self):
        """Stops the machine as in Cuckoo3, and collects the errors of its run."""
        if not self._holder(self._described()):
            super().stop_machine()
        # The stop ends the capture, whose losses are known only then.
        described = self._described()
        errors, is_lost = list(described.get("run_errors", ())), described.get("run_lost", False)
        holder = self._holder(described)
        if holder:
            # The errors are those of another run.
            errors = [f"machine '{self.machine.name}': task {holder} has locked it during the run"]
            is_lost = True
        for error in errors:
            self.taskflow.log.error("The run is incomplete", machine=self.machine.name, error=error)
            self.errtracker.add_error(f"The run is incomplete: {error}")
        if errors and is_lost and not self.errtracker.has_fatal():
            self.errtracker.fatal_error(f"The run was lost before the end of the task: {errors[0]}")

    def _holder(self, described):
        """Returns the other task that has the machine, whose run must not be stopped; an empty string if none has."""
        holder = described.get("locked_by", "")
        return "" if holder == self.task.id else holder

    def _described(self):
        """Returns the host's description of the machine; an empty one if there is none."""
        try:
            path = self.taskflow.machinery_client.sockpath
            answer = ask(path, {"action": "list"}, ANSWER_TIMEOUT, restart_timeout=RESTART_TIMEOUT)
        except HostError as error:
            self.errtracker.add_error(f"The run may be incomplete: machine '{self.machine.name}' is unknown. {error}")
            return {}
        machines = answer.get("machines", ())
        return next((machine for machine in machines if machine["name"] == self.machine.name), {})


class HostedTaskRunner(TaskRunner):
    """Cuckoo3's task runner, with the waiting client and the errors of runs."""

    def start(self):
        """Runs in the task runner's process."""
        taskflow.MachineryManagerClient = WaitingClient
        taskrunner._FlowRunner = HostedFlowRunner
        super().start()

    def stop_all_taskflows(self):
        """Cuts the tasks short, at a reset or the end of the node. They have no result, so that they run again."""
        for flow in self.active_flows:
            flow.task_success = flow.task_failed = flow.taskflow.log.close
        super().stop_all_taskflows()
