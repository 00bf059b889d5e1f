//! The durations of an action's steps, which are reported to the host.

use std::time::Instant;

use machinery::Host;

/// The steps of an action, one after the other. They belong to the thread that acts.
#[derive(Debug)]
pub struct Steps {
    host: Host,
    machine: String,
    since: Instant,
}

impl Steps {
    /// Begins the first step.
    pub fn new(host: &Host, machine: &str) -> Self {
        Steps { host: host.clone(), machine: machine.to_owned(), since: Instant::now() }
    }

    /// Ends the step of that name, and begins the next one.
    pub fn done(&mut self, step: &str) {
        let now = Instant::now();
        self.host.step(&self.machine, step, now - self.since);
        self.since = now;
    }

    /// Runs a step of that name.
    pub fn timed<T>(&mut self, step: &str, work: impl FnOnce() -> T) -> T {
        self.since = Instant::now();
        let done = work();
        self.done(step);
        done
    }
}
