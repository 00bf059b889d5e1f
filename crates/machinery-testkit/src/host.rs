//! The machinery host as a child process.
//!
//! ```text
//! start ─▶ READY=1 on a notify socket of its own ─▶ RunningHost ─▶ terminate, kill, drop
//!      └─▶ the host ended before that: an error with its output
//! ```

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;

use crate::client::Client;
use crate::error::{Context, Error};
use crate::process::{self, Process, TIMEOUT};
use crate::scratch::ScratchCwd;
use crate::{Result, artifacts};

pub use crate::process::{CommandOutput, run_command};
pub use crate::resources::ProcessResources;

/// The pause between two looks at the log, for whose lines there is no event.
const LOG_INTERVAL: Duration = Duration::from_millis(50);
/// The time until an idle host must have become quiet: the longest timer of an ended call lasts about a minute.
const QUIET_TIMEOUT: Duration = Duration::from_secs(150);

/// Returns the command `cuckoo-machinery` for that CWD, with the built plugins.
pub fn command(cwd: &ScratchCwd) -> Result<Command> {
    let mut command = Command::new(artifacts::program()?);
    command.env_remove("CUCKOO_CWD").env_remove("CUCKOO_MACHINERY_PLUGINS").env_remove("NOTIFY_SOCKET");
    command.arg("--cwd").arg(cwd.root()).arg("--plugin-dir").arg(artifacts::folder()?);
    Ok(command)
}

/// Runs `cuckoo-machinery` with these arguments to its end.
pub fn run(cwd: &ScratchCwd, arguments: &[&str]) -> Result<CommandOutput> {
    let mut command = command(cwd)?;
    command.args(arguments);
    run_command(command)
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

    /// Starts a host; `change` may change its command line (which ends in `serve`) and environment.
    pub fn start_with(cwd: &ScratchCwd, change: impl FnOnce(&mut Command)) -> Result<Self> {
        let mut command = command(cwd)?;
        command.arg("serve");
        change(&mut command);
        let dir = process::make_folder()?;
        let notify = process::notify_socket(&mut command, &dir)?;
        let mut process = Process::spawn_in(&mut command, dir)?;
        process.end_with_this_process()?;
        let host = RunningHost { process, notify, socket: cwd.socket() };
        host.wait_for_notification(process::READY)?;
        Ok(host)
    }

    /// Waits for the notification `word` to the service manager, such as `STOPPING=1`.
    pub fn wait_for_notification(&self, word: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            let mut fds =
                [PollFd::new(&self.notify, PollFlags::IN), PollFd::new(self.process.fd(), PollFlags::IN)];
            process::wait_for(&mut fds, TIMEOUT.saturating_sub(start.elapsed()))?;
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

    /// Waits until the host has executed its program again, and connects to the new one.
    pub fn wait_for_replacement(&self) -> Result<Client> {
        self.wait_for_notification(process::READY)?;
        self.client()
    }

    /// Returns the next notification to the service manager, unless none comes within that time.
    pub fn next_notification(&self, limit: Duration) -> Result<Option<String>> {
        let mut fds = [PollFd::new(&self.notify, PollFlags::IN)];
        process::wait_for(&mut fds, limit)?;
        if fds[0].revents().is_empty() {
            return Ok(None);
        }
        let mut message = [0; 4096];
        let length = self.notify.recv(&mut message).context(|| "waiting for a notification".to_owned())?;
        Ok(Some(String::from_utf8_lossy(&message[..length]).into_owned()))
    }

    /// Waits for a line of the log with these words, and returns it.
    pub fn wait_for_log(&self, words: &[&str]) -> Result<String> {
        let start = Instant::now();
        loop {
            let log = self.log();
            let line = log.lines().find(|line| words.iter().all(|word| line.contains(word)));
            match line {
                Some(line) => return Ok(line.to_owned()),
                None if start.elapsed() > TIMEOUT => {
                    return Err(Error::new(format!("no line of the log has {words:?}. It said:\n{log}")));
                }
                None => thread::sleep(LOG_INTERVAL),
            }
        }
    }

    /// Connects to the host.
    pub fn client(&self) -> Result<Client> {
        Client::connect(&self.socket)
    }

    /// Sends the host a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Waits for the host's end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.process.wait(TIMEOUT)
    }

    /// Sends SIGTERM, and waits for the host's end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    /// Kills the host, and waits for its end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait()
    }

    /// Returns the host's process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Returns the resources of the host's process.
    ///
    /// # Errors
    /// The host has ended.
    pub fn resources(&self) -> Result<ProcessResources> {
        ProcessResources::of(self.pid())
    }

    /// Waits until no thread of the host has run for that time, and returns the number of its threads. A host that polls at
    /// shorter intervals is never quiet. The ends of earlier work are no polling: the runtime keeps an idle thread for 10 s,
    /// and may wake once for a timer that was cancelled.
    ///
    /// # Errors
    /// The host has ended, or it is not quiet.
    pub fn wait_until_quiet(&self, time: Duration) -> Result<usize> {
        let begun = Instant::now();
        let mut activity = self.activity()?;
        while begun.elapsed() < QUIET_TIMEOUT {
            // Time itself is the condition here.
            thread::sleep(time);
            let before = std::mem::replace(&mut activity, self.activity()?);
            if activity == before {
                return Ok(activity.len());
            }
        }
        Err(Error::new(format!("the idle host has run in each period of {time:?}: {activity:?}")))
    }

    /// Returns what each thread of the host has done so far. Equal values mean that none has run meanwhile. Source:
    /// `/proc/<pid>/schedstat` in the kernel's sched-stats.rst.
    fn activity(&self) -> Result<Vec<(PathBuf, String)>> {
        let folder = PathBuf::from(format!("/proc/{}/task", self.pid()));
        let what = || format!("reading {}", folder.display());
        let read =
            |task: PathBuf| Ok((task.clone(), fs::read_to_string(task.join("schedstat")).context(what)?));
        let tasks = fs::read_dir(&folder).context(what)?.flatten().map(|task| read(task.path()));
        let mut activity = tasks.collect::<Result<Vec<_>>>()?;
        activity.sort();
        Ok(activity)
    }

    /// Returns the host's log.
    pub fn log(&self) -> String {
        self.process.stderr()
    }
}
