//! The part of a machine that changes.

use std::time::Duration;

use machinery::{GUEST_POWERED_OFF, RestoreReadiness, State};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

use super::availability::Availability;
use super::quarantine::unix_now;

/// The number of errors that are kept for one machine.
const MAX_ERRORS: usize = 20;
/// The number of steps that are kept for one action.
const MAX_STEPS: usize = 50;
/// The number of lost preparations after which the host prepares the machine no more before its next start.
const MAX_LOST_PREPARATIONS: u32 = 3;

/// The begin of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunBegin {
    /// The time, in seconds since 1970.
    pub unix: u64,
    /// The same time, which no change of the clock affects.
    pub instant: Instant,
}

impl RunBegin {
    /// Returns the begin at that time, in seconds since 1970. The clock may have been wrong: no run is older than the
    /// present boot of this computer.
    fn at(unix: u64) -> Self {
        let now = Instant::now();
        let uptime = clock_gettime(ClockId::Boottime);
        let uptime = Duration::from_secs(u64::try_from(uptime.tv_sec).unwrap_or_default());
        let age = Duration::from_secs(unix_now().saturating_sub(unix)).min(uptime);
        RunBegin { unix, instant: now.checked_sub(age).unwrap_or(now) }
    }
}

/// The state of a machine, and the record of its actions.
#[derive(Debug, Clone)]
pub struct Status {
    /// The state that the host ordered or the plugin reported last.
    pub state: State,
    /// True while an action runs.
    pub busy: bool,
    /// The lock and the reservation of the machine, and its place in the pool.
    pub availability: Availability,
    /// The latest errors, oldest first.
    pub errors: Vec<String>,
    /// The number of states that the plugin has reported.
    pub reports: u64,
    /// The readiness for the next restore, if the plugin has reported it.
    pub ready: Option<RestoreReadiness>,
    /// The steps of the present or last action, and their durations.
    pub steps: Vec<(String, Duration)>,
    /// The number of preparations that were lost since the last start.
    lost_preparations: u32,
    /// True if the machine was in use when its configuration changed: the change is applied later.
    pub change_pending: bool,
    /// The plugin's warnings about the machine.
    pub warnings: Vec<String>,
    /// True if the host has started the current run. Only an operator ends a run that somebody else has
    /// started.
    pub own_run: bool,
    /// The begin of the current run, if the host has seen it.
    pub run_begin: Option<RunBegin>,
    /// The reason for which the host ends the current run without a request.
    pub end_reason: Option<String>,
    /// True if the current run began with a client's successful start.
    pub started_well: bool,
    /// The number of plugin faults in a row.
    pub plugin_faults: u32,
}

impl Status {
    /// Returns the status of a machine that was just loaded.
    pub fn new(state: State) -> Self {
        Status {
            state,
            busy: false,
            availability: Availability::default(),
            errors: Vec::new(),
            reports: 0,
            ready: None,
            steps: Vec::new(),
            lost_preparations: 0,
            change_pending: false,
            warnings: Vec::new(),
            own_run: false,
            run_begin: None,
            end_reason: None,
            started_well: false,
            plugin_faults: 0,
        }
    }

    /// Reports whether the machine is powered off and no task has it.
    pub fn is_free(&self) -> bool {
        self.state == State::Poweroff && self.availability.lock.is_none()
    }

