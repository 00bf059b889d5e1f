//! The entry of a domain in `kvm.yaml`, which the machine of `qemu` that is its copy replaces.
//!
//! ```text
//! record ─▶ kvm.yaml without the entry ─▶ qemu.yaml with the machine ─▶ reload
//! ```
//!
//! A host refuses a name or an address of two machines, so the old entry goes first. The record has both texts of
//! `kvm.yaml`. An exchange that ends before `qemu.yaml` has the machine is undone, and a later one is finished.

use machinery::{Error, Result};
use serde::{Deserialize, Serialize};

use super::context::{Context, KVM};
use super::domain::DomainEntry;
use super::host;
use super::info::{domain_entries, real};
use super::publish::expect_writable;
use super::section::{expect_no_section, lock_configuration};
use crate::commands::import;
use crate::cwd::{Cwd, make_state_folder};

/// The removal of an entry.
#[derive(Debug, Serialize, Deserialize)]
pub struct Replaced {
    name: String,
    /// The text of the file before and after.
    texts: (String, String),
}

impl Replaced {
    /// Returns the removal of this entry; `None` if the file does not have it any more.
    ///
    /// # Errors
    /// Another domain has the entry's name now, or the file cannot be read or edited.
    pub fn of(cwd: &Cwd, entry: &DomainEntry) -> Result<Option<Replaced>> {
        let Some(now) = domain_entries(cwd)?.into_iter().find(|now| now.name == entry.name) else {
            return Ok(None);
        };
        if (&now.label, &now.dsn) != (&entry.label, &entry.dsn) {
            let reason = format!("the machine '{}' in kvm.yaml is another domain meanwhile", entry.name);
            return Err(Error::environment(reason).advice("Repeat the command"));
        }
        let texts = import::without(&cwd.machinery_yaml(KVM), &entry.name)?;
        Ok(Some(Replaced { name: entry.name.clone(), texts }))
    }

    /// Removes the entry. The caller has the lock of the configuration.
    ///
    /// # Errors
    /// The file was changed, or cannot be written.
    pub fn remove(&self, cwd: &Cwd) -> Result<()> {
        import::apply(&cwd.machinery_yaml(KVM), &self.texts)
    }

    /// Gives the entry back to the file, unless the file has it.
    ///
    /// # Errors
    /// Somebody has changed the file since, or it cannot be written.
    pub fn undo(&self, cwd: &Cwd) -> Result<()> {
        let _lock = lock_configuration(cwd)?;
        if domain_entries(cwd)?.iter().any(|entry| entry.name == self.name) {
            return Ok(());
        }
        import::restore(&cwd.machinery_yaml(KVM), &self.texts).map_err(|error| {
            error.advice(format!(
                "Add the machine '{}' to kvm.yaml again, and run `cuckoo-machinery machine clear`",
                self.name
            ))
        })
    }
}

/// Expects that the entry can be removed, before anything is made.
///
/// # Errors
/// `machinery-host.yaml` has a section of the machine, or the file cannot be edited or written.
pub fn expect_removable(context: &Context<'_>, entry: &DomainEntry) -> Result<()> {
    expect_no_section(context.config, KVM, &entry.name)?;
    expect_writable(&real(&context.cwd.machinery_yaml(KVM)))?;
    Replaced::of(context.cwd, entry).map(drop)
}

/// Removes the entry of a domain whose copy is in the configuration, and has a running host load that.
///
/// # Errors
/// As [`Replaced::of`] and [`Replaced::remove`].
pub fn remove_entry(context: &Context<'_>, entry: &DomainEntry) -> Result<()> {
    make_state_folder(context.cwd)?;
    let _lock = lock_configuration(context.cwd)?;
    let Some(replaced) = Replaced::of(context.cwd, entry)? else { return Ok(()) };
    replaced.remove(context.cwd)?;
    host::reload(context.cwd).into_iter().for_each(|note| tracing::warn!("{note}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::cwd;
    use super::*;
    use std::fs;

    const BEFORE: &str = "dsn: d\nmachines:\n  # one\n  m:\n    label: m\n  n:\n    label: n\n";

    fn entry(cwd: &Cwd) -> DomainEntry {
        domain_entries(cwd).unwrap().remove(0)
    }

    #[test]
    fn entry_is_back_when_its_exchange_ends_early_and_nobody_has_changed_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let (cwd, yaml) = (cwd(folder.path()), folder.path().join("conf/machineries/kvm.yaml"));
        fs::create_dir_all(yaml.parent().unwrap()).unwrap();
        fs::write(&yaml, BEFORE).unwrap();
        let replaced = Replaced::of(&cwd, &entry(&cwd)).unwrap().unwrap();
        replaced.undo(&cwd).unwrap();
        replaced.remove(&cwd).unwrap();
        let without = fs::read_to_string(&yaml).unwrap();
        assert!(without.contains("# one") && !without.contains("m:\n    label: m"), "{without}");
        replaced.undo(&cwd).unwrap();
        assert_eq!(fs::read_to_string(&yaml).unwrap(), BEFORE);
        replaced.remove(&cwd).unwrap();
        fs::write(&yaml, format!("# mine\n{without}")).unwrap();
        let refused = replaced.undo(&cwd).unwrap_err().to_string();
        assert!(refused.contains("'m'") && refused.contains("machine clear"), "{refused}");
    }

    #[test]
    fn entry_of_another_domain_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (cwd, yaml) = (cwd(folder.path()), folder.path().join("conf/machineries/kvm.yaml"));
        fs::create_dir_all(yaml.parent().unwrap()).unwrap();
        fs::write(&yaml, BEFORE).unwrap();
        let old = entry(&cwd);
        fs::write(&yaml, BEFORE.replace("label: m", "label: other")).unwrap();
        assert!(Replaced::of(&cwd, &old).unwrap_err().to_string().contains("another domain"));
        fs::write(&yaml, "machines: {m: {label: m}}\ndsn: d\n").unwrap();
        assert!(Replaced::of(&cwd, &old).unwrap_err().to_string().contains("indented block"));
        fs::write(&yaml, "machines:\n").unwrap();
        assert!(Replaced::of(&cwd, &old).unwrap().is_none());
    }
}
