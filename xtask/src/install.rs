//! `cargo xtask install`: copies the program and its plugins into the folders where the program searches for
//! them.
//!
//! | in the prefix | what |
//! | --- | --- |
//! | `bin/` | `cuckoo-machinery` |
//! | `lib/cuckoo-machinery/` | the plugins, and no other library of the build; the helper program of the jail |
//! | `share/cuckoo-machinery/conf/` | commented defaults of their configuration files |
//! | `share/man/`, `share/bash-completion/` and others | manual pages, and completions for shells, which the program writes |
//!
//! No file contains the prefix: a packager gives `--prefix "$DESTDIR/usr"`. The program `install` replaces a
//! file instead of writing into it, so a running host keeps its own files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Access, access};

use crate::run::{Context, Result, cargo, is_root, step};

/// Options of `cargo xtask install`.
#[derive(clap::Args)]
pub struct Options {
    /// Install below this folder
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Install only this plugin; can be given several times
    #[arg(long = "plugin", value_name = "NAME", default_values = ["qemu", "kvm"])]
    plugins: Vec<Plugin>,
    /// Install the results of an earlier build in this folder, instead of building
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
}

/// A plugin that can be installed.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Plugin {
    /// QEMU processes
    Qemu,
    /// Domains of libvirt
    Kvm,
    /// Machines in memory
    Example,
}

impl Plugin {
    fn name(self) -> &'static str {
        match self {
            Plugin::Qemu => "qemu",
            Plugin::Kvm => "kvm",
            Plugin::Example => "example",
        }
    }

    /// Returns the name of its crate.
    pub fn package(self) -> &'static str {
        match self {
            Plugin::Qemu => "machinery-qemu",
            Plugin::Kvm => "machinery-kvm",
            Plugin::Example => "machinery-example",
        }
    }
}

/// Builds the program and the plugins, and installs them.
pub fn run(options: &Options) -> Result<()> {
    let prefix = std::path::absolute(&options.prefix).context(|| "the prefix".to_owned())?;
    let built = match &options.from {
        Some(folder) => folder.clone(),
        None => build(&options.plugins)?,
    };
    let sudo = needs_sudo(&prefix);
    if sudo {
        eprintln!("Writing to {} needs root: sudo is used, and may ask for your password.", prefix.display());
    }
    into(&prefix, &built, &options.plugins, sudo)
}

/// Installs the results of a build below the prefix.
pub fn into(prefix: &Path, built: &Path, plugins: &[Plugin], sudo: bool) -> Result<()> {
    let share = tempfile::tempdir().context(|| "making a folder for the manual".to_owned())?;
    let manual = manual(&built.join("cuckoo-machinery"), share.path())?;
    for (mode, source, target) in files(built, plugins).into_iter().chain(manual) {
        let mut install = Command::new(if sudo { "sudo" } else { "install" });
        if sudo {
            install.arg("install");
        }
        step(install.args(["-D", "-m", mode]).arg(source).arg(prefix.join(target)))?;
    }
    Ok(())
}

/// Builds a release; returns the folder with the results.
pub fn build(plugins: &[Plugin]) -> Result<PathBuf> {
    step(&mut cargo(build_arguments(plugins)))?;
    Ok(target()?.join("release"))
}

/// Returns cargo's arguments to build a release.
pub fn build_arguments(plugins: &[Plugin]) -> Vec<&'static str> {
    let packages = plugins.iter().flat_map(|plugin| ["-p", plugin.package()]);
    ["build", "--release", "-p", "machinery-host", "-p", "machinery-jail"]
        .into_iter()
        .chain(packages)
        .collect()
}

/// Returns the folder of this build, in which cargo has a folder for each profile.
pub fn target() -> Result<PathBuf> {
    let own = std::env::current_exe().context(|| "looking for the build's folder".to_owned())?;
    let target =
        own.ancestors().nth(2).ok_or_else(|| format!("{} is in no build's folder", own.display()))?;
    Ok(target.to_owned())
}

/// A file's mode, its path, and its target below the prefix.
type Installed = (&'static str, PathBuf, PathBuf);

/// Has the program write its manual pages and completions below `share`, and returns these files.
fn manual(program: &Path, share: &Path) -> Result<Vec<Installed>> {
    step(Command::new(program).arg("manual").arg(share))?;
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let what = || format!("reading {}", share.join(&folder).display());
        for entry in fs::read_dir(share.join(&folder)).context(what)? {
            let entry = entry.context(what)?;
            let path = folder.join(entry.file_name());
            match entry.file_type().context(what)?.is_dir() {
                true => folders.push(path),
                false => files.push(("644", entry.path(), Path::new("share").join(path))),
            }
        }
    }
    Ok(files)
}

/// Returns the files of the build and of the checkout.
fn files(built: &Path, plugins: &[Plugin]) -> Vec<Installed> {
    let programs = [("cuckoo-machinery", "bin"), ("cuckoo-machinery-jail", "lib/cuckoo-machinery")];
    let conf = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../conf"));
    let share = Path::new("share/cuckoo-machinery/conf");
    let mut files: Vec<_> = programs
        .map(|(program, folder)| ("755", built.join(program), Path::new(folder).join(program)))
        .into();
    for plugin in plugins {
        let library = format!("libmachinery_{}.so", plugin.name());
        files.push(("644", built.join(&library), Path::new("lib/cuckoo-machinery").join(library)));
    }
    let machineries = plugins.iter().map(|plugin| format!("machineries/{}.yaml", plugin.name()));
    for name in ["cuckoo.yaml", "machinery-host.yaml"].map(str::to_owned).into_iter().chain(machineries) {
        files.push(("644", conf.join(&name), share.join(name)));
    }
    files
}

/// Reports whether only root can write to the folder, or to its nearest existing parent.
fn needs_sudo(folder: &Path) -> bool {
    let existing = folder.ancestors().find(|folder| folder.exists());
    !is_root() && existing.is_some_and(|folder| access(folder, Access::WRITE_OK).is_err())
}
