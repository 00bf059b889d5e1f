//! Preparations of a restore: templates and standbys. A restore works after every change, and the guest begins at
//! the snapshot.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{Lab, TinyDisk};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest, SnapshotFormat) = ("m", Guest::Micro, SnapshotFormat::Lz4);

const INSTANT: &str = "instant: auto, standby: off";
const STANDBY: &str = "instant: auto, standby: auto";

/// Creates a lab whose machine `m` is prepared with these options, its host, and a client.
fn prepared(ahead: &str) -> (Lab, RunningHost, Client) {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.ahead(ahead).unwrap();
    let (host, client) = served(&lab);
    (lab, host, client)
}

/// Starts a host of the lab and prepares its machine. The client subscribes to all events.
fn served(lab: &Lab) -> (RunningHost, Client) {
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    prepare(&mut client);
    (host, client)
}

#[track_caller]
fn prepare(client: &mut Client) {
    client.perform("prepare", "m");
}

fn ready(client: &mut Client) -> Value {
    client.machine("m").unwrap()["ready"].take()
}

#[track_caller]
fn is_ready(client: &mut Client, mode: &str) {
    let ready = ready(client);
    assert_eq!(ready["mode"], mode, "{ready}");
}

fn hears_ready(client: &mut Client, mode: &str) {
    while client.wait_for_event("ready", "m").unwrap()["mode"] != mode {}
}

/// Waits until the host has prepared the machine by itself.
fn until_ready(client: &mut Client, mode: &str) {
    while ready(client)["mode"] != mode {
        client.wait_for_event("ready", "m").unwrap();
    }
}

/// Restores the machine, and checks that the guest begins at the snapshot and continues.
#[track_caller]
fn restores(lab: &Lab, client: &mut Client) {
    client.perform("restore_start", "m");
    let machine = lab.folder("m");
    let first = machine.first_count(SOON).unwrap();
    assert_eq!(first, lab.restored_count().unwrap(), "the guest does not begin at the snapshot");
    machine.wait_for_count(first + 1, SOON).unwrap();
}

/// Does the same, and checks the way of the restore.
#[track_caller]
fn restores_by(lab: &Lab, client: &mut Client, host: &RunningHost, way: &str) {
    let before = host.log().len();
    restores(lab, client);
    let log = host.log();
    let done = log[before..].lines().rfind(|line| line.contains("restore_start")).unwrap_or_default();
    let (loads, resumes) = (done.contains("load "), done.contains("resume "));
    let took = match way {
        "standby" => !loads && resumes,
        _ => loads && resumes,
    };
    assert!(took, "not by {way}: {done}\n{log}");
}

