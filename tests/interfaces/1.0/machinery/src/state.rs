//! The states of a machine, in Cuckoo's own strings.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a machine is doing. The strings are Cuckoo3's (`cuckoo.common.machines.States`), exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// On its way to `running`.
    Starting,
    /// The guest's processors run.
    Running,
    /// The guest's processors are held, and can be resumed.
    Paused,
    /// On its way to `poweroff`.
    Stopping,
    /// There is no running machine.
    Poweroff,
    /// The snapshot's state is loaded and the machine does not run yet.
    Restored,
    /// The guest suspended itself (S3).
    Suspended,
    /// The machine needs help: crashed guest, I/O error, unknown state.
    Error,
}

impl State {
    /// All states there are.
    pub const ALL: [State; 8] = [
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopping,
        State::Poweroff,
        State::Restored,
        State::Suspended,
        State::Error,
    ];

    /// The string that Cuckoo uses for it.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Poweroff => "poweroff",
            State::Restored => "restored",
            State::Suspended => "suspended",
            State::Error => "error",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        State::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| format!("'{text}' is not a machine state"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_survives_its_string() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
        }
        assert!("RUNNING".parse::<State>().is_err());
    }
}
