//! Runs one tcpdump process, from its start until its file is complete.

use std::fs::File;
use std::io;
use std::pin::Pin;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result, format_bytes};
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::{Pid, Signal, geteuid, kill_process, kill_process_group};
use tokio::io::BufReader;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::settings::{MARK, MAX_PACKET_DELAY, Settings, Target};
use super::space::{Captures, Watched};
use super::stderr::{self, Counts, Lines};
use super::writer::{self, CaptureFile, Copied};
use super::{jail, user};

/// The time that tcpdump has to listen.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// The time that tcpdump has to read the packets that arrived. The machine is off by then, so few arrive.
const READ_TIMEOUT: Duration = Duration::from_secs(4);
/// The pause between two queries for the packet counts.
const COUNTS_INTERVAL: Duration = Duration::from_millis(10);
/// The time that tcpdump has to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The size of the pipe from tcpdump, in bytes: the traffic that waits while the disk is busy.
const PIPE_SIZE: usize = 1 << 20;
/// The number of tcpdump's error messages that are kept.
const MAX_MESSAGES: usize = 20;

/// A running capture. It ends when this value is dropped.
#[derive(Debug)]
pub struct Tcpdump {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<()>>,
}

impl Tcpdump {
    /// Starts tcpdump, whose packets are copied into `file`, and returns when it listens. If the capture ends before it is
    /// stopped, `on_death` gets the reason: tcpdump has ended, the file has its limit, or its disk is nearly full.
    ///
    /// # Errors
    /// tcpdump cannot be started, or does not listen.
    pub async fn start(
        settings: &Settings,
        target: Target,
        file: CaptureFile,
        captures: &Arc<Captures>,
        on_death: impl FnOnce(&Error) + Send + 'static,
    ) -> Result<Self> {
        let (mut process, packets) = Process::spawn(settings, target)?;
        let (limit, pcap) = (settings.limit, process.target.pcap.clone());
        // A pipe takes no space.
        let copy = file.file().and_then(File::try_clone).ok().filter(is_regular);
        let watched = copy.map(|file| captures.add(file, &pcap, settings.reserve));
        let copying = tokio::task::spawn_blocking(move || writer::copy_into(packets, &file, limit));
        let copying = Box::pin(async { copying.await.unwrap_or_else(|panic| Err(io::Error::other(panic))) });
        process.wait_until_listening().await?;
        let (stop, stopped) = oneshot::channel();
        Ok(Tcpdump { stop, ended: tokio::spawn(watch(process, copying, watched, stopped, on_death)) })
    }

    /// Ends tcpdump when it has read all packets that arrived. The file is complete then.
    ///
    /// # Errors
    /// tcpdump failed while it was ended. An earlier death was reported to `on_death`.
    pub async fn stop(self) -> Result<()> {
        // The receiver has gone if tcpdump died.
        let _ = self.stop.send(());
        self.ended
            .await
            .unwrap_or_else(|error| Err(Error::failed(format!("the capture's task panicked: {error}"))))
    }
}

/// The copy of the packets into the file, on a thread of its own.
type Copying = Pin<Box<dyn Future<Output = io::Result<Copied>> + Send>>;

async fn watch(
    mut process: Process,
    mut copying: Copying,
    watched: Option<Watched>,
    stopped: oneshot::Receiver<()>,
    on_death: impl FnOnce(&Error),
) -> Result<()> {
    let error = tokio::select! {
        // Also if the `Tcpdump` was dropped.
        _ = stopped => return process.finish(copying).await,
        status = process.end() => {
            // The packets that tcpdump has written are still copied.
            let _ = timeout(EXIT_TIMEOUT, copying).await;
            process.failure("tcpdump ended by itself", status)
        }
        copied = &mut copying => match process.expect_copied(copied) {
            Ok(()) => {
                let status = timeout(EXIT_TIMEOUT, process.end()).await;
                process.failure("tcpdump ended by itself", status.unwrap_or_else(|late| Err(late.into())))
            }
            Err(error) => {
                process.end_early().await;
                error
            }
        },
        why = exceeded(watched) => {
            process.end_early().await;
            // The packets that tcpdump has written are still copied.
            let _ = timeout(EXIT_TIMEOUT, copying).await;
            why
        }
    };
    on_death(&error);
    Ok(())
}

