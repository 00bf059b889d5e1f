//! Diagnoses whether a machine can be used, by its files as they are now.
//!
//! [`config`](crate::config) refuses a configuration that is wrong as a whole (its YAML, a key, two machines
//! with one disk). This module finds the faults of a single machine, so that the host serves all others.

use std::path::Path;

use machinery::config::find_interface;
use machinery::{Error, Result};
use machinery_backend::{ImageFile, expect_overlay_folder};
use machinery_images::Header;

use crate::config::MachineFiles;
use crate::isolation::{expect_isolated, expect_own_files};
use crate::snapshot::Snapshot;

/// Returns the faults that make the machine unusable, each with the key of `qemu.yaml` that the fault is
/// about.
pub fn faults(files: &MachineFiles) -> Vec<(&'static str, Error)> {
    let interface = files.own_interface.as_deref().map_or(Ok(()), find_interface);
    let opened = files.start_args.opened();
    let read = opened.sources.iter().filter(|source| source.path.is_file());
    let other_images = opened.images.iter().map(|image| &image.source).chain(read);
    let disk = ImageFile { path: files.disk.clone(), format: Some("qcow2".to_owned()) };
    let tests = [
        ("interface", interface),
        ("qcow2_path", find_chain(files, &disk).and_then(|()| expect_qcow2(&files.disk))),
        ("snapshot_path", Snapshot::open(&files.snapshot).map(drop)),
        ("machineinfo_path", files.args_error.clone().map_or(Ok(()), Err)),
        ("machineinfo_path", files.expect_safe_args()),
        ("machineinfo_path", files.expect_clean_runs()),
        ("machineinfo_path", expect_own_files(files)),
        ("interface", expect_isolated(files)),
        ("qcow2_path", find_overlay_folder(files)),
    ];
    let images = other_images.map(|image| find_chain(files, image));
    let tests = tests.into_iter().chain(images.map(|test| ("machineinfo_path", test)));
    tests.filter_map(|(key, test)| test.err().map(|error| (key, error))).collect()
}

/// Returns the warnings about files that the arguments name.
pub fn file_warnings(files: &MachineFiles) -> Vec<String> {
    let (opened, folder) = (files.start_args.opened(), files.folder().display());
    let relative = opened.relative.iter().map(|path| {
        format!(
            "its start_args name {}, which is taken from {folder}. Write an absolute path",
            path.display()
        )
    });
    let missing = opened.sources.iter().filter(|source| !source.path.exists()).map(|source| {
        format!(
            "its start_args name {}, which does not exist. Put the file there, or correct the path",
            source.path.display()
        )
    });
    relative.chain(missing).collect()
}

fn expect_qcow2(disk: &Path) -> Result<()> {
    match Header::read(disk)? {
        Some(_) => Ok(()),
        None => Err(Error::configuration(format!("{} is not a qcow2 disk", disk.display()))
            .advice("Convert it with `qemu-img convert -O qcow2`")),
    }
}

/// Checks that an image and all of its bases exist and may be opened.
fn find_chain(files: &MachineFiles, image: &ImageFile) -> Result<()> {
    files.chain_of(image).map(drop)
}

