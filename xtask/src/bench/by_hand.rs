//! The floor: restores and stops by QEMU alone.
//!
//! No program that drives QEMU can be faster, so the floor is the baseline of the host in each of its modes.
//! An instant restore uses a *template*, made once: a file with the machine's RAM and one with its devices.
//! No code of the host is involved.
//!
//! ```text
//! make:     QEMU with the file as its shared RAM ─▶ load the snapshot ─▶ save the devices ─▶ quit
//! restore:  copy an empty overlay ─▶ QEMU with the file as its private RAM ─▶ load the devices ─▶ cont
//! ```

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use machinery_testkit::guest::{MachineFolder, Qemu, Vm};
use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::answers;
use super::figures::{Figures, Kind, Place, Unit};
use super::host::Mode;
use super::turns::timed;
use crate::run::{Context, Result};

/// Returns the kind of a restore by hand that corresponds to the mode.
pub fn restore(mode: Mode) -> Kind {
    let (name, what) = match mode {
        Mode::Plain => (
            "floor: plain restore",
            "QEMU by hand: qemu-img makes the overlay, QEMU reads the whole snapshot through `cat`, cont",
        ),
        Mode::Instant => (
            "floor: instant restore",
            "QEMU by hand: an empty overlay is copied, QEMU maps the RAM file and loads the devices, cont until RESUME",
        ),
        Mode::Standby => {
            ("floor: standby", "QEMU by hand: cont of a machine that is loaded and paused, until RESUME")
        }
    };
    Kind { by: "", name, what, unit: Unit::Ms }
}

/// Returns the kind of the time until the agent answers after such a restore.
pub const fn answer(mode: Mode) -> Kind {
    answers::kind(match mode {
        Mode::Plain => "floor: plain, agent answers",
        Mode::Instant => "floor: instant, agent answers",
        Mode::Standby => "floor: standby, agent answers",
    })
}

/// The duration of a stop.
pub const STOP: Kind = Kind {
    by: "",
    name: "floor: stop",
    what: "QEMU by hand: quit, until the process has ended",
    unit: Unit::Ms,
};

/// Earlier QEMUs cannot map a file read-only as RAM, and load devices from descriptors only.
const OPENS_FILES_SINCE: (u32, u32) = (8, 2);

/// A machine, with the files to restore it by hand.
pub struct ByHand<'a> {
    qemu: &'a Qemu,
    machine: &'a MachineFolder,
    template: Template,
    /// An empty overlay.
    blank: PathBuf,
    /// The overlay of a run.
    overlay: PathBuf,
}

impl<'a> ByHand<'a> {
    /// Makes the template of `machine`.
    pub fn new(qemu: &'a Qemu, machine: &'a MachineFolder) -> Result<Self> {
        Self::new_in(&machine.dir.join("floor"), qemu, machine)
    }

    /// Makes the template of `machine` in this folder.
    pub fn new_in(folder: &Path, qemu: &'a Qemu, machine: &'a MachineFolder) -> Result<Self> {
        fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))?;
        let template = Template::of(qemu, machine, folder)?;
        let (blank, overlay) = (folder.join("blank.qcow2"), folder.join("overlay.qcow2"));
        qemu.overlay(&machine.disk, &blank)?;
        let by_hand = ByHand { qemu, machine, template, blank, overlay };
        by_hand.make_template()?;
        Ok(by_hand)
    }

    /// Measures restores, the agent's answers, and stops; the first round does not count.
    pub fn measure(&self, mode: Mode, rounds: usize, place: Place, figures: &mut Figures) -> Result<()> {
        for round in 0..=rounds {
            let (vm, restored) = match mode {
                Mode::Plain => self.plain()?,
                Mode::Instant => self.instant()?,
                Mode::Standby => self.standby()?,
            };
            let answered = answers::after(restored, &self.machine.probe)?;
            let ((), stopped) = timed(|| Ok(vm.quit()?))?;
            if round > 0 {
                figures.add(place, restore(mode), restored);
                figures.add(place, answer(mode), answered);
                figures.add(place, STOP, stopped);
            }
        }
        Ok(())
    }

    /// Restores the machine, and returns the milliseconds.
    fn plain(&self) -> Result<(Vm, f64)> {
        // The template's QEMU has left an overlay, too.
        fs::remove_file(&self.overlay).context(|| format!("cannot remove {}", self.overlay.display()))?;
        timed(|| {
            self.qemu.overlay(&self.machine.disk, &self.overlay)?;
            let (args, snapshot) = (&self.machine.start_args, &self.machine.snapshot);
            Ok(Vm::restore_through_cat(self.qemu, args, &self.overlay, snapshot)?)
        })
    }

    fn instant(&self) -> Result<(Vm, f64)> {
        timed(|| {
            let mut vm = self.paused()?;
            vm.resume()?;
            Ok(vm)
        })
    }

    fn standby(&self) -> Result<(Vm, f64)> {
        let mut vm = self.paused()?;
        let ((), took) = timed(|| Ok(vm.resume()?))?;
        Ok((vm, took))
    }

    /// Returns the machine, loaded from its template and paused.
    fn paused(&self) -> Result<Vm> {
        self.paused_on(&self.overlay)
    }

    /// Returns the machine, loaded from its template and paused, with an overlay at this path.
    pub fn paused_on(&self, overlay: &Path) -> Result<Vm> {
        let how = if self.template.by_name { "share=off,readonly=on,rom=off" } else { "share=off" };
        let mut vm = self.start(how, overlay)?;
        vm.load_devices(&self.template.devices, self.template.by_name)?;
        Ok(vm)
    }

    fn make_template(&self) -> Result<()> {
        let mut vm = self.start("share=on", &self.overlay)?;
        vm.load(&self.machine.snapshot)?;
        vm.save_devices(&self.template.devices)?;
        Ok(vm.quit()?)
    }

    /// Starts QEMU with the template's file as its RAM, on an overlay of its own.
    fn start(&self, how: &str, overlay: &Path) -> Result<Vm> {
        copy(&self.blank, overlay).context(|| format!("cannot copy {}", self.blank.display()))?;
        let args = self.template.args(how);
        let args = args.each_ref().map(String::as_str);
        Ok(Vm::start_for_incoming(self.qemu, &self.machine.start_args, overlay, &args)?)
    }
}

