//! The host, over its socket.
//!
//! Each mode has a host of its own, with the same machine and configuration except for the mode. Before each
//! restore the host prepares the machine, and must report the mode, so that no other mode is measured by
//! mistake.

use clap::ValueEnum;
use machinery_testkit::client::Client;
use machinery_testkit::guest::GuestProbe;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::TestNetwork;
use machinery_testkit::scratch::ScratchCwd;
use serde_json::Value;

use super::answers;
use super::figures::{Figures, Kind, Place, Unit};
use super::turns::timed;
use crate::run::Result;

/// The host's mode of restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// By reading the whole snapshot
    Plain,
    /// With the template's RAM file, or with the save image of a domain
    Instant,
    /// With a machine that was prepared ahead
    Standby,
}

/// A client waits 30 seconds for an answer. A longer preparation takes several requests.
const MAX_PREPARE_ATTEMPTS: usize = 20;

impl Mode {
    /// Returns the kind of a `restore_start` in this mode.
    pub fn restore(self) -> Kind {
        let (name, what) = match self {
            Mode::Plain => (
                "plain restore_start",
                "the host, instant and standby off: request until answer at its socket",
            ),
            Mode::Instant => {
                ("instant restore_start", "the host, standby off: request until answer at its socket")
            }
            Mode::Standby => {
                ("standby restore_start", "the host with a standby ready: request until answer at its socket")
            }
        };
        Kind { by: "", name, what, unit: Unit::Ms }
    }

    /// Returns the kind of a `stop` in this mode.
    pub fn stop(self) -> Kind {
        let name = match self {
            Mode::Plain => "plain stop",
            Mode::Instant => "instant stop",
            Mode::Standby => "standby stop",
        };
        Kind { by: "", name, what: "the host: request until answer at its socket", unit: Unit::Ms }
    }

    /// Returns the kind of the time until the agent answers after a restore in this mode.
    pub const fn answer(self) -> Kind {
        answers::kind(match self {
            Mode::Plain => "plain, agent answers",
            Mode::Instant => "instant, agent answers",
            Mode::Standby => "standby, agent answers",
        })
    }

    /// Returns the mode's name in `list`.
    pub fn word(self) -> &'static str {
        match self {
            Mode::Plain => "plain",
            Mode::Instant => "instant",
            Mode::Standby => "standby",
        }
    }

    /// Returns the host's configuration, with that much memory for standbys.
    fn settings(self, machinery: &str, memory_mib: u32) -> String {
        let standby = if self == Mode::Standby { "on" } else { "off" };
        let instant = if self == Mode::Plain { "off" } else { "auto" };
        let keys = match machinery {
            "qemu" => {
                let gib = memory_mib.div_ceil(1024) + 1;
                // The modes are measured also where the disk is nearly full.
                format!(
                    "instant: {instant}, instant_space_limit: 64GiB, standby: {standby}, standby_memory: {gib}GiB"
                )
            }
            _ => format!("instant: {instant}, standby: {standby}"),
        };
        format!("free_space_reserve: 0\nmachineries: {{{machinery}: {{{keys}}}}}\n")
    }
}

/// The machines that a host serves.
#[derive(Clone, Copy)]
pub struct Served<'a> {
    /// The CWD.
    pub cwd: &'a ScratchCwd,
    /// The machinery of the machines.
    pub machinery: &'static str,
    /// The RAM of all machines together.
    pub memory_mib: u32,
}

/// A host that serves the machines.
pub struct Session {
    mode: Mode,
    host: RunningHost,
    client: Client,
}

impl Session {
    /// Starts a host.
    pub fn start(served: Served<'_>, mode: Mode) -> Result<Self> {
        Self::start_in(None, served, mode)
    }

    /// Starts a host in a network.
    pub fn start_in(network: Option<&TestNetwork>, served: Served<'_>, mode: Mode) -> Result<Self> {
        served.cwd.host_yaml(&mode.settings(served.machinery, served.memory_mib))?;
        let host = RunningHost::start_with(served.cwd, |command| {
            if let Some(network) = network {
                network.attach(command);
            }
        })?;
        let client = host.client()?;
        Ok(Session { mode, host, client })
    }

    /// Waits until the machine is ready in this session's mode.
    pub fn prepare(&mut self, machine: &str) -> Result<()> {
        if self.mode == Mode::Plain {
            return Ok(());
        }
        let answer = self.prepared(machine)?;
        succeeded("prepare", &answer)?;
        let ready = &self.client.machine(machine)?["ready"];
        if ready["mode"] == self.mode.word() {
            return Ok(());
        }
        Err(format!("the machine {machine} is not ready as {}: {ready}", self.mode.word()).into())
    }

    fn prepared(&self, machine: &str) -> Result<Value> {
        let mut last = Err("it was not asked".to_owned().into());
        for _ in 0..MAX_PREPARE_ATTEMPTS {
            last = self.host.client()?.act("prepare", machine).map_err(Into::into);
            if last.is_ok() {
                break;
            }
        }
        last
    }

    /// Runs an action on a machine, and returns the milliseconds.
    pub fn act(&mut self, action: &str, machine: &str) -> Result<f64> {
        let (answer, took) = timed(|| Ok(self.client.act(action, machine)?))?;
        succeeded(action, &answer)?;
        Ok(took)
    }

    /// Returns the connection.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Shuts the host down.
    pub fn end(mut self) -> Result<()> {
        let status = self.host.terminate()?;
        if status.success() {
            return Ok(());
        }
        Err(format!("the host ended with {status}; it said:\n{}", self.host.log()).into())
    }
}

/// Measures restores of the machine `m`, its agent's answers, and stops; the first round does not count.
pub fn measure(
    served: Served<'_>,
    mode: Mode,
    guest: &GuestProbe,
    rounds: usize,
    place: Place,
    figures: &mut Figures,
) -> Result<()> {
    let mut session = Session::start(served, mode)?;
    for round in 0..=rounds {
        session.prepare("m")?;
        let restored = session.act("restore_start", "m")?;
        let answered = answers::after(restored, guest)?;
        let stopped = session.act("stop", "m")?;
        if round > 0 {
            figures.add(place, mode.restore(), restored);
            figures.add(place, mode.answer(), answered);
            figures.add(place, mode.stop(), stopped);
        }
    }
    session.end()
}

/// Fails unless the host's answer is a success.
pub fn succeeded(action: &str, answer: &Value) -> Result<()> {
    if answer["success"] == true { Ok(()) } else { Err(format!("{action} failed: {answer}").into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_say_the_mode() {
        let qemu = |mode: Mode| mode.settings("qemu", 2048);
        assert_eq!(
            qemu(Mode::Plain),
            "free_space_reserve: 0\nmachineries: {qemu: {instant: off, instant_space_limit: 64GiB, standby: off, standby_memory: 3GiB}}\n"
        );
        assert_eq!(
            qemu(Mode::Standby),
            "free_space_reserve: 0\nmachineries: {qemu: {instant: auto, instant_space_limit: 64GiB, standby: on, standby_memory: 3GiB}}\n"
        );
        assert_eq!(
            Mode::Plain.settings("kvm", 2048),
            "free_space_reserve: 0\nmachineries: {kvm: {instant: off, standby: off}}\n"
        );
    }
}
