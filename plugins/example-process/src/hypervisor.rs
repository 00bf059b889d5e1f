//! The hypervisor: its command line, the words of its console, and its files. Replace this file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery::{Deadline, Error, Result};
use machinery_backend::elf::{self, Architecture, Segment};
use machinery_backend::process::{self, LineKind};
use machinery_backend::{Guest, GuestProcess, Output, RunFolder, ppm_to_png};

/// Starts the processes of one machine.
pub struct Hypervisor {
    pub program: PathBuf,
}

impl GuestProcess for Hypervisor {
    /// The files of a run, such as a disposable disk, belong into the folder.
    fn command(&self, _folder: &RunFolder, snapshot: Option<&Path>, _: Deadline) -> Result<Command> {
        let mut command = machinery::command(&self.program);
        if let Some(snapshot) = snapshot {
            command.arg("--restore").arg(snapshot);
        }
        Ok(command)
    }

    /// The program's own failures are the reasons in errors.
    fn kind_of(line: &str) -> LineKind {
        if line.starts_with("example-process-guest: ") { LineKind::Failure } else { LineKind::Other }
    }

    fn wait_until_loaded(&self, guest: &Guest, deadline: Deadline) -> Result<()> {
        guest.wait_for_line("loaded", deadline).map(drop)
    }

    fn resume(&self, guest: &Guest, deadline: Deadline) -> Result<()> {
        guest.ask("resume", "running", deadline).map(drop)
    }
}

/// Returns the version of the program.
pub fn version(program: &Path, deadline: Deadline) -> Result<String> {
    let mut command = machinery::command(program);
    command.arg("--version");
    let output = process::output(command, deadline)?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Presses the power button.
pub fn press_power_button(guest: &Guest) -> Result<()> {
    guest.send("poweroff")
}

/// Writes the guest's memory, which is a file in the folder of the run.
pub fn dump(guest: &Guest, output: &Output) -> Result<()> {
    let path = guest.file("memory");
    let failed = |error| Error::io("dump", &path, &error);
    let mut memory = File::open(&path).map_err(failed)?;
    let length = memory.metadata().map_err(failed)?.len();
    let mut segments = [Segment { address: 0, length, memory: &mut memory }];
    elf::write_core(output.file(), Architecture::X86_64, &mut segments).map_err(failed)
}

/// Writes the screen, of which the program makes a picture in the folder of the run.
pub fn screenshot(guest: &Guest, output: &Output, deadline: Deadline) -> Result<()> {
    if guest.is_stopped() {
        return Err(Error::not_now("the guest is paused"));
    }
    guest.ask("screen screen.ppm", "written screen.ppm", deadline)?;
    let path = guest.file("screen.ppm");
    let picture = fs::read(&path).map_err(|error| Error::io("read", &path, &error))?;
    ppm_to_png(&picture, output.file())
}
