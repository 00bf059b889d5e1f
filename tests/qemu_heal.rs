//! Machines of real QEMUs heal: QEMU is killed in each step of a start, and the machine is back in the pool without
//! anybody's help.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{FileEvent, FileWatch, Lab};
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const SERIAL: &str = "serial.log";
/// The host opens the file first, to give it to the machine's user, and then QEMU does.
const QEMU_BEGINS: [FileEvent<'_>; 2] = [FileEvent::Opened(SERIAL), FileEvent::Opened(SERIAL)];
const MICRO: (&str, Guest, SnapshotFormat) = ("m", Guest::Micro, SnapshotFormat::Lz4);
/// A machine whose restore takes a while.
const LARGE: (&str, Guest, SnapshotFormat) =
    ("m", Guest::Linux { ram_mib: 256, noise_mib: 128 }, SnapshotFormat::Lz4);

fn good() -> Value {
    json!({"success": true})
}

/// A lab with a host and two clients, whose machine heals. They are dropped in this order.
struct Healing {
    subscriber: Client,
    client: Client,
    host: RunningHost,
    lab: Lab,
}

impl Healing {
    fn new(lab: Lab) -> Self {
        lab.heal().unwrap();
        let host = lab.host().unwrap();
        let (mut subscriber, client) = (host.client().unwrap(), host.client().unwrap());
        subscriber.subscribe().unwrap();
        Healing { subscriber, client, host, lab }
    }

    /// Asserts that the machine is in quarantine after this answer, heals with the first try, and restores then.
    #[track_caller]
    fn assert_heals(&mut self, answer: &Value) {
        println!("{answer}");
        assert_eq!(answer["success"], false, "{answer}");
        let listed = self.client.machine("m").unwrap();
        assert_eq!(
            (&listed["disabled"], &listed["quarantine"]["tries"]),
            (&json!(true), &json!(0)),
            "{listed}"
        );
        let healed = self.subscriber.wait_for_event("healed", "m").unwrap();
        println!("{healed}");
        assert_eq!(healed["tries"], 1, "{}", self.host.log());
        let listed = self.client.machine("m").unwrap();
        assert_eq!((&listed["disabled"], &listed["state"]), (&json!(false), &json!("poweroff")));
        // The first pause is 5 s, and the try takes about as long as a restore and a stop take now: together less than
        // 10 s on a computer that is not busy.
        let begun = Instant::now();
        self.assert_restores();
        let usual = begun.elapsed().as_secs() + 1;
        assert!(healed["seconds"].as_u64().unwrap() <= 6 + 3 * usual, "{healed}, and usually {usual} s");
    }

    #[track_caller]
    fn assert_restores(&mut self) {
        assert_eq!(self.client.act("restore_start", "m").unwrap(), good());
        assert_eq!(self.client.act("stop", "m").unwrap(), good());
    }

    /// Asserts that the machine restores, and that the host ends and leaves nothing.
    #[track_caller]
    fn assert_ends_well(mut self) {
        self.assert_restores();
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }

    /// Requests a restore, waits for these steps of its QEMU in that folder, and kills it.
    fn killed_in_restore(&mut self, folder: &Path, steps: &[FileEvent<'_>]) -> Value {
        let watch = FileWatch::new(folder).unwrap();
        self.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
        watch.wait(steps, SOON).unwrap();
        kill_process(self.lab.qemu_of("m").unwrap(), Signal::KILL).unwrap();
        self.client.next_message().unwrap()
    }
}

/// Puts a script in the place of a program, which runs `instead` at its first start that `matches`.
fn fails_once(lab: &Lab, program: &Path, matches: &str, instead: &str) {
    let name = program.file_name().unwrap().to_str().unwrap();
    let (program, mark) = (program.display(), lab.cwd().root().join(format!("{name}.failed")));
    let mark = mark.display();
    let script = format!(
        "case \"$*\" in {matches}) [ -e {mark} ] || {{ : > {mark}; {instead}; }};; esac\nexec {program} \"$@\""
    );
    let path = lab.cwd().script(&format!("{name}-once"), &script).unwrap();
    // The script writes a file.
    lab.set_jail("off").unwrap();
    lab.change_yaml(&program.to_string(), &path.display().to_string()).unwrap();
}

#[test]
fn machine_heals_when_the_program_that_makes_its_overlay_is_killed() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let img = lab.qemu().img.clone();
    fails_once(&lab, &img, "create*", &format!("{} \"$@\"; kill -9 $$", img.display()));
    let mut healing = Healing::new(lab);
    let answer = healing.client.act("restore_start", "m").unwrap();
    healing.assert_heals(&answer);
    healing.assert_ends_well();
}

#[test]
fn machine_heals_when_qemu_is_killed_before_it_answers() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let system = lab.qemu().system.clone();
    fails_once(&lab, &system, "*-drive*|*-machine*|*-M*|*-m*", "kill -9 $$");
    let mut healing = Healing::new(lab);
    let answer = healing.client.act("restore_start", "m").unwrap();
    assert!(answer["reason"].as_str().unwrap().contains("signal 9"), "{answer}");
    healing.assert_heals(&answer);
    healing.assert_ends_well();
}

