//! One QEMU process, driven by hand.
//!
//! It is the little that making a snapshot needs, and the yardstick for a restore: no plugin, no
//! host, just QEMU and its monitor. The monitor is one end of a socket pair, given to QEMU as its
//! standard input: so there is no path to choose, and its end is QEMU's end. Snapshots go through
//! pipes, which every QEMU version takes as `fd:`.
//!
//! RAM that is a file shared with QEMU need not be in a snapshot: then only the devices are
//! [saved](Vm::save_devices), and [loaded](Vm::load_devices) into a QEMU that maps the file.
//!
//! The process dies with its [`Vm`], and with the thread that started it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use qapi::qmp;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};

use super::Qemu;
use super::monitor::{self, Monitor};
use super::serial::SerialWatch;
use crate::error::Context;
use crate::{Result, snapshot};

/// The placeholder for the disk in start arguments.
pub const DISK_PLACEHOLDER: &str = "%DISPOSABLE_DISK_PATH%";

/// Bytes a second. Left alone, QEMU saves at 128 MiB/s, as if a network were in between.
const BANDWIDTH: u64 = 1 << 40;

/// A running QEMU.
pub struct Vm {
    child: Child,
    monitor: Monitor,
}

/// What a snapshot has of a machine's RAM.
#[derive(Clone, Copy)]
enum Ram {
    /// All.
    Included,
    /// Only what is in no file that is shared with QEMU.
    Shared,
}

impl Vm {
    /// Starts QEMU with a machine's start arguments and `disk` in the place of the disposable disk.
    pub fn boot(qemu: &Qemu, start_args: &[String], disk: &Path) -> Result<Self> {
        Self::start(qemu, start_args, disk, &[])
    }

    /// Starts QEMU and lets the machine go on from the snapshot at `snapshot`.
    pub fn restore(qemu: &Qemu, start_args: &[String], disk: &Path, snapshot: &Path) -> Result<Self> {
        let mut vm = Self::start_for_incoming(qemu, start_args, disk, &[])?;
        vm.load(snapshot)?;
        vm.cont()?;
        Ok(vm)
    }

    /// Starts QEMU, with `more` arguments, for a machine that is [loaded](Self::load) later and is paused
    /// then.
    pub fn start_for_incoming(
        qemu: &Qemu,
        start_args: &[String],
        disk: &Path,
        more: &[&str],
    ) -> Result<Self> {
        Self::start(qemu, start_args, disk, &[&["-incoming", "defer", "-S"], more].concat())
    }

    /// Restores the way it is done by hand: the plain snapshot at `snapshot` comes in through `cat`.
    /// The yardstick for a restore.
    pub fn restore_through_cat(
        qemu: &Qemu,
        start_args: &[String],
        disk: &Path,
        snapshot: &Path,
    ) -> Result<Self> {
        let mut vm = Self::start_for_incoming(qemu, start_args, disk, &[])?;
        vm.prepare_migration(Ram::Included)?;
        vm.read_from(&format!("exec:cat '{}'", snapshot.display()))?;
        vm.cont()?;
        Ok(vm)
    }

    /// Halts the machine; the process stays.
    pub fn pause(&mut self) -> Result<()> {
        self.monitor.run(&qmp::stop {}).map(drop)
    }

    /// Lets a paused machine run.
    pub fn cont(&mut self) -> Result<()> {
        self.monitor.run(&qmp::cont {}).map(drop)
    }

    /// Lets a paused machine run, and waits until QEMU tells that it does.
    pub fn resume(&mut self) -> Result<()> {
        self.cont()?;
        self.monitor.wait_for_event(|event| matches!(event, qmp::Event::RESUME { .. }).then_some(()))
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) -> Result<()> {
        self.monitor.run(&qmp::system_powerdown {}).map(drop)
    }

