//! The test guests, with QEMU and without a plugin.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machinery_testkit::guest::{self, Guest, MachineFolder, Marks, Master, Qemu, Vm, micro};
use machinery_testkit::snapshot::SnapshotFormat;

const SOON: Duration = Duration::from_secs(30);

fn restored(qemu: &Qemu, machine: &MachineFolder) -> Vm {
    let start = Instant::now();
    let overlay = machine.dir.join("overlay.qcow2");
    qemu.overlay(&machine.disk, &overlay).unwrap();
    let vm = machine.restore(qemu, &overlay).unwrap();
    println!("{} restored in {:?}", machine.name, start.elapsed());
    vm
}

fn micro_machine(dir: &Path, qemu: &Qemu, format: SnapshotFormat) -> (Master, MachineFolder) {
    let master = guest::master(qemu, Guest::Micro).unwrap();
    let machine = master.machine(&dir.join("micro1"), "micro1", "127.0.5.1", format).unwrap();
    (master, machine)
}

#[test]
fn micro_master_is_built_once() {
    let cache = tempfile::tempdir().unwrap();
    let qemu = Qemu::find().unwrap();
    let start = Instant::now();
    let master = guest::master_in(cache.path(), &qemu, Guest::Micro).unwrap();
    println!("built in {:?}", start.elapsed());
    assert!(master.snapshot_count().unwrap() >= 16);
    let snapshot = master.snapshot(SnapshotFormat::Plain).unwrap();
    let made = snapshot.metadata().unwrap().modified().unwrap();
    guest::master_in(cache.path(), &qemu, Guest::Micro).unwrap();
    assert_eq!(snapshot.metadata().unwrap().modified().unwrap(), made);
}

#[test]
fn micro_guest_continues_from_the_snapshot_when_restored_from_any_format() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::find().unwrap();
    for format in SnapshotFormat::ALL {
        let (master, machine) = micro_machine(dir.path(), &qemu, format);
        assert_eq!(SnapshotFormat::of(&machine.snapshot).unwrap(), format);
        let vm = restored(&qemu, &machine);
        let first = machine.first_count(SOON).unwrap();
        assert_eq!(first, master.snapshot_count().unwrap() + 1, "{format:?}");
        machine.wait_for_count(first + 2, SOON).unwrap();
        assert!(machine.last_count().unwrap() >= first + 2);
        vm.quit().unwrap();
    }
}

#[test]
fn micro_guest_counts_from_one_when_booted_cold() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::find().unwrap();
    let (_, machine) = micro_machine(dir.path(), &qemu, SnapshotFormat::Plain);
    let mut vm = Vm::boot(&qemu, &machine.start_args, &machine.disk).unwrap();
    assert_eq!(machine.first_count(SOON).unwrap(), 1);
    vm.pause().unwrap();
    let memory = vm.memory(micro::MAGIC_ADDRESS, 12).unwrap();
    assert_eq!(memory[..8], micro::MAGIC);
    assert!(u32::from_le_bytes(memory[8..].try_into().unwrap()) >= 1);
}

#[test]
fn micro_guest_powers_off_when_the_power_button_is_pressed() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::find().unwrap();
    let (_, machine) = micro_machine(dir.path(), &qemu, SnapshotFormat::Plain);
    let mut vm = restored(&qemu, &machine);
    let start = Instant::now();
    vm.press_power_button().unwrap();
    vm.wait(SOON).unwrap();
    println!("off in {:?}", start.elapsed());
}

#[test]
fn machineinfo_has_what_vmcloak_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (_, machine) = micro_machine(dir.path(), &Qemu::find().unwrap(), SnapshotFormat::Gzip);
    let info: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&machine.machineinfo).unwrap()).unwrap();
    let mut keys: Vec<_> = info["machine"].as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected =
        "agent_port architecture bridge disk ip mac memory_snapshot name os_name os_version start_args tags";
    assert_eq!(keys.join(" "), expected);
    assert!(machine.start_args.iter().any(|arg| arg.contains(guest::DISK_PLACEHOLDER)));
}

#[test]
fn boot_fails_with_qemus_output_when_arguments_are_invalid() {
    let args = ["-machine".to_owned(), "no-such-machine".to_owned()];
    let error = Vm::boot(&Qemu::find().unwrap(), &args, Path::new("/dev/null")).err().unwrap();
    assert!(error.to_string().contains("machine type"), "{error}");
}

#[test]
fn restore_fails_when_the_snapshot_is_truncated() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::find().unwrap();
    let (_, machine) = micro_machine(dir.path(), &qemu, SnapshotFormat::Plain);
    std::fs::File::options().write(true).open(&machine.snapshot).unwrap().set_len(20_000).unwrap();
    assert!(machine.restore(&qemu, &machine.disk).is_err());
}

/// One test for the whole Linux guest, which is slow to boot.
#[test]
fn linux_guest_has_the_snapshots_marks_when_restored() {
    let dir = tempfile::tempdir().unwrap();
    let qemu = Qemu::find().unwrap();
    let start = Instant::now();
    let master = guest::master(&qemu, Guest::Linux { ram_mib: 256, noise_mib: 16 }).unwrap();
    println!("master after {:?}", start.elapsed());
    let machine = master.machine(&dir.path().join("l1"), "l1", "127.0.5.2", SnapshotFormat::Zstd).unwrap();
    assert!(master.snapshot(SnapshotFormat::Zstd).unwrap().metadata().unwrap().len() > 16 << 20);
    let snapshot = marks("snapshot", "snapshot");

    let vm = restored(&qemu, &machine);
    let (status, body) = machine.get("/", SOON).unwrap();
    assert_eq!(status, 200);
    assert!(serde_json::from_str::<serde_json::Value>(&body).unwrap()["message"].is_string(), "{body}");
    assert_eq!(machine.marks(SOON).unwrap(), snapshot);
    assert_eq!(machine.mark("spoilt1", "spoilt2", SOON).unwrap(), marks("spoilt1", "spoilt2"));
    vm.quit().unwrap();
    assert!(holds(&machine.dir.join("overlay.qcow2"), b"spoilt2"), "the mark reached the overlay");

    let mut vm = restored(&qemu, &machine);
    assert_eq!(machine.marks(SOON).unwrap(), snapshot);
    let start = Instant::now();
    vm.press_power_button().unwrap();
    vm.wait(SOON).unwrap();
    println!("off in {:?}", start.elapsed());
}

fn marks(ram: &str, disk: &str) -> Marks {
    Marks { ram: ram.to_owned(), disk: disk.to_owned() }
}

fn holds(file: &PathBuf, wanted: &[u8]) -> bool {
    std::fs::read(file).unwrap().windows(wanted.len()).any(|bytes| bytes == wanted)
}
