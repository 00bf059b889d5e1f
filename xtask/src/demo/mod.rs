//! `cargo xtask demo`: the machinery host at work, on a computer without anything installed.
//!
//! The demo makes a small Linux into an analysis machine, and serves it from a CWD of its own. A few rounds
//! show a sandbox's work: restore, inspect, stop. All actions are commands, so the times are those of an
//! operator.

mod analysis;
mod cwd;
mod host;
mod machine;
mod print;
mod times;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery_testkit::guest::{self, GuestProbe, Qemu};

use self::host::DemoHost;
use self::machine::{MACHINE, Machine, Machinery};
use self::print::{note, say};
use self::times::{Times, timed};
use crate::leftovers::RunMarker;
use crate::run::{Context, Result, cargo, step};
use crate::system_packages;

const ROUNDS: usize = 3;
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Options of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Options {
    /// The machinery to show
    #[arg(long, value_enum, default_value = "qemu")]
    machinery: Machinery,
    /// Show a whole analysis by Cuckoo3, of the environment that $CUCKOO3_PYTHON names
    #[arg(long, conflicts_with = "machinery")]
    analysis: bool,
}

/// Shows the machinery host at work.
pub fn run(options: &Options) -> Result<()> {
    system_packages::ensure()?;
    step(&mut cargo(["build", "--workspace"]))?;
    if options.analysis {
        return analysis::show();
    }
    let qemu = Qemu::find()?;
    let scratch = cwd::DemoCwd::new()?;
    say("An analysis machine is made: a Linux with 512 MiB of RAM, booted once and saved as it runs.");
    let (machine, took) = timed(|| machine::make(options.machinery, &qemu, scratch.path()))?;
    note(&format!("ready after {} (it is cached)", times::shown(took)));
    scratch.configure(&machine)?;
    let marker = RunMarker::new();
    let times = show(&scratch, &machine, &marker)?;
    // A private libvirtd ends with the machine.
    drop(machine);
    marker.check_none_left()?;
    say("The host has ended, and left no process, no socket and no disk.");
    println!("\n{times}");
    note("times of the commands: each starts a program and connects to the host's socket");
    note(&format!("screenshots: {}", pictures()?.display()));
    Ok(())
}

fn show(scratch: &cwd::DemoCwd, machine: &Machine, marker: &RunMarker) -> Result<Times> {
    let program = program_folder()?.join("cuckoo-machinery");
    let mut host = DemoHost::new(&program, scratch.path(), marker);
    say("Configuration and environment are checked.");
    host.run(["check"])?;
    say("The host is started.");
    let ((), took) = timed(|| host.serve())?;
    note(&format!("ready after {}", times::shown(took)));
    say("The machine is prepared for its next restore, which the host also does by itself.");
    let ((), took) = timed(|| host.run(["prepare"]))?;
    note(&format!("ready after {}", times::shown(took)));
    host.run(["list"])?;
    let mut times = Times::new(ROUNDS);
    for round in 1..=ROUNDS {
        say(&format!("Round {round} of {ROUNDS}: restore, inspect, stop."));
        play(&host, scratch.path(), &machine.probe, round, &mut times)?;
    }
    say("The host gets SIGTERM.");
    host.end()?;
    scratch.check_nothing_left(machine)?;
    Ok(times)
}

fn play(
    host: &DemoHost<'_>,
    scratch: &Path,
    machine: &GuestProbe,
    round: usize,
    times: &mut Times,
) -> Result<()> {
    let mut take = |what: &'static str, action: &dyn Fn() -> Result<()>| -> Result<()> {
        let ((), took) = timed(action)?;
        note(&format!("{what}: {}", times::shown(took)));
        times.add(what, round, took);
        Ok(())
    };
    take("restore-start", &|| host.run(["restore-start", MACHINE]))?;
    take("agent answers", &|| agent_answers(machine))?;
    let picture = pictures()?.join(format!("round-{round}.png")).display().to_string();
    take("screenshot", &|| host.run(["screenshot", MACHINE, &picture]))?;
    if round == 1 {
        let dump = scratch.join("memory.elf").display().to_string();
        take("dump-memory", &|| host.run(["dump-memory", MACHINE, &dump]))?;
    }
    take("stop", &|| host.run(["stop", MACHINE]))
}

fn agent_answers(machine: &GuestProbe) -> Result<()> {
    let (status, body) = machine.get("/", AGENT_TIMEOUT)?;
    println!("  http://{}:{}/ says {status} {}", machine.ip, guest::AGENT_PORT, body.trim());
    if status == 200 { Ok(()) } else { Err(format!("the agent answers {status} instead of 200").into()) }
}

/// Returns the folder of the program and its plugins, which is that of this program.
fn program_folder() -> Result<PathBuf> {
    let this = std::env::current_exe().context(|| "cannot find the build folder".to_owned())?;
    Ok(this.parent().unwrap_or(&this).to_owned())
}

/// Returns the folder of the screenshots, which `cargo clean` removes.
fn pictures() -> Result<PathBuf> {
    let folder = program_folder()?.join("demo");
    fs::create_dir_all(&folder).context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}
