//! The host that serves the site, through its ends and starts.

use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::host::{ProcessResources, RunningHost};
use serde_json::{Value, json};

use super::site::{CALM, FAULTY, REAL, Site};
use crate::run::Result;

/// The pause between two looks at something for which there is no event.
const INTERVAL: Duration = Duration::from_millis(30);

/// The host of the present moment, and what its predecessors have logged in this round.
#[derive(Debug)]
pub struct Served {
    pub host: RunningHost,
    /// The host's resources after its first rounds.
    pub baseline: Option<ProcessResources>,
    /// The number of rounds that are in the baseline.
    pub rounds: usize,
    /// The length of the host's log at the begin of the round.
    logged: usize,
    /// The logs of the round's earlier hosts.
    earlier: String,
}

impl Served {
    /// Starts a host.
    pub fn start(site: &Site) -> Result<Self> {
        Ok(Served { host: site.host()?, baseline: None, rounds: 0, logged: 0, earlier: String::new() })
    }

    /// Starts another host in the place of one that has ended.
    pub fn start_again(&mut self, site: &Site) -> Result<()> {
        self.forget_host("--- the next host\n");
        self.host = site.host()?;
        Ok(())
    }

    /// Keeps the log of a host that has ended.
    fn forget_host(&mut self, next: &str) {
        self.earlier = self.log() + next;
        (self.baseline, self.rounds, self.logged) = (None, 0, 0);
    }

    /// Ends the host, and starts one whose clock can jump.
    pub fn restart_with_clock(&mut self, site: &Site) -> Result<()> {
        let status = self.host.terminate()?;
        if !status.success() {
            return Err(format!("the host ended with {status}").into());
        }
        self.forget_host("--- a host with another clock\n");
        self.host = site.host_with_clock()?;
        Ok(())
    }

    /// Waits until the host has executed its program again, and gets its connections from then on.
    pub fn wait_for_replacement(&mut self, mut before: Client, started: &Value) -> Result<()> {
        // The host closes its connections when it is replaced. The answer to `upgrade` comes first.
        while before.next_message().is_ok() {}
        (self.baseline, self.rounds) = (None, 0);
        match self.started()? == *started {
            true => Err("the host is not replaced".to_owned().into()),
            false => Ok(()),
        }
    }

    /// Returns the time of the host's start.
    pub fn started(&self) -> Result<Value> {
        Ok(ask(&mut self.client()?, json!({"action": "version"}))?["started"].take())
    }

    /// Connects to the host.
    pub fn client(&self) -> Result<Client> {
        Ok(self.host.client()?)
    }

    /// Begins a round: [`log`](Self::log) returns later lines only.
    pub fn begin_round(&mut self) {
        self.earlier.clear();
        self.logged = self.host.log().len();
    }

    /// Returns the log of the round.
    pub fn log(&self) -> String {
        let log = self.host.log();
        format!("{}{}", self.earlier, log.get(self.logged..).unwrap_or(&log))
    }
}

/// Returns all machines.
pub fn all_machines() -> impl Iterator<Item = &'static str> {
    REAL.into_iter().chain([CALM, FAULTY])
}

/// Requests an action, and fails unless it succeeds.
pub fn act(client: &mut Client, action: &str, machine: &str) -> Result<()> {
    ask(client, json!({"action": action, "machine": machine})).map(drop)
}

/// Sends a request, and fails unless it succeeds.
pub fn ask(client: &mut Client, request: Value) -> Result<Value> {
    let answer = client.ask(request.clone())?;
    if answer["success"] == true { Ok(answer) } else { Err(format!("{request} failed: {answer}").into()) }
}

/// Takes a machine out of the pool, so that nothing prepares it.
pub fn disable(client: &mut Client, machine: &str) -> Result<()> {
    let request =
        json!({"action": "disable_machine", "machine": machine, "reason": "the soak looks for leftovers"});
    ask(client, request).map(drop)
}

/// Looks again and again until `look` returns something, or the time is over; returns `None` then.
pub fn until<T>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let end = Instant::now() + limit;
    loop {
        match look()? {
            None if Instant::now() < end => thread::sleep(INTERVAL),
            found => return Ok(found),
        }
    }
}
