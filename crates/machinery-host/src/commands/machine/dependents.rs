//! The machines of the configuration that need files of another one.
//!
//! A machine needs its disk, its snapshot and its description, and each file that its arguments name. It needs the disk
//! from which it was made, too, and all files on which these disks depend.

use std::fs::File;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::Chain;
use rustix::fs::{FlockOperation, flock};
use serde_json::Value as Json;

use super::info::{Entry, Info, entries, real};
use crate::cwd::Cwd;

/// The format in which QEMU opens a machine's disk.
const QCOW2: Option<&str> = Some("qcow2");

/// Returns the real paths of all files that the machine needs.
fn needs(entry: &Entry) -> Result<Vec<PathBuf>> {
    let mut needs = entry.files();
    if let Some(disk) = entry.paths.first() {
        needs.extend(chain(disk, QCOW2)?);
    }
    let Some(description) = entry.paths.last() else { return Ok(needs) };
    let folder = description.parent().unwrap_or(Path::new("/"));
    if let Some(base) = Info::read(folder).ok().and_then(|info| info.machine.base) {
        needs.extend(chain(&base, QCOW2)?);
    }
    for file in named_files(description) {
        needs.extend(chain(&file, None)?);
    }
    Ok(needs)
}

/// Returns the existing files that the arguments in a machine's description name. QEMU runs in the description's folder.
fn named_files(description: &Path) -> Vec<PathBuf> {
    let text = std::fs::read(description).unwrap_or_default();
    let content: Json = serde_json::from_slice(&text).unwrap_or_default();
    let args = content["machine"]["start_args"].as_array().into_iter().flatten().filter_map(Json::as_str);
    let folder = description.parent().unwrap_or(Path::new("/"));
    args.flat_map(values).map(|value| folder.join(value)).filter(|path| path.is_file()).collect()
}

/// Returns the values in an argument of QEMU: those of its options, or all texts of its JSON. Two commas are one comma of a
/// value. Source: QEMU's util/qemu-option.c.
fn values(arg: &str) -> Vec<String> {
    if let Ok(json) = serde_json::from_str::<Json>(arg.strip_prefix("json:").unwrap_or(arg)) {
        return texts(&json);
    }
    let escaped = arg.replace(",,", "\0");
    let options = escaped.split(',').map(|option| option.replace('\0', ","));
    let value = |option: String| match option.split_once('=') {
        Some((_, value)) if value.starts_with("json:") => values(value),
        Some((_, value)) => vec![local(value)],
        None => vec![local(&option)],
    };
    options.flat_map(value).collect()
}

fn texts(json: &Json) -> Vec<String> {
    match json {
        Json::String(text) => vec![local(text)],
        Json::Array(items) => items.iter().flat_map(texts).collect(),
        Json::Object(keys) => keys.values().flat_map(texts).collect(),
        _ => Vec::new(),
    }
}

fn local(name: &str) -> String {
    name.strip_prefix("file:").unwrap_or(name).to_owned()
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
    let (chain, entries) = (chain(disk, QCOW2)?, entries(cwd)?);
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

/// Returns the real paths of a disk, and of all files on which it depends. It ends at a file that is missing.
///
/// # Errors
/// A file cannot be read, or depends on something that is no local file.
pub fn chain(disk: &Path, format: Option<&str>) -> Result<Vec<PathBuf>> {
    let chain = Chain::as_far_as_it_exists(disk, format)?;
    match chain.remote {
        None => Ok(chain.files.iter().map(|file| real(file)).collect()),
        Some(remote) => Err(Error::configuration(format!("{} depends on {remote:?}", disk.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::machine::context::MACHINERY;
    use machinery_images::MAGIC;
    use std::fs;

    /// Writes a qcow2 with this name of the disk below it.
    fn disk(path: &Path, below: &str) -> PathBuf {
        let mut content = [&MAGIC[..], &[0, 0, 0, 3]].concat();
        content.extend((if below.is_empty() { 0 } else { 104_u64 }).to_be_bytes());
        content.extend((below.len() as u32).to_be_bytes());
        content.resize(104, 0);
        content[103] = 104;
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
    fn chain_has_all_files_and_is_unknown_when_one_is_remote() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| fs::canonicalize(folder.path()).unwrap().join(name);
        disk(&at("a"), "");
        disk(&at("b"), &format!("file:{}", at("a").display()));
        std::os::unix::fs::symlink(at("b"), at("link")).unwrap();
        let chain = |path: &Path| super::chain(path, QCOW2);
        assert_eq!(chain(&at("link")).unwrap(), ["b", "a"].map(at));
        for unknown in ["nbd://host/disk", "json:{}", "rbd:pool/disk"] {
            assert!(chain(&disk(&at("e"), unknown)).is_err(), "{unknown}");
        }
        assert!(chain(&disk(&at("f"), "f")).unwrap_err().to_string().contains("may be a loop"));
        assert_eq!(chain(&disk(&at("g"), "none")).unwrap(), [at("g"), at("none")]);
    }

    #[test]
    fn machine_has_dependents_when_their_arguments_or_data_files_need_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path(), &[("a", ""), ("b", "")]);
        let at = |name: &str| folder.path().join(name);
        let needs_a = || !dependents_of(&cwd, "a", &[at("a")]).unwrap().is_empty();
        let described = |args: &[&str]| {
            let description = serde_json::json!({"machine": {"start_args": args}});
            fs::write(at("b/machineinfo.json"), description.to_string()).unwrap();
        };
        let data = at("a/data,1").display().to_string();
        fs::write(&data, "").unwrap();
        disk(&at("above"), "a/data,1");
        let escaped = format!("if=virtio,file={},format=raw", data.replace(',', ",,"));
        let json =
            serde_json::json!({"driver": "raw", "file": {"driver": "file", "filename": data}}).to_string();
        let nested = format!("id=d,file=json:{}", json.replace(',', ",,"));
        for args in [
            ["-drive", escaped.as_str()],
            ["-blockdev", &json],
            ["-drive", &nested],
            ["-hdb", &format!("file:{data}").replace(',', ",,")],
            ["-drive", "file=../above,if=ide"],
        ] {
            assert!(!needs_a());
            described(&args);
            assert!(needs_a(), "{args:?}");
            described(&["-m", "32"]);
        }
        let mut make = std::process::Command::new("qemu-img");
        let options = format!("data_file={}", at("a/data").display());
        make.args(["create", "-q", "-f", "qcow2", "-o", &options]).arg(at("b/disk.qcow2")).arg("1M");
        assert!(make.status().unwrap().success());
        assert!(needs_a(), "a data file");
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
