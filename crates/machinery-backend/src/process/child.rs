//! One process: its start, and its end.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::console::{Console, LineKind};
use super::end::End;
use super::group;
use super::handle::Handle;
use super::identity::ProcessIdentity;

/// A process of this plugin, which has to be ended and waited for.
#[derive(Debug)]
pub struct Process {
    /// The child; none of an adopted process.
    child: Option<Child>,
    handle: Arc<Handle>,
}

fn pipe() -> Result<(PipeReader, PipeWriter)> {
    io::pipe().map_err(|error| no_pipe(&error))
}

/// Opens the pipe that is the stderr of a process, for reading. Anything else is left alone: to open a terminal or a pipe
/// with a name may wait. Source: proc_pid_fd(5).
fn stderr_of(process: i32) -> Option<File> {
    let path = format!("/proc/{process}/fd/2");
    let is_pipe = std::fs::metadata(&path).is_ok_and(|found| found.file_type().is_fifo());
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let open = || File::options().read(true).custom_flags(flags.bits().cast_signed()).open(&path).ok();
    is_pipe.then(open).flatten()
}

fn no_pipe(error: &io::Error) -> Error {
    Error::environment(format!("cannot make a pipe: {error}"))
}

impl Process {
    /// Starts the process with an empty stdin, as the leader of a group of its own. Its stderr becomes its console, and
    /// its stdout is discarded; `kind_of` classifies the lines of the console. Make the command with
    /// [`machinery::command`].
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(mut command: Command, machine: &str, kind_of: fn(&str) -> LineKind) -> Result<Process> {
        let (console, stderr) = pipe()?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        Process::spawn(command, console.into(), None, machine, kind_of)
    }

