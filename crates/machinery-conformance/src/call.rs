//! The calls of a machinery as values, and the timeout on each call.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Capabilities, Deadline, DumpFormat, Error};

use crate::report::{CheckFailure, failed};

/// A call on one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    State,
    RestoreStart,
    NorestoreStart,
    Stop,
    AcpiStop,
    DumpMemory(PathBuf, DumpFormat),
    Screenshot(PathBuf),
    Prepare,
}

impl Call {
    pub fn name(&self) -> &'static str {
        match self {
            Call::State => "state",
            Call::RestoreStart => "restore_start",
            Call::NorestoreStart => "norestore_start",
            Call::Stop => "stop",
            Call::AcpiStop => "acpi_stop",
            Call::DumpMemory(..) => "dump_memory",
            Call::Screenshot(_) => "screenshot",
            Call::Prepare => "prepare",
        }
    }

    pub fn is_offered(&self, capabilities: Capabilities) -> bool {
        match self {
            Call::State | Call::RestoreStart | Call::Stop => true,
            Call::NorestoreStart => capabilities.norestore_start,
            Call::AcpiStop => capabilities.acpi_stop,
            Call::DumpMemory(..) => capabilities.dump_memory,
            Call::Screenshot(_) => capabilities.screenshot,
            Call::Prepare => capabilities.prepare,
        }
    }

    /// Returns the path of the file that the call writes.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Call::DumpMemory(file, _) | Call::Screenshot(file) => Some(file),
            _ => None,
        }
    }

    pub fn run(&self, instance: &Instance, machine: &str, deadline: Deadline) -> machinery::Result<()> {
        match self {
            Call::State => instance.state(machine, deadline).map(drop),
            Call::RestoreStart => instance.restore_start(machine, deadline),
            Call::NorestoreStart => instance.norestore_start(machine, deadline),
            Call::Stop => instance.stop(machine, deadline),
            Call::AcpiStop => instance.acpi_stop(machine, deadline),
            Call::DumpMemory(path, format) => instance.dump_memory(machine, path, *format, deadline),
            Call::Screenshot(path) => instance.screenshot(machine, path, deadline),
            Call::Prepare => instance.prepare(machine, deadline),
        }
    }
}

/// The plugin's own result of a call that returned.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome<T = ()> {
    Success(T),
    Refusal(Error),
}

impl<T> Outcome<T> {
    /// Demands that the call succeeded, and returns its value.
    pub fn expect_success(self, action: &str) -> Result<T, CheckFailure> {
        match self {
            Outcome::Success(value) => Ok(value),
            Outcome::Refusal(error) => Err(failed(action, &error)),
        }
    }
}

impl<T> From<machinery::Result<T>> for Outcome<T> {
    fn from(result: machinery::Result<T>) -> Self {
        match result {
            Ok(value) => Outcome::Success(value),
            Err(error) => Outcome::Refusal(error),
        }
    }
}

/// The reason why a function returned no value.
#[derive(Debug, PartialEq, Eq)]
pub enum NoValue {
    /// The function is still running. Its thread remains, because no thread can be ended from another.
    TimedOut,
    /// The function panicked.
    Panicked,
}

/// Runs the function in a thread of its own, as the host does: a plugin's call may never return.
pub fn run_with_timeout<T: Send + 'static>(
    timeout: Duration,
    function: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NoValue> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        // The receiver is gone once the timeout has passed.
        let _ = sender.send(function());
    });
    receiver.recv_timeout(timeout).map_err(|error| match error {
        RecvTimeoutError::Timeout => NoValue::TimedOut,
        RecvTimeoutError::Disconnected => NoValue::Panicked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_with_timeout_distinguishes_a_panic_from_a_timeout() {
        let long = Duration::from_secs(60);
        assert_eq!(run_with_timeout(long, || 1), Ok(1));
        assert_eq!(run_with_timeout(long, || panic!("on purpose")), Err::<(), _>(NoValue::Panicked));
        let (_sender, receiver) = mpsc::channel::<()>();
        let endless = move || receiver.recv().is_ok();
        assert_eq!(run_with_timeout(Duration::ZERO, endless), Err(NoValue::TimedOut));
    }
}