fn ends_well(lab: &Lab, host: &mut RunningHost) {
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

fn hash(path: &Path) -> u32 {
    crc32fast::hash(&fs::read(path).unwrap())
}

/// Returns a value that differs for each template that is built.
fn made(lab: &Lab) -> (u64, i64) {
    let ram = fs::metadata(lab.template("m").join("ram")).unwrap();
    (ram.ino(), ram.ctime_nsec())
}

/// Puts a program in QEMU's place that runs `first`, with QEMU's arguments in `$*`, and becomes QEMU.
fn wrap_qemu(lab: &Lab, first: &str) -> PathBuf {
    let qemu = lab.qemu().system.display();
    let path = lab.cwd().script("wrapped-qemu", &format!("{first}\nexec {qemu} \"$@\"")).unwrap();
    let yaml = lab.yaml().unwrap();
    if !yaml.contains("wrapped-qemu") {
        lab.change_yaml(&qemu.to_string(), &path.display().to_string()).unwrap();
    }
    path
}

#[test]
fn instant_restores_begin_at_the_snapshot_and_do_not_change_the_template() {
    let (lab, mut host, mut client) = prepared(INSTANT);
    is_ready(&mut client, "instant");
    let ram = lab.template("m").join("ram");
    let before = (hash(&ram), made(&lab));
    for _ in 0..500 {
        client.perform("restore_start", "m");
        assert_eq!(lab.folder("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
        client.perform("stop", "m");
    }
    restores_by(&lab, &mut client, &host, "instant");
    assert_eq!((hash(&ram), made(&lab)), before);
    let sparse = fs::metadata(&ram).unwrap();
    assert!(sparse.blocks() * 512 < sparse.size() / 2, "the RAM of zeros takes {} blocks", sparse.blocks());
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_reported_as_powered_off_and_replaced_after_each_run() {
    let (lab, mut host, mut client) = prepared(STANDBY);
    for _ in 0..5 {
        until_ready(&mut client, "standby");
        let standing_by = lab.qemu_of("m").unwrap();
        assert_eq!(client.act("state", "m").unwrap()["state"], "poweroff");
        for action in ["dump_memory", "screenshot"] {
            let request = json!({"action": action, "machine": "m", "path": "/tmp/never-written"});
            let answer = client.ask(request).unwrap();
            assert!(answer["reason"].as_str().unwrap().contains("powered off"), "{answer}");
        }
        assert_eq!(client.act("acpi_stop", "m").unwrap()["success"], true);
        restores_by(&lab, &mut client, &host, "standby");
        assert_eq!(lab.qemu_of("m").unwrap(), standing_by);
        client.perform("stop", "m");
    }
    until_ready(&mut client, "standby");
    let ready = ready(&mut client);
    assert!(
        ready["memory"].as_u64().unwrap() > 1 << 20 && ready["disk"].as_u64().unwrap() > 1 << 10,
        "{ready}"
    );
    ends_well(&lab, &mut host);
}

/// Returns the paused guest's memory, through the monitor in its arguments.
fn memory(monitor: &Path, mib: u32, into: &Path) -> Vec<u8> {
    let mut stream = BufReader::new(UnixStream::connect(monitor).unwrap());
    let prompt = |stream: &mut BufReader<UnixStream>| {
        let mut said = Vec::new();
        while !said.ends_with(b"(qemu) ") {
            assert!(stream.read_until(b' ', &mut said).unwrap() > 0, "the monitor has closed");
        }
        String::from_utf8_lossy(&said).into_owned()
    };
    prompt(&mut stream);
    let commands =
        [format!("pmemsave 0 {:#x} \"{}\"", u64::from(mib) << 20, into.display()), "info status".to_owned()];
    let said = commands.map(|command| {
        writeln!(stream.get_mut(), "{command}").unwrap();
        prompt(&mut stream)
    });
    assert!(said[1].contains("paused"), "{said:?}");
    fs::read(into).unwrap()
}

#[test]
fn memory_of_an_instant_restore_equals_that_of_a_plain_one() {
    const MIB: u32 = 256;
    let linux = Guest::Linux { ram_mib: MIB, noise_mib: 16 };
    let lab = Lab::new(&[("m", linux, SnapshotFormat::Plain)]).unwrap();
    let monitor = lab.cwd().root().join("hmp");
    let chardev = format!("socket,id=hmp,path={},server=on,wait=off", monitor.display());
    lab.change_start_args("m", |args| {
        args.extend(["-chardev", &chardev, "-mon", "chardev=hmp,mode=readline"].map(str::to_owned));
    })
    .unwrap();
    lab.accept_unsafe_args("m").unwrap();
    // QEMU writes the memory to a file, which no jail allows.
    lab.set_jail("off").unwrap();
    let mut memories = ["instant: off, standby: on", "instant: auto, standby: on"].map(|ahead| {
        lab.ahead(ahead).unwrap();
        let (mut host, mut client) = served(&lab);
        is_ready(&mut client, "standby");
        let file = lab.cwd().root().join("memory");
        let memory = memory(&monitor, MIB, &file);
        fs::remove_file(file).unwrap();
        ends_well(&lab, &mut host);
        memory
    });
    let [plain, instant] = &mut memories;
    assert!(plain.iter().filter(|byte| **byte != 0).count() > 16 << 20, "the memory is empty");
    let different = plain.iter().zip(instant.iter()).position(|(one, other)| one != other);
    assert_eq!((different, plain.len()), (None, instant.len()));
}

/// Takes a snapshot of the same machine at a later moment.
fn later_snapshot(lab: &Lab) -> PathBuf {
    let (machine, overlay) = (lab.folder("m"), lab.cwd().root().join("later.qcow2"));
    let path = lab.cwd().root().join("later");
    lab.qemu().overlay(&machine.disk, &overlay).unwrap();
    let mut vm = machine.restore(lab.qemu(), &overlay).unwrap();
    machine.wait_for_count(lab.restored_count().unwrap() + 20, SOON).unwrap();
    vm.pause().unwrap();
    vm.save(&path).unwrap();
    vm.quit().unwrap();
    fs::remove_file(overlay).unwrap();
    path
}

#[test]
fn restore_uses_the_new_snapshot_when_it_was_replaced() {
    for ahead in [INSTANT, STANDBY] {
        let lab = Lab::new(&[MICRO]).unwrap();
        let later = later_snapshot(&lab);
        lab.ahead(ahead).unwrap();
        let (mut host, mut client) = served(&lab);
        let before = made(&lab);
        fs::rename(&later, &lab.folder("m").snapshot).unwrap();
        for _ in 0..2 {
            client.perform("restore_start", "m");
            let first = lab.folder("m").first_count(SOON).unwrap();
            assert!(first > lab.restored_count().unwrap() + 15, "{first} is of the snapshot before");
            client.perform("stop", "m");
            prepare(&mut client);
            assert_ne!(made(&lab), before);
        }
        ends_well(&lab, &mut host);
    }
}

#[test]
fn template_and_standby_are_made_again_when_a_file_was_changed() {
    type Change = fn(&Lab);
    let changes: [(&str, Change); 3] = [
        ("the machine's disk was changed", |lab| {
            let disk = &lab.folder("m").disk;
            let copy = disk.with_extension("copy");
            fs::copy(disk, &copy).unwrap();
            fs::rename(&copy, disk).unwrap();
        }),
        ("the machine's snapshot was changed", |lab| {
            let snapshot = &lab.folder("m").snapshot;
            let (content, time) =
                (fs::read(snapshot).unwrap(), fs::metadata(snapshot).unwrap().modified().unwrap());
            fs::write(snapshot, content).unwrap();
            // Some tools keep the times of a file that they write.
            File::options().write(true).open(snapshot).unwrap().set_modified(time).unwrap();
        }),
        ("QEMU's program was replaced", |lab| drop(wrap_qemu(lab, "# another"))),
    ];
    let lab = Lab::new(&[MICRO]).unwrap();
    wrap_qemu(&lab, "# one");
    lab.ahead(STANDBY).unwrap();
    let (mut host, mut client) = served(&lab);
    for (words, change) in changes {
        let (before, log) = (made(&lab), host.log().len());
        change(&lab);
        restores(&lab, &mut client);
        assert!(host.log()[log..].contains(words), "not logged: {words}");
        client.perform("stop", "m");
        prepare(&mut client);
        is_ready(&mut client, "standby");
        assert_ne!(made(&lab), before, "{words}");
        restores_by(&lab, &mut client, &host, "standby");
        client.perform("stop", "m");
        prepare(&mut client);
    }
    ends_well(&lab, &mut host);
}

#[test]
fn template_is_built_again_when_arguments_or_version_differ_at_the_next_start() {
    let lab = Lab::new(&[MICRO]).unwrap();
    wrap_qemu(&lab, "");
    lab.ahead(INSTANT).unwrap();
    let (mut host, client) = served(&lab);
    drop(client);
    let mut before = made(&lab);
    ends_well(&lab, &mut host);
    // A template of the same identity is used.
    let (mut host, client) = served(&lab);
    drop(client);
    assert_eq!(made(&lab), before);
    ends_well(&lab, &mut host);
    let edit = |lab: &Lab| {
        lab.change_start_args("m", |args| args.extend(["-name", "x"].map(str::to_owned))).unwrap()
    };
    let upgrade = |lab: &Lab| {
        let newer = "[ \"$1\" = --version ] && echo 'QEMU emulator version 7.2.99' && exit";
        drop(wrap_qemu(lab, newer));
    };
    for change in [&edit as &dyn Fn(&Lab), &upgrade] {
        change(&lab);
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        restores(&lab, &mut client);
        client.perform("stop", "m");
        prepare(&mut client);
        assert_ne!(made(&lab), before);
        before = made(&lab);
        restores_by(&lab, &mut client, &host, "instant");
        ends_well(&lab, &mut host);
    }
}

#[test]
fn restore_is_plain_and_the_template_dropped_when_its_files_are_damaged() {
    type Harm = fn(&Path);
    fn flip_a_bit(path: &Path) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (mut byte, middle) = ([0], file.metadata().unwrap().size() / 2);
        file.read_exact_at(&mut byte, middle).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], middle).unwrap();
    }
    let harms: [(&str, Harm); 7] = [
        ("RAM truncated", |folder| {
            File::options().write(true).open(folder.join("ram")).unwrap().set_len(4096).unwrap()
        }),
        ("a bit of the RAM flipped", |folder| flip_a_bit(&folder.join("ram"))),
        ("a bit of the devices flipped", |folder| flip_a_bit(&folder.join("devices"))),
        ("devices gone", |folder| fs::remove_file(folder.join("devices")).unwrap()),
        ("record cut", |folder| {
            File::options().write(true).open(folder.join("record.json")).unwrap().set_len(20).unwrap()
        }),
        ("all gone", |folder| fs::remove_dir_all(folder).unwrap()),
        ("not what QEMU can load", |folder| {
            let record = folder.join("record.json");
            let text = fs::read_to_string(&record).unwrap();
            fs::write(record, text.replace("\"pc.ram\"", "\"other.ram\"")).unwrap();
        }),
    ];
    let (lab, mut host, mut client) = prepared(INSTANT);
    for (what, harm) in harms {
        harm(&lab.template("m"));
        println!("{what}");
        restores(&lab, &mut client);
        client.perform("stop", "m");
        prepare(&mut client);
        is_ready(&mut client, "instant");
        restores_by(&lab, &mut client, &host, "instant");
        client.perform("stop", "m");
    }
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
    ends_well(&lab, &mut host);
    // A standby maps the RAM file, and sees its changes.
    let (lab, mut host, mut client) = prepared(STANDBY);
    for (what, harm) in &harms[..2] {
        harm(&lab.template("m"));
        println!("{what}");
        restores_by(&lab, &mut client, &host, "plain");
        client.perform("stop", "m");
        prepare(&mut client);
        is_ready(&mut client, "standby");
    }
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
    ends_well(&lab, &mut host);
}

#[test]
fn restore_works_without_a_template_when_its_disk_fills_up() {
    let lab = Lab::new(&[MICRO]).unwrap();
    // The disk is larger than the minimum of free space.
    let disk = TinyDisk::mount(lab.cwd(), 600 << 10).unwrap();
    let Some(disk) = requirement::MOUNT.or_skip(disk) else { return };
    let fill = format!(
        "case \"$*\" in *share=on*) dd if=/dev/zero of={}/fill bs=1M 2>/dev/null;; esac",
        disk.path().display()
    );
    wrap_qemu(&lab, &fill);
    lab.set_jail("off").unwrap();
    lab.ahead(&format!("{STANDBY}, instant_dir: {}", disk.path().display())).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    // The build begins by itself, because there is space.
    until_ready(&mut client, "plain");
    let readiness = ready(&mut client);
    assert_eq!(readiness["mode"], "plain");
    assert!(readiness["reason"].as_str().unwrap().contains("is full"), "{readiness}");
    restores(&lab, &mut client);
    client.perform("stop", "m");
    // From now on a build does not even begin.
    prepare(&mut client);
    let readiness = ready(&mut client);
    assert!(readiness["reason"].as_str().unwrap().contains("are free in"), "{readiness}");
    assert!(!disk.path().join("m.template").exists() && !disk.path().join("m.unfinished").exists());
    ends_well(&lab, &mut host);
}

/// Creates a lab with a host, whose template takes long enough to build to act meanwhile.
fn slowly_built() -> (Lab, RunningHost, Client) {
    let linux = Guest::Linux { ram_mib: 256, noise_mib: 64 };
    let lab = Lab::new(&[("m", linux, SnapshotFormat::Gzip)]).unwrap();
    lab.ahead(STANDBY).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    (lab, host, client)
}

fn begin_to_build(client: &mut Client) {
    client.send(&json!({"action": "prepare", "machine": "m", "id": "building"})).unwrap();
    client.wait_for_event("progress", "m").unwrap();
}

#[test]
fn unfinished_template_is_removed_when_its_host_was_killed() {
    let (lab, mut host, mut client) = slowly_built();
    begin_to_build(&mut client);
    host.kill().unwrap();
    let unfinished = lab.template("m").with_file_name("m.unfinished");
    assert!(unfinished.exists() && !lab.template("m").exists(), "the host was killed too late for this test");
    let (mut host, mut client) = served(&lab);
    is_ready(&mut client, "standby");
    assert!(!unfinished.exists());
    client.perform("restore_start", "m");
    ends_well(&lab, &mut host);
}

#[test]
fn build_is_cancelled_by_a_stop_and_by_the_end_of_the_host() {
    let (lab, mut host, mut client) = slowly_built();
    begin_to_build(&mut client);
    client.perform("stop", "m");
    lab.assert_clean();
    assert!(!lab.template("m").exists(), "the build went on");
    begin_to_build(&mut client);
    ends_well(&lab, &mut host);
    assert!(!lab.template("m").exists(), "the build went on");
}

#[test]
fn standby_is_replaced_a_limited_number_of_times_when_it_dies() {
    let (lab, mut host, mut client) = prepared(STANDBY);
    for _ in 0..2 {
        let before = lab.qemu_of("m").unwrap();
        kill_process(before, Signal::KILL).unwrap();
        hears_ready(&mut client, "instant");
        hears_ready(&mut client, "standby");
        assert_ne!(lab.qemu_of("m").unwrap(), before);
        assert_eq!(client.machine("m").unwrap()["state"], "poweroff");
    }
    kill_process(lab.qemu_of("m").unwrap(), Signal::KILL).unwrap();
    hears_ready(&mut client, "instant");
    let begun = Instant::now();
    while !host.log().contains("not prepared again before its next start") {
        assert!(begun.elapsed() < SOON, "{}", host.log());
        is_ready(&mut client, "instant");
    }
    restores_by(&lab, &mut client, &host, "instant");
    client.perform("stop", "m");
    until_ready(&mut client, "standby");
    restores_by(&lab, &mut client, &host, "standby");
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_ended_when_a_file_of_its_machine_is_missing() {
    for action in ["restore_start", "prepare"] {
        let (lab, mut host, mut client) = prepared(STANDBY);
        let snapshot = &lab.folder("m").snapshot;
        let away = snapshot.with_extension("away");
        fs::rename(snapshot, &away).unwrap();
        let answer = client.act(action, "m").unwrap();
        assert!(answer["reason"].as_str().unwrap().contains("the machine's snapshot"), "{answer}");
        lab.assert_clean();
        fs::rename(&away, snapshot).unwrap();
        client.act("enable_machine", "m").unwrap();
        restores(&lab, &mut client);
        client.perform("stop", "m");
        ends_well(&lab, &mut host);
    }
}

#[test]
fn machines_are_untouched_when_templates_are_in_their_folder() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let machines = lab.folder("m").dir.parent().unwrap().to_owned();
    lab.ahead(&format!("{INSTANT}, instant_dir: {}", machines.display())).unwrap();
    let (mut host, mut client) = served(&lab);
    is_ready(&mut client, "instant");
    assert!(machines.join("m.template/ram").exists());
    restores_by(&lab, &mut client, &host, "instant");
    ends_well(&lab, &mut host);
    // Without instant restores, the template is removed and all other files stay.
    lab.ahead(&format!("instant: off, standby: off, instant_dir: {}", machines.display())).unwrap();
    let (mut host, mut client) = served(&lab);
    assert!(!machines.join("m.template").exists());
    restores(&lab, &mut client);
    ends_well(&lab, &mut host);
}

#[test]
fn template_is_built_a_limited_number_of_times_when_it_never_loads() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let qemu = lab.qemu().system.display();
    // With another display adapter, QEMU starts but cannot load the snapshot.
    let other = format!("exec {qemu} $(echo \"$*\" | sed 's/-vga std/-vga cirrus/')");
    wrap_qemu(&lab, &format!("case \"$*\" in *share=off*) {other};; esac"));
    lab.set_jail("off").unwrap();
    lab.ahead(INSTANT).unwrap();
    let (mut host, mut client) = served(&lab);
    for _ in 0..3 {
        is_ready(&mut client, "instant");
        restores_by(&lab, &mut client, &host, "plain");
        client.perform("stop", "m");
        prepare(&mut client);
    }
    let readiness = ready(&mut client);
    assert_eq!(readiness["mode"], "plain");
    assert!(readiness["reason"].as_str().unwrap().contains("tried 3 times"), "{readiness}");
    ends_well(&lab, &mut host);
}

