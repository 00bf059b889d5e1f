//! Looking at real domains: memory dumps and screenshots, which belong to the caller although libvirtd
//! writes them as root, and leave the machine running and enabled, also where they fail.

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
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// A running machine, `m`, and what looks at it; dropped in this order.
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
        let folder = self.lab.cwd().root().join("machines/looks");
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

    /// It is in the pool, runs, and nothing unfinished is left of a look at it.
    #[track_caller]
    fn assert_runs_on(&mut self) {
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

/// For its owner alone, and that is who runs the host.
#[track_caller]
fn assert_is_ours(path: &Path) {
    let (file, ours) = (fs::metadata(path).unwrap(), fs::metadata(path.parent().unwrap()).unwrap());
    assert_eq!((file.mode() & 0o777, file.uid()), (0o600, ours.uid()), "{}", path.display());
}

#[test]
fn a_dump_holds_the_guests_memory_and_is_the_callers() {
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
        assert_is_ours(&path);
        m.assert_runs_on();
        m.lab.machine("m").wait_for_next_count(SOON).unwrap();
    }
    m.end();
}

/// A folder that others own does not change whose the file is: libvirtd only writes into it.
#[test]
fn a_dump_into_somebody_elses_folder_is_still_the_callers() {
    let mut m = running(Guest::Micro);
    let path = m.target("dump");
    let folder = path.parent().unwrap();
    fs::set_permissions(folder, Permissions::from_mode(0o777)).unwrap();
    let me = fs::metadata(folder).unwrap().uid();
    if chown(folder, Some(65534), Some(65534)).is_err() {
        eprintln!("NOT CHECKED: a folder of another user, because this user may not give one away");
        return m.end();
    }
    assert_eq!(m.dump(&path, "elf"), good());
    let dump = fs::metadata(&path).unwrap();
    assert_eq!((dump.uid(), dump.mode() & 0o777), (me, 0o600));
    m.end();
}

#[test]
fn the_progress_of_a_long_dump_is_told() {
    let mut m = running(Guest::Linux { ram_mib: 512, noise_mib: 256 });
    let mut subscriber = m.host.client().unwrap();
    subscriber.subscribe().unwrap();
    let path = m.target("dump");
    assert_eq!(m.dump(&path, "elf"), good());
    let mut told = Vec::new();
    while told.last() != Some(&1.0) {
        let event = subscriber.next_message().unwrap();
        if event["event"] == "progress" {
            told.push(event["fraction"].as_f64().unwrap());
        }
    }
    println!("{told:?}");
    assert!(told.is_sorted() && told.iter().all(|at| (0.0..=1.0).contains(at)), "{told:?}");
    m.assert_runs_on();
    assert_eq!(m.lab.machine("m").get("/", SOON).unwrap().0, 200);
    m.end();
}

#[test]
fn a_screenshot_is_a_picture() {
    let mut m = running(Guest::Micro);
    for _ in 0..2 {
        let path = m.target("screen.png");
        assert_eq!(m.screenshot(&path), good());
        let mut png = png::Decoder::new(BufReader::new(File::open(&path).unwrap())).read_info().unwrap();
        let mut pixels = vec![0; png.output_buffer_size().unwrap()];
        let frame = png.next_frame(&mut pixels).unwrap();
        println!("{} x {}", frame.width, frame.height);
        assert_eq!((frame.width, frame.height), (720, 400), "a PC's text screen");
        // The firmware has written on it.
        assert!(pixels.iter().any(|byte| *byte > 100 && *byte < 255), "it is blank");
        assert_is_ours(&path);
        m.assert_runs_on();
    }
    m.end();
}

#[test]
fn what_cannot_be_written_costs_the_machine_nothing() {
    let mut m = running(Guest::Micro);
    let nowhere = m.target("none/dump");
    let folder = m.target("folder");
    fs::create_dir(&folder).unwrap();
    for path in [&nowhere, &folder] {
        for answer in [m.dump(path, "elf"), m.screenshot(path)] {
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains(path.to_str().unwrap()), "{reason}");
        }
        m.assert_runs_on();
    }
    // Nothing in this guest helps with a Windows crash dump.
    let path = m.target("win.dmp");
    let answer = m.dump(&path, "win-dmp");
    assert_eq!(answer["success"], false, "{answer}");
    assert!(!path.exists());
    m.assert_runs_on();
    m.end();
}

#[test]
fn a_machine_that_is_off_has_neither() {
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
