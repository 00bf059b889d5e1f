//! The answer to a new configuration while machines run.

use serde::{Deserialize, Serialize};

/// The result of a reload for the previous machines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reloaded {
    /// The machines whose configuration has changed.
    pub changed: Vec<String>,
    /// The machines in use that the new configuration changes or removes. They are unchanged for now; the host
    /// reloads again when they are free.
    pub later: Vec<String>,
}
