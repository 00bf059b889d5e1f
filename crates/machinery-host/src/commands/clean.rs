//! Removes what a host keeps in its CWD, when no host is to come back.
//!
//! ```text
//! no host serves ─▶ runs of an earlier host end ─▶ the CWD is locked ─▶ the folder of the state is removed
//! ```
//!
//! A folder `instant_dir` of a machinery is outside the CWD, and may have other files. It is only named.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use serde::Deserialize;

use super::end_runs::end_runs;
use super::machine;
use crate::config::Config;
use crate::cwd::Cwd;
use crate::cwd_lock::lock;
use crate::plugin::search::PluginSearch;

/// The result of the command.
pub struct Cleaned {
    /// The folder that was removed.
    pub folder: PathBuf,
    /// The bytes on disk that it used.
    pub freed: u64,
    /// The folders for templates and images outside the CWD, which remain.
    pub remaining: Vec<PathBuf>,
}

#[derive(Default, Deserialize)]
struct Section {
    // The old names of the plugins `qemu` and `kvm`.
    #[serde(default, alias = "template_dir", alias = "save_dir")]
    instant_dir: Option<PathBuf>,
}

/// Removes templates, images, locks and all other state of a host.
///
/// # Errors
/// A host serves the CWD, a machine is on, runs of an earlier host may remain, or the folder cannot be removed.
pub fn clean(cwd: &Cwd, search: &PluginSearch) -> Result<Cleaned> {
    let (config, folder) = (Config::read(cwd)?, cwd.state());
    let on = end_runs(cwd, search)?.ok_or_else(|| {
        Error::environment("a host serves this CWD, and uses its templates")
            .advice("End it first with `cuckoo-machinery shutdown`")
    })?;
    if !on.is_empty() {
        let machines = on.join(", ");
        return Err(Error::environment(format!(
            "machines are on, and the host could not end them: {machines}"
        ))
        .advice("Stop them with their hypervisor's tools, and repeat the command"));
    }
    machine::clear_all(cwd, &config, search)?;
    // Held until the end: no host starts with half of the state.
    let _lock = lock(&folder, config.timeouts.load)?;
    machine::expect_no_command(cwd)?;
    let freed = disk_usage(&folder);
    fs::remove_dir_all(&folder).map_err(|error| Error::io("remove", &folder, &error))?;
    let remaining = config.machineries.iter().filter_map(|machinery| instant_dir(&config, machinery));
    Ok(Cleaned { folder, freed, remaining: remaining.filter(|folder| folder.exists()).collect() })
}

/// Returns the folder for templates and images that the machinery's section names.
fn instant_dir(config: &Config, machinery: &str) -> Option<PathBuf> {
    let section = config.host_file.as_ref()?.parse_at::<Section>(&["machineries", machinery]);
    section.ok().flatten().and_then(|section| section.instant_dir)
}

/// Returns the bytes on disk of a file, or of all files in a folder.
fn disk_usage(path: &Path) -> u64 {
    const BLOCK: u64 = 512;
    let Ok(found) = path.symlink_metadata() else { return 0 };
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let below: u64 = if found.is_dir() { entries.map(|entry| disk_usage(&entry.path())).sum() } else { 0 };
    found.blocks() * BLOCK + below
}
