//! The machinery host as a child process, and its command line.
//!
//! ```text
//! start ─▶ READY=1 on a notify socket of its own ─▶ RunningHost ─▶ terminate, kill, drop
//!      └─▶ it ended before that: an error with all it said
//! ```
//!
//! Nothing here is left behind: a process that is still there when its owner is dropped is told to
//! end, then killed with all it has started; and it is told to end with the thread that started it, a
//! host with the whole process, also when that is killed.

use std::fs::{self, File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open, set_parent_process_death_signal,
};
use tempfile::TempDir;

use crate::client::Client;
use crate::error::{Context, Error};
use crate::scratch::ScratchCwd;
use crate::{Result, artifacts};

/// What takes longer than this is taken for stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a process gets to end in good order when its owner is dropped.
const GOOD_ORDER: Duration = Duration::from_secs(10);

/// `cuckoo-machinery` for that CWD, with the plugins that were built.
pub fn command(cwd: &ScratchCwd) -> Result<Command> {
    let mut command = Command::new(artifacts::program()?);
    command.env_remove("CUCKOO_CWD").env_remove("CUCKOO_MACHINERY_PLUGINS").env_remove("NOTIFY_SOCKET");
    command.arg("--cwd").arg(cwd.root()).arg("--plugin-dir").arg(artifacts::folder()?);
    Ok(command)
}

/// A command that has ended.
#[derive(Debug, Clone)]
pub struct CommandOutput {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// Runs `cuckoo-machinery` with these arguments to its end.
pub fn run(cwd: &ScratchCwd, arguments: &[&str]) -> Result<CommandOutput> {
    let mut command = command(cwd)?;
    command.args(arguments);
    run_command(command)
}

/// Runs any command to its end, which must come soon.
pub fn run_command(command: Command) -> Result<CommandOutput> {
    let mut process = Process::spawn(command)?;
    let code = process.wait(PATIENCE)?.code();
    Ok(CommandOutput { code, stdout: process.stdout(), stderr: process.stderr() })
}

/// A host that serves.
#[derive(Debug)]
pub struct RunningHost {
    process: Process,
    notify: UnixDatagram,
    socket: PathBuf,
}

impl RunningHost {
    /// Starts a host and waits until it is ready.
    pub fn start(cwd: &ScratchCwd) -> Result<Self> {
        Self::start_with(cwd, |_| ())
    }

    /// Starts a host; `change` may add to its command line (which ends in `serve`) and environment.
    pub fn start_with(cwd: &ScratchCwd, change: impl FnOnce(&mut Command)) -> Result<Self> {
        let mut command = command(cwd)?;
        command.arg("serve");
        change(&mut command);
        let what = || "making a notify socket".to_owned();
        // Its own folder is short; the CWD may be too long for an address.
        let dir = scratch()?;
        let address = dir.path().join("notify");
        let notify = UnixDatagram::bind(&address).context(what)?;
        // A host may run as another user.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o711)).context(what)?;
        fs::set_permissions(&address, Permissions::from_mode(0o666)).context(what)?;
        command.env("NOTIFY_SOCKET", address);
        let mut process = Process::spawn_in(&mut command, dir)?;
        process.guard = Some(Guard::of(&process.child)?);
        let host = RunningHost { process, notify, socket: cwd.socket() };
        host.wait_for_notification("READY=1")?;
        Ok(host)
    }

    /// Waits until it tells its service manager `word`, such as `STOPPING=1`.
    pub fn wait_for_notification(&self, word: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            let mut fds =
                [PollFd::new(&self.notify, PollFlags::IN), PollFd::new(&self.process.fd, PollFlags::IN)];
            wait_for(&mut fds, PATIENCE.saturating_sub(start.elapsed()))?;
            if fds[0].revents().contains(PollFlags::IN) {
                let mut message = [0; 4096];
                let length = self.notify.recv(&mut message).context(|| format!("waiting for {word}"))?;
                if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == word) {
                    return Ok(());
                }
            } else {
                let what = if fds[1].revents().is_empty() { "did not come" } else { "the host ended first" };
                return Err(Error::new(format!("waiting for {word}: {what}. It said:\n{}", self.log())));
            }
        }
    }

    /// A new connection to it.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait(PATIENCE)
    }

    /// Asks it to end, as a service manager does, and waits until it has.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// What its process holds now.
    ///
    /// # Errors
    /// It has ended.
    pub fn resources(&self) -> Result<ProcessResources> {
        ProcessResources::of(self.pid())
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.process.stderr()
    }
}

