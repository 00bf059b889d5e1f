//! One machine: its files, and its run or standby if it has one.
//!
//! A machine's state is in [`RunSlot`]. The modules below add the actions:
//!
//! | module | action |
//! | --- | --- |
//! | `restore` | restore_start and norestore_start, the fastest way first |
//! | `prepare` | the template and the standby, ahead of the next restore |
//! | `end` | stop, power button, discarding a standby |
//! | `start` | a QEMU with a paused guest, for all of these |
//! | `templates` | the machine's template: find, build, drop |

mod end;
mod prepare;
mod restore;
mod start;
mod templates;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use machinery::{
    Deadline, Diagnosis, DumpFormat, Error, MachineInfo, Reloadable, Result, State, machine_socket,
};

use crate::config::MachineFiles;
use crate::diagnose::{faults, file_warnings};
use crate::disk::OverlayTemplates;
use crate::inspection;
use crate::machineinfo::StartArgs;
use crate::peers::Peer;
use crate::readiness::ReadinessReport;
use crate::resources::Resource;
use crate::run::Run;
use crate::run_marker::RunMarker;
use crate::run_slot::RunSlot;
use crate::shared::Shared;
use crate::template::BuildFailures;

pub struct Machine {
    configured: MachineFiles,
    /// The machine's files with its arguments, if these could be read only after the configuration.
    corrected: OnceLock<MachineFiles>,
    /// The resources that the machine claims, once its arguments are known.
    resources: OnceLock<Vec<Resource>>,
    /// The reason why leftovers of a host that died still exist, if they do.
    leftovers: Mutex<Option<Error>>,
    socket: PathBuf,
    shared: Arc<Shared>,
    slot: RunSlot,
    /// The empty overlays that a run's overlays are copied from.
    overlay_templates: OverlayTemplates,
    readiness: ReadinessReport,
    build_failures: BuildFailures,
}

impl Reloadable for Machine {
    type Keys = MachineFiles;

    fn key_name(files: &MachineFiles) -> &str {
        &files.info.name
    }

    fn unique(files: &MachineFiles) -> Vec<(&'static str, Option<&str>)> {
        let info = &files.info;
        vec![
            ("qcow2_path", files.disk.to_str()),
            // A machine's disk must not be at the path of another machine's overlay, either.
            ("qcow2_path", files.disposable.to_str()),
            ("snapshot_path", files.snapshot.to_str()),
            ("ip", Some(&info.ip)),
            ("mac_address", info.mac_address.as_deref()),
        ]
    }

    fn keys(&self) -> &MachineFiles {
        self.files()
    }
}

impl Peer for Machine {
    fn name(&self) -> &str {
        self.name()
    }

    fn resources(&self) -> &[Resource] {
        let files = self.files();
        if files.args_error.is_some() {
            return &[];
        }
        self.resources.get_or_init(|| Resource::of(files))
    }

    fn is_prepared(&self) -> bool {
        self.slot.is_prepared()
    }

    fn has_qemu(&self) -> bool {
        self.slot.has_qemu()
    }

    fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        if self.slot.discard_standby(deadline)? {
            self.readiness.report();
        }
        Ok(())
    }

    fn report_standby_lost(&self, why: String) {
        self.readiness.set_reason(why);
        self.readiness.report();
    }
}

impl Machine {
    pub fn new(files: MachineFiles, sockets: &Path, shared: Arc<Shared>) -> Arc<Self> {
        let name = &files.info.name;
        let machine = Arc::new(Machine {
            socket: machine_socket(sockets, "qemu", name),
            readiness: ReadinessReport::new(&shared.host, name),
            configured: files,
            corrected: OnceLock::new(),
            resources: OnceLock::new(),
            leftovers: Mutex::new(None),
            shared,
            slot: RunSlot::default(),
            overlay_templates: OverlayTemplates::default(),
            build_failures: BuildFailures::default(),
        });
        let peer: Arc<dyn Peer> = Arc::clone(&machine) as Arc<dyn Peer>;
        machine.shared.peers.add(&peer);
        machine
    }

    pub fn name(&self) -> &str {
        &self.configured.info.name
    }

    pub fn info(&self) -> &MachineInfo {
        &self.files().info
    }

    /// Reports whether the machine is configured to have a template.
    pub fn is_instant(&self) -> bool {
        self.files().prepare.instant
    }

    fn files(&self) -> &MachineFiles {
        self.corrected.get().unwrap_or(&self.configured)
    }

    /// Removes leftovers of a host that died. As long as some remain, the machine cannot be used.
    pub fn clear_leftovers(&self) {
        let program = self.shared.program.path();
        let files = self.files();
        let marker = RunMarker::new(&self.socket);
        let cleared = marker.clear_leftovers(&files.overlays(), program, files.keep_disk);
        *self.leftovers() = cleared.err();
    }

    /// Diagnoses the machine by its files as they are now. Arguments that could not be read with the
    /// configuration are read as soon as that is possible.
    pub fn diagnose(&self) -> Diagnosis {
        let mut diagnosis = Diagnosis::new(self.name());
        let files = self.files();
        let now = match StartArgs::read(&files.machineinfo) {
            Err(error) => MachineFiles { args_error: Some(error), ..files.clone() },
            Ok(start_args) if files.args_error.is_some() => {
                let corrected = MachineFiles { start_args, args_error: None, ..files.clone() };
                // Once `corrected` is set, this error no longer occurs.
                self.corrected.get_or_init(|| corrected).clone()
            }
            Ok(start_args) => {
                if start_args != files.start_args {
                    diagnosis.warn("its machineinfo.json has changed since it was read: reload to use it");
                }
                files.clone()
            }
        };
        for (_, error) in faults(&now) {
            diagnosis.keep::<()>(Err(error));
        }
        now.shared_writes_warning().into_iter().for_each(|warning| diagnosis.warn(warning));
        file_warnings(&now).into_iter().for_each(|warning| diagnosis.warn(warning));
        // The files of a machine that is on are no leftovers.
        if self.leftovers().is_some() && self.slot.is_off() {
            self.clear_leftovers();
        }
        diagnosis.keep(self.leftovers().clone().map_or(Ok(()), Err));
        diagnosis
    }

    fn leftovers(&self) -> MutexGuard<'_, Option<Error>> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the machine's state.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn state(&self, deadline: Deadline) -> Result<State> {
        self.slot.state(deadline)
    }

    /// See [`inspection::dump_memory`].
    ///
    /// # Errors
    /// The machine is off; as there.
    pub fn dump_memory(&self, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let run = self.running()?;
        inspection::dump_memory(&run, self.name(), path, format, &self.shared.host, deadline)
    }

    /// See [`inspection::screenshot`].
    ///
    /// # Errors
    /// The machine is off; as there.
    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        inspection::screenshot(&*self.running()?, path, deadline)
    }

    fn running(&self) -> Result<Arc<Run>> {
        let off = || Error::unexpected_state("the machine is powered off").advice("Start it first");
        self.slot.running().ok_or_else(off)
    }
}
