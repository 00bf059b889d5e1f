//! The network of an isolated machine: a cell, which the machine has beside its runs.
//!
//! ```text
//! opened ─▶ QEMU runs in it ─▶ QEMU has ended ─▶ the host has ended its capture: closed
//!              └◀── the next QEMU of the same start ──┘
//! ```
//!
//! The host captures at the cell's interface from before the run until after it. A start that falls back to a slower way
//! continues in the same cell. tcpdump would lose the last packets if the interface went away before it has read them.

use std::fs::File;
use std::sync::{Arc, Mutex};

use machinery_backend::cell::{self, Cell, CellSpec};
use machinery_backend::sync::lock;

/// The cell of a machine, if it has one.
#[derive(Debug, Clone, Default)]
pub struct MachineCell(Arc<Mutex<Option<Held>>>);

#[derive(Debug)]
enum Held {
    Whole(Arc<Cell>),
    /// The interface of a cell that an earlier host has made, and that this host cannot enter.
    Interface(String),
}

impl MachineCell {
    /// Returns the cell for a QEMU, if there is one that this host can enter.
    pub fn get(&self) -> Option<Arc<Cell>> {
        match &*lock(&self.0) {
            Some(Held::Whole(cell)) => Some(Arc::clone(cell)),
            Some(Held::Interface(_)) | None => None,
        }
    }

    /// Sets the cell. [Close](MachineCell::close) the earlier one before its successor is opened.
    pub fn set(&self, cell: Cell) -> Arc<Cell> {
        let cell = Arc::new(cell);
        *lock(&self.0) = Some(Held::Whole(Arc::clone(&cell)));
        cell
    }

    /// Adopts the cell with that interface, in which the process lives. `spec` is the machine's present cell.
    pub fn adopt(&self, interface: &str, process: u32, spec: Option<&CellSpec>) {
        let spec = spec.filter(|spec| spec.interface == interface);
        let namespace = spec.and_then(|_| File::open(format!("/proc/{process}/ns/net")).ok());
        *lock(&self.0) = Some(match spec.zip(namespace) {
            Some((spec, namespace)) => Held::Whole(Arc::new(Cell::adopt(spec, namespace.into()))),
            None => Held::Interface(interface.to_owned()),
        });
    }

    /// Closes the cell, if there is one.
    pub fn close(&self, machine: &str) {
        let held = lock(&self.0).take();
        // A whole cell closes with its last owner.
        if let Some(Held::Interface(interface)) = held
            && let Err(error) = cell::remove(&interface)
        {
            tracing::warn!(machine, %error, "the network of a run remains");
        }
    }
}
