//! Memory dumps and screenshots of real domains. The files belong to the caller, although libvirtd writes them as
//! root. The machine keeps running and stays enabled, also after a failure.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File, Permissions};
use std::io::BufReader;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, micro};
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::KvmLab;
use machinery_testkit::requirement;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// A running machine, `m`, with a client and a host. They are dropped in this order.
struct Running {
    client: Client,
    host: RunningHost,
    lab: KvmLab,
}

fn running(guest: Guest) -> Running {
    let lab = KvmLab::new(&[("m", guest)]).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    Running { client, host, lab }
}

fn good() -> Value {
    json!({"success": true})
}

impl Running {
    fn target(&self, name: &str) -> PathBuf {
        let folder = self.lab.cwd().root().join("machines/inspections");
        fs::create_dir_all(&folder).unwrap();
        folder.join(name)
    }

    fn dump(&mut self, path: &Path, format: &str) -> Value {
        let request = json!({"action": "dump_memory", "machine": "m", "path": path, "format": format});
        self.client.ask(request).unwrap()
    }

    fn screenshot(&mut self, path: &Path) -> Value {
        self.client.ask(json!({"action": "screenshot", "machine": "m", "path": path})).unwrap()
    }

    /// Expects that the machine runs and is enabled, and that there are no unfinished files.
    #[track_caller]
    fn assert_still_runs(&mut self) {
        let listed = self.client.machine("m").unwrap();
        let (state, disabled) = (&listed["state"], &listed["disabled"]);
        assert_eq!((state, disabled), (&json!("running"), &json!(false)), "{}", self.host.log());
        let left = self.lab.leftovers().unwrap();
        assert!(!left.iter().any(|left| left.contains("/.unfinished-")), "{left:?}");
    }

    fn end(mut self) {
        assert_eq!(self.client.act("stop", "m").unwrap(), good());
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        self.lab.assert_clean();
    }
}

/// Expects that the file belongs to the host's user, and is accessible to nobody else.
#[track_caller]
fn assert_is_private(path: &Path) {
    let (file, ours) = (fs::metadata(path).unwrap(), fs::metadata(path.parent().unwrap()).unwrap());
    assert_eq!((file.mode() & 0o777, file.uid()), (0o600, ours.uid()), "{}", path.display());
}

#[test]
fn dump_has_the_memory_of_the_guest_and_belongs_to_the_caller() {
    let mut m = running(Guest::Micro);
    m.lab.machine("m").wait_for_next_count(SOON).unwrap();
    for name in ["dump", "dump", "another dump, with a comma=and such"] {
        let path = m.target(name);
        assert_eq!(m.dump(&path, "elf"), good());
        let dump = fs::read(&path).unwrap();
        assert!(dump.starts_with(b"\x7fELF"), "{:02x?}", &dump[..4]);
        assert!(dump.len() >= 32 << 20, "{} bytes", dump.len());
        let count = micro::counter_in(&dump);
        println!("the counter in it is {count:?}");
        assert!(count >= Some(m.lab.restored_count().unwrap()), "{count:?}");
        assert_is_private(&path);
        m.assert_still_runs();
        m.lab.machine("m").wait_for_next_count(SOON).unwrap();
    }
    m.end();
}

/// The owner of the folder does not change the owner of the file: libvirtd only writes into it.
#[test]
fn dump_belongs_to_the_caller_when_the_folder_does_not() {
    let mut m = running(Guest::Micro);
    let path = m.target("dump");
    let folder = path.parent().unwrap();
    fs::set_permissions(folder, Permissions::from_mode(0o777)).unwrap();
    let me = fs::metadata(folder).unwrap().uid();
    if !requirement::ROOT.is_met(chown(folder, Some(65534), Some(65534)).is_ok()) {
        return m.end();
    }
    assert_eq!(m.dump(&path, "elf"), good());
    let dump = fs::metadata(&path).unwrap();
    assert_eq!((dump.uid(), dump.mode() & 0o777), (me, 0o600));
    m.end();
}

