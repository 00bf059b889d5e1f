//! The machines of the configuration whose installed disk has changed, for the command `check`.

use std::path::PathBuf;

use machinery::Report;

use super::base::expect_unchanged;
use super::context::{KVM, MACHINERY};
use super::info::{Entry, Info, entries};
use super::kvm;
use crate::cwd::Cwd;
use crate::plugin::search::is_listed;

/// Reports installed disks that have changed. Others report a configuration that cannot be read, and files that are missing.
pub fn check_installed_disks(cwd: &Cwd, machineries: &[String], report: &mut Report) {
    let mut described = Vec::new();
    if is_listed(MACHINERY, machineries) {
        let folder = |entry: &Entry| Some(entry.paths.last()?.parent()?.to_owned());
        let folders: Vec<PathBuf> = entries(cwd).unwrap_or_default().iter().filter_map(folder).collect();
        described.extend(folders.iter().filter_map(|folder| Info::read(folder).ok()));
    }
    if is_listed(KVM, machineries) {
        described.extend(kvm::all_found(cwd).map(|found| found.info));
    }
    for info in described {
        if let Some(warnings) = report.keep(expect_unchanged(&info.machine)) {
            warnings.into_iter().for_each(|warning| report.warning(warning));
        }
    }
}
