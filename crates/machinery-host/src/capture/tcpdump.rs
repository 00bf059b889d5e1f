//! One tcpdump process, from its start to the end of its file.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use machinery::{Error, Result};
use rustix::process::{Pid, Signal, geteuid, kill_process, kill_process_group};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::stderr::{self, Counts};
use super::{HANDED_OVER, Settings, Target};

/// How long tcpdump may take until it listens.
const STARTING: Duration = Duration::from_secs(10);
/// How long it may take to read what has arrived. The machine is off by then, so it is not much.
const READING: Duration = Duration::from_secs(4);
/// How long between two questions whether it has all.
const ASKING: Duration = Duration::from_millis(10);
/// How long it may take to end.
const ENDING: Duration = Duration::from_secs(10);
/// How many of its complaints are remembered.
const COMPLAINTS: usize = 20;

/// A capture under way. Dropped, it ends by itself.
#[derive(Debug)]
pub struct Tcpdump {
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<()>>,
}

impl Tcpdump {
    /// Starts it, and returns when it listens. If it ends before it is stopped, `died` is told why.
    ///
    /// # Errors
    /// It cannot be started, or does not listen.
    pub async fn start(
        settings: &Settings,
        target: Target,
        died: impl FnOnce(&Error) + Send + 'static,
    ) -> Result<Self> {
        let mut process = Process::spawn(settings, target)?;
        process.listens().await?;
        let (stop, stopped) = oneshot::channel();
        Ok(Tcpdump { stop, ended: tokio::spawn(watch(process, stopped, died)) })
    }

    /// Ends it when it has read all that arrived. The file is complete then.
    ///
    /// # Errors
    /// It did not end in good order. That it had died before has been told.
    pub async fn stop(self) -> Result<()> {
        // It may have died meanwhile.
        let _ = self.stop.send(());
        self.ended.await.unwrap_or_else(|error| Err(Error::failed(format!("its watch panicked: {error}"))))
    }
}

async fn watch(
    mut process: Process,
    stopped: oneshot::Receiver<()>,
    died: impl FnOnce(&Error),
) -> Result<()> {
    tokio::select! {
        // Also when whoever held it is gone.
        _ = stopped => process.finish().await,
        status = process.end() => {
            let error = process.failure("tcpdump ended by itself", status);
            died(&error);
            Ok(())
        }
    }
}

struct Process {
    child: Child,
    stderr: Lines<BufReader<ChildStderr>>,
    complaints: Vec<String>,
    settings: Settings,
    target: Target,
}

