//! Which machine a task gets that does not name one.
//!
//! The rules are those of Cuckoo3's machine list (`MachinesList.find_available` in
//! `common/machines.py`): a name counts alone; else the first available machine, in the order of
//! the configuration, with the platform, the version and all the tags that are asked for. A version
//! counts only together with a platform. `architecture` is ours.

use std::sync::Arc;

use machinery::MachineInfo;

use super::{Fleet, Machine};

/// What a task asks for; what is empty may be anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// A machine's name; then nothing else counts.
    pub name: String,
    /// Its operating system's family.
    pub platform: String,
    /// That system's version.
    pub os_version: String,
    /// Its processor's architecture.
    pub architecture: String,
    /// What must be installed in it.
    pub tags: Vec<String>,
}

impl Wanted {
    fn fits(&self, info: &MachineInfo) -> bool {
        let any = |wanted: &str, has: &str| wanted.is_empty() || wanted == has;
        any(&self.platform, &info.platform)
            && (self.platform.is_empty() || any(&self.os_version, &info.os_version))
            && any(&self.architecture, &info.architecture)
            && self.tags.iter().all(|tag| info.tags.contains(tag))
    }
}

impl Fleet {
    /// The machines that would do, the first choice first.
    pub fn fitting<'a>(&'a self, wanted: &'a Wanted) -> impl Iterator<Item = &'a Arc<Machine>> {
        self.machines().iter().filter(|machine| match wanted.name.as_str() {
            "" => wanted.fits(&machine.info),
            name => machine.name() == name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> MachineInfo {
        MachineInfo {
            name: "win10_1".into(),
            label: "win10_1".into(),
            ip: "10.0.0.1".into(),
            platform: "windows".into(),
            os_version: "10".into(),
            tags: vec!["office".into(), "dotnet".into()],
            snapshot: None,
            architecture: "amd64".into(),
            interface: None,
            agent_port: 8000,
            mac_address: None,
        }
    }

    fn wanted(platform: &str, os_version: &str, architecture: &str, tags: &[&str]) -> Wanted {
        Wanted {
            name: String::new(),
            platform: platform.into(),
            os_version: os_version.into(),
            architecture: architecture.into(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        }
    }

    #[test]
    fn all_that_is_asked_for_must_be_there() {
        for wanted in [
            wanted("", "", "", &[]),
            wanted("windows", "", "", &[]),
            wanted("windows", "10", "amd64", &["dotnet"]),
            wanted("", "", "", &["dotnet", "office"]),
        ] {
            assert!(wanted.fits(&windows()), "{wanted:?}");
        }
        for wanted in [
            wanted("linux", "", "", &[]),
            wanted("windows", "7", "", &[]),
            wanted("", "", "x86", &[]),
            wanted("", "", "", &["dotnet", "java"]),
        ] {
            assert!(!wanted.fits(&windows()), "{wanted:?}");
        }
    }

    #[test]
    fn a_version_without_a_platform_does_not_count() {
        assert!(wanted("", "7", "", &[]).fits(&windows()));
    }
}
