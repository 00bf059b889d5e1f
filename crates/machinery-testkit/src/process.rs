//! Child processes that never outlive their test.
//!
//! A process whose owner is dropped gets SIGTERM, and after [`TERMINATION_TIMEOUT`] SIGKILL together with its
//! process group. A command also gets SIGTERM when the thread that started it ends; a host when this process
//! ends, even by SIGKILL.

use std::fs::{self, File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open, set_parent_process_death_signal,
};
use tempfile::TempDir;

use crate::Result;
use crate::error::{Context, Error};

/// The maximum duration of a command, of a host's start and of its end.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The notification of a host that serves.
pub const READY: &str = "READY=1";

/// The time between SIGTERM and SIGKILL for a process whose owner is dropped.
const TERMINATION_TIMEOUT: Duration = Duration::from_secs(10);

/// The outcome of a command.
#[derive(Debug, Clone)]
pub struct CommandOutput {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The standard output.
    pub stdout: String,
    /// The standard error.
    pub stderr: String,
}

/// Runs any command to its end, with a timeout. A host that serves, although it should have refused to, is an error at
/// once.
pub fn run_command(mut command: Command) -> Result<CommandOutput> {
    let dir = make_folder()?;
    let notify = notify_socket(&mut command, &dir)?;
    let mut process = Process::spawn_in(end_with_this_thread(&mut command), dir)?;
    let begun = Instant::now();
    loop {
        let mut fds = [PollFd::new(process.fd(), PollFlags::IN), PollFd::new(&notify, PollFlags::IN)];
        wait_for(&mut fds, TIMEOUT.saturating_sub(begun.elapsed()))?;
        let [ended, notified] = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        if ended || !notified {
            break;
        }
        let mut message = [0; 4096];
        let length = notify.recv(&mut message).context(|| "waiting for a command".to_owned())?;
        if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == READY) {
            let said = process.stderr();
            return Err(Error::new(format!("the host serves, and was to end by itself. It said:\n{said}")));
        }
    }
    let code = process.wait(TIMEOUT.saturating_sub(begun.elapsed()))?.code();
    Ok(CommandOutput { code, stdout: process.stdout(), stderr: process.stderr() })
}

/// Makes a socket for the command's notifications to the service manager.
pub fn notify_socket(command: &mut Command, dir: &TempDir) -> Result<UnixDatagram> {
    let what = || "making a notify socket".to_owned();
    // The CWD's path may be too long for a socket address.
    let address = dir.path().join("notify");
    let notify = UnixDatagram::bind(&address).context(what)?;
    // A host may run as another user.
    fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).context(what)?;
    fs::set_permissions(&address, Permissions::from_mode(0o666)).context(what)?;
    command.env("NOTIFY_SOCKET", address);
    Ok(notify)
}

/// A child process whose output goes to files, so that it never waits for a reader.
#[derive(Debug)]
pub struct Process {
    child: Child,
    fd: OwnedFd,
    /// The exit status, once waited for; the process id may be reused from then on.
    ended: Option<ExitStatus>,
    guard: Option<Guard>,
    dir: TempDir,
}

/// Sends a host SIGTERM when this process ends. The kernel's parent-death signal would be sent again whenever
/// a parent thread ends, and a second SIGTERM makes the host exit at once.
#[derive(Debug)]
struct Guard(Child);

impl Guard {
    fn of(host: &Child) -> Result<Self> {
        let mut sh = Command::new("sh");
        // The shell reads a pipe that this process holds open.
        sh.args(["-c", r#"read -r _; kill -TERM "$1""#, "guard", &host.id().to_string()]);
        sh.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        sh.spawn().map(Guard).context(|| "guarding a host".to_owned())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The shell may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    pub fn spawn_in(command: &mut Command, dir: TempDir) -> Result<Self> {
        let what = || format!("starting {}", command.get_program().display());
        let stdout = File::create(dir.path().join("stdout")).context(what)?;
        let stderr = File::create(dir.path().join("stderr")).context(what)?;
        let started = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0).spawn();
        let child = started.context(|| format!("starting {}", command.get_program().display()))?;
        // The child has not been waited for, so its process id is valid.
        let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .context(|| format!("watching the process {}", child.id()))?;
        Ok(Process { child, fd, ended: None, guard: None, dir })
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended.is_some() {
            return Err(Error::new("the process has ended and hears no signal"));
        }
        kill_process(Pid::from_child(&self.child), signal)
            .context(|| format!("sending {signal:?} to the process {}", self.child.id()))
    }

    /// Makes the process end when this process ends, however it ends.
    pub fn end_with_this_process(&mut self) -> Result<()> {
        self.guard = Some(Guard::of(&self.child)?);
        Ok(())
    }

    /// Returns the process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the process's pidfd.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    fn ends_within(&self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        wait_for(&mut fds, limit)?;
        Ok(!fds[0].revents().is_empty())
    }

    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if !self.ends_within(limit)? {
            let said = format!("{}{}", self.stdout(), self.stderr());
            return Err(Error::new(format!("the process does not end within {limit:?}. It said:\n{said}")));
        }
        // The process id may be reused after the wait.
        self.guard = None;
        let status = self.child.wait().context(|| "waiting for the process".to_owned())?;
        self.ended = Some(status);
        Ok(status)
    }

    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    pub fn stderr(&self) -> String {
        self.read("stderr")
    }

    fn read(&self, name: &str) -> String {
        let read = fs::read(self.dir.path().join(name));
        read.map_or_else(|error| error.to_string(), |text| String::from_utf8_lossy(&text).into_owned())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_some() {
            return;
        }
        // The process may have ended already.
        let _ = self.signal(Signal::TERM);
        let _ = self.ends_within(TERMINATION_TIMEOUT);
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        self.guard = None;
        let _ = self.child.wait();
    }
}

pub fn make_folder() -> Result<TempDir> {
    let dir = tempfile::Builder::new().prefix("machinery-run.").tempdir();
    dir.context(|| "making a folder for a process".to_owned())
}

pub fn wait_for(fds: &mut [PollFd<'_>], limit: Duration) -> Result<()> {
    let what = || "waiting for a process".to_owned();
    let limit = Timespec::try_from(limit).context(what)?;
    retry_on_intr(|| poll(fds, Some(&limit))).context(what).map(drop)
}

fn end_with_this_thread(command: &mut Command) -> &mut Command {
    let ask = || Ok(set_parent_process_death_signal(Some(Signal::TERM))?);
    // SAFETY: between fork and exec only what is async-signal-safe is allowed; this is one system
    // call, without allocation or lock.
    unsafe { command.pre_exec(ask) }
}
