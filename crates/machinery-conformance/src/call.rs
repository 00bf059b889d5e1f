//! Calls by name, and the bound on them.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Capabilities, Deadline, DumpFormat};

/// A call that is about one machine.
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

    pub fn is_offered(&self, able: Capabilities) -> bool {
        match self {
            Call::State | Call::RestoreStart | Call::Stop => true,
            Call::NorestoreStart => able.norestore_start,
            Call::AcpiStop => able.acpi_stop,
            Call::DumpMemory(..) => able.dump_memory,
            Call::Screenshot(_) => able.screenshot,
            Call::Prepare => able.prepare,
        }
    }

    /// What it writes.
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

/// Why a piece of work gave no answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Silent {
    /// It is still at it. Its thread stays, for nothing can end it.
    Hangs,
    /// It panicked.
    Panicked,
}

/// Does the work in a thread of its own, which is also how a host calls: no thread that ever called
/// a plugin is sure to live on.
pub fn bounded<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Silent> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        // Nobody listens any more once the limit has passed.
        let _ = tell.send(work());
    });
    told.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => Silent::Hangs,
        RecvTimeoutError::Disconnected => Silent::Panicked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_gives_no_answer_is_told_apart() {
        let long = Duration::from_secs(60);
        assert_eq!(bounded(long, || 1), Ok(1));
        assert_eq!(bounded(long, || panic!("on purpose")), Err::<(), _>(Silent::Panicked));
        let (_keep, never) = mpsc::channel::<()>();
        assert_eq!(bounded(Duration::ZERO, move || never.recv().is_ok()), Err(Silent::Hangs));
    }
}
