//! The testkit's error: a message.
//!
//! No caller handles a failure by kind; a developer reads it in a test's output. The message has the
//! operation, its object, the reason, and the advice.

use std::fmt::Display;

/// A failure, as a whole sentence.
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

/// Adds the failed operation to an error.
pub(crate) trait Context<T> {
    /// Turns the error into "`what`: the error".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error(format!("{}: {error}", what())))
    }
}
