//! Debian's archives, as the system's apt reaches them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::output;

/// The keys that sign Debian's archives.
pub const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An archive, named by the last part of its address.
#[derive(Clone, Copy)]
pub enum Archive {
    /// The releases and their updates.
    Main,
    /// Security updates.
    Security,
}

impl Archive {
    fn name(self) -> &'static str {
        match self {
            Self::Main => "debian",
            Self::Security => "debian-security",
        }
    }

    /// Returns the address that the system's apt uses, or else Debian's own.
    pub fn mirror(self) -> String {
        let files = source_files().into_iter().filter_map(|path| fs::read_to_string(path).ok());
        let found = files.map(|sources| self.mirror_in(&sources)).find_map(|mirror| mirror);
        found.unwrap_or_else(|| format!("http://deb.debian.org/{}", self.name()))
    }

    /// Returns the first address of the archive in apt's `sources`, in either of their formats.
    fn mirror_in(self, sources: &str) -> Option<String> {
        let lines = sources.lines().filter(|line| !line.trim_start().starts_with('#'));
        let addresses = lines.flat_map(str::split_whitespace).filter(|word| word.starts_with("http"));
        let mut addresses = addresses.map(|address| address.trim_end_matches('/'));
        let mirror = addresses.find(|address| address.rsplit('/').next() == Some(self.name()));
        mirror.map(str::to_owned)
    }
}

/// Returns a line for `sources.list`.
pub fn source(archive: Archive, suite: &str) -> String {
    format!("deb [signed-by={KEYRING}] {} {suite} main\n", archive.mirror())
}

/// Returns the download settings of the system's apt, such as proxies, as lines for `apt.conf`.
pub fn download_settings() -> String {
    // Without apt there are no settings.
    downloads_in(&output(Command::new("apt-config").arg("dump")).unwrap_or_default())
}

/// Filters the download settings, without those for downloads other than packages.
fn downloads_in(dump: &str) -> String {
    let about_downloads =
        |line: &&str| line.starts_with("Acquire::") && !line.starts_with("Acquire::IndexTargets");
    dump.lines().filter(about_downloads).map(|line| format!("{line}\n")).collect()
}

fn source_files() -> Vec<PathBuf> {
    let entries = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let is_read = |path: &PathBuf| path.extension().is_some_and(|kind| kind == "list" || kind == "sources");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_read).collect();
    files.push(Path::new("/etc/apt/sources.list").to_owned());
    files.sort_unstable();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_read_from_both_formats_of_sources() {
        let old = "# deb http://old.example/debian bookworm main\n\
                   deb [arch=amd64] https://mirror.example/pub/debian/ bookworm main\n\
                   deb http://mirror.example/debian-security bookworm-security main\n";
        assert_eq!(Archive::Main.mirror_in(old).as_deref(), Some("https://mirror.example/pub/debian"));
        assert_eq!(
            Archive::Security.mirror_in(old).as_deref(),
            Some("http://mirror.example/debian-security")
        );
        let new = "Types: deb\nURIs: http://new.example/debian\nSuites: trixie\n";
        assert_eq!(Archive::Main.mirror_in(new).as_deref(), Some("http://new.example/debian"));
    }

    #[test]
    fn mirror_is_unknown_when_sources_are_of_another_distribution() {
        let ubuntu = "deb http://archive.ubuntu.com/ubuntu noble main\n";
        assert_eq!(Archive::Main.mirror_in(ubuntu), None);
    }

    #[test]
    fn download_settings_keep_proxies_and_drop_extra_indexes() {
        let dump = "APT::Architecture \"amd64\";\nAcquire::http::Proxy \"http://proxy.example:3128\";\n\
                    Acquire::IndexTargets::deb::DEP-11 \"\";\nAcquire::Languages:: \"none\";\n";
        let kept = "Acquire::http::Proxy \"http://proxy.example:3128\";\nAcquire::Languages:: \"none\";\n";
        assert_eq!(downloads_in(dump), kept);
    }
}
