//! A host in a process of its own, which can be killed, and whose resources are only those of the plugin.
//!
//! ```text
//! HostProcess::start ─▶ <program> REQUEST ─▶ run ─▶ load the plugin, do the job ─▶ replies on the standard output
//! ```
//!
//! The process runs the test program or `cuckoo-machinery` again. It ends when its standard input ends, and so with
//! the suite.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::host::{Instance, Plugin};
use machinery::{Deadline, Error, ErrorKind, Setup};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::processes::{self, Process};
use crate::recorder::NullHost;
use crate::report::{CheckFailure, Result, demand, failed};
use crate::resources::Resources;
use crate::spec::Program;

/// The arguments by which `cuckoo-machinery` becomes a host process. The path of the request follows.
pub const HOST_PROCESS: &[&str] = &["conformance", "--host-process"];

/// The mark of a reply. The plugin may print other lines.
const REPLY: &str = "machinery-host-process: ";
/// The order to hand over. Without it, the process ends with the suite, and ends its runs.
const HAND_OVER: &[u8] = b"hand over";
/// Runs before the first count: they create what the plugin keeps.
const FIRST_RUNS: usize = 2;
/// The time that the plugin has to free the resources of its last run.
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// The interval of counts in this time. No event reports the number of resources.
const SETTLE_INTERVAL: Duration = Duration::from_millis(20);

/// The task of a host process, which is passed in a file.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub plugin: PathBuf,
    pub setup: Setup,
    pub machine: String,
    /// The deadline of each call.
    pub timeout: Duration,
    pub job: Job,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// Starts the machine and prepares another one, then waits.
    Run { start: Start, prepare: Option<String> },
    /// Makes runs of the machine, and counts the resources before and after.
    CountResources { rounds: usize },
}

/// The call that starts the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// `restore_start`.
    Restored,
    /// `norestore_start`.
    Cold,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// A call has returned, and the job goes on.
    Alive,
    Running,
    HandedOver,
    /// The resources that grew.
    Counted(Vec<String>),
    Failed(String),
}

/// A running host process. Dropping it kills the process.
pub struct HostProcess {
    child: Child,
    replies: Receiver<Reply>,
    /// The time until the next reply.
    patience: Duration,
    _request: NamedTempFile,
}

