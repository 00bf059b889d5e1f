//! The console of real QEMU machines: viewers see the screen and press keys, and QEMU listens nowhere.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::viewer::{self, Viewer};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// The bytes of the cursor, which blinks: a character of 9 × 16 pixels of 4 bytes.
const CURSOR: usize = 9 * 16 * 4;
/// The BIOS's buffer of keys, in the guest's memory: 16 entries of a character and a scan code. Source: the BIOS data area
/// at 0x400, with the buffer at 0x1e.
const KEYS: std::ops::Range<usize> = 0x41e..0x43e;
/// The key K: its symbol in X, and its entry in the BIOS's buffer.
const K: (u32, [u8; 2]) = (0x6b, [0x6b, 0x25]);

/// A host with the machine `m`, and a client. They are dropped in this order.
struct Desk {
    client: Client,
    host: RunningHost,
    lab: Lab,
}

fn desk(qemu: &str) -> Desk {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    lab.host_yaml("", qemu).unwrap();
    desk_in(lab)
}

fn desk_in(lab: Lab) -> Desk {
    let host = lab.host().unwrap();
    let client = host.client().unwrap();
    Desk { client, host, lab }
}

fn good() -> Value {
    json!({"success": true})
}

impl Desk {
    fn act(&mut self, action: &str) {
        assert_eq!(self.client.act(action, "m").unwrap(), good(), "{action}: {}", self.host.log());
    }

    /// Returns the socket of the running machine's console.
    fn console(&mut self) -> PathBuf {
        let answer = self.client.act("console", "m").unwrap();
        answer["path"].as_str().unwrap_or_else(|| panic!("{answer}")).into()
    }

    /// Connects a viewer that sees the screen of the restored guest.
    fn viewer(&mut self) -> Viewer {
        Viewer::of_screen(&self.console(), viewer::is_text).unwrap()
    }

    /// Waits until the guest's BIOS has the key, by memory dumps.
    fn wait_for_key(&mut self, entry: [u8; 2]) {
        let path = self.lab.cwd().root().join("dump");
        let end = Instant::now() + SOON;
        loop {
            let request = json!({"action": "dump_memory", "machine": "m", "path": path});
            assert_eq!(self.client.ask(request).unwrap(), good());
            let dump = fs::read(&path).unwrap();
            let keys = &memory_of(&dump)[KEYS];
            if keys.chunks(2).any(|key| key == entry) {
                return;
            }
            assert!(Instant::now() < end, "the guest's keys are {keys:x?}");
        }
    }

    fn qemu_command(&self) -> Vec<String> {
        let pid = self.lab.qemu_of("m").unwrap().as_raw_nonzero();
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        command.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
    }

    /// Returns the number of sockets on which the machine's QEMU listens.
    fn listening(&self) -> usize {
        let process = format!("/proc/{}", self.lab.qemu_of("m").unwrap().as_raw_nonzero());
        let tables = ["/proc/net/unix".to_owned()]
            .into_iter()
            .chain(["unix", "tcp", "tcp6"].iter().map(|table| format!("{process}/net/{table}")));
        let inodes: BTreeSet<String> =
            tables.flat_map(|table| listening_in(&fs::read_to_string(table).unwrap())).collect();
        let opened = fs::read_dir(format!("{process}/fd")).unwrap().flatten();
        let opened = opened.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()));
        opened.filter(|file| inodes.iter().any(|inode| *file == format!("socket:[{inode}]"))).count()
    }

    fn end(mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        assert!(!self.lab.cwd().root().join("operational/sockets/console").exists());
        self.lab.assert_clean();
    }
}

/// Returns the inodes of listening sockets in a table of the kernel. Source: proc_net_unix(5), proc_net_tcp(5).
fn listening_in(table: &str) -> Vec<String> {
    let lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let inode = |words: Vec<&str>| match words[..] {
        [_, _, _, "00010000", _, _, inode, ..] => Some(inode.to_owned()),
        [_, _, _, "0A", _, _, _, _, _, inode, ..] => Some(inode.to_owned()),
        _ => None,
    };
    lines.filter_map(inode).collect()
}

/// Returns the memory from the address 0 on, out of a dump. Source: elf(5).
fn memory_of(dump: &[u8]) -> &[u8] {
    let number = |at: usize, length: usize| {
        dump[at..at + length].iter().rev().fold(0_usize, |all, byte| all << 8 | usize::from(*byte))
    };
    let (table, size, count) = (number(0x20, 8), number(0x36, 2), number(0x38, 2));
    let segments = (0..count).map(|index| table + index * size);
    let first = segments.into_iter().find(|at| number(*at, 4) == 1 && number(at + 24, 8) == 0).unwrap();
    let (offset, length) = (number(first + 8, 8), number(first + 32, 8));
    &dump[offset..offset + length]
}

#[test]
fn viewer_sees_the_screen_and_its_keys_reach_the_guest() {
    let mut desk = desk(", console: true");
    assert_eq!(desk.client.act("console", "m").unwrap()["success"], json!(false), "it is off");
    for start in ["restore_start", "norestore_start"] {
        desk.act(start);
        let listed = desk.client.machine("m").unwrap();
        let socket = desk.console();
        assert_eq!(listed["console"], json!(socket));
        let (mut first, mut second) = match start {
            "restore_start" => (desk.viewer(), desk.viewer()),
            // The size of the screen changes while the guest boots.
            _ => (Viewer::connect(&socket).unwrap(), Viewer::connect(&socket).unwrap()),
        };
        if start == "restore_start" {
            second.press(K.0).unwrap();
            desk.wait_for_key(K.1);
            first.is_served().unwrap();
        } else {
            first.greeting().unwrap();
            second.greeting().unwrap();
        }
        desk.act("stop");
        first.wait_for_close().unwrap();
        second.wait_for_close().unwrap();
    }
    desk.end();
}