/// What a process holds.
#[derive(Debug, Clone)]
pub struct ProcessResources {
    /// Open descriptors.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Memory that is its own or shared, in KiB.
    pub resident_kib: usize,
    /// The numbers of its children, with spaces between.
    pub children: String,
}

impl ProcessResources {
    /// It has no children, and otherwise hardly more than it held `before`: what grows with every round
    /// of many is much more.
    ///
    /// # Panics
    /// It has.
    #[track_caller]
    pub fn assert_no_growth_since(&self, before: &ProcessResources) {
        assert_eq!(self.children, "", "the host has children left");
        assert!(self.files <= before.files + 8, "{before:?}, {self:?}");
        assert!(self.threads <= before.threads + 8, "{before:?}, {self:?}");
        assert!(self.resident_kib <= before.resident_kib * 3 / 2 + 32 * 1024, "{before:?}, {self:?}");
    }

    fn of(pid: u32) -> Result<ProcessResources> {
        let proc = format!("/proc/{pid}");
        let what = || format!("reading {proc}");
        let list = |name: &str| fs::read_dir(format!("{proc}/{name}")).context(what);
        let tasks: Vec<_> = list("task")?.flatten().collect();
        let status = fs::read_to_string(format!("{proc}/status")).context(what)?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        Ok(ProcessResources {
            files: list("fd")?.count(),
            threads: tasks.len(),
            resident_kib: resident.trim().trim_end_matches(" kB").parse().context(what)?,
            // A thread may end meanwhile; its children are another's then.
            children: tasks
                .iter()
                .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default())
                .collect(),
        })
    }
}

/// A child whose output goes to files, so that it never waits for a reader.
#[derive(Debug)]
struct Process {
    child: Child,
    fd: OwnedFd,
    /// Its end, once it was waited for; from then on its number may be another's.
    ended: Option<ExitStatus>,
    guard: Option<Guard>,
    dir: TempDir,
}

/// Tells a host to end when this process is gone. The kernel would tell it each time that a thread ends
/// which is its parent by then; and who is told twice ends at once, in no order.
#[derive(Debug)]
struct Guard(Child);

impl Guard {
    fn of(host: &Child) -> Result<Self> {
        let mut sh = Command::new("sh");
        // It reads to the end of a pipe which this process holds open.
        sh.args(["-c", r#"read -r _; kill -TERM "$1""#, "guard", &host.id().to_string()]);
        sh.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        sh.spawn().map(Guard).context(|| "guarding a host".to_owned())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // What fails here has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn spawn(mut command: Command) -> Result<Self> {
        Self::spawn_in(end_with_this_thread(&mut command), scratch()?)
    }

    fn spawn_in(command: &mut Command, dir: TempDir) -> Result<Self> {
        let what = || format!("starting {}", command.get_program().display());
        let stdout = File::create(dir.path().join("stdout")).context(what)?;
        let stderr = File::create(dir.path().join("stderr")).context(what)?;
        let started = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0).spawn();
        let child = started.context(|| format!("starting {}", command.get_program().display()))?;
        // Nobody has waited for the child yet, so its number is still its own.
        let fd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .context(|| format!("watching the process {}", child.id()))?;
        Ok(Process { child, fd, ended: None, guard: None, dir })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        if self.ended.is_some() {
            return Err(Error::new("the process has ended and hears no signal"));
        }
        kill_process(Pid::from_child(&self.child), signal)
            .context(|| format!("sending {signal:?} to the process {}", self.child.id()))
    }

    fn ends_within(&self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        wait_for(&mut fds, limit)?;
        Ok(!fds[0].revents().is_empty())
    }

    fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if !self.ends_within(limit)? {
            let said = format!("{}{}", self.stdout(), self.stderr());
            return Err(Error::new(format!("the process does not end within {limit:?}. It said:\n{said}")));
        }
        // From then on its number may be another's.
        self.guard = None;
        let status = self.child.wait().context(|| "waiting for the process".to_owned())?;
        self.ended = Some(status);
        Ok(status)
    }

    fn stdout(&self) -> String {
        self.read("stdout")
    }

    fn stderr(&self) -> String {
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
        // What fails here has ended already, which is what is wanted.
        let _ = self.signal(Signal::TERM);
        let _ = self.ends_within(GOOD_ORDER);
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        self.guard = None;
        let _ = self.child.wait();
    }
}

fn scratch() -> Result<TempDir> {
    let dir = tempfile::Builder::new().prefix("machinery-run.").tempdir();
    dir.context(|| "making a folder for a process".to_owned())
}

fn wait_for(fds: &mut [PollFd<'_>], limit: Duration) -> Result<()> {
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