    /// Starts the process as [`start`](Process::start) does, and a helper in its group, which has the same console and is
    /// ended with it.
    ///
    /// # Errors
    /// One of them cannot be started. Neither remains then.
    pub fn start_with_helper(
        mut command: Command,
        helper: Option<Command>,
        machine: &str,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Process> {
        let Some(mut helper) = helper else { return Process::start(command, machine, kind_of) };
        let (console, stderr) = pipe()?;
        helper.stderr(stderr.try_clone().map_err(|error| no_pipe(&error))?);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let process = Process::spawn(command, console.into(), None, machine, kind_of)?;
        helper.process_group(process.handle.pid.cast_signed()).stdin(Stdio::null()).stdout(Stdio::null());
        // Reaped with the rest of the group.
        match helper.spawn() {
            Ok(_) => Ok(process),
            Err(error) => {
                process.end(Duration::ZERO);
                Err(Error::io("run", Path::new(helper.get_program()), &error))
            }
        }
    }

    /// Starts the process as [`start`](Process::start) does, with its stdout in its console as well.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_with_stdout(
        mut command: Command,
        machine: &str,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Process> {
        command.stdin(Stdio::null());
        Process::spawn_with_stdout(command, None, machine, kind_of)
    }

    /// Starts the process as [`start_with_stdout`](Process::start_with_stdout) does. It takes commands on its stdin:
    /// [`Handle::ask`].
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_with_commands(
        mut command: Command,
        machine: &str,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Process> {
        let (stdin, commands) = pipe()?;
        command.stdin(stdin);
        Process::spawn_with_stdout(command, Some(commands), machine, kind_of)
    }

    fn spawn_with_stdout(
        mut command: Command,
        commands: Option<PipeWriter>,
        machine: &str,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Process> {
        let (console, stderr) = pipe()?;
        let stdout = stderr.try_clone().map_err(|error| no_pipe(&error))?;
        command.stdout(stdout).stderr(stderr);
        Process::spawn(command, console.into(), commands, machine, kind_of)
    }

    fn spawn(
        mut command: Command,
        console: OwnedFd,
        commands: Option<PipeWriter>,
        machine: &str,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Process> {
        // In a group of its own, it gets no signal from the host's terminal, and its children can be ended with it.
        let spawned = command.process_group(0).spawn();
        let program = Path::new(command.get_program()).to_owned();
        let mut child = spawned.map_err(|error| {
            let failed = Error::io("run", &program, &error);
            match command.get_current_dir().filter(|folder| !folder.is_dir()) {
                Some(folder) => failed.detail(&format!("there is no folder {}", folder.display())),
                None => failed,
            }
        })?;
        // The command holds the writing end of the console, which would never end.
        drop(command);
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(io::Error::from);
        let console = Console::follow(console, machine, kind_of);
        match (pidfd, console) {
            (Ok(pidfd), Ok(console)) => {
                let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let ended = AtomicBool::new(false);
                let commands = commands.map(Mutex::new);
                let handle = Handle { pid: child.id(), pidfd, ended, program: name, console, commands };
                Ok(Process { child: Some(child), handle: Arc::new(handle) })
            }
            (Err(error), _) | (_, Err(error)) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(Error::environment(format!("cannot watch the process {}: {error}", program.display())))
            }
        }
    }

    /// Adopts a process that an earlier host has started; none if it has ended. Its stderr becomes its console, where this
    /// user may read it.
    ///
    /// # Errors
    /// The thread of the console cannot be started.
    pub fn adopt(
        identity: &ProcessIdentity,
        program: &str,
        machine: &str,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Option<Process>> {
        let number = identity.number();
        let Some(pidfd) = identity.open() else {
            identity.reap();
            return Ok(None);
        };
        let console = match stderr_of(number) {
            // Only now it is certain that the descriptor was that of this process.
            Some(stderr) if identity.open().is_some() => stderr.into(),
            // Nothing is ever read from it.
            _ => pipe()?.0.into(),
        };
        let console = Console::follow(console, machine, kind_of)
            .map_err(|error| Error::environment(format!("cannot watch the process {number}: {error}")))?;
        let (pid, ended, program) = (number.cast_unsigned(), AtomicBool::new(false), program.to_owned());
        let handle = Handle { pid, pidfd, ended, program, console, commands: None };
        Ok(Some(Process { child: None, handle: Arc::new(handle) }))
    }

    /// Returns the identity of the process, by which a later host can adopt it.
    pub fn identity(&self) -> Option<ProcessIdentity> {
        ProcessIdentity::of(self.pid()?)
    }

    fn pid(&self) -> Option<Pid> {
        Pid::from_raw(self.handle.pid.cast_signed())
    }

    /// Starts a thread that waits for the end of the process, reaps it, and calls `on_end`. A process with a monitor
    /// has such a thread already, and calls [`end`](Process::end) in it.
    ///
    /// # Errors
    /// The thread cannot be started. The process is ended then.
    pub fn watch(self, on_end: impl FnOnce(End) + Send + 'static) -> Result<Arc<Handle>> {
        let handle = Arc::clone(&self.handle);
        let watched = std::thread::Builder::new().name("process-watcher".to_owned()).spawn(move || {
            // A signal may interrupt the wait.
            while !self.handle.wait(Duration::MAX) {}
            on_end(self.end(Duration::ZERO));
        });
        match watched {
            Ok(_) => Ok(handle),
            Err(error) => {
                handle.kill();
                Err(Error::environment(format!("cannot start a thread to watch {}: {error}", handle.program)))
            }
        }
    }

    /// Returns the handle for other threads.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Waits for the end of the process and of its helpers, and returns how it ended. Kills it after `grace`.
    pub fn end(mut self, grace: Duration) -> End {
        if !self.handle.wait(grace) {
            self.handle.kill();
        }
        let status = match &mut self.child {
            Some(child) => child.wait().ok(),
            None => self.handle.reap(),
        };
        self.pid().into_iter().for_each(group::end_rest);
        let killed = self.handle.ended.load(Ordering::SeqCst);
        let (program, output) = (self.handle.program.clone(), self.handle.console.output());
        End { program, status, by_plugin: killed, output }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::Deadline;
    use rustix::process::{Signal, WaitId, WaitIdOptions, kill_process, waitid};

    fn shell(script: &str) -> Process {
        let mut command = machinery::command(Path::new("/bin/sh"));
        command.arg("-c").arg(script);
        Process::start(
            command,
            "m",
            |line| {
                if line.contains(": ") { LineKind::Failure } else { LineKind::Other }
            },
        )
        .unwrap()
    }

    #[test]
    fn end_is_described_with_its_stderr() {
        let end = shell("echo first >&2; echo last >&2; exit 3").end(Duration::from_secs(10));
        assert_eq!(end.describe(), "sh exited with code 3: first; last");
        assert!(!end.was_clean());
    }

    fn talking_shell(script: &str) -> Process {
        let mut command = machinery::command(Path::new("/bin/sh"));
        command.arg("-c").arg(script);
        Process::start_with_commands(command, "m", |_| LineKind::Other).unwrap()
    }

    #[test]
    fn answer_is_found_when_more_lines_follow_or_its_line_does_not_end() {
        let lines = "echo loaded $a; for n in 1 2 3 4 5 6 7 8; do echo noise; done";
        let process = talking_shell(&format!("{lines}; read a; {lines}; printf '<shell:2> '; read b"));
        let (handle, deadline) = (process.handle(), Deadline::after(Duration::from_secs(60)));
        assert_eq!(handle.wait_for_line("load", deadline).unwrap(), "loaded");
        assert_eq!(handle.ask("again", "loaded", deadline).unwrap(), "loaded again");
        assert_eq!(handle.wait_for_line("<shell:", deadline).unwrap(), "<shell:2>");
        process.end(Duration::ZERO);
    }

    #[test]
    fn answer_is_not_the_prompt_before_the_command() {
        let process = talking_shell("printf '<1> '; read a; echo $a; printf '<2> '; read a");
        let (handle, deadline) = (process.handle(), Deadline::after(Duration::from_secs(60)));
        assert_eq!(handle.wait_for_line("<", deadline).unwrap(), "<1>");
        assert_eq!(handle.ask("next", "<", deadline).unwrap(), "<2>");
        process.end(Duration::ZERO);
    }

    #[test]
    fn interrupt_is_repeated_when_the_process_loses_it() {
        let script =
            "trap 'lost=$lost.; [ $lost = .. ] && echo held' INT; echo running; while :; do read a; done";
        let process = talking_shell(script);
        let (handle, deadline) = (process.handle(), Deadline::after(Duration::from_secs(60)));
        handle.wait_for_line("running", deadline).unwrap();
        assert_eq!(handle.interrupt_until("held", deadline).unwrap(), "held");
        process.end(Duration::ZERO);
    }

    #[test]
    fn answer_fails_with_the_last_words_when_the_process_dies() {
        let process = talking_shell("read a; echo cannot load >&2; exit 1");
        let error = process.handle().ask("load", "loaded", Deadline::after(Duration::from_secs(60)));
        let text = error.unwrap_err().to_string();
        assert!(text.contains("sh has ended while") && text.contains("cannot load"), "{text}");
        process.end(Duration::ZERO);
    }

    #[test]
    fn command_is_refused_when_the_process_takes_none_or_has_ended() {
        let process = shell("exec sleep 600");
        let text = process.handle().send("load").unwrap_err().to_string();
        assert!(text.contains("cannot send 'load' to sh: it takes no commands"), "{text}");
        process.end(Duration::ZERO);
        let process = talking_shell("exit 1");
        assert!(process.handle().wait(Duration::from_secs(60)));
        let text = process.handle().send("load").unwrap_err().to_string();
        assert!(text.contains("cannot send 'load' to sh: Broken pipe"), "{text}");
        process.end(Duration::ZERO);
    }

    #[test]
    fn process_is_killed_when_it_does_not_end() {
        let end = shell("exec sleep 600").end(Duration::from_millis(20));
        assert_eq!(end.describe(), "sh was ended by this machinery");
    }

    #[test]
    fn end_names_the_signal_when_others_kill_the_process() {
        let process = shell("kill -9 $$");
        assert_eq!(process.end(Duration::from_secs(10)).describe(), "sh was killed by signal 9");
    }

    /// Starts the script, and waits until its process has stopped itself.
    fn stopped(script: &str) -> (Process, Pid) {
        let process = shell(script);
        let pid = Pid::from_raw(process.handle().pid().cast_signed()).unwrap();
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).unwrap();
        (process, pid)
    }

    #[test]
    fn end_is_described_with_the_output_of_its_last_step() {
        let script = "echo noise >&2; kill -STOP $$; echo qemu-img: why >&2; echo noise >&2; exit 3";
        let (process, pid) = stopped(script);
        process.handle().begin_step();
        kill_process(pid, Signal::CONT).unwrap();
        assert_eq!(process.end(Duration::from_secs(10)).describe(), "sh exited with code 3: qemu-img: why");
        let (process, _) = stopped("echo noise >&2; kill -STOP $$");
        process.handle().begin_step();
        process.handle().kill();
        assert_eq!(process.end(Duration::from_secs(10)).failure(), "");
    }

    #[test]
    fn process_is_stopped_until_it_continues() {
        let (process, pid) = stopped("kill -STOP $$; echo on >&2; exec sleep 600");
        assert!(process.handle().is_stopped());
        kill_process(pid, Signal::CONT).unwrap();
        process.handle().wait_for_line("on", Deadline::after(Duration::from_secs(60))).unwrap();
        assert!(!process.handle().is_stopped());
        process.handle().interrupt();
        assert_eq!(process.end(Duration::from_secs(60)).describe(), "sh was killed by signal 2: on");
    }

    #[test]
    fn helper_ends_by_itself_when_its_process_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let script = "mkfifo p; { cat p; : > clean; } & exec 9>p; kill -STOP $$";
        let (process, _) = stopped(&format!("cd {}; {script}", folder.path().display()));
        process.end(Duration::ZERO);
        assert!(folder.path().join("clean").exists(), "the helper was killed");
    }

    #[test]
    fn helper_has_the_console_of_its_process_and_is_reaped_with_it() {
        let [process, helper] = ["true", "echo helper $$ >&2"].map(|script| {
            let mut command = machinery::command(Path::new("/bin/sh"));
            command.arg("-c").arg(format!("{script}; exec sleep 600 > /dev/null"));
            command
        });
        let process = Process::start_with_helper(process, Some(helper), "m", |_| LineKind::Other).unwrap();
        let deadline = Deadline::after(Duration::from_secs(60));
        let line = process.handle().wait_for_line("helper", deadline).unwrap();
        let number = Pid::from_raw(line.split_whitespace().last().unwrap().parse().unwrap()).unwrap();
        assert_eq!(rustix::process::getpgid(Some(number)).ok(), process.pid());
        process.end(Duration::ZERO);
        assert!(!Path::new(&format!("/proc/{}", number.as_raw_nonzero())).exists());
    }

    #[test]
    fn helper_is_killed_when_it_does_not_end() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("helper");
        let end = shell(&format!("sleep 600 & echo $! > {}", file.display())).end(Duration::from_secs(10));
        assert!(end.was_clean());
        let helper = std::fs::read_to_string(file).unwrap();
        // The new parent of the helper may not have reaped it yet.
        let status = std::fs::read_to_string(format!("/proc/{}/status", helper.trim())).unwrap_or_default();
        assert!(status.is_empty() || status.contains("Z (zombie)"), "{status}");
    }

    #[test]
    fn start_error_names_the_program_when_it_cannot_run() {
        let none = || machinery::command(Path::new("/none/qemu"));
        let error = Process::start(none(), "m", |_| LineKind::Other).unwrap_err();
        assert!(error.to_string().contains("/none/qemu"));
        let mut elsewhere = machinery::command(Path::new("/bin/sh"));
        elsewhere.current_dir("/none/folder");
        let error = Process::start(elsewhere, "m", |_| LineKind::Other).unwrap_err();
        assert!(error.to_string().contains("there is no folder /none/folder"), "{error}");
    }
}