impl Process {
    fn spawn(settings: &Settings, target: Target) -> Result<Self> {
        let mut command = Command::from(machinery::command(&settings.tcpdump));
        // Each packet at once to the file, whole, without looking up names.
        command.arg("-i").arg(&target.interface).args(["-U", "-s", "0", "-n"]);
        if geteuid().is_root() {
            // Some distributions' tcpdump becomes another user, who may not write the file.
            command.args(["-Z", "root"]);
        }
        command.arg("-w").arg(&target.pcap).arg(&target.filter);
        // A group of its own: a terminal's Ctrl-C is for the host, which ends it in order.
        command.env("LC_ALL", "C").process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| cannot_start(settings, &error))?;
        let stderr = child.stderr.take().ok_or_else(|| Error::failed("tcpdump has no stderr"))?;
        let stderr = BufReader::new(stderr).lines();
        tracing::debug!(pcap = %target.pcap.display(), filter = target.filter, "tcpdump started");
        Ok(Process { child, stderr, complaints: Vec::new(), settings: settings.clone(), target })
    }

    async fn listens(&mut self) -> Result<()> {
        let by = Instant::now() + STARTING;
        loop {
            match timeout_at(by, self.line()).await {
                Ok(Some(line)) if stderr::is_listening(&line) => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) => match timeout_at(by, self.end()).await {
                    Ok(status) => return Err(self.failure("tcpdump ended at once", status)),
                    Err(_) => {
                        self.kill().await;
                        let error = "tcpdump closed its stderr, so it cannot be told whether it listens";
                        return Err(self.diagnosis().detail(error));
                    }
                },
                Err(_) => {
                    self.kill().await;
                    let error = format!("tcpdump does not listen within {STARTING:?}");
                    return Err(self.diagnosis().detail(&error));
                }
            }
        }
    }

    /// The next line it says, or that it will say no more.
    async fn line(&mut self) -> Option<String> {
        // A line that is no text ends what can be understood of it.
        let line = self.stderr.next_line().await.ok().flatten()?;
        if !stderr::is_harmless(&line) && self.complaints.len() < COMPLAINTS {
            self.complaints.push(line.clone());
        }
        Some(line)
    }

    /// Waits for its end.
    async fn end(&mut self) -> io::Result<std::process::ExitStatus> {
        while self.line().await.is_some() {}
        self.child.wait().await
    }

    async fn finish(mut self) -> Result<()> {
        let read = timeout(READING, self.reads_all()).await;
        self.terminate();
        match timeout(ENDING, self.end()).await {
            Ok(Ok(status)) if status.success() => self.completeness(read.ok().flatten()),
            Ok(status) => Err(self.failure("tcpdump did not end in good order", status)),
            Err(_) => {
                self.kill().await;
                Err(self.diagnosis().detail(&format!("it did not end within {ENDING:?} and was killed")))
            }
        }
    }

    /// Whether the file holds all there was, by the last counts.
    fn completeness(&self, counts: Option<Counts>) -> Result<()> {
        let pcap = self.target.pcap.display();
        if !self.complaints.is_empty() {
            tracing::warn!(%pcap, complaints = ?self.complaints, "tcpdump complained, and ended well");
        }
        let Some(counts) = counts else {
            let error =
                format!("{pcap} may lack the last packets: they still arrived when the machine was off");
            return Err(Error::failed(error).advice("Look at who else uses the machine's address"));
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

    /// Waits until all that has arrived is in the file. There is no event for it. Gives the last counts,
    /// unless it has ended.
    async fn reads_all(&mut self) -> Option<Counts> {
        let mut last = self.counts().await?;
        let mut since = Instant::now();
        // The loopback interface counts each packet twice, so there they never agree.
        while !last.all_read() && since.elapsed() < HANDED_OVER {
            tokio::time::sleep(ASKING).await;
            let counts = self.counts().await?;
            if counts != last {
                (last, since) = (counts, Instant::now());
            }
        }
        Some(last)
    }

    /// How many packets there are by now, unless it has ended.
    async fn counts(&mut self) -> Option<Counts> {
        self.signal(Signal::USR1);
        loop {
            if let Some(counts) = Counts::of(&self.line().await?) {
                return Some(counts);
            }
        }
    }

    /// Asks it to end, with all it has started.
    fn terminate(&self) {
        if let Some(pid) = self.pid() {
            // An error says that there is nobody left.
            let _ = kill_process_group(pid, Signal::TERM);
        }
    }

    /// Kills it with all it has started, for it may be a script around tcpdump.
    async fn kill(&mut self) {
        if let Some(pid) = self.pid() {
            // An error says that there is nobody left.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        // Nothing resists this but a disk that hangs.
        let _ = timeout(ENDING, self.end()).await;
    }

    /// There is none once it has been waited for, so a signal never hits another process.
    fn pid(&self) -> Option<Pid> {
        self.child.id().and_then(|id| Pid::from_raw(id.cast_signed()))
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid()
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::debug!(%error, "tcpdump hears no signal");
        }
    }

    fn failure(&self, what: &str, status: io::Result<std::process::ExitStatus>) -> Error {
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        self.diagnosis().detail(&format!("{what} ({status})"))
    }

    fn diagnosis(&self) -> Error {
        stderr::diagnose(&self.complaints, &self.settings.tcpdump, &self.target.interface, &self.target.pcap)
    }
}

fn cannot_start(settings: &Settings, error: &io::Error) -> Error {
    let error = Error::environment(format!("cannot start {}: {error}", settings.tcpdump.display()));
    error.advice(format!("{}. Then run `cuckoo-machinery reload`", super::NO_TCPDUMP))
}
