//! The agents of an analysis guest.

use std::path::PathBuf;
use std::{env, fs};

use crate::Result;
use crate::error::{Context, Error};

/// Our agent, which speaks the protocol of Cuckoo's agent 0.10.
const AGENT: &str = include_str!("analysis/agent.py");

/// The variable with the path of Cuckoo's agent 0.10, `agent.py`.
pub const CUCKOO_AGENT: &str = "CUCKOO_AGENT";
/// The variable with the path of a Python 2.7, which Cuckoo's agent needs.
pub const CUCKOO_AGENT_PYTHON: &str = "CUCKOO_AGENT_PYTHON";

/// The agent of an analysis guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Agent {
    /// The testkit's own.
    Own,
    /// Cuckoo's, from the files that [`CUCKOO_AGENT`] and [`CUCKOO_AGENT_PYTHON`] name.
    Cuckoo,
}

impl Agent {
    /// Reports whether the files of the agent are known.
    pub fn is_known(self) -> bool {
        match self {
            Agent::Own => true,
            Agent::Cuckoo => [CUCKOO_AGENT, CUCKOO_AGENT_PYTHON].iter().all(|name| named(name).is_ok()),
        }
    }

    /// Returns its source, and the Python that runs it.
    pub(super) fn files(self) -> Result<(String, PathBuf)> {
        match self {
            Agent::Own => Ok((AGENT.to_owned(), python3())),
            Agent::Cuckoo => {
                let agent = named(CUCKOO_AGENT)?;
                let source = fs::read_to_string(&agent).context(|| format!("reading {}", agent.display()))?;
                Ok((source, named(CUCKOO_AGENT_PYTHON)?))
            }
        }
    }
}

/// Returns the file that a variable names.
fn named(variable: &str) -> Result<PathBuf> {
    let path = env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    path.ok_or_else(|| Error::new(format!("{variable} names no file")))
}

/// Returns Debian's Python, which needs few libraries, or the first one in the PATH.
fn python3() -> PathBuf {
    let debian = PathBuf::from("/usr/bin/python3");
    if debian.is_file() { debian } else { "python3".into() }
}
