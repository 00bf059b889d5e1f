//! The system calls of a program, in the order in which they end. They show what no test sees otherwise: whether a file
//! is on disk before somebody relies on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{PidfdFlags, pidfd_open};
use tempfile::TempDir;

use crate::error::{Context, Error};
use crate::process::{self, run_command};
use crate::{Result, command, processes};

/// The time in which strace ends after its program.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// A system call that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemCall {
    /// Its name, such as `fsync`.
    pub name: String,
    /// Its arguments as strace writes them. A descriptor has its path in angle brackets.
    pub args: String,
}

impl SystemCall {
    /// Reports whether the call has that name and a path that ends so.
    pub fn is(&self, name: &str, path_end: &str) -> bool {
        let ends = [format!("{path_end}>"), format!("{path_end}\"")];
        self.name == name && ends.iter().any(|end| self.args.contains(end))
    }
}

/// The calls of a traced program.
#[derive(Debug)]
pub struct Trace {
    calls: String,
    pipe: PathBuf,
    reader: JoinHandle<std::io::Result<String>>,
    _folder: TempDir,
}

impl Trace {
    /// Begins to collect these system calls.
    pub fn new(calls: &[&str]) -> Result<Self> {
        let folder = process::make_folder()?;
        let pipe = folder.path().join("calls");
        command::output(Command::new("mkfifo").arg(&pipe))?;
        let read = pipe.clone();
        // The pipe ends when strace ends, so nobody has to guess when the calls are complete.
        let reader = thread::spawn(move || fs::read_to_string(read));
        Ok(Trace { calls: calls.join(","), pipe, reader, _folder: folder })
    }

    /// Makes the command run under strace. The program stays the child of this process.
    pub fn attach(&self, command: &mut Command) {
        let mut traced = Command::new("strace");
        traced.args(["-D", "-f", "-qq", "-y", "-s", "4096", "-e", "signal=none", "-e"]);
        traced.arg(format!("trace={}", self.calls)).arg("-o").arg(&self.pipe).arg("--");
        traced.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => traced.env(name, value),
                None => traced.env_remove(name),
            };
        }
        *command = traced;
    }

    /// Waits for the end of the program, and returns its calls.
    ///
    /// # Errors
    /// The calls cannot be read.
    pub fn finish(self) -> Result<Vec<SystemCall>> {
        let text = self.reader.join().map_err(|_| Error::new("the reader of the system calls panicked"))?;
        wait_for_strace(&self.pipe)?;
        Ok(parse(&text.context(|| "reading the system calls".to_owned())?))
    }
}

/// Waits for the end of the strace that writes to `pipe`, which is no child of this process. It closes the pipe shortly
/// before.
fn wait_for_strace(pipe: &Path) -> Result<()> {
    let pipe = pipe.to_string_lossy();
    let is_strace = |command: &str| command.starts_with("strace ") && command.contains(&*pipe);
    for (pid, _) in processes::list()?.into_iter().filter(|(_, command)| is_strace(command)) {
        // It may have ended meanwhile.
        if let Ok(end) = pidfd_open(pid, PidfdFlags::empty()) {
            process::wait_for(&mut [PollFd::new(&end, PollFlags::IN)], END_TIMEOUT)?;
        }
    }
    Ok(())
}

/// Runs another test of this test program, and returns its calls. `name` is the test's path.
///
/// # Errors
/// strace is missing; the test fails, or does not exist.
pub fn of_test(name: &str, calls: &[&str]) -> Result<Vec<SystemCall>> {
    let trace = Trace::new(calls)?;
    let program = std::env::current_exe().context(|| "finding this test program".to_owned())?;
    let mut command = Command::new(program);
    command.args(["--exact", name]);
    trace.attach(&mut command);
    let ran = run_command(command)?;
    if ran.code != Some(0) || !ran.stdout.contains("1 passed") {
        return Err(Error::new(format!("the test {name} does not pass under strace: {ran:?}")));
    }
    trace.finish()
}

/// Returns the position of the first call from `begin` on that has that name and path.
///
/// # Errors
/// There is none; the error has all calls.
pub fn position(calls: &[SystemCall], begin: usize, name: &str, path_end: &str) -> Result<usize> {
    let found = calls.iter().skip(begin).position(|call| call.is(name, path_end));
    let missing = || {
        let listed: Vec<String> = calls.iter().map(|call| format!("{}({})", call.name, call.args)).collect();
        Error::new(format!("no {name} of {path_end} from call {begin} on:\n{}", listed.join("\n")))
    };
    found.map(|at| begin + at).ok_or_else(missing)
}

/// Reads strace's lines: `PID name(args) = result`. Another thread's call may interrupt a line.
fn parse(text: &str) -> Vec<SystemCall> {
    let mut unfinished: Vec<(&str, SystemCall)> = Vec::new();
    let mut calls = Vec::new();
    for line in text.lines() {
        let Some((pid, line)) = line.trim_start().split_once(' ') else { continue };
        let line = line.trim_start();
        if line.starts_with("<... ") {
            if let Some(at) = unfinished.iter().position(|(of, _)| *of == pid) {
                calls.push(unfinished.remove(at).1);
            }
            continue;
        }
        let Some((name, rest)) = line.split_once('(') else { continue };
        let call = |args: &str| SystemCall { name: name.to_owned(), args: args.trim_end().to_owned() };
        match (rest.strip_suffix("<unfinished ...>"), rest.rsplit_once(')')) {
            (Some(args), _) => unfinished.push((pid, call(args))),
            (None, Some((args, _))) => calls.push(call(args)),
            (None, None) => {}
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_in_the_order_in_which_they_end() {
        let calls = parse(
            "7  fsync(3</a/b.new> <unfinished ...>\n8 rename(\"/x\", \"/y\") = 0\n7 <... fsync resumed>) = 0\n\
             7 +++ exited with 0 +++\n",
        );
        let found: Vec<_> = calls.iter().map(|call| (call.name.as_str(), call.args.as_str())).collect();
        assert_eq!(found, [("rename", "\"/x\", \"/y\""), ("fsync", "3</a/b.new>")]);
        assert!(calls[0].is("rename", "/y") && calls[1].is("fsync", "b.new") && !calls[1].is("fsync", "b"));
        assert_eq!(position(&calls, 0, "fsync", "b.new").unwrap(), 1);
        assert!(position(&calls, 1, "rename", "/y").is_err());
    }
}