    /// Keeps an error, and drops the oldest when there are too many.
    pub fn add_error(&mut self, error: String) {
        if self.errors.len() == MAX_ERRORS {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    /// Keeps a step of the present action.
    pub fn add_step(&mut self, step: &str, took: Duration) {
        if self.steps.len() < MAX_STEPS {
            self.steps.push((step.to_owned(), took));
        }
    }

    /// Sets the state, and what follows from it.
    pub fn set_state(&mut self, state: State) {
        self.state = state;
        match state {
            State::Starting => {
                self.lost_preparations = 0;
                self.begin_run();
            }
            State::Poweroff => {
                (self.own_run, self.started_well) = (false, false);
                (self.run_begin, self.end_reason) = (None, None);
            }
            State::Running => self.begin_run(),
            _ => {}
        }
    }

    /// Makes the current run one that the host has started. A run of a machine in quarantine was a try. The begin of the run
    /// is not known: a task starts its machine soon after it has locked it.
    pub fn adopt_run(&mut self) {
        if self.state != State::Poweroff {
            self.started_well = self.availability.quarantine.is_none();
            self.own_run = true;
            self.run_begin = self.availability.locked_since.map(RunBegin::at);
            self.begin_run();
        }
    }

    /// Leaves a machine in quarantine alone, because somebody else has started it.
    pub fn leave_alone(&mut self, machine: &str) {
        let quarantine = self.availability.quarantine.as_mut();
        if let Some(quarantine) = quarantine.filter(|quarantine| !quarantine.is_left_alone) {
            tracing::warn!(
                machine,
                "somebody else has started it: not tried any more before `enable-machine`"
            );
            quarantine.is_left_alone = true;
        }
    }

    fn begin_run(&mut self) {
        self.run_begin.get_or_insert_with(|| RunBegin { unix: unix_now(), instant: Instant::now() });
    }

    /// Counts a lost preparation. Returns whether the host prepares the machine again before its next start.
    pub fn count_lost_preparation(&mut self) -> bool {
        self.lost_preparations += 1;
        self.lost_preparations < MAX_LOST_PREPARATIONS
    }
}

/// Reports whether this reported state is an accident. A guest that powers itself off is no accident, and
/// neither is a state without a reason, which the host has ordered.
pub fn is_accident(state: State, reason: &str) -> bool {
    match state {
        State::Error => true,
        State::Poweroff | State::Paused | State::Suspended => {
            !reason.is_empty() && reason != GUEST_POWERED_OFF
        }
        State::Starting | State::Running | State::Stopping | State::Restored => false,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::super::availability::TaskLock;
    use super::super::quarantine::Quarantine;
    use super::*;

    #[test]
    fn reported_state_is_an_accident_unless_the_host_or_the_guest_caused_it() {
        assert!(is_accident(
            State::Error,
            "the disk failed and the guest was paused: No space left on device"
        ));
        assert!(is_accident(State::Error, ""));
        assert!(is_accident(State::Poweroff, "QEMU was killed by signal 9"));
        assert!(is_accident(State::Suspended, "the guest suspended itself"));
        assert!(!is_accident(State::Poweroff, GUEST_POWERED_OFF));
        assert!(!is_accident(State::Poweroff, ""));
        assert!(!is_accident(State::Stopping, GUEST_POWERED_OFF));
        assert!(!is_accident(State::Running, "the guest woke up"));
    }

    #[test]
    fn oldest_error_is_dropped_when_there_are_too_many() {
        let mut status = Status::new(State::Poweroff);
        (0..=MAX_ERRORS).for_each(|number| status.add_error(number.to_string()));
        assert_eq!((status.errors.len(), status.errors[0].as_str()), (MAX_ERRORS, "1"));
    }

    #[test]
    fn machine_is_free_only_when_it_is_powered_off_and_not_locked() {
        let mut status = Status::new(State::Poweroff);
        assert!(status.is_free());
        status.availability.lock = Some(TaskLock::default());
        assert!(!status.is_free());
        assert!(!Status::new(State::Running).is_free());
    }

    #[test]
    fn later_steps_are_dropped_when_there_are_too_many() {
        let mut status = Status::new(State::Poweroff);
        (0..MAX_STEPS + 2).for_each(|number| status.add_step(&number.to_string(), Duration::ZERO));
        assert_eq!(status.steps.len(), MAX_STEPS);
        assert_eq!(status.steps[MAX_STEPS - 1].0, (MAX_STEPS - 1).to_string());
    }

    #[tokio::test(start_paused = true)]
    async fn run_lasts_from_the_first_start_to_the_poweroff() {
        let mut status = Status::new(State::Poweroff);
        status.set_state(State::Starting);
        let begin = status.run_begin.unwrap();
        advance(Duration::from_secs(1)).await;
        status.set_state(State::Running);
        status.set_state(State::Paused);
        assert_eq!((status.state, status.run_begin), (State::Paused, Some(begin)));
        (status.own_run, status.started_well, status.end_reason) = (true, true, Some("max_run".into()));
        status.set_state(State::Poweroff);
        assert_eq!((status.own_run, status.started_well), (false, false));
        assert_eq!((status.run_begin, status.end_reason.clone()), (None, None));
        // Somebody else has started it: the host sees no start.
        status.set_state(State::Running);
        assert!(status.run_begin.is_some());
    }

    #[test]
    fn adopted_run_is_one_of_the_host_and_began_when_its_task_locked_the_machine() {
        let mut off = Status::new(State::Poweroff);
        off.adopt_run();
        assert!(!off.own_run && off.run_begin.is_none());
        let mut status = Status::new(State::Running);
        status.availability.locked_since = Some(unix_now() - 7);
        status.adopt_run();
        assert!(status.own_run && status.started_well);
        assert!(status.run_begin.is_some_and(|begin| begin.unix <= unix_now() - 7));
        let mut tried = Status::new(State::Running);
        tried.availability.quarantine = Some(Quarantine::new("QEMU was killed"));
        tried.adopt_run();
        assert!(tried.own_run && !tried.started_well && tried.run_begin.is_some());
    }

    #[test]
    fn preparation_is_repeated_until_three_were_lost_since_the_last_start() {
        let mut status = Status::new(State::Poweroff);
        for _ in 0..2 {
            let repeated: [bool; 4] = std::array::from_fn(|_| status.count_lost_preparation());
            assert_eq!(repeated, [true, true, false, false]);
            status.set_state(State::Starting);
        }
    }

    #[test]
    fn machine_in_quarantine_is_left_alone_when_somebody_else_has_started_it() {
        let mut status = Status::new(State::Running);
        status.leave_alone("m");
        assert!(status.availability.quarantine.is_none());
        status.availability.quarantine = Some(Quarantine::new("QEMU was killed"));
        status.leave_alone("m");
        assert!(status.availability.quarantine.unwrap().is_left_alone);
    }
}
