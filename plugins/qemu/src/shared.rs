//! Everything that the machines of one host have in common.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use machinery::{Host, Result};
use machinery_backend::{Budget, DiskSpace, QemuImg};

use crate::config::Config;
use crate::peers::Peers;
use crate::prepare::{SharedTemplates, Templates};
use crate::version::Program;

/// Everything that the machines of one host have in common.
pub struct Qemu {
    pub qemu_img: QemuImg,
    pub program: Program,
    pub instant_dir: PathBuf,
    /// The folder of the records of runs.
    pub state_dir: PathBuf,
    /// The templates. The folder is opened only if a machine wants a template or has had one.
    pub templates: OnceLock<Templates>,
    /// The parts of templates that are only in memory.
    pub shared_templates: SharedTemplates,
    /// True once a machine of this host was isolated.
    pub has_cells: AtomicBool,
    pub peers: Peers,
    pub budget: Arc<Budget>,
    /// The free space of the file systems that runs write to.
    pub space: Arc<DiskSpace>,
    pub host: Host,
}

impl Qemu {
    /// Opens what the machines of this configuration share.
    ///
    /// # Errors
    /// QEMU's program does not exist; as [`Templates::open`].
    pub fn new(config: &Config, state_dir: &Path, host: Host) -> Result<Qemu> {
        let qemu = Qemu {
            qemu_img: QemuImg::new(&config.binaries.qemu_img).with_jail(config.jail),
            program: Program::new(&config.binaries.qemu_system_x86_64, config.version)?,
            instant_dir: config.instant_dir.clone(),
            state_dir: state_dir.to_owned(),
            templates: OnceLock::new(),
            shared_templates: SharedTemplates::default(),
            has_cells: AtomicBool::new(false),
            peers: Peers::default(),
            budget: Budget::new(config.standby_memory_limit, config.standby_memory_reserve),
            space: DiskSpace::new(config.free_space_reserve),
            host,
        };
        // A folder that no machine needs any more may contain templates, which are removed.
        if config.machines.iter().any(|machine| machine.prepare.instant) || qemu.instant_dir.is_dir() {
            qemu.open_templates()?;
        }
        Ok(qemu)
    }

    /// Opens the folder of the templates, unless it is open.
    ///
    /// # Errors
    /// As [`Templates::open`].
    pub fn open_templates(&self) -> Result<()> {
        if self.templates.get().is_none() {
            // No other thread opens the folder meanwhile: the folder has a lock.
            let _ = self.templates.set(Templates::open(&self.instant_dir)?);
        }
        Ok(())
    }

    /// Removes all templates but those of these names, also from memory, and sets the limit of their disk space, in bytes.
    pub fn apply_template_settings(&self, names: &[&str], limit: Option<u64>) {
        self.shared_templates.keep_only(names);
        let Some(templates) = self.templates.get() else { return };
        templates.space().set_limit(limit);
        templates.keep_only(names);
    }
}
