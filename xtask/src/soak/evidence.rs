//! The evidence of a violation: a folder that stays after the soak.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process;

use machinery_testkit::processes;

use super::plan::Step;
use super::served::Served;
use super::site::Site;
use crate::run::{Context, Result};

/// Keeps the violations, the host's log of the round, its state file and configuration, and the processes.
pub fn keep(site: &Site, served: &Served, step: Step, found: &[String]) -> Result<PathBuf> {
    let name = format!("machinery-soak.{}/round-{}", process::id(), step.round);
    let folder = env::temp_dir().join(name);
    fs::create_dir_all(&folder).context(|| format!("cannot make {}", folder.display()))?;
    let write = |name: &str, content: String| {
        let path = folder.join(name);
        fs::write(&path, content).context(|| format!("cannot write {}", path.display()))
    };
    write("violations", format!("{}, seed of the round {}\n{}\n", step.cell, step.seed, found.join("\n")))?;
    write("host.log", served.log())?;
    let processes = processes::list()?;
    let lines = processes.iter().map(|(pid, command)| format!("{pid} {command}\n"));
    write("processes", lines.collect())?;
    let libvirtd = site.libvirtd().map(|libvirtd| libvirtd.log());
    let state = [
        Some(site.state_folder().join("machines.json")),
        Some(site.cwd().root().join("conf/machinery-host.yaml")),
        libvirtd,
    ];
    for file in state.into_iter().flatten() {
        let copy = folder.join(file.file_name().unwrap_or_default());
        // A file may be missing: that may be the violation.
        let _ = fs::copy(&file, copy);
    }
    Ok(folder)
}
