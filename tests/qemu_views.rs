//! Memory dumps and screenshots of real machines: the files belong to the caller, and the machine stays running
//! and enabled, even if they fail.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::BufReader;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, micro};
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{Lab, TinyDisk};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// A guest whose dump takes a while.
const LARGE: Guest = Guest::Linux { ram_mib: 512, noise_mib: 256 };

/// A running machine `m` with its host and a client, dropped in this order.
struct Running {
    client: Client,
    host: RunningHost,
    lab: Lab,
}

fn running(guest: Guest) -> Running {
    let lab = Lab::new(&[("m", guest, SnapshotFormat::Plain)]).unwrap();
    running_in(lab, "restore_start")
}

fn running_in(lab: Lab, start: &str) -> Running {
    // The log then has the reason if QEMU ends.
    let host = RunningHost::start_with(lab.cwd(), |command| {
        command.arg("-v");
    })
    .unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act(start, "m").unwrap(), good());
    Running { client, host, lab }
}

fn good() -> Value {
    json!({"success": true})
}

impl Running {
    fn target(&self, name: &str) -> PathBuf {
        self.lab.cwd().root().join(name)
    }

    fn dump(&mut self, path: &Path, format: &str) -> Value {
        let request = json!({"action": "dump_memory", "machine": "m", "path": path, "format": format});
        self.client.ask(request).unwrap()
    }

    fn screenshot(&mut self, path: &Path) -> Value {
        self.client.ask(json!({"action": "screenshot", "machine": "m", "path": path})).unwrap()
    }

    /// Checks that the machine is in the pool, and that the micro guest continues to count.
    #[track_caller]
    fn assert_runs_on(&mut self) {
        let listed = self.client.machine("m").unwrap();
        let (state, disabled) = (&listed["state"], &listed["disabled"]);
        assert_eq!((state, disabled), (&json!("running"), &json!(false)), "{}", self.host.log());
        let machine = self.lab.folder("m");
        machine.first_count(SOON).unwrap();
        machine.wait_for_count(machine.last_count().unwrap() + 1, SOON).unwrap();
    }

    /// Checks that other users may not read the file, and that no unfinished file is beside it.
    #[track_caller]
    fn assert_is_ours(&self, path: &Path) {
        let (file, ours) = (fs::metadata(path).unwrap(), fs::metadata(self.lab.cwd().root()).unwrap());
        assert_eq!((file.mode() & 0o777, file.uid()), (0o600, ours.uid()), "{}", path.display());
        self.assert_nothing_unfinished();
    }

    #[track_caller]
    fn assert_nothing_unfinished(&self) {
        let left = self.lab.leftovers().unwrap();
        assert!(!left.iter().any(|left| left.contains("/.unfinished-")), "{left:?}");
    }

    fn end(mut self) {
        assert_eq!(self.client.act("stop", "m").unwrap(), good());
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }
}

#[test]
fn dump_holds_the_memory_of_the_guest() {
    let mut m = running(Guest::Micro);
    m.assert_runs_on();
    for name in ["dump", "dump", "another dump, with a comma=and such"] {
        let path = m.target(name);
        assert_eq!(m.dump(&path, "elf"), good());
        let dump = fs::read(&path).unwrap();
        assert!(dump.starts_with(b"\x7fELF"), "{:02x?}", &dump[..4]);
        assert!(dump.len() >= 32 << 20, "{} bytes", dump.len());
        let count = micro::counter_in(&dump);
        assert!(count >= Some(m.lab.restored_count().unwrap()), "{count:?}");
        m.assert_is_ours(&path);
        m.assert_runs_on();
    }
    m.end();
}

/// The descriptors of QEMU that lead to files, with their paths.
fn files_of_qemu(m: &Running) -> Vec<(PathBuf, fs::Metadata)> {
    let folder = format!("/proc/{}/fd", m.lab.qemu_of("m").unwrap().as_raw_nonzero());
    let entries = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    // A descriptor may be closed meanwhile.
    entries.filter_map(|path| Some((fs::read_link(&path).ok()?, fs::metadata(&path).ok()?))).collect()
}