#[test]
fn restore_is_instant_when_the_standby_hangs() {
    let (lab, mut host, mut client) = prepared(STANDBY);
    kill_process(lab.qemu_of("m").unwrap(), Signal::STOP).unwrap();
    restores_by(&lab, &mut client, &host, "instant");
    assert_eq!(client.machine("m").unwrap()["disabled"], false);
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_discarded_by_a_stop_and_by_a_cold_start() {
    let (lab, mut host, mut client) = prepared(STANDBY);
    client.perform("stop", "m");
    lab.assert_clean();
    is_ready(&mut client, "instant");
    restores_by(&lab, &mut client, &host, "instant");
    client.perform("stop", "m");
    until_ready(&mut client, "standby");
    client.perform("norestore_start", "m");
    let first = lab.folder("m").first_count(SOON).unwrap();
    assert!(first < lab.restored_count().unwrap(), "not a cold boot: {first}");
    client.perform("stop", "m");
    until_ready(&mut client, "standby");
    restores_by(&lab, &mut client, &host, "standby");
    ends_well(&lab, &mut host);
}

#[test]
fn standby_follows_when_a_guest_powers_itself_off() {
    let (lab, mut host, mut client) = prepared(STANDBY);
    restores(&lab, &mut client);
    client.perform("acpi_stop", "m");
    until_ready(&mut client, "standby");
    restores_by(&lab, &mut client, &host, "standby");
    ends_well(&lab, &mut host);
}

/// Guests power themselves off 25 times, by a power button that is not pressed through the host.
#[test]
fn restores_are_from_standby_when_guests_power_themselves_off() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let monitor = lab.cwd().root().join("hmp");
    let chardev = format!("socket,id=hmp,path={},server=on,wait=off", monitor.display());
    lab.change_start_args("m", |args| {
        args.extend(["-chardev", &chardev, "-mon", "chardev=hmp,mode=readline"].map(str::to_owned));
    })
    .unwrap();
    lab.accept_unsafe_args("m").unwrap();
    lab.ahead(STANDBY).unwrap();
    let (mut host, mut client) = served(&lab);
    let mut subscriber = host.client().unwrap();
    subscriber.subscribe().unwrap();
    for _ in 0..25 {
        until_ready(&mut client, "standby");
        restores_by(&lab, &mut client, &host, "standby");
        let mut powers_off = UnixStream::connect(&monitor).unwrap();
        writeln!(powers_off, "system_powerdown").unwrap();
        let reason = subscriber.wait_for_state("m", "poweroff").unwrap();
        assert_eq!(reason, "the guest powered itself off");
    }
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
    let is_warning = |line: &str| line.contains("WARN") && !line.contains("unsafe_start_args");
    assert!(!host.log().lines().any(is_warning), "{}", host.log());
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_not_made_when_the_memory_limit_is_reached() {
    let (lab, mut host, mut client) = prepared("standby: on, standby_memory_limit: 1 MiB");
    let readiness = ready(&mut client);
    assert_eq!(readiness["mode"], "instant");
    assert!(readiness["reason"].as_str().unwrap().contains("standby_memory_limit"), "{readiness}");
    lab.assert_clean();
    restores_by(&lab, &mut client, &host, "instant");
    ends_well(&lab, &mut host);
}

#[test]
fn automatic_standby_is_given_back_when_memory_is_short_and_made_again_when_it_is_free() {
    let (lab, mut host, mut client) = prepared("standby: auto, standby_memory_reserve: 0");
    is_ready(&mut client, "standby");
    lab.ahead("standby: auto, standby_memory_reserve: 1000000 GiB").unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    until_ready(&mut client, "instant");
    let reason = ready(&mut client)["reason"].take();
    assert_eq!(reason, "the computer needs its memory");
    lab.assert_clean();
    restores_by(&lab, &mut client, &host, "instant");
    client.perform("stop", "m");
    prepare(&mut client);
    let readiness = ready(&mut client);
    assert!(readiness["reason"].as_str().unwrap().contains("standby_memory_reserve"), "{readiness}");
    lab.ahead("standby: auto, standby_memory_reserve: 0").unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    until_ready(&mut client, "standby");
    restores_by(&lab, &mut client, &host, "standby");
    ends_well(&lab, &mut host);
}

#[test]
fn standby_without_a_template_is_made_only_when_it_is_configured() {
    for (ahead, mode) in [("instant: off", "plain"), ("instant: off, standby: on", "standby")] {
        let (lab, mut host, mut client) = prepared(ahead);
        is_ready(&mut client, mode);
        assert!(!lab.template("m").exists());
        restores(&lab, &mut client);
        ends_well(&lab, &mut host);
    }
    let (lab, mut host, mut client) = prepared("machines: {m: {instant: off}}");
    is_ready(&mut client, "plain");
    assert!(ready(&mut client)["reason"].as_str().unwrap().contains("off"));
    ends_well(&lab, &mut host);
}

#[test]
fn reason_for_no_template_is_reported_by_check_and_list() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let args = ["-numa", "node,memdev=r", "-object", "memory-backend-ram,id=r,size=32M"];
    lab.change_start_args("m", |all| all.extend(args.map(str::to_owned))).unwrap();
    lab.ahead(STANDBY).unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert!(check.stdout.contains("is restored plainly") && check.stdout.contains("-numa"), "{check:?}");
    let (mut host, mut client) = served(&lab);
    let readiness = ready(&mut client);
    assert_eq!(readiness["mode"], "plain");
    assert!(readiness["reason"].as_str().unwrap().contains("-numa"), "{readiness}");
    let list = lab.run(&["list"]).unwrap();
    assert!(list.stdout.contains("-numa"), "{list:?}");
    ends_well(&lab, &mut host);
}

