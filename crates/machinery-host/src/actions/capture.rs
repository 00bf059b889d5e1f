//! Begins and ends the capture of a machine's traffic, from before its start until after its stop.
//!
//! A failure is reported in the log, as an event and among the machine's errors. It fails no action: an
//! analysis without its traffic is worth more than none. The rules are Cuckoo3's (`start_netcapture` in
//! `node/machinery.py`). Two are ours: tcpdump listens before the machine runs, and reads everything before
//! it is ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result};

use super::inspection::within;
use crate::capture::space::Captures;
use crate::capture::tcpdump::Tcpdump;
use crate::capture::writer::CaptureFile;
use crate::capture::{Settings, Target, filter};
use crate::client_file::{ClientFile, Existing, Folders};
use crate::fleet::Machine;
use crate::fleet::availability::TaskLock;
use crate::fleet::machine::Capture;

/// The time that the file of a capture has to be opened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Begins to capture if a task has locked the machine and wants a capture. Returns when tcpdump listens.
pub async fn begin(machine: &Arc<Machine>, settings: &Settings, folders: &Folders, captures: &Arc<Captures>) {
    run(machine, settings, folders, captures, Existing::Truncated).await;
}

/// Continues the capture of a run that an earlier host has started, and reports the gap. Returns when tcpdump listens.
pub async fn resume(
    machine: &Arc<Machine>,
    settings: &Settings,
    folders: &Folders,
    captures: &Arc<Captures>,
) {
    let lock = machine.task_lock();
    let pcap = lock.as_ref().and_then(|lock| lock.pcap_path.clone());
    let written = pcap.as_ref().and_then(|pcap| std::fs::metadata(pcap).ok()?.modified().ok());
    run(machine, settings, folders, captures, Existing::Kept).await;
    let Some((lock, pcap)) = lock.zip(pcap) else { return };
    let gap = written.and_then(|written| written.elapsed().ok()).unwrap_or_default().as_secs_f64();
    let (pcap, what) = (pcap.display(), "no packets of the time between two hosts");
    let error = format!("{pcap} has {what}; the last one before is {gap:.1} seconds old");
    machine.capture_failed(&lock, &Error::failed(error));
}

async fn run(
    machine: &Arc<Machine>,
    settings: &Settings,
    folders: &Folders,
    captures: &Arc<Captures>,
    content: Existing,
) {
    let mut capture = machine.capture.lock().await;
    let Some(lock) = machine.task_lock() else { return };
    match start(machine, settings, folders, captures, &lock, content).await {
        Ok(Some(tcpdump)) => *capture = Some(Capture { lock, tcpdump }),
        Ok(None) => {}
        Err(error) => machine.capture_failed(&lock, &error),
    }
}

/// Starts tcpdump, if the task wants a capture.
async fn start(
    machine: &Arc<Machine>,
    settings: &Settings,
    folders: &Folders,
    captures: &Arc<Captures>,
    lock: &TaskLock,
    content: Existing,
) -> Result<Option<Tcpdump>> {
    let Some(file) = lock.pcap() else {
        return if lock.pcap_passed { Err(lost_descriptor()) } else { Ok(None) };
    };
    // A passed file has no path. Its mark is a path in the CWD.
    let pcap = lock.pcap_path.clone().unwrap_or_else(|| folders.staging.join("passed descriptor"));
    let (target, folders) = (target(machine, settings, pcap)?, folders.clone());
    let opened = within(OPEN_TIMEOUT, "open the file of the capture", move || open(file, &folders, content));
    let (file, reporter, task) = (opened.await?, Arc::clone(machine), lock.clone());
    let report = move |error: &Error| reporter.capture_failed(&task, error);
    Ok(Some(Tcpdump::start(settings, target, file, captures, report).await?))
}

