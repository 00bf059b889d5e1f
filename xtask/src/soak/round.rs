//! One round: a phase, a fault within it, and the invariants.

use std::fs;
use std::io::{self, PipeReader};
use std::thread;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::random::Rng;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use super::cells::{Cell, Fault, Machinery, Phase};
use super::check;
use super::fault::{Injected, Injector};
use super::phase::{Director, Reached, SOON, TASK, choose_machine};
use super::plan::{self, Step};
use super::pulse::Pulse;
use super::served::{Served, act, ask, until};
use super::site::{FAULTY, Site};
use super::traffic;
use crate::run::{Context, Result};

/// A request that is answered before the fault comes is repeated so often.
const ATTEMPTS: usize = 5;

/// The result of a round.
#[derive(Debug)]
pub struct Outcome {
    /// The machine of the round.
    pub machine: &'static str,
    /// True if the fault occurred within the phase.
    pub is_hit: bool,
    /// The longest pause of a guest whose host was away.
    pub pause: Option<Duration>,
    /// The violations.
    pub found: Vec<String>,
}

/// A round under way.
struct Round<'a> {
    site: &'a Site,
    served: &'a mut Served,
    step: Step,
    machine: &'static str,
    rng: Rng,
    is_hit: bool,
    /// True if frozen processes go on.
    thawed: bool,
    pulse: Option<Pulse>,
    pause: Option<Duration>,
    found: Vec<String>,
    /// Connections that stay until the end of the round.
    kept: Vec<Client>,
}

/// Conducts a round. All machines are in the pool and off before and, without a violation, afterwards.
pub fn conduct(site: &Site, served: &mut Served, step: Step) -> Outcome {
    let mut rng = plan::rng(step.seed);
    let machine = choose_machine(site.machinery, step.cell, &mut rng);
    served.begin_round();
    let (found, kept) = (Vec::new(), Vec::new());
    let (is_hit, thawed, pulse, pause) = (false, false, None, None);
    let mut round = Round { site, served, step, machine, rng, is_hit, thawed, pulse, pause, found, kept };
    if let Err(failure) = round.run() {
        round.found.push(failure.to_string());
    }
    Outcome { machine, is_hit: round.is_hit, pause: round.pause, found: round.found }
}