#[test]
fn qemu_listens_nowhere_and_has_no_server_unless_a_console_is_configured() {
    let mut desk = desk("");
    desk.act("restore_start");
    let command = desk.qemu_command();
    assert!(!command.iter().any(|arg| arg == "-vnc"), "{command:?}");
    assert_eq!(desk.client.machine("m").unwrap()["console"], Value::Null);
    let refused = desk.client.act("console", "m").unwrap();
    assert!(refused["reason"].as_str().unwrap().contains("`console: true`"), "{refused}");
    assert!(!desk.lab.cwd().root().join("operational/sockets/console").exists());
    let before = desk.listening();
    desk.act("stop");
    desk.lab.host_yaml("", ", machines: {m: {console: true}}").unwrap();
    assert_eq!(desk.client.ask(json!({"action": "reload"})).unwrap()["changed"], json!(["m"]));
    desk.act("restore_start");
    desk.viewer();
    assert_eq!(desk.listening(), before);
    desk.end();
}

/// Returns the pixels of a PNG.
fn pixels(path: &Path) -> Vec<u8> {
    let mut png = png::Decoder::new(BufReader::new(File::open(path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; png.output_buffer_size().unwrap()];
    png.next_frame(&mut pixels).unwrap();
    pixels
}

#[test]
fn console_changes_no_restore_and_no_screenshot() {
    let mut pictures = Vec::new();
    for console in ["false", "true"] {
        let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
        lab.ahead(&format!("instant: auto, standby: auto, console: {console}")).unwrap();
        let mut desk = desk_in(lab);
        desk.act("prepare");
        assert_eq!(desk.client.machine("m").unwrap()["ready"]["mode"], "standby", "{}", desk.host.log());
        desk.act("restore_start");
        if console == "true" {
            desk.viewer().is_served().unwrap();
        }
        let path = desk.lab.cwd().root().join("screen.png");
        let request = json!({"action": "screenshot", "machine": "m", "path": path});
        assert_eq!(desk.client.ask(request).unwrap(), good());
        pictures.push(pixels(&path));
        desk.act("stop");
        desk.act("stop");
        // Without its standby, by the template.
        desk.act("restore_start");
        let log = desk.host.wait_for_log(&["done", "restore_start", "load"]).unwrap();
        assert!(!log.contains("snapshot"), "{log}");
        if console == "true" {
            desk.viewer().is_served().unwrap();
        }
        desk.act("stop");
        desk.end();
    }
    assert_eq!(pictures[0].len(), pictures[1].len());
    let differing = pictures[0].iter().zip(&pictures[1]).filter(|(one, other)| one != other).count();
    assert!(differing <= CURSOR, "{differing} bytes of the screen differ with a console");
}

#[test]
fn viewer_is_disconnected_when_qemu_is_killed() {
    let mut desk = desk(", console: true");
    desk.act("restore_start");
    let mut viewer = desk.viewer();
    kill_process(desk.lab.qemu_of("m").unwrap(), Signal::KILL).unwrap();
    viewer.wait_for_close().unwrap();
    desk.client.act("enable_machine", "m").unwrap();
    desk.act("restore_start");
    desk.viewer().is_served().unwrap();
    desk.end();
}

#[test]
fn console_of_an_adopted_run_is_that_of_its_start() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    lab.host_yaml("", ", console: true").unwrap();
    let mut desk = desk_in(lab);
    desk.act("restore_start");
    let mut viewer = desk.viewer();
    desk.host.kill().unwrap();
    viewer.wait_for_close().unwrap();
    let Desk { lab, .. } = desk;
    let mut desk = desk_in(lab);
    assert_eq!(desk.client.machine("m").unwrap()["state"], "running");
    desk.viewer().is_served().unwrap();
    desk.act("stop");
    desk.end();
}

#[test]
fn console_is_refused_for_an_adopted_run_that_was_started_without_one() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    let mut desk = desk_in(lab);
    desk.act("restore_start");
    desk.host.kill().unwrap();
    let Desk { lab, .. } = desk;
    lab.host_yaml("", ", console: true").unwrap();
    let mut desk = desk_in(lab);
    assert_eq!(desk.client.machine("m").unwrap()["state"], "running");
    Viewer::connect(&desk.console()).unwrap().wait_for_close().unwrap();
    desk.host.wait_for_log(&["a viewer was refused", "started without a console"]).unwrap();
    desk.act("stop");
    desk.act("restore_start");
    desk.viewer().is_served().unwrap();
    desk.act("stop");
    desk.end();
}

#[test]
fn console_is_the_server_of_the_arguments_when_they_have_one() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Plain)]).unwrap();
    lab.change_start_args("m", |args| args.extend(["-vnc", "none"].map(str::to_owned))).unwrap();
    lab.host_yaml("", ", console: true").unwrap();
    let mut desk = desk_in(lab);
    desk.act("restore_start");
    let servers = desk.qemu_command().iter().filter(|arg| *arg == "-vnc").count();
    assert_eq!(servers, 1);
    desk.viewer().is_served().unwrap();
    desk.act("stop");
    desk.end();
}
