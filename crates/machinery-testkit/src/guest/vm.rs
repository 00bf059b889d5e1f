//! One QEMU process, driven by hand.
//!
//! It makes snapshots, and is the baseline for restores: QEMU and its monitor, without plugin and host. The
//! monitor is one end of a socket pair, which QEMU gets as its standard input. It therefore needs no path,
//! and closes when QEMU ends. Snapshots pass through pipes, as `fd:`, which every QEMU version supports.
//!
//! RAM that is a file shared with QEMU need not be in a snapshot. Only the devices are then
//! [saved](Vm::save_devices), and [loaded](Vm::load_devices) into a QEMU that maps the file.
//!
//! The process is killed with its [`Vm`], and with the thread that started it.

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

/// Bytes per second. QEMU's default, 128 MiB/s, is meant for a network.
const BANDWIDTH: u64 = 1 << 40;

/// A running QEMU.
pub struct Vm {
    child: Child,
    monitor: Monitor,
}

/// The part of a machine's RAM that a snapshot contains.
#[derive(Clone, Copy)]
enum Ram {
    /// The whole RAM.
    Included,
    /// RAM that is not in a file shared with QEMU.
    Shared,
}

impl Vm {
    /// Starts QEMU with a machine's start arguments, and `disk` as the disposable disk.
    pub fn boot(qemu: &Qemu, start_args: &[String], disk: &Path) -> Result<Self> {
        Self::start(qemu, start_args, disk, &[])
    }

    /// Starts QEMU and runs the machine from the snapshot at `snapshot`.
    pub fn restore(qemu: &Qemu, start_args: &[String], disk: &Path, snapshot: &Path) -> Result<Self> {
        let mut vm = Self::start_for_incoming(qemu, start_args, disk, &[])?;
        vm.load(snapshot)?;
        vm.cont()?;
        Ok(vm)
    }

    /// Starts QEMU, with `more` arguments, for a machine that is [loaded](Self::load) later and then paused.
    pub fn start_for_incoming(
        qemu: &Qemu,
        start_args: &[String],
        disk: &Path,
        more: &[&str],
    ) -> Result<Self> {
        Self::start(qemu, start_args, disk, &[&["-incoming", "defer", "-S"], more].concat())
    }

    /// Restores like an operator at a shell: QEMU reads the plain snapshot through `cat`. The baseline for
    /// plain restores.
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

    /// Pauses the machine.
    pub fn pause(&mut self) -> Result<()> {
        self.monitor.run(&qmp::stop {}).map(drop)
    }

    /// Resumes a paused machine.
    pub fn cont(&mut self) -> Result<()> {
        self.monitor.run(&qmp::cont {}).map(drop)
    }

    /// Resumes a paused machine, and waits for QEMU's event.
    pub fn resume(&mut self) -> Result<()> {
        self.cont()?;
        self.monitor.wait_for_event(|event| matches!(event, qmp::Event::RESUME { .. }).then_some(()))
    }

    /// Presses the power button.
    pub fn press_power_button(&mut self) -> Result<()> {
        self.monitor.run(&qmp::system_powerdown {}).map(drop)
    }

    /// Waits until QEMU has ended. Kills it after `timeout`, and fails.
    pub fn wait(mut self, timeout: Duration) -> Result<()> {
        let process = self.process()?;
        let timeout = Timespec::try_from(timeout).context(|| "waiting for QEMU's end".to_owned())?;
        let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout));
        match ended.context(|| "waiting for QEMU's end".to_owned())? {
            0 => Err(self.monitor.failed("waiting for QEMU's end", "it still runs")),
            _ => self.child.wait().context(|| "waiting for QEMU's end".to_owned()).map(drop),
        }
    }

    /// Ends QEMU in any state of the machine.
    pub fn quit(mut self) -> Result<()> {
        // QEMU may end before it answers.
        let _ = self.monitor.run(&qmp::quit {});
        self.wait(monitor::TIMEOUT)
    }

    /// Waits for output on the machine's serial port, while QEMU runs.
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

    /// Returns `length` bytes of the machine's memory from the physical address `from`.
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

    /// Writes the paused machine's state to the file at `path`, without RAM in a shared file.
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

    /// Loads the file of [`save_devices`](Self::save_devices). QEMU reads it itself: since 8.2 `by_name`,
    /// earlier from a descriptor.
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
        // The command still holds QEMU's end of the socket, which would stay open when QEMU ends.
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

    /// Enables events, and removes the bandwidth limit.
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

    /// Waits for the end of an incoming or outgoing migration.
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
        // It may have ended already.
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

/// Returns the final status of a migration, if the event has it.
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
