//! `cargo xtask bench`: how fast the host is, beside the hypervisor alone and beside Cuckoo3.
//!
//! Times say little across computers. So all is measured in one run, on the same machines, and what is
//! compared takes turns: whatever else the computer does meanwhile hits all alike.
//!
//! | module | what is measured | where it begins and ends |
//! | --- | --- | --- |
//! | [`by_hand`] | QEMU by hand: what a restore takes when nothing but QEMU does anything | first step … `RESUME` |
//! | [`host`] | the host: `restore_start` and `stop` over its socket, in each of its [modes](host::Mode) | request … answer |
//! | [`qemu`] | both of them, and Cuckoo3, on one machine for each size of RAM | |
//! | [`cuckoo3`] | Cuckoo3's own manager with its own client, on one of these machines | call … return |
//! | [`parallel`] | many machines restored at the same moment, and the memory they take | first request … last answer |
//! | [`load`] | actions on a thousand machines in memory: the host without any hypervisor | first request … last answer |
//! | [`kvm`] | the host with libvirt, beside `virsh` | |
//!
//! Half of each guest's RAM is noise, so that it is neither skipped as zeroes nor compressed. All that is
//! measured ends in [`figures`]; [`report`] shows it as a table and as JSON, [`chart`] as a picture.
//!
//! Optimised programs are measured: the task builds them, and goes on as the one beside them.

mod by_hand;
mod chart;
mod cuckoo3;
mod figures;
mod host;
mod kvm;
mod load;
mod parallel;
mod qemu;
mod report;
mod turns;

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;
use machinery_testkit::artifacts;
use machinery_testkit::guest::Guest;

use self::figures::Figures;
use self::host::Mode;
use crate::packages;
use crate::run::{Context, Result, cargo, step};

/// What can be chosen.
#[derive(clap::Args)]
pub struct Options {
    /// The machinery to measure
    #[arg(long, value_enum, default_value = "qemu")]
    machinery: Machinery,
    /// How often each is measured
    #[arg(long, default_value_t = 15, value_parser = at_least_one)]
    rounds: usize,
    /// How often a standby is measured
    #[arg(long, default_value_t = 50, value_parser = at_least_one)]
    standby_rounds: usize,
    /// The guests' RAM, in MiB; half of it holds noise [default: 256,1024,2048,4096; with kvm 1024]
    #[arg(long, value_delimiter = ',', value_name = "LIST", value_parser = clap::value_parser!(u32).range(256..))]
    ram: Vec<u32>,
    /// How many machines are restored at the same moment
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    machines: usize,
    /// The host's modes to measure
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "plain,instant,standby"
    )]
    modes: Vec<Mode>,
    /// A check that all can be measured: the smallest guests and few rounds
    #[arg(long)]
    quick: bool,
    /// Writes everything measured there, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws a chart there, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// A machinery that can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Machinery {
    /// Beside QEMU, started by hand, and Cuckoo3 if $CUCKOO3_PYTHON names a Python that has it
    Qemu,
    /// Beside virsh
    Kvm,
}

/// How much is measured.
struct Plan {
    rounds: usize,
    standby_rounds: usize,
    ram: Vec<u32>,
    machines: usize,
    /// The RAM of each of them.
    machines_ram: u32,
    modes: Vec<Mode>,
    actions: usize,
}

/// Measures and shows.
pub fn run(options: &Options) -> Result<()> {
    if cfg!(debug_assertions) {
        packages::ensure()?;
        return go_on_optimised();
    }
    // A place that cannot be written to is told before all is measured for nothing.
    for path in [&options.json, &options.svg].into_iter().flatten() {
        File::options().append(true).create(true).open(path).context(cannot_write(path))?;
    }
    let plan = Plan::of(options);
    let mut figures = Figures::default();
    match options.machinery {
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
        write(path, &chart::svg(&figures))?;
    }
    Ok(())
}

/// Builds all of the workspace optimised, and replaces this process by the task that was built with it:
/// programs and plugins are looked for beside the one that runs.
fn go_on_optimised() -> Result<()> {
    step(&mut cargo(["build", "--release", "--workspace"]))?;
    let debug = artifacts::folder()?;
    let program = debug.with_file_name("release").join("xtask");
    let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
    Err(error).context(|| format!("cannot run {}", program.display()))
}

impl Plan {
    fn of(options: &Options) -> Self {
        let ram = match options.machinery {
            _ if !options.ram.is_empty() => options.ram.clone(),
            Machinery::Qemu => vec![256, 1024, 2048, 4096],
            Machinery::Kvm => vec![1024],
        };
        let modes = options.modes.clone();
        let plan = Plan {
            rounds: options.rounds,
            standby_rounds: options.standby_rounds,
            ram,
            machines: options.machines,
            machines_ram: 1024,
            modes,
            actions: 10_000,
        };
        if options.quick { plan.quick() } else { plan }
    }

    fn quick(self) -> Self {
        Plan {
            rounds: self.rounds.min(2),
            standby_rounds: self.standby_rounds.min(4),
            ram: vec![256],
            machines: self.machines.min(2),
            machines_ram: 256,
            actions: 2000,
            ..self
        }
    }
}

/// A Linux with that much RAM, half of it noise.
fn guest(ram_mib: u32) -> Guest {
    Guest::Linux { ram_mib, noise_mib: ram_mib / 2 }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(cannot_write(path))
}

fn cannot_write(path: &Path) -> impl FnOnce() -> String {
    move || format!("cannot write {}", path.display())
}

/// Says what is going on; the results are all that goes to standard output.
fn note(text: &str) {
    eprintln!("  {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_what_was_measured_and_may_be_empty() {
        let mut figures = Figures::default();
        assert!(!chart::svg(&figures).contains("NaN"));
        figures.add(figures::Place::Qemu(256), by_hand::restore(Mode::Standby), 0.4);
        figures.add(figures::Place::Double(1000), load::ACTIONS, 20_000.0);
        let chart = chart::svg(&figures);
        assert!(chart.contains(">0.4 ms<") && chart.contains("floor: standby"), "{chart}");
        assert!(!chart.contains("20000") && !chart.contains("NaN"), "{chart}");
    }
}
