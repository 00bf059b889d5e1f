//! `cargo xtask bench`: how fast a restore is, beside the hypervisor alone.
//!
//! Times say little across machines, so both are measured in one run, in turns, with the same machine:
//! the host over its socket, and by hand. That is, for qemu: QEMU as one would start it (an overlay,
//! `-incoming "exec:cat …"`, wait until the guest runs), and `quit`; for kvm: `virsh snapshot-revert`
//! and `virsh destroy`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, MachineFolder, Qemu, Vm};
use machinery_testkit::lab::{KvmLab, Lab};
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::snapshot::SnapshotFormat;

use crate::packages;
use crate::run::{Result, cargo, step};

/// What can be chosen.
#[derive(clap::Args)]
pub struct Options {
    /// The machinery to measure
    #[arg(long, value_enum, default_value = "qemu")]
    machinery: Machinery,
    /// How often each is measured
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// The guest's RAM, in MiB
    #[arg(long, default_value_t = 1024)]
    ram: u32,
    /// How much of it holds noise, in MiB
    #[arg(long, default_value_t = 600)]
    noise: u32,
}

/// A machinery that can be measured.
#[derive(Clone, Copy, ValueEnum)]
enum Machinery {
    /// Beside QEMU, started by hand
    Qemu,
    /// Beside virsh
    Kvm,
}

/// Measures and shows.
pub fn run(options: &Options) -> Result<()> {
    packages::ensure()?;
    step(&mut cargo(["build", "--workspace"]))?;
    let guest = Guest::Linux { ram_mib: options.ram, noise_mib: options.noise };
    match options.machinery {
        Machinery::Qemu => qemu(guest, options),
        Machinery::Kvm => kvm(guest, options),
    }
}

fn qemu(guest: Guest, options: &Options) -> Result<()> {
    let lab = Lab::new(&[("m", guest, SnapshotFormat::Plain)])?;
    let machine = lab.folder("m");
    let size = fs::metadata(&machine.snapshot).map_or(0, |file| file.len() >> 20);
    println!("{}, guest of {} MiB, snapshot of {size} MiB, plain", lab.qemu().version()?, options.ram);
    let mut host = lab.host()?;
    let mut client = host.client()?;
    let mut times = Times::new(["bare restore", "bare quit"]);
    for _ in 0..options.rounds {
        bare(lab.qemu(), machine, &mut times)?;
        hosted(&mut client, &mut times)?;
    }
    host.terminate()?;
    times.show();
    Ok(())
}

fn kvm(guest: Guest, options: &Options) -> Result<()> {
    let lab = KvmLab::new(&[("m", guest)])?;
    let version = lab.libvirtd().virsh(&["version", "--daemon"])?;
    println!("{}\nguest of {} MiB, {} MiB of noise", version.trim(), options.ram, options.noise);
    let mut host = lab.host()?;
    let mut client = host.client()?;
    let mut times = Times::new(["snapshot-revert", "virsh destroy"]);
    for round in 0..options.rounds {
        // What one leaves for the kernel to write slows the other, so they take turns at being first.
        if round % 2 == 0 {
            by_virsh(&lab, &mut times)?;
        }
        hosted(&mut client, &mut times)?;
        if round % 2 == 1 {
            by_virsh(&lab, &mut times)?;
        }
    }
    host.terminate()?;
    times.show();
    Ok(())
}

fn by_virsh(lab: &KvmLab, times: &mut Times) -> Result<()> {
    let label = lab.machine("m").label.as_str();
    let commands = [
        (&["snapshot-revert", label, SNAPSHOT, "--running"][..], &mut times.bare_restore),
        (&["destroy", label][..], &mut times.bare_stop),
    ];
    for (command, into) in commands {
        let begun = Instant::now();
        lab.libvirtd().virsh(command)?;
        into.push(begun.elapsed());
    }
    Ok(())
}

fn bare(qemu: &Qemu, machine: &MachineFolder, times: &mut Times) -> Result<()> {
    let overlay = machine.dir.join("bare.qcow2");
    let begun = Instant::now();
    qemu.overlay(&machine.disk, &overlay)?;
    let vm = Vm::restore_through_cat(qemu, &machine.start_args, &overlay, &machine.snapshot)?;
    times.bare_restore.push(begun.elapsed());
    let begun = Instant::now();
    vm.quit()?;
    times.bare_stop.push(begun.elapsed());
    remove(&overlay)
}

fn remove(overlay: &Path) -> Result<()> {
    fs::remove_file(overlay).map_err(|error| format!("cannot remove {}: {error}", overlay.display()).into())
}

fn hosted(client: &mut Client, times: &mut Times) -> Result<()> {
    for (action, into) in [("restore_start", &mut times.restore), ("stop", &mut times.stop)] {
        let begun = Instant::now();
        let answer = client.act(action, "m")?;
        into.push(begun.elapsed());
        if answer["success"] != true {
            return Err(format!("{action} failed: {answer}").into());
        }
    }
    Ok(())
}

struct Times {
    /// What the restore and the stop by hand are called.
    names: [&'static str; 2],
    bare_restore: Vec<Duration>,
    restore: Vec<Duration>,
    bare_stop: Vec<Duration>,
    stop: Vec<Duration>,
}

impl Times {
    fn new(names: [&'static str; 2]) -> Self {
        let none = || Vec::new();
        Times { names, bare_restore: none(), restore: none(), bare_stop: none(), stop: none() }
    }

    fn show(&mut self) {
        println!("\n{:16}{:>12}{:>24}", "", "median", "fastest … slowest");
        let rows = [
            (self.names[0], &mut self.bare_restore),
            ("restore_start", &mut self.restore),
            (self.names[1], &mut self.bare_stop),
            ("stop", &mut self.stop),
        ];
        let medians = rows.map(|(name, times)| {
            times.sort();
            let ms = |time: &Duration| time.as_secs_f64() * 1000.0;
            let (median, spread) =
                (ms(&times[times.len() / 2]), (ms(&times[0]), ms(&times[times.len() - 1])));
            println!("{name:16}{median:9.1} ms{:12.1} … {:6.1} ms", spread.0, spread.1);
            median
        });
        println!(
            "\nrestore_start takes {:.2} times as long as by hand, stop {:.2} times",
            medians[1] / medians[0],
            medians[3] / medians[2]
        );
    }
}