#[test]
fn wrong_keys_are_reported_with_their_place() {
    let lab = Lab::new(&[MICRO]).unwrap();
    for (ahead, words) in [
        ("instant: maybe", "instant"),
        ("standby: maybe", "standby"),
        ("standby_memory_limit: 5", "'5' is not a size"),
        ("instant_dir: here", "not an absolute path"),
        ("machines: {other: {standby: off}}", "there is no machine 'other'"),
        ("machines: {m: {standbye: off}}", "standbye"),
    ] {
        lab.ahead(ahead).unwrap();
        let check = lab.run(&["-v", "check"]).unwrap();
        assert_eq!(check.code, Some(2), "{check:?}");
        assert!(
            check.stdout.contains("machinery-host.yaml") && check.stdout.contains(words),
            "{words}: {check:?}"
        );
    }
}

#[test]
fn renamed_keys_are_read_and_reported_by_check_and_log() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let folder = lab.cwd().root().join("elsewhere");
    let keys = format!(
        "standby: on, template_dir: {}, template_space: 16 GiB, standby_memory: 1 MiB",
        folder.display()
    );
    lab.cwd().host_yaml(&format!("machineries: {{qemu: {{{keys}}}}}\n")).unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    let (mut host, mut client) = served(&lab);
    is_ready(&mut client, "instant");
    assert!(folder.join("m.template").exists());
    for (old, new) in [
        ("template_dir", "instant_dir"),
        ("template_space", "instant_space_limit"),
        ("standby_memory", "standby_memory_limit"),
    ] {
        let warning = format!("machineries.qemu.{old}: this key is now called `{new}`");
        for text in [&check.stdout, &host.log()] {
            assert_eq!(text.matches(&warning).count(), 1, "{warning}: {text}");
        }
    }
    ends_well(&lab, &mut host);
}