#[test]
fn dump_and_screenshot_are_written_into_passed_descriptors() {
    let mut m = running(Guest::Micro);
    let path = m.target("passed");
    for (action, magic) in [("dump_memory", &b"\x7fELF"[..]), ("screenshot", b"\x89PNG")] {
        let file = File::create(&path).unwrap();
        let request = json!({"action": action, "machine": "m", "fd": true});
        assert_eq!(m.client.ask_with(request, &file).unwrap(), good());
        assert!(fs::read(&path).unwrap().starts_with(magic));
        m.assert_nothing_unfinished();
    }
    m.assert_runs_on();
    m.end();
}

#[test]
fn qemu_never_has_the_file_of_a_dump_or_a_screenshot() {
    let mut m = running(LARGE);
    let (dump, screen) = (m.target("dump"), m.target("screen.png"));
    let pipes_of = |files: &[(PathBuf, fs::Metadata)]| {
        files.iter().filter(|(path, _)| path.to_string_lossy().starts_with("pipe:")).count()
    };
    let before = pipes_of(&files_of_qemu(&m));
    let mut subscriber = m.host.client().unwrap();
    subscriber.subscribe().unwrap();
    let request = json!({"action": "dump_memory", "machine": "m", "path": dump, "id": "dump"});
    m.client.send(&request).unwrap();
    let mut pipes = 0;
    loop {
        let event = subscriber.next_message().unwrap();
        if event["event"] == "progress" {
            let files = files_of_qemu(&m);
            assert!(
                files.iter().all(|(path, _)| !path.to_string_lossy().contains(".unfinished-")),
                "{files:?}"
            );
            pipes = pipes.max(pipes_of(&files));
            if event["fraction"] == 1.0 {
                break;
            }
        }
    }
    println!("{before} pipes before the dump, {pipes} during it");
    assert_eq!(m.client.next_message().unwrap()["success"], true);
    assert_eq!(m.screenshot(&screen), good());
    for path in [&dump, &screen] {
        let file = fs::metadata(path).unwrap();
        let files = files_of_qemu(&m);
        let is_same = |meta: &fs::Metadata| (meta.dev(), meta.ino()) == (file.dev(), file.ino());
        assert!(!files.iter().any(|(_, meta)| is_same(meta)), "{files:?}");
        assert_eq!(pipes_of(&files), before, "{files:?}");
    }
    m.end();
}

#[test]
fn dump_is_cut_off_when_it_is_larger_than_the_memory_in_the_arguments() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    // A graphics card with more memory than the plugin expects of all graphics cards.
    let card = ["-device".to_owned(), "secondary-vga,vgamem_mb=512".to_owned()];
    lab.change_start_args("m", |args| args.extend(card)).unwrap();
    // The snapshot has no such card.
    let mut m = running_in(lab, "norestore_start");
    m.assert_runs_on();
    let path = m.target("dump");
    let answer = m.dump(&path, "elf");
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.contains("more than 301989888 bytes were written"), "{reason}");
    assert!(!path.exists());
    m.assert_nothing_unfinished();
    m.assert_runs_on();
    m.end();
}

#[test]
fn dump_reports_its_progress() {
    let mut m = running(LARGE);
    let mut subscriber = m.host.client().unwrap();
    assert_eq!(subscriber.ask(json!({"action": "subscribe"})).unwrap(), good());
    let begun = Instant::now();
    let path = m.target("dump");
    assert_eq!(m.dump(&path, "elf"), good());
    let mut fractions = Vec::new();
    while fractions.last() != Some(&1.0) {
        let event = subscriber.next_message().unwrap();
        if event["event"] == "progress" {
            assert_eq!(event["machine"], "m");
            fractions.push(event["fraction"].as_f64().unwrap());
        }
    }
    println!("512 MiB in {:?}: {fractions:?}", begun.elapsed());
    assert!(
        fractions.is_sorted() && fractions.iter().all(|fraction| (0.0..=1.0).contains(fraction)),
        "{fractions:?}"
    );
    assert_eq!(m.lab.folder("m").get("/", SOON).unwrap().0, 200);
    m.end();
}

