//! The machines of the configuration that need files of another one.
//!
//! A machine needs its disk, its snapshot and its description. It needs all disks below its disk, too, and those of the
//! disk from which it was made.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value as Json;

use super::info::{Entry, Info, entries, real};
use crate::cwd::Cwd;

/// The beginning of a qcow2 file, and the maximum length of the name of the disk below it. Source: QEMU's
/// docs/interop/qcow2.txt.
pub const QCOW2: &[u8; 4] = b"QFI\xfb";
const MAX_NAME: usize = 1023;
/// The maximum number of disks that depend on each other.
const MAX_DEPTH: usize = 100;

/// Returns the real paths of all files that the machine needs.
fn needs(entry: &Entry) -> Result<Vec<PathBuf>> {
    let mut needs = entry.files();
    if let Some(disk) = entry.paths.first() {
        needs.extend(chain(disk)?);
    }
    let folder = entry.paths.last().and_then(|path| path.parent());
    let base = folder.and_then(|folder| Info::read(folder).ok()?.machine.base);
    needs.extend(base.map_or_else(|| Ok(Vec::new()), |base| chain(&base))?);
    Ok(needs)
}

/// Returns the machines, besides this one, that need one of these files, or a file in one of these folders.
///
/// # Errors
/// The configuration or a disk cannot be read.
pub fn dependents_of(cwd: &Cwd, name: &str, files: &[PathBuf]) -> Result<Vec<Entry>> {
    let files: Vec<PathBuf> = files.iter().map(|file| real(file)).collect();
    let mut found = Vec::new();
    for entry in entries(cwd)?.into_iter().filter(|entry| entry.name != name) {
        if needs(&entry)?.iter().any(|need| files.iter().any(|file| need.starts_with(file))) {
            found.push(entry);
        }
    }
    Ok(found)
}

/// Expects that no machine needs the files, besides this one.
///
/// # Errors
/// A machine needs one, or this is not known.
pub fn expect_no_dependents(cwd: &Cwd, name: &str, files: &[PathBuf]) -> Result<()> {
    refuse(name, dependents_of(cwd, name, files)?.iter())
}