    /// Waits until QEMU has ended by itself, for `timeout` at most: then it is killed and an error.
    pub fn wait(mut self, timeout: Duration) -> Result<()> {
        let process = self.process()?;
        let timeout = Timespec::try_from(timeout).context(|| "waiting for QEMU's end".to_owned())?;
        let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout));
        match ended.context(|| "waiting for QEMU's end".to_owned())? {
            0 => Err(self.monitor.failed("waiting for QEMU's end", "it goes on")),
            _ => self.child.wait().context(|| "waiting for QEMU's end".to_owned()).map(drop),
        }
    }

    /// Ends QEMU, whatever the machine does.
    pub fn quit(mut self) -> Result<()> {
        // It may be gone before it has been asked in full, or has answered.
        let _ = self.monitor.run(&qmp::quit {});
        self.wait(monitor::TIMEOUT)
    }

    /// Waits for something on the machine's serial port, as long as QEMU lives.
    pub(super) fn wait_for_serial<T>(
        &self,
        serial: &SerialWatch,
        timeout: Duration,
        find: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let process = self.process()?;
        serial
            .wait_for(timeout, Some(process.as_fd()), find)
            .map_err(|error| self.monitor.failed("booting the guest", &error))
    }

    /// `length` bytes of the machine's memory, from the physical address `from` on.
    pub fn memory(&mut self, from: u64, length: u64) -> Result<Vec<u8>> {
        let what = || "reading guest memory".to_owned();
        let file = tempfile::NamedTempFile::new().context(what)?;
        let filename = file.path().to_string_lossy().into_owned();
        self.monitor.run(&qmp::pmemsave { filename, val: from, size: length })?;
        std::fs::read(file.path()).context(what)
    }

    /// Writes the paused machine's state to the file at `path`, as a plain snapshot.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.write(path, Ram::Included)
    }

    /// Writes the paused machine's state to the file at `path`, without the RAM that is a shared file.
    pub fn save_devices(&mut self, path: &Path) -> Result<()> {
        self.write(path, Ram::Shared)
    }

    fn write(&mut self, path: &Path, ram: Ram) -> Result<()> {
        let what = || format!("writing the snapshot {}", path.display());
        let (mut reader, writer) = io::pipe().context(what)?;
        let mut file = File::create(path).context(what)?;
        let copying = thread::spawn(move || io::copy(&mut reader, &mut file));
        self.monitor.pass_descriptor("snapshot", writer.into())?;
        self.prepare_migration(ram)?;
        let uri = Some("fd:snapshot".to_owned());
        self.monitor.run(&qmp::migrate { channels: None, detach: None, resume: None, uri })?;
        self.wait_for_migration()?;
        ended(copying).context(what)
    }

    /// Loads the snapshot at `path`, in any format.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let what = || format!("reading the snapshot {}", path.display());
        let mut stream = snapshot::read(path)?;
        let (reader, mut writer) = io::pipe().context(what)?;
        let copying = thread::spawn(move || io::copy(&mut stream, &mut writer));
        self.monitor.pass_descriptor("snapshot", reader.into())?;
        self.prepare_migration(Ram::Included)?;
        self.read_from("fd:snapshot")?;
        ended(copying).context(what)
    }

    /// Loads what [`save_devices`](Self::save_devices) wrote, in the quickest way: QEMU reads the file
    /// itself. Since 8.2 it knows files `by_name`; before, it takes one that is open.
    pub fn load_devices(&mut self, path: &Path, by_name: bool) -> Result<()> {
        self.prepare_migration(Ram::Shared)?;
        if by_name {
            return self.read_from(&format!("file:{}", path.display()));
        }
        let file = File::open(path).context(|| format!("opening {}", path.display()))?;
        self.monitor.pass_descriptor("devices", file.into())?;
        self.read_from("fd:devices")
    }

    fn read_from(&mut self, uri: &str) -> Result<()> {
        let uri = Some(uri.to_owned());
        self.monitor.run(&qmp::migrate_incoming { channels: None, exit_on_error: None, uri })?;
        self.wait_for_migration()
    }

    fn start(qemu: &Qemu, start_args: &[String], disk: &Path, more: &[&str]) -> Result<Self> {
        let what = || format!("starting {}", qemu.system.display());
        let (ours, theirs) = UnixStream::pair().context(what)?;
        let errors = tempfile::tempfile().context(what)?;
        let mut command = Command::new(&qemu.system);
        command.args(with_disk(start_args, disk)).args(more);
        if start_args.iter().any(|arg| arg.starts_with("hda-")) && qemu.needs_audio_backend()? {
            command.args(["-audio", "none"]);
        }
        command.args([
            "-chardev",
            "socket,id=testkit-monitor,fd=0",
            "-mon",
            "chardev=testkit-monitor,mode=control",
        ]);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        command.stderr(errors.try_clone().context(what)?);
        die_with_this_thread(&mut command);
        let mut child = command.spawn().context(what)?;
        // The command still holds QEMU's end of the socket: nobody would see it close.
        drop(command);
        match Monitor::connect(ours, errors) {
            Ok(monitor) => Ok(Self { child, monitor }),
            Err(error) => {
                // A QEMU that has ended cannot be killed.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Asks for events and for all the speed there is.
    fn prepare_migration(&mut self, ram: Ram) -> Result<()> {
        let on = |capability| qmp::MigrationCapabilityStatus { capability, state: true };
        let mut capabilities = vec![on(qmp::MigrationCapability::events)];
        if let Ram::Shared = ram {
            capabilities.push(on(qmp::MigrationCapability::x_ignore_shared));
        }
        self.monitor.run(&qmp::migrate_set_capabilities { capabilities })?;
        let parameters = qmp::MigrateSetParameters { max_bandwidth: Some(BANDWIDTH), ..Default::default() };
        self.monitor.run(&qmp::migrate_set_parameters(parameters)).map(drop)
    }

    /// Waits for the end of a migration, in or out.
    fn wait_for_migration(&mut self) -> Result<()> {
        match self.monitor.wait_for_event(migration_end)? {
            qmp::MigrationStatus::failed => Err(self.monitor.failed("migration", "QEMU says it failed")),
            _ => Ok(()),
        }
    }

    fn process(&self) -> Result<OwnedFd> {
        let pid = Pid::from_child(&self.child);
        pidfd_open(pid, PidfdFlags::empty())
            .context(|| format!("watching the QEMU process {}", self.child.id()))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn with_disk(start_args: &[String], disk: &Path) -> Vec<String> {
    // A comma ends an option's value unless it is doubled.
    let disk = disk.to_string_lossy().replace(',', ",,");
    start_args.iter().map(|arg| arg.replace(DISK_PLACEHOLDER, &disk)).collect()
}

fn die_with_this_thread(command: &mut Command) {
    let ask = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: between fork and exec only what is async-signal-safe is allowed; this is one system
    // call, without allocation or lock.
    unsafe { command.pre_exec(ask) };
}

/// How a migration ended, if the event tells that.
fn migration_end(event: &qmp::Event) -> Option<qmp::MigrationStatus> {
    use qmp::MigrationStatus::{completed, failed};
    match event {
        qmp::Event::MIGRATION { data, .. } => Some(data.status).filter(|it| matches!(it, completed | failed)),
        _ => None,
    }
}

fn ended(copying: thread::JoinHandle<io::Result<u64>>) -> io::Result<()> {
    copying.join().map_err(|_| io::Error::other("the copying thread panicked"))?.map(drop)
}