#[test]
fn check_reports_a_folder_that_cannot_hold_templates() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.ahead(&format!("instant_dir: {}/below", lab.folder("m").disk.display())).unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    assert!(check.stdout.contains("templates cannot be kept in"), "{check:?}");
}

#[test]
fn host_is_refused_when_another_host_uses_its_templates() {
    let (lab, other) = (Lab::new(&[MICRO]).unwrap(), Lab::new(&[MICRO]).unwrap());
    let shared = format!("{INSTANT}, instant_dir: {}", lab.cwd().root().join("shared").display());
    for lab in [&lab, &other] {
        lab.ahead(&shared).unwrap();
    }
    let (mut host, _client) = served(&lab);
    let refused = other.host().unwrap_err().to_string();
    assert!(refused.contains("another host keeps its templates"), "{refused}");
    ends_well(&lab, &mut host);
}

/// Creates a lab of two machines that listen on the same port, which only one QEMU at a time can use.
fn rivals() -> Lab {
    let lab = Lab::new(&["m", "n"].map(|name| (name, Guest::Micro, SnapshotFormat::Lz4))).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for name in ["m", "n"] {
        let console = format!("socket,id=console,host=127.0.0.1,port={port},server=on,wait=off");
        lab.change_start_args(name, |args| args.extend(["-chardev".to_owned(), console])).unwrap();
    }
    lab.ahead(STANDBY).unwrap();
    lab
}

