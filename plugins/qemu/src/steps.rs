//! The durations of a start's steps, which are reported to the host.

use std::time::Instant;

use machinery::Host;

/// The steps of a start, one after the other.
pub struct Steps<'a> {
    host: &'a Host,
    machine: &'a str,
    since: Instant,
}

impl<'a> Steps<'a> {
    /// Begins the first step.
    pub fn new(host: &'a Host, machine: &'a str) -> Self {
        Steps { host, machine, since: Instant::now() }
    }

    /// Ends the step of that name, and begins the next one.
    pub fn done(&mut self, step: &str) {
        let now = Instant::now();
        self.host.step(self.machine, step, now - self.since);
        self.since = now;
    }
}
