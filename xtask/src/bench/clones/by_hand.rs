//! Clones by hand: QEMUs in network namespaces, which `ip` and `nft` make. No code of the host is involved.
//!
//! Each processor has a worker. A worker makes namespaces and starts their QEMUs one after the other. It lives until the end,
//! because a QEMU ends with the thread that has started it.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, Scope};
use std::time::Instant;

use machinery_testkit::guest::Vm;
use machinery_testkit::lab::TestNetwork;
use tempfile::TempDir;

use super::agents;
use super::kinds::{ALL_MEMORY, ANSWERED, BY_HAND, IDLE_MEMORY, MEMORY, RESUMED, STAND_BY, STOPPED, place};
use super::machines::{BASE, INSIDE, Machines};
use crate::bench::by_hand::ByHand;
use crate::bench::figures::Figures;
use crate::bench::parallel::{IDLE_AFTER, memory_of_all};
use crate::bench::turns::{ms, timed};
use crate::run::{Context, Result};

/// The template of the machine, and a folder for overlays.
pub struct HandMade<'a> {
    machines: &'a Machines,
    template: ByHand<'a>,
    overlays: TempDir,
}

impl<'a> HandMade<'a> {
    /// Makes the template.
    pub fn new(machines: &'a Machines) -> Result<Self> {
        let lab = machines.lab();
        let overlays = tempfile::tempdir().context(|| "cannot make a folder".to_owned())?;
        let template =
            lab.network().inside(|| ByHand::new_in(overlays.path(), lab.qemu(), lab.folder(BASE)))??;
        Ok(HandMade { machines, template, overlays })
    }

    /// Measures that many clones.
    pub fn measure(&self, count: usize, figures: &mut Figures) -> Result<()> {
        let (lab, place) = (self.machines.lab(), place(count));
        let ips: Vec<Ipv4Addr> = self.machines.clones(count)?.iter().map(|clone| clone.ip).collect();
        thread::scope(|scope| {
            let count_of_workers = thread::available_parallelism().map_or(1, usize::from).min(count);
            let workers: Vec<Worker<'_>> = (0..count_of_workers).map(|_| Worker::start(scope)).collect();
            let begun = Instant::now();
            for (index, ip) in ips.iter().enumerate() {
                workers[index % workers.len()].send(move |vms| {
                    vms.push(self.stand_by(index, *ip)?);
                    Ok(())
                })?;
            }
            workers.iter().try_for_each(Worker::wait)?;
            figures.add(place, STAND_BY.by(BY_HAND), ms(begun.elapsed()));
            let one = |memory: f64| memory / count as f64;
            figures.add(place, IDLE_MEMORY.by(BY_HAND), one(memory_of_all(lab, count)?));
            let begun = Instant::now();
            let resume = |vms: &mut Vec<Vm>| Ok(vms.iter_mut().try_for_each(Vm::resume)?);
            workers.iter().try_for_each(|worker| worker.send(resume))?;
            workers.iter().try_for_each(Worker::wait)?;
            figures.add(place, RESUMED.by(BY_HAND), ms(begun.elapsed()));
            agents::wait_for_all(lab.network(), &ips)?;
            figures.add(place, ANSWERED.by(BY_HAND), ms(begun.elapsed()));
            thread::sleep(IDLE_AFTER);
            let memory = memory_of_all(lab, count)?;
            figures.add(place, MEMORY.by(BY_HAND), one(memory));
            figures.add(place, ALL_MEMORY.by(BY_HAND), memory);
            let quit = |vms: &mut Vec<Vm>| Ok(vms.drain(..).try_for_each(Vm::quit)?);
            let ((), stopped) = timed(|| {
                workers.iter().try_for_each(|worker| worker.send(quit))?;
                workers.iter().try_for_each(Worker::wait)
            })?;
            figures.add(place, STOPPED.by(BY_HAND), stopped);
            Ok(())
        })
    }

    /// Makes a namespace, and a QEMU in it that is loaded and paused.
    fn stand_by(&self, index: usize, ip: Ipv4Addr) -> Result<Vm> {
        let host = self.machines.lab().network();
        let cell = cell(host, &format!("hand{index}"), ip)?;
        cell.enter()?;
        self.template.paused_on(&self.overlay(index))
    }

    fn overlay(&self, index: usize) -> PathBuf {
        self.overlays.path().join(format!("overlay{index}.qcow2"))
    }
}

/// Makes the network of one machine, whose interface on the host has that name.
fn cell(host: &TestNetwork, interface: &str, ip: Ipv4Addr) -> Result<TestNetwork> {
    let (bridge, tap, source) = (TestNetwork::BRIDGE, TestNetwork::tap_of(1), TestNetwork::HOST);
    let (here, there) = ("02:00:00:00:00:01", "02:00:00:00:00:02");
    let cell = TestNetwork::empty()?;
    let namespace = host.path();
    cell.ip_batch(&format!(
        "link add {bridge} type bridge\nlink set {bridge} up\ntuntap add dev {tap} mode tap\nlink set {tap} master {bridge} up\n\
         link add uplink address {there} type veth peer name {interface} address {here} netns {namespace}\nlink set uplink up\n\
         route add 169.254.1.1 dev uplink\nneigh add 169.254.1.1 lladdr {here} dev uplink nud permanent\n\
         route add default via 169.254.1.1 dev uplink onlink\nroute add {INSIDE}/32 dev {bridge}\n"
    ))?;
    cell.route_for_others(bridge)?;
    cell.nft(&format!(
        "table ip clone {{\n chain before {{ type nat hook prerouting priority dstnat; iifname uplink ip daddr {ip} dnat to {INSIDE}; }}\n\
         chain after {{ type nat hook postrouting priority srcnat; oifname uplink ip saddr {INSIDE} snat to {ip}; }}\n}}\n"
    ))?;
    host.ip_batch(&format!(
        "link set {interface} up\nneigh add {ip} lladdr {there} dev {interface} nud permanent\n\
         route add {ip}/32 dev {interface} src {source}\n"
    ))?;
    Ok(cell)
}

type Job<'a> = Box<dyn FnOnce(&mut Vec<Vm>) -> Result<()> + Send + 'a>;

/// A thread that has started some QEMUs.
struct Worker<'a> {
    jobs: Sender<Job<'a>>,
    results: Receiver<Result<()>>,
    sent: std::cell::Cell<usize>,
}

impl<'a> Worker<'a> {
    fn start<'scope>(scope: &'scope Scope<'scope, '_>) -> Self
    where
        'a: 'scope,
    {
        let (jobs, to_do) = channel::<Job<'a>>();
        let (done, results) = channel();
        scope.spawn(move || {
            let mut vms = Vec::new();
            for job in to_do {
                if done.send(job(&mut vms)).is_err() {
                    return;
                }
            }
        });
        Worker { jobs, results, sent: std::cell::Cell::new(0) }
    }

    fn send(&self, job: impl FnOnce(&mut Vec<Vm>) -> Result<()> + Send + 'a) -> Result<()> {
        self.sent.set(self.sent.get() + 1);
        Ok(self.jobs.send(Box::new(job)).map_err(|_| "a worker has ended".to_owned())?)
    }

    /// Waits for all jobs.
    fn wait(&self) -> Result<()> {
        let sent = self.sent.take();
        (0..sent).try_for_each(|_| self.results.recv().map_err(|_| "a worker has ended".to_owned())?)
    }
}