#[test]
fn machine_starts_when_the_standby_of_another_has_its_port() {
    let lab = rivals();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let done = json!({"success": true});
    let ready = |client: &mut Client, machine: &str| {
        assert_eq!(client.act("prepare", machine).unwrap(), done);
        client.machine(machine).unwrap()["ready"].take()
    };
    for _ in 0..3 {
        for (machine, other) in [("m", "n"), ("n", "m")] {
            assert_eq!(client.act("restore_start", machine).unwrap(), done, "{}", host.log());
            let why = ready(&mut client, other);
            assert!(
                why["reason"].as_str().unwrap().contains(&format!("machine '{machine}' has the TCP port")),
                "{why}"
            );
            assert_eq!(client.act("stop", machine).unwrap(), done);
            assert_eq!(ready(&mut client, machine)["mode"], "standby");
            assert_ne!(ready(&mut client, other)["mode"], "standby");
        }
    }
    for machine in ["m", "n"] {
        assert_eq!(client.machine(machine).unwrap()["disabled"], false);
    }
    ends_well(&lab, &mut host);
}

#[test]
fn check_warns_when_two_machines_claim_the_same_port() {
    let lab = rivals();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    let warnings: Vec<&str> =
        check.stdout.lines().filter(|line| line.contains("cannot run at the same time")).collect();
    let [warning] = warnings[..] else { panic!("one warning: {}", check.stdout) };
    assert!(warning.contains("machine 'n'") && warning.contains("machine 'm'"), "{warning}");
    assert!(warning.contains("the TCP port 127.0.0.1:"), "{warning}");
}
