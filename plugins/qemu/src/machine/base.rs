//! A machine: its files, its state, and everything that its actions share.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};

use machinery::{Deadline, Result, machine_socket};
use machinery_backend::Backend;
use machinery_backend::jail::{Jail, Layers, Policy};
use machinery_backend::sync::lock;
use machinery_backend::{ReadinessReport, Reloadable, Work};

use super::state::MachineState;
use crate::config::MachineFiles;
use crate::jail::{jail_of, policy_of};
use crate::peers::Peer;
use crate::prepare::{Identity, SharedTemplate, TemplateFailures};
use crate::resources::Resource;
use crate::run::MachineCell;
use crate::run::record::RecordFile;
use crate::shared::Qemu;

/// One machine.
pub struct Machine {
    pub(super) configured: MachineFiles,
    /// The machine's files with its arguments, if these could be read only after the configuration.
    pub(super) corrected: OnceLock<MachineFiles>,
    /// The resources that the machine claims, once its arguments are known.
    pub(super) resources: OnceLock<Vec<Resource>>,
    /// The leftovers of a host that died: an error if some still exist, and none until they were adopted or ended.
    pub(super) leftovers: Mutex<Option<Result<()>>>,
    pub(super) socket: PathBuf,
    pub(super) record: RecordFile,
    pub(super) jail: Jail,
    pub(super) shared: Arc<Qemu>,
    pub(super) work: Arc<Work<MachineState>>,
    pub(super) readiness: ReadinessReport,
    /// The network of the next run, of the present one, or of the last one until the host has ended its capture.
    pub(super) cell: MachineCell,
    /// The name of the machine's template.
    template_name: String,
    /// Everything that machines with the same template share.
    pub(super) shared_template: Arc<SharedTemplate>,
    /// The failures of this machine to load a template that others may load.
    pub(super) load_failures: TemplateFailures,
}

impl Reloadable for Machine {
    type Keys = MachineFiles;

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
        self.resources.get_or_init(|| Resource::contested(files))
    }

    fn is_prepared(&self) -> bool {
        self.has_preparation()
    }

    fn has_qemu(&self) -> bool {
        self.uses_resources()
    }

    fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        self.discard(deadline)
    }

    fn report_standby_lost(&self, why: String) {
        self.readiness.set_reason(why);
        self.readiness.report();
    }
}

impl Machine {
    /// Creates the machine, whose socket and records are in these folders.
    pub fn new(files: MachineFiles, sockets: &Path, state: &Path, shared: Arc<Qemu>) -> Arc<Self> {
        let name = &files.info.name;
        shared.has_cells.fetch_or(files.isolation.is_some(), Ordering::SeqCst);
        let template_name = files.template_name();
        let machine = Arc::new(Machine {
            socket: machine_socket(sockets, "qemu", name),
            record: RecordFile::of(name, state),
            cell: MachineCell::default(),
            readiness: ReadinessReport::new(&shared.host, name),
            jail: jail_of(&files),
            shared_template: shared.shared_templates.of(&template_name),
            template_name,
            load_failures: TemplateFailures::default(),
            configured: files,
            corrected: OnceLock::new(),
            resources: OnceLock::new(),
            leftovers: Mutex::new(None),
            shared,
            work: Work::new(MachineState::default()),
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

    /// Returns the name of the machine's template.
    pub fn template_name(&self) -> &str {
        &self.template_name
    }

    pub(super) fn files(&self) -> &MachineFiles {
        self.corrected.get().unwrap_or(&self.configured)
    }

    /// Ends the leftovers that nobody has looked for: the host has given up before it asked for the adoption.
    ///
    /// # Errors
    /// As [`Backend::clear_leftovers`].
    pub(super) fn clear_unknown_leftovers(&self) -> Result<()> {
        let known = lock(&self.leftovers).is_some();
        if known { Ok(()) } else { self.clear_leftovers() }
    }

    /// Checks that no leftovers of a host that died remain.
    ///
    /// # Errors
    /// Some remain; the error has the reason.
    pub(super) fn expect_no_leftovers(&self) -> Result<()> {
        lock(&self.leftovers).clone().unwrap_or(Ok(()))
    }

    /// Returns the layers of the jail that hold for the machine.
    pub fn layers(&self) -> Layers {
        self.jail.layers(self.policy())
    }

    /// Returns the policy of the machine's jail.
    pub(super) fn policy(&self) -> Policy {
        let files = self.files();
        policy_of(files, self.shared.program.path(), files.overlays())
    }

    /// Returns the checksum of everything that a reload compares, and of the jail that holds. It is the same for the same
    /// build of this plugin.
    pub(super) fn checksum(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{:?} {:?}", self.files(), self.layers()).hash(&mut hasher);
        hasher.finish()
    }

    pub(super) fn identity(&self) -> Result<Identity> {
        Identity::of(self.files(), &self.shared.program)
    }
}
