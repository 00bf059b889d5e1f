//! The host's resource use with many machines, with many actions, and when idle.
//!
//! Bounds allow for a debug build on a busy machine. The measured numbers are printed (`--nocapture`). These
//! tests run one after the other.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::host::RunningHost;
use machinery_testkit::scratch::ScratchCwd;
use serde_json::{Value, json};

const MACHINES: usize = 1000;
const ACTIONS: usize = 10_000;

/// A host with its CWD, and the exclusive right to measure; dropped in this order.
struct Served {
    host: RunningHost,
    _cwd: ScratchCwd,
    _turn: MutexGuard<'static, ()>,
}

fn served(machines: &[(&str, &str)]) -> Served {
    static TURN: Mutex<()> = Mutex::new(());
    // A failed test no longer measures.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let cwd = ScratchCwd::double(machines).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), _cwd: cwd, _turn: turn }
}

/// Starts a host with [`MACHINES`] machines.
fn many() -> Served {
    with_machines(MACHINES)
}

/// Starts a host with machines `m0`, `m1` and so on; the restore of every third one fails.
fn with_machines(count: usize) -> Served {
    let names: Vec<String> = (0..count).map(|index| format!("m{index}")).collect();
    let keys = |index: usize| if fails(index) { "faults: {restore_start: fail}" } else { "" };
    let machines: Vec<_> =
        names.iter().enumerate().map(|(index, name)| (name.as_str(), keys(index))).collect();
    served(&machines)
}

fn fails(machine: usize) -> bool {
    machine.is_multiple_of(3)
}

/// Measures the duration of a list of that many machines.
fn list_time(client: &mut Client, machines: usize) -> Duration {
    let begun = Instant::now();
    client.send(&json!({"action": "list"})).unwrap();
    let line = client.next_line().unwrap();
    let took = begun.elapsed();
    let list: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(list["machines"].as_array().unwrap().len(), machines);
    took
}

/// Returns the host's processor time for a number of lists.
fn list_costs(machines: usize, lists: usize) -> Duration {
    let served = with_machines(machines);
    let mut client = served.host.client().unwrap();
    let before = processor_time(&served.host);
    let mut times: Vec<Duration> = (0..lists).map(|_| list_time(&mut client, machines)).collect();
    let used = processor_time(&served.host) - before;
    times.sort();
    println!("{lists} lists of {machines}: median {:?}, processor time {used:?}", times[lists / 2]);
    println!("{} kB resident", resident_kb(&served.host));
    used
}

fn resident_kb(host: &RunningHost) -> u64 {
    number(&fs::read_to_string(format!("/proc/{}/status", host.pid())).unwrap(), "VmRSS:")
}

/// Returns the number after `word` in a file of `/proc`.
fn number(text: &str, word: &str) -> u64 {
    let rest = text.lines().find_map(|line| line.strip_prefix(word)).unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

/// Returns a process's processor time, which does not depend on the machine's load.
fn processor_time(host: &RunningHost) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", host.pid())).unwrap();
    let ticks: u64 = times_of(&stat).iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    // A tick is 10 ms for programs, on every Linux.
    Duration::from_millis(ticks * 10)
}

/// Returns the 14th and 15th field of a `stat`: time in the program and in the kernel. The second field is a
/// name in parentheses with arbitrary content.
fn times_of(stat: &str) -> Vec<&str> {
    stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).collect()
}

#[test]
fn list_time_per_machine_is_constant_when_there_are_many() {
    // Ten times as many machines, and a tenth of the lists. A quadratic algorithm would take ten times as
    // long.
    let (few, many) = (list_costs(MACHINES / 10, 500), list_costs(MACHINES, 50));
    assert!(many < few * 4, "{few:?} with few machines, {many:?} with many");
}

/// Returns the action with that number: machines in order, each alternately restored and stopped.
fn action(number: usize) -> (usize, &'static str) {
    let name = if (number / MACHINES).is_multiple_of(2) { "restore_start" } else { "stop" };
    (number % MACHINES, name)
}

#[test]
fn host_answers_ten_thousand_actions_on_one_connection() {
    let served = many();
    let mut client = served.host.client().unwrap();
    let requests: String = (0..ACTIONS)
        .map(|number| {
            let (machine, action) = action(number);
            format!("{}\n", json!({"action": action, "machine": format!("m{machine}"), "id": number}))
        })
        .collect();
    let before = resident_kb(&served.host);
    let begun = Instant::now();
    client.send_bytes(requests.as_bytes()).unwrap();
    let mut answered = vec![false; ACTIONS];
    for _ in 0..ACTIONS {
        let answer = client.next_message().unwrap();
        let id = usize::try_from(answer["id"].as_u64().unwrap()).unwrap();
        assert!(!std::mem::replace(&mut answered[id], true), "{id} is answered twice");
        let (machine, action) = action(id);
        if fails(machine) && action == "restore_start" {
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains(&format!("'m{machine}'")), "{answer}");
        } else {
            assert_eq!(answer, json!({"success": true, "id": id}));
        }
    }
    let took = begun.elapsed();
    let rate = ACTIONS as f64 / took.as_secs_f64();
    println!(
        "{ACTIONS} actions in {took:?}, {rate:.0}/s; {before} kB before, {} kB after",
        resident_kb(&served.host)
    );
}

#[test]
fn concurrent_clients_get_their_own_answers() {
    let served = many();
    thread::scope(|scope| {
        for client in 0..100 {
            let mut connection = served.host.client().unwrap();
            scope.spawn(move || {
                for round in 0..20 {
                    // Machines whose restore succeeds: 1, 4, 7 and so on, one for each client.
                    let machine = format!("m{}", client * 3 + 1);
                    for action in ["restore_start", "stop"] {
                        let id = format!("{client}/{round}/{action}");
                        connection.send(&json!({"action": action, "machine": machine, "id": id})).unwrap();
                        let answer = connection.next_message().unwrap();
                        assert_eq!(answer, json!({"success": true, "id": id}));
                    }
                }
            });
        }
    });
}

#[test]
fn host_uses_no_processor_time_when_idle() {
    let served = served(&[("m", ""), ("runs", "")]);
    let mut client = served.host.client().unwrap();
    let mut subscriber = served.host.client().unwrap();
    subscriber.ask(json!({"action": "subscribe"})).unwrap();
    client.act("restore_start", "runs").unwrap();
    let threads = served.host.wait_until_quiet(Duration::from_secs(3)).unwrap();
    println!("idle with {threads} threads; {} kB", resident_kb(&served.host));
}
