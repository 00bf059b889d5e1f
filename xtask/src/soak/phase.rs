//! Brings a phase about: from a machine that is off to the moment of the fault.

use std::io::{self, PipeReader};
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::lab::{FileEvent, FileWatch};
use machinery_testkit::random::Rng;
use rustix::fd::AsFd;
use rustix::process::Pid;
use serde_json::json;

use super::cells::{Cell, Fault, Machinery, Phase};
use super::served::{Served, act, ask, disable, until};
use super::site::{INSTANT, PLAIN, REAL, STANDBY, Site};
use super::traffic;
use crate::run::{Context, Result};

/// The time that a machine has for each step.
pub const SOON: Duration = Duration::from_secs(60);
/// The task of all locks.
pub const TASK: &str = "soak";

/// A phase that was reached.
#[derive(Debug)]
pub struct Reached {
    /// The connection with the request that is under way.
    pub request: Option<Client>,
    /// The dump that nobody reads yet, which keeps its request under way.
    pub dump: Option<PipeReader>,
    /// The machine's QEMU, whose guest was running before the request.
    pub qemu: Option<Pid>,
    /// True if the machine's traffic is captured.
    pub captures: bool,
}

impl Reached {
    /// Reports whether the request is still under way.
    pub fn is_under_way(&self) -> Result<bool> {
        Ok(match &self.request {
            Some(request) => !request.has_message()?,
            None => true,
        })
    }
}

/// Chooses the machine for a cell.
pub fn choose_machine(machinery: Machinery, cell: Cell, rng: &mut Rng) -> &'static str {
    let of = |machines: &[&'static str], rng: &mut Rng| machines[rng.index(machines.len())];
    match cell.phase {
        Phase::Idle => STANDBY,
        // A save image stays as long as its snapshot.
        Phase::Preparing if machinery == Machinery::Kvm => STANDBY,
        Phase::Preparing => of(&[INSTANT, STANDBY], rng),
        // A standby runs within a millisecond.
        Phase::Starting => of(&[PLAIN, INSTANT], rng),
        _ => of(&REAL, rng),
    }
}

/// Brings phases about, for one machine.
pub struct Director<'a> {
    pub site: &'a Site,
    pub served: &'a Served,
    pub machine: &'static str,
    pub cell: Cell,
    pub rng: &'a mut Rng,
    /// The number of the next changed configuration.
    pub revision: u64,
}

