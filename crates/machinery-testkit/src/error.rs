//! One error for the whole kit: a message.
//!
//! Nobody handles a testkit failure by kind; somebody reads it in a test's output. So it is a
//! sentence that says what was being done, to what, why it failed and what to do.

use std::fmt::Display;

/// What went wrong, in full.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

/// A result with the kit's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Says what was being done when something failed.
pub(crate) trait Context<T> {
    /// Turns the failure into "`what`: the failure".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error(format!("{}: {error}", what())))
    }
}
