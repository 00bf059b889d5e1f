//! The host with clones or copies.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Instant;

use machinery_testkit::client::Client;
use machinery_testkit::host::RunningHost;
use serde_json::{Value, json};

use super::agents;
use super::kinds::{ALL_MEMORY, ANSWERED, DISK, IDLE_MEMORY, MEMORY, RESUMED, STAND_BY, STOPPED, place};
use super::machines::{Machine, Machines};
use crate::bench::figures::Figures;
use crate::bench::host::succeeded;
use crate::bench::parallel::{IDLE_AFTER, memory_of_all};
use crate::bench::turns::{ms, timed};
use crate::run::Result;

/// Has these machines stand by once, so that their templates are there.
fn make_templates(machines: &Machines, all: &[Machine]) -> Result<()> {
    let mut host = machines.lab().host()?;
    stand_by(&mut host.client()?, all)?;
    end(&mut host)
}

/// Measures hosts of these machines, whose templates are made before.
pub fn measure(
    machines: &Machines,
    all: &[Machine],
    by: &'static str,
    rounds: usize,
    figures: &mut Figures,
) -> Result<()> {
    make_templates(machines, all)?;
    (0..rounds).try_for_each(|_| one_round(machines, all, by, figures))
}

fn one_round(machines: &Machines, all: &[Machine], by: &'static str, figures: &mut Figures) -> Result<()> {
    let (lab, place) = (machines.lab(), place(all.len()));
    let begun = Instant::now();
    let mut host = lab.host()?;
    let mut client = host.client()?;
    stand_by(&mut client, all)?;
    figures.add(place, STAND_BY.by(by), ms(begun.elapsed()));
    let one = |memory: f64| memory / all.len() as f64;
    figures.add(place, IDLE_MEMORY.by(by), one(memory_of_all(lab, all.len())?));
    let begun = Instant::now();
    act(&mut client, "restore_start", all)?;
    figures.add(place, RESUMED.by(by), ms(begun.elapsed()));
    let ips: Vec<Ipv4Addr> = all.iter().map(|machine| machine.ip).collect();
    agents::wait_for_all(lab.network(), &ips)?;
    figures.add(place, ANSWERED.by(by), ms(begun.elapsed()));
    thread::sleep(IDLE_AFTER);
    let memory = memory_of_all(lab, all.len())?;
    figures.add(place, MEMORY.by(by), one(memory));
    figures.add(place, ALL_MEMORY.by(by), memory);
    figures.add(place, DISK.by(by), machines.disk()?);
    let ((), stopped) = timed(|| act(&mut client, "stop", all))?;
    figures.add(place, STOPPED.by(by), stopped);
    end(&mut host)
}

/// Waits until all machines stand by.
fn stand_by(client: &mut Client, all: &[Machine]) -> Result<()> {
    act(client, "prepare", all)?;
    let list = client.ask(json!({"action": "list"}))?;
    let ready = |machine: &&Value| machine["ready"]["mode"] == "standby";
    let listed = list["machines"].as_array().into_iter().flatten();
    let ready: HashSet<&str> = listed.filter(ready).filter_map(|machine| machine["name"].as_str()).collect();
    match all.iter().find(|machine| !ready.contains(machine.name.as_str())) {
        None => Ok(()),
        Some(machine) => {
            Err(format!("{} does not stand by: {}", machine.name, client.machine(&machine.name)?).into())
        }
    }
}

/// Requests an action for every machine at once, and waits for all answers.
fn act(client: &mut Client, action: &str, all: &[Machine]) -> Result<()> {
    let request = |machine: &Machine| format!("{}\n", json!({"action": action, "machine": machine.name}));
    client.send_bytes(all.iter().map(request).collect::<String>().as_bytes())?;
    all.iter().try_for_each(|_| succeeded(action, &client.next_message()?))
}

fn end(host: &mut RunningHost) -> Result<()> {
    let status = host.terminate()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("the host ended with {status}; it said:\n{}", host.log()).into())
    }
}