/// Files of a machine's RAM and of its devices.
struct Template {
    ram: PathBuf,
    /// The size of the RAM, as QEMU's argument.
    size: String,
    devices: PathBuf,
    /// QEMU opens files by their name.
    by_name: bool,
}

impl Template {
    /// Returns the paths of a machine's template.
    fn of(qemu: &Qemu, machine: &MachineFolder, folder: &Path) -> Result<Self> {
        let args = &machine.start_args;
        let size = args.iter().skip_while(|arg| *arg != "-m").nth(1);
        let size = size.ok_or_else(|| format!("there is no -m among the arguments {args:?}"))?;
        Ok(Template {
            ram: folder.join("ram"),
            size: format!("{size}M"),
            devices: folder.join("devices"),
            by_name: version(&qemu.version()?)? >= OPENS_FILES_SINCE,
        })
    }

    /// Returns QEMU's arguments for the file as RAM.
    fn args(&self, how: &str) -> [String; 4] {
        // A comma ends an option's value unless it is doubled.
        let path = self.ram.to_string_lossy().replace(',', ",,");
        let object = format!("memory-backend-file,id=pc.ram,mem-path={path},size={},{how}", self.size);
        ["-object".to_owned(), object, "-machine".to_owned(), "memory-backend=pc.ram".to_owned()]
    }
}

/// Returns the first two numbers of QEMU's version.
fn version(said: &str) -> Result<(u32, u32)> {
    let number = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut parts = number.unwrap_or_default().split('.').map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(format!("there is no version in what QEMU says of it: {said:?}").into()),
    }
}

/// Copies a file with its holes; shares blocks if the file system can.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    if ioctl_ficlone(&to, &from).is_ok() {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match seek(&from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            data => data?,
        };
        at = seek(&from, SeekFrom::Hole(data))?;
        seek(&from, SeekFrom::Start(data))?;
        seek(&to, SeekFrom::Start(data))?;
        io::copy(&mut (&from).take(at - data), &mut &to)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use machinery_testkit::guest::{self, Guest};
    use machinery_testkit::snapshot::SnapshotFormat;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn template_is_unchanged_when_machines_run_from_it() {
        let (dir, qemu) = (tempfile::tempdir().unwrap(), Qemu::find().unwrap());
        let master = guest::master(&qemu, Guest::Micro).unwrap();
        let machine = master.machine(dir.path(), "m", "127.0.0.1", SnapshotFormat::Plain).unwrap();
        let by_hand = ByHand::new(&qemu, &machine).unwrap();
        let ram = fs::read(&by_hand.template.ram).unwrap();
        for _ in 0..2 {
            let (vm, _) = by_hand.instant().unwrap();
            assert_eq!(machine.first_count(PATIENCE).unwrap(), master.snapshot_count().unwrap() + 1);
            vm.quit().unwrap();
            assert!(fs::read(&by_hand.template.ram).unwrap() == ram, "the template has changed");
        }
    }

    #[test]
    fn copy_keeps_content_and_holes() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut file = File::create(&from).unwrap();
        file.write_all(b"at the begin").unwrap();
        seek(&file, SeekFrom::Start(4 << 20)).unwrap();
        file.write_all(b"in between").unwrap();
        file.set_len(8 << 20).unwrap();
        file.sync_all().unwrap();
        copy(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() < 1 << 11);
    }

    #[test]
    fn versions() {
        assert_eq!(version("QEMU emulator version 7.2.22 (Debian 1:7.2)").unwrap(), (7, 2));
        assert_eq!(version("QEMU emulator version 10.0.2").unwrap(), (10, 0));
        assert!(version("QEMU").is_err());
    }
}
