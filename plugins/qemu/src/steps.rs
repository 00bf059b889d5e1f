//! How long each step of a start takes, told to the host.

use std::time::Instant;

use machinery::Host;

/// Steps, one after the other.
pub struct Steps<'a> {
    host: &'a Host,
    machine: &'a str,
    since: Instant,
}

impl<'a> Steps<'a> {
    /// From now on.
    pub fn new(host: &'a Host, machine: &'a str) -> Self {
        Steps { host, machine, since: Instant::now() }
    }

    /// The step of that name has just ended; the next one begins.
    pub fn done(&mut self, step: &str) {
        let now = Instant::now();
        self.host.step(self.machine, step, now - self.since);
        self.since = now;
    }
}
