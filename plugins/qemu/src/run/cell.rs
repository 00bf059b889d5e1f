//! The network of an isolated run, which is closed with the run.

use machinery_backend::cell::{self, Cell};
use machinery_backend::sync::lock;

use super::Run;

/// The cell of a run, which is closed with the run.
#[derive(Debug)]
pub enum RunCell {
    /// This host has made it.
    Made(Cell),
    /// An earlier host has made the cell with that interface.
    Adopted(String),
}

impl Run {
    /// Takes the network for the machine's next run, whose start has to end this one first. None if an earlier host has made
    /// it.
    pub fn release_cell(&self) -> Option<Cell> {
        let mut cell = lock(&self.cell);
        match cell.take() {
            Some(RunCell::Made(made)) => Some(made),
            other => {
                *cell = other;
                None
            }
        }
    }

    /// Closes the network after the end of the process.
    pub(super) fn close_cell(&self) {
        let closed = match lock(&self.cell).take() {
            Some(RunCell::Made(cell)) => cell.close(),
            Some(RunCell::Adopted(interface)) => cell::remove(&interface),
            None => Ok(()),
        };
        if let Err(error) = closed {
            tracing::warn!(machine = self.machine, %error, "the network of a run remains");
        }
    }
}
