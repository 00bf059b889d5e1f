//! Brings a fault about, and takes it back.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::random::Rng;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::cells::Fault;
use super::served::{Served, act, ask, until};
use super::site::{FAULTY, Site};
use crate::run::{Context, Result};

/// The keys of the double's machine for faults of a plugin. Each fault occurs once.
const PANICS: &str = "faults: {restore_start: panic}, fault_times: 1";
const EXITS: &str = "faults: {screenshot: exit}, fault_times: 1";
const HANGS: &str = "faults: {screenshot: hang}, fault_times: 1, hang_ms: 3000";

/// The text that a client floods the host with: more answers than its connection holds.
const REQUESTS: usize = 400;

/// A fault that was injected, with all that is needed to take it back.
#[derive(Debug)]
pub enum Injected {
    /// There is nothing to take back.
    Over,
    /// The host has to end, or has ended.
    Ended,
    /// The clock of the host is wrong.
    Jumped,
    /// The host executes its program again; a connection that was open before, and the time of its first start.
    Replaced(Client, Value),
    /// These processes are frozen.
    Frozen(Vec<Pid>),
    /// libvirtd has ended.
    NoLibvirtd,
    /// These files fill the disks.
    Full(Vec<PathBuf>),
    /// These connections stay until the end of the round.
    Clients(Vec<Client>),
    /// The answer to a reload is due, and must be a success or not.
    Reload(Client, bool),
}

/// Injects one fault.
pub struct Injector<'a> {
    pub site: &'a Site,
    pub served: &'a mut Served,
    pub machine: &'static str,
    pub fault: Fault,
    pub rng: &'a mut Rng,
    pub revision: u64,
}

