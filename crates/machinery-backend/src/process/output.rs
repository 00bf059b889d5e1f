//! Runs a program to its end, with a time limit: for a version, or for a test of a device.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use super::group;

/// The time that the program has to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);
/// The maximum size of each of the program's streams, in bytes. The longest are descriptions of images.
const MAX_OUTPUT: usize = 8 << 20;

/// Runs the program to its end, and returns its output. A program that hangs is killed at the deadline with its
/// children, and one that prints more than 8 MiB is killed at once. Make the command with [`machinery::command`].
///
/// # Errors
/// The program cannot be run, does not end in time, or prints too much.
pub fn output(command: Command, deadline: Deadline) -> Result<Output> {
    output_for(command, Stdio::null(), deadline)
}

/// Runs the program like [`output`], with that standard input.
pub(crate) fn output_for(mut command: Command, input: Stdio, deadline: Deadline) -> Result<Output> {
    let program = PathBuf::from(command.get_program());
    let failed = |error: io::Error| Error::io("run", &program, &error);
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let child = command.spawn().map_err(failed)?;
    let leader = Pid::from_child(&child);
    let (sender, output) = mpsc::channel();
    // The caller may have timed out.
    let wait = move || drop(sender.send(read_to_end(child, leader)));
    let waiting = thread::Builder::new().name("program-output".to_owned()).spawn(wait);
    waiting.map_err(|error| {
        let _ = kill_process_group(leader, Signal::KILL);
        failed(error)
    })?;
    match output.recv_timeout(deadline.remaining()) {
        Ok(Ok(output)) if output.stdout.len().max(output.stderr.len()) > MAX_OUTPUT => {
            group::end_rest(leader);
            let reason = format!("{} prints more than {} MiB", program.display(), MAX_OUTPUT >> 20);
            Err(Error::failed(reason).advice("Check that it is the right program"))
        }
        Ok(output) => output.map_err(failed),
        Err(_) => {
            // The thread reaps the program after this, so the number still belongs to it, unless it has just ended.
            let _ = kill_process_group(leader, Signal::KILL);
            // Nothing of it is to run while the caller cleans up.
            let _ = output.recv_timeout(KILL_TIMEOUT);
            group::end_rest(leader);
            let reason = format!("{} does not end within {:?}", program.display(), deadline.limit());
            Err(Error::timeout(reason).advice("Check that it is the right program"))
        }
    }
}

/// Reads both streams of the program, and waits for its end.
fn read_to_end(mut child: Child, leader: Pid) -> io::Result<Output> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = thread::scope(|scope| {
        let errors = scope.spawn(|| read_bounded(stderr, leader));
        let output = read_bounded(stdout, leader);
        (output, errors.join().unwrap_or_else(|_| Ok(Vec::new())))
    });
    Ok(Output { status: child.wait()?, stdout: stdout?, stderr: stderr? })
}

/// Reads a stream to its end. A program that prints too much is killed.
fn read_bounded(stream: Option<impl Read>, leader: Pid) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        stream.take(MAX_OUTPUT as u64 + 1).read_to_end(&mut bytes)?;
    }
    if bytes.len() > MAX_OUTPUT {
        let _ = kill_process_group(leader, Signal::KILL);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn shell(script: &str, limit: Duration) -> Result<Output> {
        let mut command = machinery::command(Path::new("/bin/sh"));
        command.args(["-c", script]);
        output(command, Deadline::after(limit))
    }

    #[test]
    fn output_has_both_streams_and_the_exit_code() {
        let output = shell("echo out; echo err >&2; exit 3", Duration::from_secs(60)).unwrap();
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn program_is_killed_when_it_prints_without_end() {
        for stream in ["", ">&2"] {
            let error = shell(&format!("exec cat /dev/zero {stream}"), Duration::from_secs(60)).unwrap_err();
            assert!(error.to_string().starts_with("/bin/sh prints more than 8 MiB"), "{error}");
        }
    }

    #[test]
    fn program_has_ended_with_its_children_when_its_time_is_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pids");
        let script = format!("sleep 600 & echo $$ $! > {}; wait", file.display());
        let error = shell(&script, Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.kind(), machinery::ErrorKind::Timeout);
        let error = error.to_string();
        assert!(error.starts_with("/bin/sh does not end within 1s"), "{error}");
        let pids = std::fs::read_to_string(file).unwrap();
        assert_eq!(pids.split_whitespace().count(), 2, "{pids}");
        for pid in pids.split_whitespace() {
            // The new parent of the child may not have reaped it yet.
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            assert!(status.is_empty() || status.contains("Z (zombie)"), "{status}");
        }
    }
}