fn open(file: ClientFile, folders: &Folders, content: Existing) -> Result<CaptureFile> {
    let named = match file {
        ClientFile::Passed(file) => return Ok(CaptureFile::Passed(file)),
        ClientFile::Named(named) => named,
    };
    let opened = named.open(folders, content).map_err(|error| {
        error.default_advice("Check that its folder exists and is writable for the host's user")
    })?;
    match content {
        Existing::Truncated => Ok(CaptureFile::Opened(opened)),
        Existing::Kept => CaptureFile::continued(opened)
            .map_err(|error| Error::io("continue the capture in", &named.path, &error)),
    }
}

fn lost_descriptor() -> Error {
    Error::failed("the descriptor for the capture was lost with an earlier host")
        .advice("Lock the machine again, with the same task, and pass another descriptor")
}

/// Ends the machine's capture, if there is one. Its file is complete then.
pub async fn end(machine: &Machine) {
    stop(machine, machine.capture.lock().await.take()).await;
}

/// Ends the machine's capture if the task of the capture does not have the machine any more. The capture of a
/// later task goes on.
pub async fn end_of_task(machine: &Machine) {
    let mut capture = machine.capture.lock().await;
    let ended = capture.take_if(|capture| machine.task_lock().as_ref() != Some(&capture.lock));
    stop(machine, ended).await;
}

async fn stop(machine: &Machine, capture: Option<Capture>) {
    if let Some(Capture { tcpdump, lock }) = capture
        && let Err(error) = tcpdump.stop().await
    {
        machine.capture_failed(&lock, &error);
    }
}

fn target(machine: &Machine, settings: &Settings, pcap: PathBuf) -> Result<Target> {
    let info = machine.info();
    let interface = info.interface.clone().ok_or_else(|| {
        Error::configuration("the machine has no interface to capture on")
            .advice("Give `interface` in the machine's or the machinery's configuration")
    })?;
    let agent = (info.ip.clone(), info.agent_port);
    let ignored: Vec<_> = settings.result_server.iter().chain([&agent]).collect();
    Ok(Target { interface, filter: filter(&info.ip, &ignored), pcap })
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::*;
    use crate::capture::Jail;
    use crate::fleet::fake_plugin::info;
    use machinery::{FreeSpaceReserve, MachineInfo};

    /// Returns the settings of captures by a program that does not exist.
    fn settings() -> Settings {
        Settings {
            tcpdump: "/none/tcpdump".into(),
            result_server: None,
            limit: None,
            reserve: FreeSpaceReserve::default(),
            jail: Jail::Off,
        }
    }

    #[tokio::test]
    async fn capture_that_fails_is_an_error_of_the_machine_and_nothing_else() {
        let lab = Lab::new("");
        let errors = || lab.machine.status().errors;
        let start =
            async || begin(&lab.machine, &settings(), &lab.context.folders, &lab.context.captures).await;
        start().await;
        lab.machine.lock(&TaskLock::default()).unwrap();
        start().await;
        assert!(errors().is_empty(), "nobody wants a capture");
        lab.machine.unlock(None).unwrap();
        let pcap_path = Some(lab.folder.path().join("dump.pcap"));
        lab.machine.lock(&TaskLock { pcap_path, ..TaskLock::default() }).unwrap();
        start().await;
        assert!(errors()[0].contains("no interface"), "{:?}", errors());
        lab.machine.set_info(MachineInfo { interface: Some("lo".into()), ..info("m") });
        start().await;
        assert!(errors()[1].contains("cannot start /none/tcpdump"), "{:?}", errors());
    }

    #[tokio::test]
    async fn continued_capture_reports_its_gap_only_when_there_is_a_capture() {
        let lab = Lab::new("");
        let again =
            async || resume(&lab.machine, &settings(), &lab.context.folders, &lab.context.captures).await;
        again().await;
        assert!(lab.machine.status().errors.is_empty());
        let pcap_path = Some(lab.folder.path().join("dump.pcap"));
        lab.machine.lock(&TaskLock { pcap_path, ..TaskLock::default() }).unwrap();
        again().await;
        let errors = lab.machine.status().errors;
        assert!(
            errors.iter().any(|error| error.contains("no packets of the time between two hosts")),
            "{errors:?}"
        );
    }
}
