//! One machine: its files, and its run or standby if it has one.
//!
//! | module | content |
//! | --- | --- |
//! | `base`, `state` | the machine; its run and its standby |
//! | `query`, `diagnose` | its present state; its faults |
//! | `restore` | restore_start and norestore_start, the fastest way first |
//! | `prepare`, `templates` | the template and the standby, ahead of the next restore |
//! | `stop` | stop, power button, discarding a standby |
//! | `network` | the network of the next run, before its start |
//! | `save` | a new snapshot and disk of a run |
//! | `adopt` | a run or a standby of an earlier host, and leaving them to the next one |
//! | `start` | a QEMU with a paused guest, for all of these |

mod adopt;
mod base;
mod diagnose;
mod network;
mod prepare;
mod query;
mod restore;
mod save;
mod start;
mod state;
mod stop;
mod templates;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Diagnosis, DumpFormat, Result, State};
use machinery_backend::sync::lock;
use machinery_backend::{Backend, PrepareOrigin, refuse};

use crate::{inspect, leftovers, memory, vnc};

pub use base::Machine;

impl Backend for Machine {
    fn state(self: &Arc<Self>, deadline: Deadline) -> Result<State> {
        self.current_state(deadline)
    }

    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start_from_snapshot(deadline)
    }

    fn norestore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start_cold(deadline)
    }

    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.pull_the_plug(deadline)
    }

    fn acpi_stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.press_power_button(deadline)
    }

    fn dump_memory(self: &Arc<Self>, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.shared.space.check(path.parent().unwrap_or(path))?;
        let limit = memory::max_dump(&self.files().start_args);
        inspect::dump_memory(&*self.running()?, path, format, limit, deadline)
    }

    fn screenshot(self: &Arc<Self>, path: &Path, deadline: Deadline) -> Result<()> {
        inspect::screenshot(&*self.running()?, path, deadline)
    }

    fn console(self: &Arc<Self>, deadline: Deadline) -> Result<OwnedFd> {
        vnc::connect(&*self.running()?, deadline)
    }

    fn save(self: &Arc<Self>, memory: &Path, disk: &Path, deadline: Deadline) -> Result<()> {
        self.save_run(memory, disk, deadline)
    }

    fn prepare(self: &Arc<Self>, _: PrepareOrigin, deadline: Deadline) -> Result<()> {
        self.prepare_restore(deadline)
    }

    fn open_network(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.open_cell(deadline)
    }

    fn close_network(self: &Arc<Self>, _: Deadline) -> Result<()> {
        self.close_cell();
        Ok(())
    }

    fn diagnose(&self) -> Diagnosis {
        self.diagnose_files()
    }

    fn jail(&self) -> Option<String> {
        Some(self.layers().to_string())
    }

    fn clear_leftovers(&self) -> Result<()> {
        let files = self.files();
        let program = self.shared.program.path();
        self.jail.end_leftovers();
        let record = self.record.read().map(|(_, record)| record);
        let interface = record.as_ref().and_then(|record| record.interface.clone());
        let owner = leftovers::Owner {
            user: self.jail.user().map(|user| user.uid),
            recorded: record.map(|record| record.process),
        };
        let cleared = leftovers::clear(&self.socket, &owner, &files.overlays(), program, files.keep_disk)
            .and_then(|()| self.clear_cell(interface));
        if cleared.is_ok() {
            self.record.remove();
        }
        // As long as some remain, only this machine cannot be used.
        *lock(&self.leftovers) = Some(cleared);
        Ok(())
    }

    fn adopt(self: &Arc<Self>, deadline: Deadline) -> Result<bool> {
        self.adopt_run(deadline)
    }

    fn hand_over(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.leave(deadline)
    }

    fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        self.wait_for_pending_end(deadline);
        if self.is_on() { Err(refuse::on_in_reload(self.name())) } else { Ok(()) }
    }

    fn begin_end(&self) {
        self.terminate_standby();
    }

    fn discard_standby(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.discard(deadline)?;
        self.close_cell();
        Ok(())
    }

    fn give_standby_back(self: &Arc<Self>, why: &str, deadline: Deadline) -> Result<()> {
        self.give_back(why, deadline)
    }

    fn end(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        let ended = self.pull_the_plug(deadline);
        // The host has ended its capture.
        self.cell.close(self.name());
        ended
    }
}
