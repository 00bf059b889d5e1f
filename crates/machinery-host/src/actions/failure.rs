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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_is_harmless_when_the_machine_stays_in_the_pool_and_another_moment_would_do() {
        for (kind, disable, expected) in [
            (ErrorKind::Interrupted, false, true),
            (ErrorKind::NotNow, false, true),
            (ErrorKind::NotNow, true, false),
            (ErrorKind::Failed, false, false),
            (ErrorKind::Failed, true, false),
        ] {
            let reason = Error::new(kind, "no");
            assert_eq!(Failure { reason, disable }.is_harmless(), expected, "{kind:?} {disable}");
        }
    }

    #[test]
    fn failure_takes_the_machine_out_of_the_pool_unless_a_method_is_missing() {
        assert!(!Failure::from(Error::unsupported("stop")).disable);
        assert!(Failure::from(Error::failed("killed")).disable);
        assert!(!refused(Error::failed("the host ends")).disable);
    }
}
