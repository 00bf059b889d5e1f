//! The options of the benchmark, and the plan that results from them.

use std::path::PathBuf;

use clap::ValueEnum;
use machinery_testkit::guest::Guest;

use super::host::Mode;
use crate::run::Result;

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Options {
    /// The machinery to measure
    #[arg(long, value_enum, default_value = "qemu")]
    pub machinery: Machinery,
    /// Number of rounds of each measurement
    #[arg(long, default_value_t = 15, value_parser = at_least_one)]
    pub rounds: usize,
    /// Number of rounds of a standby
    #[arg(long, default_value_t = 50, value_parser = at_least_one)]
    pub standby_rounds: usize,
    /// The guests' RAM, in MiB; half of it holds noise [default: 256,1024,2048,4096; with kvm 1024]
    #[arg(long, value_delimiter = ',', value_name = "LIST", value_parser = clap::value_parser!(u32).range(256..))]
    pub ram: Vec<u32>,
    /// Number of machines that are restored at the same moment
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    pub machines: usize,
    /// The host's modes to measure
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "LIST",
        default_value = "plain,instant,standby"
    )]
    pub modes: Vec<Mode>,
    /// Measure analyses instead: by Cuckoo3 of $CUCKOO3_PYTHON, and by CAPE of $CAPE_SOURCE and $CAPE_PYTHON; uses 4 machines
    #[arg(long)]
    pub analysis: bool,
    /// Measure clones of one snapshot instead, from 1 to that number, as root
    #[arg(
        long,
        value_name = "N",
        num_args = 0..=1,
        default_missing_value = "100",
        value_parser = at_least_one,
        conflicts_with = "analysis"
    )]
    pub clones: Option<usize>,
    /// Number of analyses with each manager
    #[arg(long, default_value_t = 20, value_parser = at_least_one, requires = "analysis")]
    pub analyses: usize,
    /// Only check that everything can be measured, with the smallest guests and few rounds
    #[arg(long)]
    pub quick: bool,
    /// Write all samples to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw a chart into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// A machinery that can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Machinery {
    /// Beside QEMU, started by hand, and Cuckoo3 if $CUCKOO3_PYTHON names a Python that has it
    Qemu,
    /// Beside virsh
    Kvm,
}

/// The extent of the measurements.
pub struct Plan {
    pub rounds: usize,
    pub standby_rounds: usize,
    pub ram: Vec<u32>,
    pub machines: usize,
    /// The RAM of each of these machines.
    pub machines_ram: u32,
    pub modes: Vec<Mode>,
    pub actions: usize,
    /// The number of whole analyses with each manager.
    pub analyses: usize,
}

impl Plan {
    pub fn of(options: &Options) -> Self {
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
            // An analysis has more processes than its machine.
            machines: if options.analysis { options.machines.min(4) } else { options.machines },
            machines_ram: 1024,
            modes,
            actions: 10_000,
            analyses: options.analyses,
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
            analyses: self.analyses.min(4),
            ..self
        }
    }
}

/// Returns a Linux guest with that much RAM, half of it noise.
pub fn guest(ram_mib: u32) -> Guest {
    Guest::Linux { ram_mib, noise_mib: ram_mib / 2 }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1 is needed".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}