impl Director<'_> {
    /// Brings the phase about.
    pub fn reach(&mut self) -> Result<Reached> {
        match self.cell.phase {
            Phase::Idle => self.idle(),
            Phase::Preparing => self.preparing(),
            Phase::Starting => self.starting(),
            Phase::Running => self.running(false),
            Phase::Capturing => self.running(true),
            Phase::Dumping => self.dumping(),
            Phase::Stopping => self.stopping(),
            Phase::Reloading => self.reloading(),
        }
    }

    fn needs_capture(&self) -> bool {
        self.cell.fault == Fault::TcpdumpKilled
            || self.cell.phase != Phase::Running && self.site.missing.capture.is_none() && self.rng_is_even()
    }

    /// Chooses half of the rounds, without a change of the generator.
    fn rng_is_even(&self) -> bool {
        self.rng.0.is_multiple_of(2)
    }

    fn idle(&self) -> Result<Reached> {
        let mut client = self.served.client()?;
        let ready = until(SOON, || {
            let machine = client.machine(self.machine)?;
            Ok((machine["ready"]["mode"] == "standby").then_some(()))
        })?;
        match ready {
            Some(()) => Ok(Reached { request: None, dump: None, qemu: None, captures: false }),
            None => {
                Err(format!("{} gets no standby: {}", self.machine, client.machine(self.machine)?).into())
            }
        }
    }

    fn preparing(&self) -> Result<Reached> {
        let mut client = self.served.client()?;
        // Only a machine without a preparation is prepared.
        disable(&mut client, self.machine)?;
        act(&mut client, "restore_start", self.machine)?;
        act(&mut client, "stop", self.machine)?;
        self.site.renew_snapshot(self.machine)?;
        let watch = self.watch()?;
        act(&mut client, "enable_machine", self.machine)?;
        client.send(&json!({"action": "prepare", "machine": self.machine}))?;
        self.wait_for_qemu(watch)?;
        Ok(Reached { request: Some(client), dump: None, qemu: None, captures: false })
    }

    fn starting(&mut self) -> Result<Reached> {
        let (mut client, captures) = (self.served.client()?, self.needs_capture());
        self.lock(&mut client, captures)?;
        let mut subscriber = self.served.client()?;
        subscriber.subscribe()?;
        let watch = self.watch()?;
        client.send(&json!({"action": "restore_start", "machine": self.machine}))?;
        let of_qemu = matches!(self.cell.fault, Fault::QemuKilled | Fault::QemuFrozen | Fault::TcpdumpKilled);
        if of_qemu || self.rng.below(2) == 0 {
            self.wait_for_qemu(watch)?;
        } else {
            subscriber.wait_for_state(self.machine, "starting")?;
        }
        Ok(Reached { request: Some(client), dump: None, qemu: None, captures })
    }

    fn running(&mut self, captures: bool) -> Result<Reached> {
        let mut client = self.served.client()?;
        self.lock(&mut client, captures)?;
        act(&mut client, "restore_start", self.machine)?;
        let probe = self.site.probe(self.machine);
        probe.wait_for_next_count(SOON)?;
        if captures {
            traffic::talk(&probe.ip, &self.site.pcap(self.machine), "before the fault")?;
        }
        let qemu = self.site.qemus(self.machine)?.first().copied();
        Ok(Reached { request: None, dump: None, qemu, captures })
    }

    fn dumping(&mut self) -> Result<Reached> {
        let mut reached = self.running(self.needs_capture())?;
        let (reader, writer) = io::pipe().context(|| "cannot make a pipe for a dump".to_owned())?;
        let mut client = self.served.client()?;
        let mut subscriber = self.served.client()?;
        subscriber.subscribe()?;
        let request = json!({"action": "dump_memory", "machine": self.machine, "fd": true});
        client.send_with(format!("{request}\n").as_bytes(), &[writer.as_fd()])?;
        drop(writer);
        if self.rng.below(2) == 0 {
            // QEMU writes. Otherwise, it may not have begun.
            subscriber.wait_for_event("progress", self.machine)?;
        }
        (reached.request, reached.dump) = (Some(client), Some(reader));
        Ok(reached)
    }

    fn stopping(&mut self) -> Result<Reached> {
        let mut reached = self.running(self.needs_capture())?;
        let mut client = self.served.client()?;
        let mut subscriber = self.served.client()?;
        subscriber.subscribe()?;
        client.send(&json!({"action": "acpi_stop", "machine": self.machine}))?;
        subscriber.wait_for_state(self.machine, "stopping")?;
        reached.request = Some(client);
        Ok(reached)
    }

    fn reloading(&mut self) -> Result<Reached> {
        let mut reached = self.running(self.needs_capture())?;
        let mut client = self.served.client()?;
        self.site.write_revision(self.revision)?;
        client.send(&json!({"action": "reload"}))?;
        reached.request = Some(client);
        Ok(reached)
    }

    fn lock(&self, client: &mut Client, captures: bool) -> Result<()> {
        let mut lock = json!({"action": "lock", "machine": self.machine, "task_id": TASK});
        if captures {
            lock["pcap_path"] = json!(self.site.pcap(self.machine));
        }
        ask(client, lock).map(drop)
    }

    fn watch(&self) -> Result<FileWatch> {
        let serial = &self.site.probe(self.machine).serial;
        let folder = serial.parent().ok_or_else(|| format!("{} has no folder", serial.display()))?;
        Ok(FileWatch::new(folder)?)
    }

    /// Waits until the machine's QEMU opens its files. The host of qemu opens this one first, to give it to the
    /// machine's user.
    fn wait_for_qemu(&self, watch: FileWatch) -> Result<()> {
        let opened = [FileEvent::Opened("serial.log"); 2];
        let steps = if self.site.machinery == Machinery::Qemu { &opened[..] } else { &opened[..1] };
        Ok(watch.wait(steps, SOON)?)
    }
}
