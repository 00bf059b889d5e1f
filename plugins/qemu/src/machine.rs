//! One machine: its files, and its run or standby if it has one.
//!
//! | module | content |
//! | --- | --- |
//! | `state` | the run and the standby, and who may change them |
//! | `restore` | restore_start and norestore_start, the fastest way first |
//! | `prepare` | the template and the standby, ahead of the next restore |
//! | `stop` | stop, power button, discarding a standby |
//! | `start` | a QEMU with a paused guest, for all of these |
//! | `templates` | the machine's template: find, build, drop |

mod prepare;
mod restore;
mod start;
mod state;
mod stop;
mod templates;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use machinery::{Deadline, Diagnosis, DumpFormat, Error, MachineInfo, Result, State, machine_socket};
use machinery_backend::sync::lock;
use machinery_backend::{
    Backend, OverlayTemplates, PrepareOrigin, ReadinessReport, Reloadable, Work, refuse,
};

use crate::config::MachineFiles;
use crate::diagnose::{faults, file_warnings};
use crate::machineinfo::StartArgs;
use crate::peers::Peer;
use crate::prepare::{BuildFailures, Identity};
use crate::resources::Resource;
use crate::shared::Qemu;
use crate::{inspect, leftovers};
use state::MachineState;

pub struct Machine {
    configured: MachineFiles,
    /// The machine's files with its arguments, if these could be read only after the configuration.
    corrected: OnceLock<MachineFiles>,
    /// The resources that the machine claims, once its arguments are known.
    resources: OnceLock<Vec<Resource>>,
    /// The reason why leftovers of a host that died still exist, if they do.
    leftovers: Mutex<Option<Error>>,
    socket: PathBuf,
    shared: Arc<Qemu>,
    work: Arc<Work<MachineState>>,
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
        self.has_preparation()
    }

    fn has_qemu(&self) -> bool {
        self.is_on() || self.has_preparation()
    }

    fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        self.discard(deadline)
    }

    fn report_standby_lost(&self, why: String) {
        self.readiness.set_reason(why);
        self.readiness.report();
    }
}

impl Backend for Machine {
    type Shared = Qemu;

    fn info(&self) -> &MachineInfo {
        &self.files().info
    }

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
        inspect::dump_memory(&*self.running()?, path, format, deadline)
    }

    fn screenshot(self: &Arc<Self>, path: &Path, deadline: Deadline) -> Result<()> {
        inspect::screenshot(&*self.running()?, path, deadline)
    }

    fn prepare(self: &Arc<Self>, _: PrepareOrigin, deadline: Deadline) -> Result<()> {
        self.prepare_restore(deadline)
    }

    fn diagnose(&self) -> Diagnosis {
        self.diagnose_files()
    }

    fn clear_leftovers(&self) -> Result<()> {
        let files = self.files();
        let program = self.shared.program.path();
        let cleared = leftovers::clear(&self.socket, &files.overlays(), program, files.keep_disk);
        // As long as some remain, only this machine cannot be used.
        *lock(&self.leftovers) = cleared.err();
        Ok(())
    }

    fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        self.wait_for_pending_end(deadline);
        if self.is_on() { Err(refuse::on_in_reload(self.name())) } else { Ok(()) }
    }

    fn begin_end(&self) {
        self.terminate_standby();
    }

    fn discard_standby(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.discard(deadline)
    }
}

impl Machine {
    /// Creates the machine, whose socket is in the folder `sockets`.
    pub fn new(files: MachineFiles, sockets: &Path, shared: Arc<Qemu>) -> Arc<Self> {
        let name = &files.info.name;
        let machine = Arc::new(Machine {
            socket: machine_socket(sockets, "qemu", name),
            readiness: ReadinessReport::new(&shared.host, name),
            configured: files,
            corrected: OnceLock::new(),
            resources: OnceLock::new(),
            leftovers: Mutex::new(None),
            shared,
            work: Work::new(MachineState::default()),
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

    /// Reports whether the machine is configured to have a template.
    pub fn is_instant(&self) -> bool {
        self.files().prepare.instant
    }

    fn files(&self) -> &MachineFiles {
        self.corrected.get().unwrap_or(&self.configured)
    }

    /// Diagnoses the machine by its files as they are now. Arguments that could not be read with the
    /// configuration are read as soon as that is possible.
    fn diagnose_files(&self) -> Diagnosis {
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
        if self.usable().is_err() && self.is_idle_without_qemu() {
            diagnosis.keep(self.clear_leftovers());
        }
        diagnosis.keep(self.usable());
        diagnosis
    }

    /// Checks that no leftovers of a host that died remain.
    ///
    /// # Errors
    /// Some remain; the error has the reason.
    fn usable(&self) -> Result<()> {
        lock(&self.leftovers).clone().map_or(Ok(()), Err)
    }

    fn identity(&self) -> Result<Identity> {
        Identity::of(self.files(), &self.shared.program)
    }
}
