//! The failure of an action.

use machinery::{Error, ErrorKind};

/// The failure of an action, and whether it takes the machine out of the pool.
pub struct Failure {
    /// The reason.
    pub reason: Error,
    /// True if the machine leaves the pool.
    pub disable: bool,
}

impl Failure {
    /// Reports whether nothing is wrong: another action ended this one, or it works at another time.
    pub fn is_harmless(&self) -> bool {
        !self.disable && matches!(self.reason.kind(), ErrorKind::Interrupted | ErrorKind::NotNow)
    }
}

impl From<Error> for Failure {
    fn from(reason: Error) -> Self {
        let disable = reason.kind() != ErrorKind::Unsupported;
        Failure { reason, disable }
    }
}

/// The failure of an action that the host does not begin.
pub fn refused(reason: Error) -> Failure {
    Failure { reason, disable: false }
}
