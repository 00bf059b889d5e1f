//! Everything that the machines of one host have in common.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use machinery::{Budget, Host, Result};

use crate::peers::Peers;
use crate::template::Templates;
use crate::version::Program;

/// Everything that the machines of one host have in common.
pub struct Shared {
    pub qemu_img: PathBuf,
    pub program: Program,
    pub instant_dir: PathBuf,
    /// The templates. The folder is opened only if a machine wants a template or has had one.
    pub templates: OnceLock<Templates>,
    pub peers: Peers,
    pub budget: Arc<Budget>,
    pub host: Host,
}

impl Shared {
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

    /// Removes the templates of all machines but these, and sets the limit of their disk space, in bytes.
    pub fn apply_template_settings(&self, machines: &[&str], limit: Option<u64>) {
        let Some(templates) = self.templates.get() else { return };
        templates.space().set_limit(limit);
        templates.keep_only(machines);
    }
}