#[test]
fn machine_is_unchanged_when_a_dump_format_fails() {
    let mut m = running(Guest::Micro);
    for (format, magic) in [("kdump-zlib", &b"makedumpfile"[..]), ("win-dmp", b"PAGEDU64")] {
        let path = m.target(format);
        let answer = m.dump(&path, format);
        println!("{format}: {answer}");
        if answer["success"] == true {
            assert!(fs::read(&path).unwrap().starts_with(magic), "{format}");
            m.assert_is_ours(&path);
        } else {
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains("dump_memory of machine 'm' failed: "), "{reason}");
            assert!(!path.exists());
            m.assert_nothing_unfinished();
        }
        m.assert_runs_on();
    }
    // This guest is no Windows.
    assert!(!m.target("win-dmp").exists());
    m.end();
}

#[test]
fn reason_names_the_path_when_it_cannot_be_written() {
    let mut m = running(Guest::Micro);
    let (missing, folder) = (m.target("no/such/folder/file"), m.target("folder"));
    fs::create_dir(&folder).unwrap();
    for path in [&missing, &folder] {
        for answer in [m.dump(path, "elf"), m.screenshot(path)] {
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains(&format!("cannot write to {}: ", path.display())), "{reason}");
            println!("{reason}");
            m.assert_runs_on();
        }
    }
    assert!(folder.read_dir().unwrap().next().is_none());
    m.assert_nothing_unfinished();
    m.end();
}

#[test]
fn reason_names_the_space_when_a_dump_has_too_little() {
    let mut m = running(Guest::Micro);
    let Some(tiny) = requirement::MOUNT.or_skip(TinyDisk::mount(m.lab.cwd(), 1024).unwrap()) else { return };
    let answer = m.dump(&tiny.path().join("dump"), "elf");
    let reason = answer["reason"].as_str().unwrap();
    println!("{reason}");
    assert!(reason.contains("cannot dump the memory to") && reason.contains("space"), "{reason}");
    assert!(tiny.path().read_dir().unwrap().next().is_none());
    m.assert_runs_on();
    drop(tiny);
    m.end();
}

#[test]
fn screenshot_is_a_png_of_the_screen() {
    let mut m = running(Guest::Micro);
    for name in ["shot", "shot", "another, with a comma=and such"] {
        let path = m.target(name);
        assert_eq!(m.screenshot(&path), good());
        let mut png = png::Decoder::new(BufReader::new(File::open(&path).unwrap())).read_info().unwrap();
        let mut pixels = vec![0; png.output_buffer_size().unwrap()];
        let image = png.next_frame(&mut pixels).unwrap();
        println!("{} × {}", image.width, image.height);
        // A text screen or a VGA one.
        assert!((320..=1280).contains(&image.width) && (200..=1024).contains(&image.height), "{image:?}");
        m.assert_is_ours(&path);
        m.assert_runs_on();
    }
    m.end();
}

#[test]
fn dump_and_screenshot_fail_when_the_machine_is_off() {
    let mut m = running(Guest::Micro);
    assert_eq!(m.client.act("stop", "m").unwrap(), good());
    let path = m.target("file");
    for answer in [m.dump(&path, "elf"), m.screenshot(&path)] {
        let reason = answer["reason"].as_str().unwrap();
        assert!(reason.contains("powered off") && reason.contains("Start it first"), "{reason}");
    }
    assert!(!path.exists());
    let listed = m.client.machine("m").unwrap();
    assert_eq!((&listed["state"], &listed["disabled"]), (&json!("poweroff"), &json!(false)));
    m.end();
}
