//! Runs one tcpdump process, from its start until its file is complete.

use std::fs::File;
use std::io;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result};
use rustix::process::{Pid, Signal, geteuid, kill_process, kill_process_group};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::settings::{MAX_PACKET_DELAY, MISSING_ADVICE, Settings, Target};
use super::space::{Captures, Watched};
use super::stderr::{self, Counts};

/// The time that tcpdump has to listen.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// The time that tcpdump has to read the packets that arrived. The machine is off by then, so few arrive.
const READ_TIMEOUT: Duration = Duration::from_secs(4);
/// The pause between two queries for the packet counts.
const COUNTS_INTERVAL: Duration = Duration::from_millis(10);
/// The time that tcpdump has to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The number of tcpdump's error messages that are kept.
const MAX_MESSAGES: usize = 20;

/// A running capture. It ends when this value is dropped.
#[derive(Debug)]
pub struct Tcpdump {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<()>>,
}

impl Tcpdump {
    /// Starts tcpdump, and returns when it listens. If tcpdump ends before it is stopped, or its file becomes too
    /// large, `on_death` gets the reason.
    ///
    /// # Errors
    /// tcpdump cannot be started, or does not listen.
    pub async fn start(
        settings: &Settings,
        target: Target,
        captures: &Arc<Captures>,
        on_death: impl FnOnce(&Error) + Send + 'static,
    ) -> Result<Self> {
        let mut process = Process::spawn(settings, target)?;
        process.wait_until_listening().await?;
        let pcap = process.target.pcap.clone();
        // A script in tcpdump's place may write elsewhere.
        let file = File::open(&pcap).ok();
        let watched = file.map(|file| captures.add(file, &pcap, settings.limit, settings.reserve));
        let (stop, stopped) = oneshot::channel();
        Ok(Tcpdump { stop, ended: tokio::spawn(watch(process, stopped, watched, on_death)) })
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

async fn watch(
    mut process: Process,
    stopped: oneshot::Receiver<()>,
    watched: Option<Watched>,
    on_death: impl FnOnce(&Error),
) -> Result<()> {
    tokio::select! {
        // Also if the `Tcpdump` was dropped.
        _ = stopped => process.finish().await,
        status = process.end() => {
            let error = process.failure("tcpdump ended by itself", status);
            on_death(&error);
            Ok(())
        }
        why = exceeded(watched) => {
            process.end_early().await;
            on_death(&why);
            Ok(())
        }
    }
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
    fn spawn(settings: &Settings, target: Target) -> Result<Self> {
        let mut command = Command::from(machinery::command(&settings.tcpdump));
        // Write each packet to the file at once and as a whole, and look up no names.
        command.arg("-i").arg(&target.interface).args(["-U", "-s", "0", "-n"]);
        if geteuid().is_root() {
            // In some distributions tcpdump changes to another user, who may not write the file.
            command.args(["-Z", "root"]);
        }
        command.arg("-w").arg(&target.pcap).arg(&target.filter);
        // With a process group of its own, tcpdump does not get a terminal's Ctrl-C. The host ends it
        // instead.
        command.env("LC_ALL", "C").process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| cannot_start(settings, &error))?;
        let stderr = child.stderr.take().ok_or_else(|| Error::failed("tcpdump has no stderr"))?;
        let stderr = BufReader::new(stderr).lines();
        tracing::debug!(pcap = %target.pcap.display(), filter = target.filter, "tcpdump started");
        Ok(Process { child, stderr, messages: Vec::new(), settings: settings.clone(), target })
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
        // A line that is not UTF-8 counts as the end.
        let line = self.stderr.next_line().await.ok().flatten()?;
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

    /// Ends tcpdump at once, although packets arrive. Its file has only whole packets.
    async fn end_early(mut self) {
        self.terminate();
        if timeout(EXIT_TIMEOUT, self.end()).await.is_err() {
            self.kill().await;
        }
    }

    async fn finish(mut self) -> Result<()> {
        let read = timeout(READ_TIMEOUT, self.read_all()).await;
        self.terminate();
        match timeout(EXIT_TIMEOUT, self.end()).await {
            Ok(Ok(status)) if status.success() => self.expect_complete(read.ok().flatten()),
            Ok(status) => Err(self.failure("tcpdump did not end in good order", status)),
            Err(_) => {
                self.kill().await;
                Err(self
                    .diagnosis()
                    .detail(&format!("it did not end within {EXIT_TIMEOUT:?} and was killed")))
            }
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
        stderr::diagnose(&self.messages, &self.settings.tcpdump, &self.target.interface, &self.target.pcap)
    }
}

fn cannot_start(settings: &Settings, error: &io::Error) -> Error {
    let error = Error::environment(format!("cannot start {}: {error}", settings.tcpdump.display()));
    error.advice(format!("{}. Then run `cuckoo-machinery reload`", MISSING_ADVICE))
}