impl HostProcess {
    /// Starts the program with the request. `patience` is the time for one call.
    pub fn start(program: &Program, request: &Request, patience: Duration) -> Result<Self> {
        let text = serde_json::to_vec(request).map_err(|error| failed("writing a request", &error))?;
        let file = NamedTempFile::new().map_err(|error| failed("creating the file of a request", &error))?;
        fs::write(file.path(), text).map_err(|error| failed("writing a request", &error))?;
        let mut command = machinery::command(&program.path);
        command.args(&program.arguments).arg(file.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let action = format!("starting {}", program.path.display());
        let mut child = command.spawn().map_err(|error| failed(&action, &error))?;
        let (sender, replies) = mpsc::channel();
        let output = child.stdout.take();
        thread::spawn(move || {
            // The plugin may print anything.
            let lines = output.into_iter().flat_map(|output| BufReader::new(output).split(b'\n'));
            let replies = lines
                .map_while(io::Result::ok)
                .filter_map(|line| serde_json::from_slice(line.strip_prefix(REPLY.as_bytes())?).ok());
            for reply in replies {
                // The suite may not wait any more.
                let _ = sender.send(reply);
            }
        });
        Ok(HostProcess { child, replies, patience, _request: file })
    }

    /// Waits for the end of the job. Demands that the process did not end, and that no call took too long.
    pub fn wait(&mut self) -> Result<Reply> {
        loop {
            match self.replies.recv_timeout(self.patience) {
                Ok(Reply::Alive) => {}
                Ok(Reply::Failed(why)) => {
                    return Err(CheckFailure::Failed(format!("in a host of its own: {why}")));
                }
                Ok(reply) => return Ok(reply),
                Err(RecvTimeoutError::Timeout) => {
                    let why =
                        format!("a call in a host of its own has not returned after {:?}", self.patience);
                    return Err(CheckFailure::Failed(why));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().map_err(|error| failed("waiting for the host", &error))?;
                    return Err(CheckFailure::Failed(format!("the host of the plugin ended with {status}")));
                }
            }
        }
    }

    /// Has the process hand over, and waits for its end.
    pub fn hand_over(&mut self) -> Result {
        let ordered = self.child.stdin.take().map_or(Ok(()), |mut input| input.write_all(HAND_OVER));
        ordered.map_err(|error| failed("ordering the host to hand over", &error))?;
        let reply = self.wait()?;
        demand!(matches!(reply, Reply::HandedOver), "the host process has not handed over: {reply:?}");
        let ended = self.child.wait().map_err(|error| failed("waiting for the host", &error))?;
        demand!(ended.success(), "the host of the plugin ended with {ended} after hand_over");
        Ok(())
    }

    /// Kills the process with SIGKILL. Returns the processes that it had started.
    pub fn kill(&mut self) -> Result<Vec<Process>> {
        let started = processes::descendants(self.child.id());
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map_err(|error| failed("killing the host", &error))?;
        Ok(started)
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does the job of the request, as the host process. `cuckoo-machinery conformance --host-process` and
/// [`main`](crate::main) call it. Reports whether the job was done.
pub fn run_host_process(request: &Path) -> bool {
    let done = read(request).and_then(|request| work(&request));
    if let Err(error) = &done {
        send(&Reply::Failed(error.to_string()));
    }
    done.is_ok()
}

fn read(file: &Path) -> machinery::Result<Request> {
    let text = fs::read(file).map_err(|error| Error::io("read the request", file, &error))?;
    let wrong = |error| Error::failed(format!("{} is no request: {error}", file.display()));
    serde_json::from_slice(&text).map_err(wrong)
}

fn send(reply: &Reply) {
    // A reply is made of strings, so it can be written. The leading line break ends a line of the plugin's.
    let text = serde_json::to_string(reply).unwrap_or_default();
    // The suite may have ended. This process then ends with its input, after it has shut the plugin down.
    let _ = writeln!(io::stdout(), "\n{REPLY}{text}");
}

fn work(request: &Request) -> machinery::Result<()> {
    let plugin = Plugin::open(&request.plugin).map_err(|error| Error::failed(error.to_string()))?;
    let host = Host { request, instance: plugin.load(&request.setup, Arc::new(NullHost))? };
    send(&Reply::Alive);
    match &request.job {
        Job::Run { start, prepare } => {
            host.run(*start, prepare.as_deref())?;
            send(&Reply::Running);
        }
        Job::CountResources { rounds } => send(&Reply::Counted(host.count_resources(*rounds)?)),
    }
    // The end of the input is the end of the suite, which then does not kill this process.
    let mut order = Vec::new();
    let _ = io::stdin().read_to_end(&mut order);
    if order != HAND_OVER {
        return host.call(Instance::shutdown);
    }
    host.call(Instance::hand_over)?;
    drop(host);
    send(&Reply::HandedOver);
    Ok(())
}

/// The plugin in the host process.
struct Host<'a> {
    request: &'a Request,
    instance: Instance,
}

impl Host<'_> {
    fn call<T>(
        &self,
        call: impl FnOnce(&Instance, Deadline) -> machinery::Result<T>,
    ) -> machinery::Result<T> {
        let result = call(&self.instance, Deadline::after(self.request.timeout));
        send(&Reply::Alive);
        result
    }

    /// Prepares the other machine, and starts that of the request.
    fn run(&self, start: Start, prepare: Option<&str>) -> machinery::Result<()> {
        if let Some(other) = prepare {
            self.call(|instance, deadline| instance.prepare(other, deadline))?;
        }
        let machine = &self.request.machine;
        self.call(|instance, deadline| match start {
            Start::Restored => instance.restore_start(machine, deadline),
            Start::Cold => instance.norestore_start(machine, deadline),
        })
    }

    fn count_resources(&self, rounds: usize) -> machinery::Result<Vec<String>> {
        let prepares = self.instance.capabilities()?.prepare;
        (0..FIRST_RUNS).try_for_each(|_| self.one_run(prepares))?;
        let before = Resources::count(&self.request.setup);
        (0..rounds).try_for_each(|_| self.one_run(prepares))?;
        let began = Instant::now();
        loop {
            let growth = Resources::count(&self.request.setup).growth(&before, rounds);
            if growth.is_empty() || began.elapsed() > SETTLE_TIME {
                return Ok(growth);
            }
            thread::sleep(SETTLE_INTERVAL);
        }
    }

    fn one_run(&self, prepares: bool) -> machinery::Result<()> {
        let machine = &self.request.machine;
        if prepares {
            self.call(|instance, deadline| instance.prepare(machine, deadline))?;
        }
        self.call(|instance, deadline| instance.restore_start(machine, deadline))?;
        match self.call(|instance, deadline| instance.stop(machine, deadline)) {
            // The guest may have ended by itself.
            Err(error) if error.kind() == ErrorKind::StateReached => Ok(()),
            stopped => stopped,
        }
    }
}
