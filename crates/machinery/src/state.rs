//! The states of a machine, with Cuckoo's own names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The state of a machine. The names are exactly those of Cuckoo3 (`cuckoo.common.machines.States`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The machine is about to be `running`.
    Starting,
    /// The guest's processors run.
    Running,
    /// The guest's processors are paused, and can be resumed.
    Paused,
    /// The machine is about to be `poweroff`.
    Stopping,
    /// The machine does not run.
    Poweroff,
    /// The snapshot is loaded, and the machine does not run yet.
    Restored,
    /// The guest suspended itself (S3).
    Suspended,
    /// The machine has failed: crashed guest, I/O error, unknown state.
    Error,
}

impl State {
    /// All states.
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

    /// Returns Cuckoo's name of the state.
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
    fn state_is_read_from_its_own_name() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
        }
        assert!("RUNNING".parse::<State>().is_err());
    }
}
