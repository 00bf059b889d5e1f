//! The network of an isolated run.
//!
//! ```text
//! run: its cell ─▶ QEMU has ended ─▶ past cell ─▶ the host has ended its capture: closed
//!       └── a preparation has ended, or a standby: closed
//! ```
//!
//! tcpdump would lose the last packets if the interface went away before it has read them.

use std::fs::File;
use std::sync::{Arc, Mutex};

use machinery::Result;
use machinery_backend::cell::{self, Cell};
use machinery_backend::sync::lock;

/// The cell of a run.
#[derive(Debug)]
pub enum RunCell {
    /// This host has made it.
    Made(Cell),
    /// An earlier host has made it. The namespace lives as long as its file.
    Adopted { interface: String, _namespace: Option<File> },
}

/// The place for the cell of a machine's last run.
#[derive(Debug, Clone, Default)]
pub struct PastCell(Arc<Mutex<Option<RunCell>>>);

impl RunCell {
    /// Adopts the cell with that interface, in which the process lives.
    pub fn adopt(interface: &str, process: u32) -> RunCell {
        let namespace = File::open(format!("/proc/{process}/ns/net"));
        RunCell::Adopted { interface: interface.to_owned(), _namespace: namespace.ok() }
    }

    /// Returns the cell for the machine's next run; an error has it back if an earlier host has made it.
    pub fn into_made(self) -> std::result::Result<Cell, RunCell> {
        match self {
            RunCell::Made(cell) => Ok(cell),
            RunCell::Adopted { .. } => Err(self),
        }
    }

    fn close(self) -> Result<()> {
        match self {
            RunCell::Made(cell) => cell.close(),
            RunCell::Adopted { interface, .. } => cell::remove(&interface),
        }
    }
}

impl PastCell {
    /// Keeps the cell of a run that has ended.
    pub fn keep(&self, cell: RunCell) {
        *lock(&self.0) = Some(cell);
    }

    /// Closes the cell, if there is one.
    pub fn close(&self, machine: &str) {
        let past = lock(&self.0).take();
        if let Some(Err(error)) = past.map(RunCell::close) {
            tracing::warn!(machine, %error, "the network of a run remains");
        }
    }
}