/// Refuses to change the files of a machine on which other ones depend.
///
/// # Errors
/// There are such machines.
pub fn refuse<'a>(name: &str, dependents: impl Iterator<Item = &'a Entry>) -> Result<()> {
    let names: Vec<&str> = dependents.map(|entry| entry.name.as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let reason = format!("other machines need its files: {}", names.join(", "));
    Err(Error::configuration(reason).machine(name).advice("Remove these machines first"))
}

/// Expects that a disk is not that of a machine, and does not depend on one.
///
/// # Errors
/// It is or does, or this is not known.
fn expect_no_disk_of_machine(cwd: &Cwd, disk: &Path) -> Result<()> {
    let (chain, entries) = (chain(disk)?, entries(cwd)?);
    let owner = |path: &PathBuf| {
        let has = |entry: &&Entry| entry.paths.first().is_some_and(|own| real(own) == *path);
        Some((path.clone(), &entries.iter().find(has)?.name))
    };
    // A machine of the machinery `kvm` has the description of its disk beside it.
    let of_domain = |path: &PathBuf| {
        let info = Info::read(path.parent()?).ok()?;
        (info.machine.domain.is_some() && path.ends_with(&info.machine.disk))
            .then_some((path.clone(), info.machine.name))
    };
    let by_entry = chain.iter().find_map(owner).map(|(path, name)| (path, name.clone()));
    let Some((path, name)) = by_entry.or_else(|| chain.iter().find_map(of_domain)) else { return Ok(()) };
    let depends = if path == real(disk) { "" } else { "the disk depends on " };
    Err(Error::configuration(format!("{depends}{} is the disk of the machine '{name}'", path.display()))
        .advice("Make a copy of the disk, which depends on no other: qemu-img convert -O qcow2 OLD NEW"))
}

/// Locks the disk: its path is the key of the jail in which the guest boots.
///
/// # Errors
/// A machine has the disk or one below it, or another command boots it.
pub fn lock_base(cwd: &Cwd, base: &Path) -> Result<File> {
    expect_no_disk_of_machine(cwd, base)?;
    let file = File::open(base).map_err(|error| Error::io("open the disk", base, &error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => Err(Error::environment(format!("another command boots the disk {}", base.display()))
            .advice("Wait for its end")),
    }
}

/// Returns the real paths of a disk and of all disks below it. It ends at a disk that is missing.
///
/// # Errors
/// A disk cannot be read, or does not say in which file the next one is.
pub fn chain(disk: &Path) -> Result<Vec<PathBuf>> {
    let mut chain = Vec::new();
    let mut next = Some(disk.to_owned());
    while let Some(path) = next {
        let own = real(&path);
        if chain.contains(&own) || chain.len() == MAX_DEPTH {
            return Err(Error::configuration(format!("{} depends on itself", disk.display())));
        }
        next = match below(&path) {
            Ok(next) => next,
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(Error::io("read the disk", &path, &error)),
        };
        chain.push(own);
    }
    Ok(chain)
}

/// Returns the path of the disk below this one.
fn below(path: &Path) -> io::Result<Option<PathBuf>> {
    let (mut file, mut header) = (File::open(path)?, [0; 20]);
    if file.metadata()?.len() < header.len() as u64 {
        return Ok(None);
    }
    file.read_exact(&mut header)?;
    let number = |range: std::ops::Range<usize>| {
        header[range].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let (at, length) = (number(8..16), number(16..20) as usize);
    if !header.starts_with(QCOW2) || at == 0 || length == 0 {
        return Ok(None);
    }
    let mut name = vec![0; length.min(MAX_NAME)];
    file.read_exact_at(&mut name, at)?;
    let unknown = || io::Error::other(format!("it depends on {:?}", String::from_utf8_lossy(&name)));
    let named = named_file(&name).ok_or_else(unknown)?;
    Ok(Some(path.parent().unwrap_or(Path::new("/")).join(named)))
}

/// Returns the path in QEMU's name of a file: a path, `file:PATH`, or `json:` with a description.
fn named_file(name: &[u8]) -> Option<PathBuf> {
    if let Some(text) = name.strip_prefix(b"json:") {
        return filename_in(&serde_json::from_slice(text).ok()?).map(PathBuf::from);
    }
    let path = name.strip_prefix(b"file:").unwrap_or(name);
    // A colon before the first slash ends the name of a protocol.
    let is_protocol = path.split(|byte| *byte == b'/').next().is_some_and(|first| first.contains(&b':'));
    (!is_protocol).then(|| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}

fn filename_in(node: &Json) -> Option<&str> {
    let own = ["filename", "file.filename"].iter().find_map(|key| node[*key].as_str());
    own.or_else(|| filename_in(node.get("file")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::machine::context::MACHINERY;
    use std::fs;

    /// Writes a qcow2 with this name of the disk below it.
    fn disk(path: &Path, below: &str) -> PathBuf {
        let mut content = [&QCOW2[..], &[0, 0, 0, 3]].concat();
        content.extend((if below.is_empty() { 0 } else { 104_u64 }).to_be_bytes());
        content.extend((below.len() as u32).to_be_bytes());
        content.resize(104, 0);
        content.extend(below.as_bytes());
        fs::write(path, content).unwrap();
        path.to_owned()
    }

    /// Returns a CWD with these machines, each with a folder of its own and a disk on the one that is named.
    fn cwd(root: &Path, machines: &[(&str, &str)]) -> Cwd {
        fs::write(root.join(".cuckoocwd"), "").unwrap();
        fs::create_dir_all(root.join("conf/machineries")).unwrap();
        let mut yaml = "machines:\n".to_owned();
        for (name, below) in machines {
            let folder = root.join(name);
            fs::create_dir_all(&folder).unwrap();
            disk(&folder.join("disk.qcow2"), below);
            let at = folder.display();
            yaml += &format!("  {name}: {{qcow2_path: {at}/disk.qcow2, snapshot_path: {at}/memory, ");
            yaml += &format!("machineinfo_path: {at}/machineinfo.json}}\n");
        }
        fs::write(root.join("conf/machineries/qemu.yaml"), yaml).unwrap();
        Cwd::find(Some(root)).unwrap()
    }

    #[test]
    fn chain_has_all_disks_below_in_each_form_of_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| fs::canonicalize(folder.path()).unwrap().join(name);
        disk(&at("a"), "");
        disk(&at("b"), "a");
        disk(&at("c"), &format!("file:{}", at("b").display()));
        let json = format!(r#"json:{{"driver":"qcow2","file":{{"filename":"{}"}}}}"#, at("c").display());
        disk(&at("d"), &json);
        std::os::unix::fs::symlink(at("d"), at("link")).unwrap();
        let all = ["d", "c", "b", "a"].map(at);
        assert_eq!(chain(&at("link")).unwrap(), all);
        for unknown in ["nbd://host/disk", "json:{}", "json:{\"file\":null}", "rbd:pool/disk"] {
            assert!(chain(&disk(&at("e"), unknown)).is_err(), "{unknown}");
        }
        assert!(chain(&disk(&at("f"), "f")).unwrap_err().to_string().contains("depends on itself"));
        assert_eq!(chain(&disk(&at("g"), "none")).unwrap(), [at("g"), at("none")]);
    }

    #[test]
    fn machine_has_dependents_when_their_disk_is_above_its_own_or_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let overlay = folder.path().join("overlay.qcow2");
        disk(&overlay, "a/disk.qcow2");
        let cwd = cwd(folder.path(), &[("a", ""), ("b", "../overlay.qcow2"), ("c", "")]);
        let names = |name: &str, files: &[PathBuf]| -> Vec<String> {
            dependents_of(&cwd, name, files).unwrap().into_iter().map(|entry| entry.name).collect()
        };
        assert_eq!(names("a", &[folder.path().join("a")]), ["b"]);
        assert_eq!(names("x", &[folder.path().join("a/disk.qcow2")]), ["a", "b"]);
        assert!(names("c", &[folder.path().join("c")]).is_empty());
        assert!(expect_no_dependents(&cwd, "b", std::slice::from_ref(&overlay)).is_ok());
        let refused = expect_no_disk_of_machine(&cwd, &overlay).unwrap_err().to_string();
        assert!(refused.contains("is the disk of the machine 'a'") && refused.contains("copy"), "{refused}");
        assert!(expect_no_disk_of_machine(&cwd, &disk(&folder.path().join("free"), "")).is_ok());
    }

    #[test]
    fn dependents_are_unknown_when_the_configuration_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path(), &[("a", "")]);
        fs::write(cwd.machinery_yaml(MACHINERY), "machines: [\n").unwrap();
        assert!(expect_no_dependents(&cwd, "a", &[folder.path().join("a")]).is_err());
    }
}
