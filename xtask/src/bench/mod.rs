//! `cargo xtask bench`: the speed of the host, beside the hypervisor alone and beside Cuckoo3.
//!
//! Times of different computers are hardly comparable. All contestants are therefore measured in one run, on
//! the same machines. They take turns, so that other load of the computer affects all of them alike.
//!
//! | module | what is measured | where it begins and ends |
//! | --- | --- | --- |
//! | [`by_hand`] | QEMU by hand: what a restore takes when nothing but QEMU does anything | first step … `RESUME` |
//! | [`host`] | the host: `restore_start` and `stop` over its socket, in each of its [modes](host::Mode) | request … answer |
//! | [`qemu`] | both of them, and Cuckoo3, on one machine for each size of RAM | |
//! | [`cuckoo3`] | Cuckoo3's own manager with its own client, on one of these machines | call … return |
//! | [`answers`] | the agent in the guest, after each of these restores | first step, request or call … the agent's answer |
//! | [`parallel`] | many machines restored at the same moment, and the memory they take | first request … last answer |
//! | [`load`] | actions on a thousand machines in memory: the host without any hypervisor | first request … last answer |
//! | [`clones`] | clones of one snapshot, beside QEMU by hand and beside separate machines | first step or request … last answer |
//! | [`analysis`] | analyses by Cuckoo3 and by CAPE, and the agent's first answers | |
//! | [`kvm`] | the host with libvirt, beside `virsh` | |
//!
//! Half of each guest's RAM is noise, which QEMU can neither skip as zeroes nor compress. [`figures`] has the
//! measured samples; [`report`] shows them as a table and as JSON, [`chart`] and [`growth`]
//! as pictures.
//!
//! The task builds optimised programs, and replaces itself by the optimised task beside them.

mod analysis;
mod answers;
mod by_hand;
mod chart;
mod clones;
mod cuckoo3;
mod figures;
mod growth;
mod host;
mod kvm;
mod load;
mod parallel;
mod plan;
mod qemu;
mod report;
mod turns;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use machinery_testkit::artifacts;

use self::figures::Figures;
use self::plan::{Machinery, Plan};

pub use self::plan::Options;

use crate::run::{Context, Result, cargo, step};
use crate::system_packages;

/// Measures, and shows the figures.
pub fn run(options: &Options) -> Result<()> {
    if cfg!(debug_assertions) {
        system_packages::ensure()?;
        return go_on_optimised();
    }
    // A path that cannot be written is reported before the measurements.
    for path in [&options.json, &options.svg].into_iter().flatten() {
        File::options().append(true).create(true).open(path).context(cannot_write(path))?;
    }
    let plan = Plan::of(options);
    let mut figures = Figures::default();
    match options.machinery {
        Machinery::Qemu if let Some(most) = options.clones => clones::measure(&plan, most, &mut figures)?,
        Machinery::Qemu if options.analysis => analysis::measure(&plan, &mut figures)?,
        Machinery::Qemu => {
            qemu::measure(&plan, &mut figures)?;
            parallel::measure(&plan, &mut figures)?;
            load::measure(&plan, &mut figures)?;
        }
        Machinery::Kvm => kvm::measure(&plan, &mut figures)?,
    }
    print!("{}", report::table(&figures));
    if let Some(path) = &options.json {
        write(path, &report::json(&figures))?;
    }
    if let Some(path) = &options.svg {
        let chart = if options.clones.is_some() { growth::svg } else { chart::svg };
        write(path, &chart(&figures))?;
    }
    Ok(())
}

/// Builds an optimised workspace, and replaces this process by the task in it. Programs and plugins are
/// searched beside the running one.
fn go_on_optimised() -> Result<()> {
    step(&mut cargo(["build", "--release", "--workspace"]))?;
    let debug = artifacts::folder()?;
    let program = debug.with_file_name("release").join("xtask");
    let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
    Err(error).context(|| format!("cannot run {}", program.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(cannot_write(path))
}

fn cannot_write(path: &Path) -> impl FnOnce() -> String {
    move || format!("cannot write {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::host::Mode;

    #[test]
    fn chart_shows_measured_values_when_there_are_any() {
        let mut figures = Figures::default();
        assert!(!chart::svg(&figures).contains("NaN"));
        figures.add(figures::Place::Qemu(256), by_hand::restore(Mode::Standby), 0.4);
        figures.add(figures::Place::Double(1000), load::ACTIONS, 20_000.0);
        let chart = chart::svg(&figures);
        assert!(chart.contains(">0.4 ms<") && chart.contains("floor: standby"), "{chart}");
        assert!(!chart.contains("20000") && !chart.contains("NaN"), "{chart}");
    }
}