/// Waits until the capture has to end; returns the reason.
async fn exceeded(watched: Option<Watched>) -> Error {
    match watched {
        Some(watched) => watched.exceeded().await,
        None => std::future::pending().await,
    }
}

struct Process {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
    messages: Vec<String>,
    settings: Settings,
    target: Target,
}

impl Process {
    /// Starts tcpdump. Returns the process, and the pipe with its packets.
    fn spawn(settings: &Settings, target: Target) -> Result<(Self, File)> {
        let mut command = Command::from(jail::command(settings)?);
        // Write each packet to the file at once and as a whole, and look up no names.
        command.arg("-i").arg(&target.interface).args(["-U", "-s", "0", "-n"]);
        if geteuid().is_root() {
            command.args(["-Z", user::of_tcpdump()]);
        }
        command.arg(MARK).arg(&target.pcap).args(["-w", "-"]).arg(&target.filter);
        // With a process group of its own, tcpdump does not get a terminal's Ctrl-C. The host ends it
        // instead.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| settings.cannot_start(&error))?;
        let no_pipe = || Error::failed("tcpdump has no pipe for its output");
        let stderr = Lines::new(BufReader::new(child.stderr.take().ok_or_else(no_pipe)?));
        let packets = child.stdout.take().ok_or_else(no_pipe)?.into_owned_fd();
        let packets = packets.map_err(|error| settings.cannot_start(&error))?;
        if let Err(error) = fcntl_setpipe_size(&packets, PIPE_SIZE) {
            tracing::debug!(%error, "the pipe from tcpdump keeps its size");
        }
        tracing::debug!(pcap = %target.pcap.display(), filter = target.filter, "tcpdump started");
        let process = Process { child, stderr, messages: Vec::new(), settings: settings.clone(), target };
        Ok((process, File::from(packets)))
    }