impl Round<'_> {
    fn run(&mut self) -> Result<()> {
        self.injector().arm()?;
        let Some((reached, injected)) = self.hit()? else { return self.end() };
        self.is_hit = true;
        let guest = Reached { request: None, dump: None, ..reached };
        self.take_back(reached.request, reached.dump, injected)?;
        self.expect_guest(&guest)?;
        self.end()
    }

    fn injector(&mut self) -> Injector<'_> {
        let revision = self.revision();
        Injector {
            site: self.site,
            served: self.served,
            machine: self.machine,
            fault: self.step.cell.fault,
            rng: &mut self.rng,
            revision,
        }
    }

    /// Returns a number that no other round has, with a gap for a second one.
    fn revision(&self) -> u64 {
        self.step.round * 2
    }

    /// Brings the phase about, and the fault within it. `None` if the phase was over each time.
    fn hit(&mut self) -> Result<Option<(Reached, Injected)>> {
        for _ in 0..ATTEMPTS {
            let revision = self.revision();
            let mut director = Director {
                site: self.site,
                served: self.served,
                machine: self.machine,
                cell: self.step.cell,
                rng: &mut self.rng,
                revision,
            };
            let mut reached = director.reach()?;
            self.watch_pulse();
            if reached.is_under_way()?
                && let Some(injected) = self.injector().inject()?
            {
                return Ok(Some((reached, injected)));
            }
            // The reader of a dump has not been started.
            drop(reached.dump.take());
            if let Some(mut request) = reached.request {
                request.next_message()?;
            }
            self.release()?;
        }
        Ok(None)
    }

    /// Watches the guest from now on, if it runs and counts while its host is away.
    fn watch_pulse(&mut self) {
        let counts = matches!(self.step.cell.phase, Phase::Running | Phase::Capturing);
        if counts && self.step.cell.fault.parts_host_and_guest() {
            self.pulse = Some(Pulse::watch(self.site.probe(self.machine)));
        }
    }

    /// Stops the machine, and releases its lock.
    fn release(&self) -> Result<()> {
        let mut client = self.served.client()?;
        act(&mut client, "stop", self.machine)?;
        self.unlock(&mut client)
    }

    fn unlock(&self, client: &mut Client) -> Result<()> {
        if client.machine(self.machine)?["locked"] == true {
            act(client, "unlock", self.machine)?;
        }
        Ok(())
    }

    /// Takes the fault back, and waits for the answers and for the host of the time after it.
    fn take_back(
        &mut self,
        request: Option<Client>,
        dump: Option<PipeReader>,
        injected: Injected,
    ) -> Result<()> {
        let request = request.filter(|_| self.step.cell.fault != Fault::ClientLeaves);
        let dump = dump.filter(|_| request.is_some());
        let reader = dump.map(|mut dump| thread::spawn(move || io::copy(&mut dump, &mut io::sink())));
        match &injected {
            Injected::Frozen(processes) if self.rng.below(3) > 0 => {
                self.thawed = true;
                // The length of the pause is a choice, and no event.
                thread::sleep(Duration::from_millis(self.rng.below(700)));
                for process in processes {
                    // The host may have ended it meanwhile.
                    let _ = kill_process(*process, Signal::CONT);
                }
            }
            Injected::NoLibvirtd => {
                self.site.libvirtd().map_or(Ok(()), |libvirtd| libvirtd.start_daemon_without_lost_starts())?
            }
            _ => {}
        }
        if let Some(request) = request {
            self.expect_answer(request);
        }
        self.end_fault(injected)?;
        if let Some(reader) = reader {
            // A dump that failed ends early.
            let _ = reader.join();
        }
        Ok(())
    }

    fn expect_answer(&mut self, mut request: Client) {
        let cell = self.step.cell;
        match request.next_message() {
            Ok(answer) if answer["success"] == true || !cell.fault.spares_requests() => {}
            Ok(answer) => self.found.push(format!("the request under way failed: {answer}")),
            Err(_) if cell.fault.ends_host() => {}
            Err(error) => self.found.push(format!("the request under way has no answer: {error}")),
        }
    }

    fn end_fault(&mut self, injected: Injected) -> Result<()> {
        match injected {
            Injected::Over | Injected::Frozen(_) | Injected::NoLibvirtd => {}
            Injected::Ended => self.start_again()?,
            Injected::Jumped => {
                ask(&mut self.served.client()?, json!({"action": "list"}))?;
                // The next host finds the times of another clock.
                self.served.host.kill()?;
                self.start_again()?;
            }
            Injected::Replaced(client, started) => self.served.wait_for_replacement(client, &started)?,
            Injected::Full(fillers) => {
                for filler in fillers {
                    fs::remove_file(&filler).context(|| format!("cannot remove {}", filler.display()))?;
                }
            }
            Injected::Clients(clients) => self.kept.extend(clients),
            Injected::Reload(mut client, succeeds) => {
                let answer = client.next_message()?;
                if answer["success"] != succeeds {
                    self.found.push(format!("the reload must be {succeeds}: {answer}"));
                }
                self.site.write_revision(self.revision() + 1)?;
            }
        }
        Ok(())
    }

    fn start_again(&mut self) -> Result<()> {
        let status = self.served.host.wait()?;
        let expected = match self.step.cell.fault {
            Fault::HostTerminated => Some(0),
            Fault::PluginExits => Some(1),
            _ => None,
        };
        if status.code() != expected {
            self.found.push(format!("the host ended with {status}"));
        }
        self.site.write_double("")?;
        self.served.start_again(self.site)
    }

    /// Expects that the guest goes on, that it can be dumped, and that its capture continues, if the fault spares it.
    fn expect_guest(&mut self, reached: &Reached) -> Result<()> {
        let cell = self.step.cell;
        let mut client = self.served.client()?;
        ask(&mut client, json!({"action": "wait_idle"}))?;
        if cell.phase.keeps_guest() && (cell.fault.spares_guests() || self.thawed) {
            self.expect_running(&mut client, reached)?;
        }
        Ok(())
    }

    fn expect_running(&mut self, client: &mut Client, reached: &Reached) -> Result<()> {
        let mut last = Value::Null;
        let runs = until(SOON, || {
            last = client.machine(self.machine)?;
            Ok((last["state"] == "running").then_some(()))
        })?;
        let qemu = self.site.qemus(self.machine)?;
        if runs.is_none() || last["locked_by"] != TASK || qemu.first() != reached.qemu.as_ref() {
            self.found.push(format!("the guest of {:?} does not go on in {qemu:?}: {last}", reached.qemu));
            return Ok(());
        }
        let probe = self.site.probe(self.machine);
        probe.wait_for_next_count(SOON)?;
        self.pause = self.pulse.take().map(Pulse::longest);
        let is_reported = last["errors"].to_string().contains("no packets of the time between two hosts");
        if reached.captures && self.step.cell.fault.parts_host_and_guest() && !is_reported {
            self.found.push(format!("the gap of the capture is not reported: {last}"));
        }
        if reached.captures && self.step.cell.fault != Fault::TcpdumpKilled {
            traffic::talk(&probe.ip, &self.site.pcap(self.machine), "after the fault")?;
        }
        let path = self.site.dump();
        ask(client, json!({"action": "dump_memory", "machine": self.machine, "path": path}))?;
        fs::remove_file(&path).context(|| format!("cannot remove {}", path.display()))?;
        Ok(())
    }

    /// Ends the run, and checks the invariants.
    fn end(&mut self) -> Result<()> {
        let mut client = self.served.client()?;
        ask(&mut client, json!({"action": "wait_idle"}))?;
        if self.step.cell.phase != Phase::Idle {
            self.stop(&mut client)?;
            self.unlock(&mut client)?;
        }
        if self.step.cell.fault == Fault::PluginHangs {
            self.stop_faulty(&mut client)?;
        }
        if self.standby_may_fail() {
            client.act("restore_start", self.machine)?;
            self.stop(&mut client)?;
        }
        drop(client);
        self.found.extend(check::wait_for_pool(self.served)?);
        if !self.found.is_empty() {
            return Ok(());
        }
        self.disarm()?;
        self.kept.clear();
        self.found.extend(check::check(self.site, self.served)?);
        Ok(())
    }

    /// Reports whether the machine's next restore may fail: libvirt does not report that the QEMU of a standby is frozen.
    /// The machine then heals.
    fn standby_may_fail(&self) -> bool {
        let Cell { fault, phase } = self.step.cell;
        self.site.machinery == Machinery::Kvm && fault == Fault::QemuFrozen && phase == Phase::Idle
    }

    /// Stops the machine. After an accident the first attempt may fail, and then the machine heals.
    fn stop(&mut self, client: &mut Client) -> Result<()> {
        let answer = client.act("stop", self.machine)?;
        if answer["success"] == false && client.machine(self.machine)?["quarantine"].is_null() {
            self.found.push(format!("the stop failed: {answer}"));
        }
        Ok(())
    }

    /// Stops the machine of the double whose call hangs. A stop fails until the call has returned.
    fn stop_faulty(&self, client: &mut Client) -> Result<()> {
        let stopped = until(SOON, || Ok((client.act("stop", FAULTY)?["success"] == true).then_some(())))?;
        stopped.ok_or_else(|| format!("{FAULTY} does not stop after its call has returned").into())
    }

    /// Takes the faults of the double back, which has healed by itself.
    fn disarm(&self) -> Result<()> {
        let is_armed =
            matches!(self.step.cell.fault, Fault::PluginPanics | Fault::PluginHangs | Fault::PluginExits);
        if is_armed {
            self.site.write_double("")?;
            ask(&mut self.served.client()?, json!({"action": "reload"}))?;
        }
        Ok(())
    }
}
