//! What a template, or a machine that stands by, was made from.

use machinery::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::config::MachineFiles;
use crate::version::Program;
use machinery_images::FileId;

/// Everything that a restored guest depends on. If any of it has changed, what was made from it is stale.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    snapshot: FileId,
    disk: FileId,
    program: FileId,
    version: String,
    args: Vec<String>,
}

impl Identity {
    /// The machine's, as its files are now.
    ///
    /// # Errors
    /// One of them cannot be looked at.
    pub fn of(files: &MachineFiles, program: &Program) -> Result<Identity> {
        let id = |what: &str, path| {
            FileId::of(path)
                .map_err(|error| Error::io(&format!("look at the machine's {what},"), path, &error))
        };
        let (version, program) = program.now()?;
        Ok(Identity {
            snapshot: id("snapshot", &files.snapshot)?,
            disk: id("disk", &files.disk)?,
            program,
            version: version.to_string(),
            args: files.start_args.as_written().to_vec(),
        })
    }

    /// What has changed, for people; nothing if it is the same.
    pub fn change_since(&self, earlier: &Identity) -> Option<String> {
        let (now, then) = (self, earlier);
        let change = if now.version != then.version {
            format!("QEMU was {}, and is {}", then.version, now.version)
        } else if now.program != then.program {
            "QEMU's program was replaced".to_owned()
        } else if now.snapshot != then.snapshot {
            "the machine's snapshot was changed".to_owned()
        } else if now.disk != then.disk {
            "the machine's disk was changed".to_owned()
        } else if now.args != then.args {
            "the machine's start_args were changed".to_owned()
        } else {
            return None;
        };
        Some(change)
    }

    /// The size of the snapshot's file, in bytes.
    pub fn snapshot_size(&self) -> u64 {
        self.snapshot.size()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// Of files in that folder.
    pub fn identity(folder: &Path) -> Identity {
        let id = |name: &str| {
            let path = folder.join(name);
            fs::write(&path, name).unwrap();
            FileId::of(&path).unwrap()
        };
        Identity {
            snapshot: id("snapshot"),
            disk: id("disk"),
            program: id("program"),
            version: "7.2.0".into(),
            args: vec!["-m".into(), "32".into()],
        }
    }

    /// The same, as the files are now.
    pub fn identity_again(folder: &Path, identity: &Identity) -> Identity {
        Identity { snapshot: FileId::of(&folder.join("snapshot")).unwrap(), ..identity.clone() }
    }

    #[test]
    fn every_change_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let then = identity(folder.path());
        assert_eq!(then.change_since(&then), None);
        let other = |name: &str| FileId::of(&folder.path().join(name)).unwrap();
        let told = |now: Identity| now.change_since(&then).unwrap();
        assert!(
            told(Identity { version: "10.0.2".into(), ..then.clone() }).contains("was 7.2.0, and is 10.0.2")
        );
        assert!(told(Identity { program: other("disk"), ..then.clone() }).contains("program"));
        assert!(told(Identity { snapshot: other("disk"), ..then.clone() }).contains("snapshot"));
        assert!(told(Identity { disk: other("snapshot"), ..then.clone() }).contains("disk"));
        assert!(
            told(Identity { args: vec!["-m".into(), "64".into()], ..then.clone() }).contains("start_args")
        );
    }
}