#[test]
fn qemu_never_has_the_file_of_a_dump() {
    let mut m = running(Guest::Linux { ram_mib: 512, noise_mib: 256 });
    let folder = format!("/proc/{}/fd", m.lab.qemu_of("m").unwrap().as_raw_nonzero());
    let opened = || -> Vec<String> {
        let entries = fs::read_dir(&folder).unwrap().flatten();
        entries.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string())).collect()
    };
    let mut subscriber = m.host.client().unwrap();
    subscriber.subscribe().unwrap();
    let path = m.target("dump");
    m.client.send(&json!({"action": "dump_memory", "machine": "m", "path": path, "id": "dump"})).unwrap();
    loop {
        let event = subscriber.next_message().unwrap();
        if event["event"] == "progress" {
            let opened = opened();
            // The pipe is beside the file.
            assert!(!opened.iter().any(|path| path.ends_with("/file")), "{opened:?}");
            if event["fraction"] == 1.0 {
                break;
            }
        }
    }
    assert_eq!(m.client.next_message().unwrap()["success"], true);
    let opened = opened();
    assert!(!opened.iter().any(|opened| opened.contains(".unfinished-")), "{opened:?}");
    assert!(fs::read(&path).unwrap().starts_with(b"\x7fELF"));
    m.assert_still_runs();
    m.end();
}

#[test]
fn progress_of_a_long_dump_is_reported() {
    let mut m = running(Guest::Linux { ram_mib: 512, noise_mib: 256 });
    let mut subscriber = m.host.client().unwrap();
    subscriber.subscribe().unwrap();
    let path = m.target("dump");
    assert_eq!(m.dump(&path, "elf"), good());
    let mut fractions = Vec::new();
    while fractions.last() != Some(&1.0) {
        let event = subscriber.next_message().unwrap();
        if event["event"] == "progress" {
            fractions.push(event["fraction"].as_f64().unwrap());
        }
    }
    println!("{fractions:?}");
    assert!(fractions.is_sorted() && fractions.iter().all(|at| (0.0..=1.0).contains(at)), "{fractions:?}");
    m.assert_still_runs();
    assert_eq!(m.lab.machine("m").get("/", SOON).unwrap().0, 200);
    m.end();
}

#[test]
fn screenshot_is_a_png_of_the_screen() {
    let mut m = running(Guest::Micro);
    for _ in 0..2 {
        let path = m.target("screen.png");
        assert_eq!(m.screenshot(&path), good());
        let mut png = png::Decoder::new(BufReader::new(File::open(&path).unwrap())).read_info().unwrap();
        let mut pixels = vec![0; png.output_buffer_size().unwrap()];
        let frame = png.next_frame(&mut pixels).unwrap();
        println!("{} x {}", frame.width, frame.height);
        assert_eq!((frame.width, frame.height), (720, 400), "a PC's text screen");
        // The firmware has written to the screen.
        assert!(pixels.iter().any(|byte| *byte > 100 && *byte < 255), "the screen is blank");
        assert_is_private(&path);
        m.assert_still_runs();
    }
    m.end();
}

#[test]
fn machine_runs_on_when_a_file_cannot_be_written() {
    let mut m = running(Guest::Micro);
    let nowhere = m.target("none/dump");
    let folder = m.target("folder");
    fs::create_dir(&folder).unwrap();
    for path in [&nowhere, &folder] {
        for answer in [m.dump(path, "elf"), m.screenshot(path)] {
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains(path.to_str().unwrap()), "{reason}");
        }
        m.assert_still_runs();
    }
    // This guest has no driver for a Windows crash dump.
    let path = m.target("win.dmp");
    let answer = m.dump(&path, "win-dmp");
    assert_eq!(answer["success"], false, "{answer}");
    assert!(!path.exists());
    m.assert_still_runs();
    m.end();
}

#[test]
fn dump_and_screenshot_are_refused_when_the_machine_is_off() {
    let mut m = running(Guest::Micro);
    assert_eq!(m.client.act("stop", "m").unwrap(), good());
    let path = m.target("nothing");
    for answer in [m.dump(&path, "elf"), m.screenshot(&path)] {
        let reason = answer["reason"].as_str().unwrap();
        assert!(reason.contains("powered off") && reason.contains("Start it first"), "{reason}");
        assert!(!path.exists());
    }
    assert_eq!(m.host.terminate().unwrap().code(), Some(0));
    m.lab.assert_clean();
}
