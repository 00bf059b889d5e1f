//! A start that failed: the error, the stage, and the run if its QEMU still runs.

use std::sync::Arc;

use machinery::Error;

use super::Run;

/// A start that failed.
pub struct StartError {
    pub error: Error,
    /// The stage that failed.
    pub at: Stage,
    /// The run, in the rare case that its QEMU does not end.
    pub still_running: Option<Arc<Run>>,
}

/// The stages of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The disk, the process and its monitor: independent of the memory that is loaded.
    Process,
    /// Loading the memory that the guest continues from.
    Load,
    /// Resuming the guest, or ending the run.
    Run,
}

impl From<Error> for StartError {
    fn from(error: Error) -> Self {
        StartError { error, at: Stage::Process, still_running: None }
    }
}
