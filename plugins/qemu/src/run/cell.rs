//! The network of an isolated run, which is closed with the run.

use machinery_backend::cell::{self, Cell};

/// The cell of a run, which is closed with the run.
#[derive(Debug)]
pub enum RunCell {
    /// This host has made it.
    Made(Cell),
    /// An earlier host has made the cell with that interface.
    Adopted(String),
}

impl RunCell {
    /// Closes the cell after the end of its run.
    pub fn close(self, machine: &str) {
        let closed = match self {
            RunCell::Made(cell) => cell.close(),
            RunCell::Adopted(interface) => cell::remove(&interface),
        };
        if let Err(error) = closed {
            tracing::warn!(machine, %error, "the network of a run remains");
        }
    }
}