/// Checks the machine's overlay folder. A folder for all machines is checked with the configuration.
fn find_overlay_folder(files: &MachineFiles) -> Result<()> {
    let folder = files.disposable.parent().filter(|folder| files.disk.parent() == Some(folder));
    match folder {
        Some(folder) if folder.is_dir() => expect_overlay_folder(folder),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::machine_in;
    use crate::machineinfo::StartArgs;
    use std::fs;

    fn found(files: &MachineFiles) -> Vec<String> {
        faults(files).into_iter().map(|(key, error)| format!("{key}: {error}")).collect()
    }

    #[test]
    fn faults_name_each_file_that_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = machine_in(folder.path());
        assert_eq!(found(&files), Vec::<String>::new());
        fs::remove_file(&files.disk).unwrap();
        fs::remove_file(&files.snapshot).unwrap();
        files.args_error = StartArgs::read(&folder.path().join("none"), "m").err();
        files.own_interface = Some("br-none".to_owned());
        let problems = found(&files);
        for (problem, expected) in problems.iter().zip([
            "interface: the network interface 'br-none' does not exist",
            "qcow2_path: cannot open the image",
            "snapshot_path: cannot read the snapshot",
            "machineinfo_path: cannot read the machineinfo",
        ]) {
            assert!(problem.starts_with(expected), "{problem}");
        }
        assert_eq!(problems.len(), 4, "{problems:?}");
    }

    #[test]
    fn warnings_name_files_that_are_missing_or_relative() {
        let folder = tempfile::tempdir().unwrap();
        let args = |iso: &str| {
            let args = ["-cdrom", iso, "-kernel", "/none/kernel"].map(str::to_owned);
            MachineFiles {
                start_args: StartArgs::in_folder(args, folder.path()),
                ..machine_in(folder.path())
            }
        };
        fs::write(folder.path().join("x.iso"), "iso").unwrap();
        let [relative, missing] = &file_warnings(&args("x.iso"))[..] else { panic!("two warnings") };
        assert!(relative.contains("x.iso") && relative.contains("absolute path"), "{relative}");
        assert!(missing.contains("/none/kernel, which does not exist"), "{missing}");
        let whole = folder.path().join("x.iso").display().to_string();
        assert_eq!(file_warnings(&args(&whole)).len(), 1);
    }

    #[test]
    fn chain_has_each_file_that_qemu_reads_and_faults_name_unsafe_arguments() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let machine = |args: &[&str]| {
            let args = args.iter().map(|arg| (*arg).to_owned());
            MachineFiles {
                start_args: StartArgs::in_folder(args, folder.path()),
                ..machine_in(folder.path())
            }
        };
        let mut files = machine(&["-cdrom", "x.iso", "-hdb", "second", "-bios", "missing.bin"]);
        fs::write(path("x.iso"), "iso").unwrap();
        fs::write(path("base"), vec![0; 4096]).unwrap();
        let mut qemu_img = std::process::Command::new("qemu-img");
        qemu_img.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base"]).arg(path("second"));
        assert!(qemu_img.status().unwrap().success());
        let chain = ["base", "disk.qcow2", "missing.bin", "second", "x.iso"].map(path);
        assert_eq!(files.chain().unwrap(), chain);
        assert_eq!(found(&files), [""; 0]);
        files = machine(&["-plugin", "x.so", "-cdrom", "/etc/passwd"]);
        let [fault] = &found(&files)[..] else { panic!("one fault") };
        for word in [
            "machineinfo_path: ",
            "-plugin x.so: it runs",
            "/etc/passwd: ",
            "machines.m.unsafe_start_args: true",
        ] {
            assert!(fault.contains(word), "{word} is not in {fault}");
        }
        assert_eq!(files.unsafe_args_warning(), None);
        files.unsafe_start_args = true;
        assert_eq!(found(&files), [""; 0]);
        assert!(files.unsafe_args_warning().unwrap().contains("-plugin x.so"));
    }

    #[test]
    fn faults_name_the_missing_base_when_the_backing_chain_is_broken() {
        let folder = tempfile::tempdir().unwrap();
        let files = machine_in(folder.path());
        let path = |name: &str| folder.path().join(name).display().to_string();
        for (image, base) in [("middle", "base"), ("disk.qcow2", "middle")] {
            let options = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
            let mut qemu_img = std::process::Command::new("qemu-img");
            qemu_img.args(options).args([&path(base), &path(image), "1M"]);
            assert!(qemu_img.status().unwrap().success());
        }
        let problems = found(&files).join("\n");
        assert!(problems.starts_with("qcow2_path: ") && problems.contains(&path("base")), "{problems}");
        assert!(problems.contains(&path("middle")), "{problems}");
    }
}
