//! Begins and ends the capture of a machine's traffic, from before its start until after its stop.
//!
//! A failure is reported in the log, as an event and among the machine's errors. It fails no action: an
//! analysis without its traffic is worth more than none. The rules are Cuckoo3's (`start_netcapture` in
//! `node/machinery.py`). Two are ours: tcpdump listens before the machine runs, and reads everything before
//! it is ended.

use std::path::PathBuf;
use std::sync::Arc;

use machinery::{Error, Result};

use crate::capture::space::Captures;
use crate::capture::tcpdump::Tcpdump;
use crate::capture::{Settings, Target, filter};
use crate::fleet::Machine;
use crate::fleet::machine::Capture;

/// Begins to capture if a task has locked the machine and wants a capture. Returns when tcpdump listens.
pub async fn begin(machine: &Arc<Machine>, settings: &Settings, captures: &Arc<Captures>) {
    let mut capture = machine.capture.lock().await;
    let Some(lock) = machine.task_lock() else { return };
    let Some(pcap) = lock.pcap_path.clone() else { return };
    let begun = match target(machine, settings, pcap) {
        Ok(target) => {
            let reporter = Arc::clone(machine);
            Tcpdump::start(settings, target, captures, move |error| reporter.capture_failed(error)).await
        }
        Err(error) => Err(error),
    };
    match begun {
        Ok(tcpdump) => *capture = Some(Capture { lock, tcpdump }),
        Err(error) => machine.capture_failed(&error),
    }
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
    if let Some(Capture { tcpdump, .. }) = capture
        && let Err(error) = tcpdump.stop().await
    {
        machine.capture_failed(&error);
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