impl Injector<'_> {
    /// Prepares the fault before its phase.
    pub fn arm(&mut self) -> Result<()> {
        let keys = match self.fault {
            Fault::PluginPanics => PANICS,
            Fault::PluginExits => EXITS,
            Fault::PluginHangs => HANGS,
            Fault::ClockJumped => return self.served.restart_with_clock(self.site),
            _ => return Ok(()),
        };
        self.site.write_double(keys)?;
        let mut client = self.served.client()?;
        ask(&mut client, json!({"action": "reload"}))?;
        if self.fault != Fault::PluginPanics {
            act(&mut client, "restore_start", FAULTY)?;
        }
        Ok(())
    }

    /// Injects the fault; `None` if its process has ended at this moment.
    pub fn inject(&mut self) -> Result<Option<Injected>> {
        let (site, machine) = (self.site, self.machine);
        let hit = match self.fault {
            Fault::QemuKilled => signal_all(self.wait_for_qemus()?, Signal::KILL),
            Fault::QemuFrozen => signal_all(self.wait_for_qemus()?, Signal::STOP),
            Fault::TcpdumpKilled => signal_all(site.tcpdumps(machine)?, Signal::KILL),
            _ => return self.inject_elsewhere().map(Some),
        };
        Ok(match hit {
            hit if hit.is_empty() => None,
            frozen if self.fault == Fault::QemuFrozen => Some(Injected::Frozen(frozen)),
            _ => Some(Injected::Over),
        })
    }

    /// Returns the machine's QEMUs. libvirtd makes a QEMU's files before the process.
    fn wait_for_qemus(&self) -> Result<Vec<Pid>> {
        let found = until(Duration::from_secs(1), || {
            let found = self.site.qemus(self.machine)?;
            Ok((!found.is_empty()).then_some(found))
        })?;
        Ok(found.unwrap_or_default())
    }

    /// Injects a fault of something other than the machine's own processes.
    fn inject_elsewhere(&mut self) -> Result<Injected> {
        match self.fault {
            Fault::QemuKilled | Fault::QemuFrozen | Fault::TcpdumpKilled => Ok(Injected::Over),
            Fault::HostKilled => self.kill_host(),
            Fault::HostTerminated => self.signal_host(Signal::TERM).map(|()| Injected::Ended),
            Fault::HostReplaced => self.replace_host(),
            Fault::LibvirtdKilled => self.kill_libvirtd(),
            Fault::PluginPanics => self.call_faulty(json!({"action": "restore_start", "machine": FAULTY})),
            Fault::PluginHangs => self.call_faulty(self.screenshot()),
            Fault::PluginExits => {
                let mut client = self.served.client()?;
                client.send(&self.screenshot())?;
                Ok(Injected::Ended)
            }
            Fault::DiskFull => self.fill_disks(),
            Fault::MemoryShort => self.site.cgroups().use_memory_up().map(|()| Injected::Over),
            Fault::ClockJumped => {
                let differences = ["+365d", "-365d"];
                self.site.jump(differences[self.rng.index(differences.len())])?;
                Ok(Injected::Jumped)
            }
            Fault::ClientLeaves => self.leave(),
            Fault::ClientReadsNothing => self.flood(),
            Fault::Reload => {
                self.site.write_revision(self.revision + 1)?;
                self.reload(true)
            }
            Fault::BrokenReload => {
                self.site.break_yaml()?;
                self.reload(false)
            }
        }
    }

    fn kill_host(&mut self) -> Result<Injected> {
        self.served.host.kill()?;
        Ok(Injected::Ended)
    }

    fn signal_host(&self, signal: Signal) -> Result<()> {
        Ok(self.served.host.signal(signal)?)
    }

    fn replace_host(&mut self) -> Result<Injected> {
        let (mut client, started) = (self.served.client()?, self.served.started()?);
        if self.rng.below(2) == 0 {
            self.signal_host(Signal::USR2)?;
        } else {
            client.send(&json!({"action": "upgrade"}))?;
        }
        Ok(Injected::Replaced(client, started))
    }

    fn kill_libvirtd(&mut self) -> Result<Injected> {
        if let Some(libvirtd) = self.site.libvirtd() {
            libvirtd.kill_daemon()?;
            // The length of the outage is a choice, and no event.
            thread::sleep(Duration::from_millis(self.rng.below(500)));
        }
        Ok(Injected::NoLibvirtd)
    }

    /// Requests an action that must fail, and leaves the fault to the host.
    fn call_faulty(&self, request: Value) -> Result<Injected> {
        let answer = self.served.client()?.ask(request)?;
        match answer["success"] == false {
            true => Ok(Injected::Over),
            false => Err(format!("the plugin's fault did not occur: {answer}").into()),
        }
    }

    /// Returns a request with a short timeout.
    fn screenshot(&self) -> Value {
        json!({"action": "screenshot", "machine": FAULTY, "path": self.site.cwd().root().join("screen")})
    }

    fn fill_disks(&self) -> Result<Injected> {
        let fillers: Vec<PathBuf> = self.site.disks().iter().map(|disk| disk.path().join("filler")).collect();
        fillers.iter().try_for_each(|filler| fill(filler))?;
        Ok(Injected::Full(fillers))
    }

    /// Sends half of a request, and closes the connection.
    fn leave(&self) -> Result<Injected> {
        self.served.client()?.send_bytes(b"{\"action\": \"restore_st")?;
        Ok(Injected::Over)
    }

    fn flood(&self) -> Result<Injected> {
        let mut client = self.served.client()?;
        client.subscribe()?;
        client.flood("{\"action\": \"list\"}\n".repeat(REQUESTS).as_bytes())?;
        Ok(Injected::Clients(vec![client]))
    }

    fn reload(&self, succeeds: bool) -> Result<Injected> {
        let mut client = self.served.client()?;
        client.send(&json!({"action": "reload"}))?;
        Ok(Injected::Reload(client, succeeds))
    }
}

/// Sends the processes a signal, and returns those that have not ended by then.
fn signal_all(processes: Vec<Pid>, signal: Signal) -> Vec<Pid> {
    processes.into_iter().filter(|process| kill_process(*process, signal).is_ok()).collect()
}

/// Writes a file until its file system is full.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path).context(|| format!("cannot make {}", path.display()))?;
    for size in [1 << 20, 4096, 1] {
        let bytes = vec![0; size];
        while file.write_all(&bytes).is_ok() {}
    }
    Ok(())
}