    async fn wait_until_listening(&mut self) -> Result<()> {
        let by = Instant::now() + LISTEN_TIMEOUT;
        loop {
            match timeout_at(by, self.line()).await {
                Ok(Some(line)) if stderr::is_listening(&line) => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) => match timeout_at(by, self.end()).await {
                    Ok(status) => return Err(self.failure("tcpdump ended at once", status)),
                    Err(_) => {
                        self.kill().await;
                        let error = "tcpdump closed its stderr without reporting that it listens";
                        return Err(self.diagnosis().detail(error));
                    }
                },
                Err(_) => {
                    self.kill().await;
                    let error = format!("tcpdump does not listen within {LISTEN_TIMEOUT:?}");
                    return Err(self.diagnosis().detail(&error));
                }
            }
        }
    }

    /// Returns the next line of standard error, or `None` at its end.
    async fn line(&mut self) -> Option<String> {
        let line = self.stderr.next().await?;
        if !stderr::is_harmless(&line) && self.messages.len() < MAX_MESSAGES {
            self.messages.push(line.clone());
        }
        Some(line)
    }

    /// Waits until the process has ended.
    async fn end(&mut self) -> io::Result<std::process::ExitStatus> {
        while self.line().await.is_some() {}
        self.child.wait().await
    }

    /// Ends tcpdump at once, although packets arrive.
    async fn end_early(&mut self) {
        self.terminate();
        if timeout(EXIT_TIMEOUT, self.end()).await.is_err() {
            self.kill().await;
        }
    }

    async fn finish(mut self, copying: Copying) -> Result<()> {
        let read = timeout(READ_TIMEOUT, self.read_all()).await;
        self.terminate();
        match timeout(EXIT_TIMEOUT, self.end()).await {
            Ok(Ok(status)) if status.success() => {
                let copied = timeout(EXIT_TIMEOUT, copying).await;
                self.expect_copied(copied.unwrap_or_else(|late| Err(late.into())))?;
                self.expect_complete(read.ok().flatten())
            }
            Ok(status) => Err(self.failure("tcpdump did not end in good order", status)),
            Err(_) => {
                self.kill().await;
                Err(self
                    .diagnosis()
                    .detail(&format!("it did not end within {EXIT_TIMEOUT:?} and was killed")))
            }
        }
    }

    /// Expects that all packets of tcpdump were copied.
    fn expect_copied(&self, copied: io::Result<Copied>) -> Result<()> {
        let pcap = self.target.pcap.display();
        match copied {
            Ok(Copied::All) => Ok(()),
            Ok(Copied::UpToLimit) => {
                let limit = format_bytes(self.settings.limit.unwrap_or_default());
                let reason = format!("{pcap} has reached the limit of {limit}, and has no later packets");
                Err(Error::failed(reason).advice("Raise capture_size_limit in machinery-host.yaml"))
            }
            Err(error) => Err(Error::environment(format!("cannot write {pcap}: {error}"))
                .advice("Check the space on its file system, or read the passed pipe faster")),
        }
    }

    /// Expects by the last counts that the file holds all packets.
    fn expect_complete(&self, counts: Option<Counts>) -> Result<()> {
        let pcap = self.target.pcap.display();
        if !self.messages.is_empty() {
            tracing::warn!(%pcap, messages = ?self.messages, "tcpdump reported problems, and ended without an error");
        }
        let Some(counts) = counts else {
            let error =
                format!("{pcap} may lack the last packets: they still arrived when the machine was off");
            return Err(Error::failed(error).advice("Check whether another host uses the machine's address"));
        };
        match counts.lost() {
            None => Ok(()),
            Some((lost, all)) => {
                let error = format!("{lost} of {all} packets are not in {pcap}: tcpdump could not keep up");
                Err(Error::failed(error)
                    .advice("Give the host more processor time, or its captures a faster disk"))
            }
        }
    }

    /// Waits until the file holds all packets that arrived, by polling the counts. Returns the last counts,
    /// or `None` if tcpdump has ended.
    async fn read_all(&mut self) -> Option<Counts> {
        let mut last = self.counts().await?;
        let mut since = Instant::now();
        // The loopback interface counts each packet twice, so its counts never agree.
        while !last.all_read() && since.elapsed() < MAX_PACKET_DELAY {
            tokio::time::sleep(COUNTS_INTERVAL).await;
            let counts = self.counts().await?;
            if counts != last {
                (last, since) = (counts, Instant::now());
            }
        }
        Some(last)
    }

    /// Queries the packet counts. Returns `None` if tcpdump has ended.
    async fn counts(&mut self) -> Option<Counts> {
        self.signal(Signal::USR1);
        loop {
            if let Some(counts) = Counts::of(&self.line().await?) {
                return Some(counts);
            }
        }
    }

    /// Sends SIGTERM to tcpdump and its children.
    fn terminate(&self) {
        if let Some(pid) = self.pid() {
            // An error means that the group has ended.
            let _ = kill_process_group(pid, Signal::TERM);
        }
    }

    /// Kills tcpdump and its children: the program may be a script that runs tcpdump.
    async fn kill(&mut self) {
        if let Some(pid) = self.pid() {
            // An error means that the group has ended.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        // Only a disk that hangs delays this.
        let _ = timeout(EXIT_TIMEOUT, self.end()).await;
    }

    /// Returns the process id, or `None` once the process has been waited for. So a signal never reaches
    /// another process.
    fn pid(&self) -> Option<Pid> {
        self.child.id().and_then(|id| Pid::from_raw(id.cast_signed()))
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid()
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::debug!(%error, "cannot send a signal to tcpdump");
        }
    }

    fn failure(&self, what: &str, status: io::Result<std::process::ExitStatus>) -> Error {
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        self.diagnosis().detail(&format!("{what} ({status})"))
    }

    fn diagnosis(&self) -> Error {
        stderr::diagnose(&self.messages, &self.settings.tcpdump, &self.target.interface)
    }
}

fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|found| found.is_file())
}