#[test]
fn machine_heals_when_qemu_is_killed_while_it_loads_a_plain_snapshot() {
    let mut healing = Healing::new(Lab::new(&[LARGE]).unwrap());
    let folder = healing.lab.folder("m").dir.clone();
    let loading = [QEMU_BEGINS[0], QEMU_BEGINS[1], FileEvent::Read("memory.snapshot")];
    let answer = healing.killed_in_restore(&folder, &loading);
    assert!(answer["reason"].as_str().unwrap().contains("signal 9"), "{answer}");
    healing.assert_heals(&answer);
    healing.assert_ends_well();
}

/// The kill comes at any step from QEMU's first one to the resumed guest.
#[test]
fn machine_is_in_the_pool_again_when_qemu_is_killed_between_its_first_step_and_the_resume() {
    for instant in ["off", "on"] {
        let lab = Lab::new(&[MICRO]).unwrap();
        lab.ahead(&format!("instant: {instant}, standby: off")).unwrap();
        let mut healing = Healing::new(lab);
        let folder = healing.lab.folder("m").dir.clone();
        for _ in 0..2 {
            if instant == "on" {
                // Also waits for the preparation that the host makes by itself.
                assert_eq!(healing.client.act("prepare", "m").unwrap(), good());
            }
            let answer = healing.killed_in_restore(&folder, &QEMU_BEGINS);
            if answer["success"] == false {
                healing.assert_heals(&answer);
            } else {
                // QEMU had resumed the guest already, or a plain restore has followed.
                println!("{instant}: {answer}");
                assert_eq!(healing.client.machine("m").unwrap()["disabled"], false);
            }
            healing.assert_restores();
        }
        assert_eq!(healing.host.terminate().unwrap().code(), Some(0), "{}", healing.host.log());
    }
}

#[test]
fn machine_heals_when_a_qemu_that_hangs_takes_too_long() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.host_yaml("timeouts: {restore_start: 5}", "").unwrap();
    let system = lab.qemu().system.clone();
    fails_once(&lab, &system, "*-drive*|*-machine*|*-M*|*-m*", "exec tail -f \"$0\"");
    let mut healing = Healing::new(lab);
    let answer = healing.client.act("restore_start", "m").unwrap();
    assert!(answer["reason"].as_str().unwrap().contains("waited 5.0 s"), "{answer}");
    healing.assert_heals(&answer);
    healing.assert_ends_well();
}

/// Damages the snapshot, and asserts that a restore disables the machine for good.
#[track_caller]
fn assert_disabled_by(healing: &mut Healing, content: &[u8]) {
    let snapshot = healing.lab.folder("m").snapshot.clone();
    let whole = fs::read(&snapshot).unwrap();
    fs::write(&snapshot, content).unwrap();
    let answer = healing.client.act("restore_start", "m").unwrap();
    println!("{answer}");
    assert_eq!(answer["success"], false, "{answer}");
    let listed = healing.client.machine("m").unwrap();
    assert_eq!((&listed["disabled"], &listed["quarantine"]), (&json!(true), &Value::Null), "{listed}");
    assert_eq!(listed["disabled_reason"], answer["reason"]);
    fs::write(&snapshot, whole).unwrap();
    assert_eq!(healing.client.act("enable_machine", "m").unwrap(), good());
}

#[test]
fn machine_is_disabled_and_not_tried_when_its_snapshot_is_damaged() {
    for format in SnapshotFormat::ALL {
        let mut healing = Healing::new(Lab::new(&[("m", Guest::Micro, format)]).unwrap());
        let whole = fs::read(&healing.lab.folder("m").snapshot).unwrap();
        let half = whole[..whole.len() / 2].to_vec();
        let garbage = [&half[..], &[0x5a; 100_000]].concat();
        for content in [&half[..], &garbage, b"PK\x03\x04", b""] {
            assert_disabled_by(&mut healing, content);
        }
        let metrics = healing.client.ask(json!({"action": "metrics"})).unwrap();
        assert_eq!(metrics["quarantine"], json!({"machines": 0, "tries": 0, "healed": 0}));
        healing.assert_ends_well();
    }
}

#[test]
fn machine_is_disabled_when_the_snapshot_behind_its_template_is_damaged() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.ahead("instant: on, standby: off").unwrap();
    let mut healing = Healing::new(lab);
    assert_eq!(healing.client.act("prepare", "m").unwrap(), good());
    assert_disabled_by(&mut healing, b"QEVM and nothing else");
}

#[test]
fn machine_is_disabled_when_qemu_refuses_a_snapshot_of_another_machine() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.change_start_args("m", |args| {
        let memory = args.iter().position(|arg| arg == "-m").unwrap();
        args[memory + 1] = "48M".to_owned();
    })
    .unwrap();
    let mut healing = Healing::new(lab);
    let answer = healing.client.act("restore_start", "m").unwrap();
    println!("{answer}");
    let listed = healing.client.machine("m").unwrap();
    assert_eq!((&listed["disabled"], &listed["quarantine"]), (&json!(true), &Value::Null), "{listed}");
}
