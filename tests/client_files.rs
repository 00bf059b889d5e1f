//! The files of clients: descriptors that they pass, and paths that they name. Only root can act as another user; plain
//! users may skip the tests of other users' paths.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File, Permissions};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::requirement;
use machinery_testkit::scratch::ScratchCwd;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Gid, Uid, geteuid};
use serde_json::{Value, json};

/// A user without a name, and Debian's `nogroup`.
const STRANGER: u32 = 54_321;
const NOGROUP: u32 = 65_534;

fn success() -> Value {
    json!({"success": true})
}

#[track_caller]
fn assert_fails(answer: &Value, parts: &[&str]) {
    assert_eq!(answer["success"], false, "{answer}");
    let reason = answer["reason"].as_str().unwrap();
    for part in parts {
        assert!(reason.contains(part), "{part:?} is not in: {reason}");
    }
    println!("{reason}");
}

/// A host with a running machine `m` in memory, whose socket the group `nogroup` may use. It ends before its CWD.
struct Served {
    host: RunningHost,
    cwd: ScratchCwd,
}

fn served(more: &str) -> Served {
    let cwd = ScratchCwd::double(&[("m", "snapshot: 5000"), ("n", "")]).unwrap();
    cwd.write("storage/task/.keep", "").unwrap();
    cwd.write("operational/sockets/.keep", "").unwrap();
    let group = if geteuid().is_root() { "socket_group: nogroup\n" } else { "" };
    cwd.host_yaml(&format!("{group}{more}")).unwrap();
    if geteuid().is_root() {
        for folder in ["..", ".", "operational", "operational/sockets", "storage", "storage/task"] {
            fs::set_permissions(cwd.root().join(folder), Permissions::from_mode(0o755)).unwrap();
        }
    }
    let host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap(), success());
    Served { host, cwd }
}

impl Served {
    fn client(&self) -> Client {
        self.host.client().unwrap()
    }

    /// Connects as another user who is a member of the socket's group; none if this user cannot be another.
    fn stranger(&self) -> Option<Client> {
        if !requirement::is_root() {
            return None;
        }
        let socket = self.cwd.socket();
        // The kernel keeps the credentials of the thread that connects.
        let connecting = std::thread::spawn(move || {
            let (user, group) = (Uid::from_raw(STRANGER), Gid::from_raw(NOGROUP));
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_gid(group).unwrap();
            rustix::thread::set_thread_uid(user).unwrap();
            Client::connect(&socket).unwrap()
        });
        Some(connecting.join().unwrap())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.cwd.root().join(path)
    }

    /// Expects that the host is as before: `m` runs, and no unfinished file is left.
    #[track_caller]
    fn assert_well(&self) {
        let machine = self.client().machine("m").unwrap();
        assert_eq!((&machine["state"], &machine["disabled"]), (&json!("running"), &json!(false)));
        let staging = self.path("operational/generated/machinery-host/unfinished");
        assert_eq!(fs::metadata(&staging).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(staging).unwrap().count(), 0);
    }

    /// Returns the number of open descriptors of the host.
    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.host.pid())).unwrap().count()
    }
}

fn to(action: &str, path: &Path) -> Value {
    json!({"action": action, "machine": "m", "path": path})
}

fn passed(action: &str) -> Value {
    json!({"action": action, "machine": "m", "fd": true})
}

#[test]
fn dump_and_screenshot_are_written_into_a_passed_file() {
    let served = served("");
    let mut client = served.client();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'x'; 100_000]).unwrap();
    for (action, magic) in [("dump_memory", &b"\x7fELF"[..]), ("screenshot", b"\x89PNG")] {
        assert_eq!(client.ask_with(passed(action), &file).unwrap(), success());
        let mut content = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut content).unwrap();
        assert!(content.starts_with(magic) && content.len() < 100_000, "{} bytes", content.len());
    }
    served.assert_well();
}

#[test]
fn dump_is_written_into_a_passed_pipe() {
    let served = served("");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut client = served.client();
    assert_eq!(client.ask_with(passed("dump_memory"), &writer).unwrap(), success());
    drop(writer);
    let mut content = Vec::new();
    // The host has closed its end.
    reader.read_to_end(&mut content).unwrap();
    assert!(content.starts_with(b"\x7fELF"));
    served.assert_well();
}

#[test]
fn machine_stays_enabled_when_nobody_reads_a_passed_pipe() {
    let served = served("timeouts: {dump_memory: 0.3}\n");
    let (_reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let answer = served.client().ask_with(passed("dump_memory"), &writer).unwrap();
    assert_fails(&answer, &["nobody reads it", "pipe"]);
    let machine = served.client().machine("m").unwrap();
    assert_eq!((&machine["state"], &machine["disabled"]), (&json!("running"), &json!(false)));
}

#[test]
fn descriptor_is_refused_when_the_host_cannot_write_to_it() {
    let served = served("");
    let mut client = served.client();
    assert_fails(&client.ask(passed("screenshot")).unwrap(), &["no descriptor was passed"]);
    let read_only = File::open(served.path(".cuckoocwd")).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let folder = File::open(served.cwd.root()).unwrap();
    for descriptor in [OwnedFd::from(read_only), reader.into(), folder.into()] {
        let answer = client.ask_with(passed("screenshot"), &descriptor).unwrap();
        assert_fails(&answer, &["the passed descriptor is not open for writing"]);
    }
    let device = File::options().write(true).open("/dev/null").unwrap();
    let answer = client.ask_with(passed("screenshot"), &device).unwrap();
    assert_fails(&answer, &["neither a regular file nor a pipe"]);
    let odd = json!({"action": "screenshot", "machine": "m", "fd": 3});
    assert_fails(&client.ask(odd).unwrap(), &["'fd' must be true or false"]);
    served.assert_well();
}

#[test]
fn descriptors_belong_to_their_requests_when_requests_are_sent_together() {
    let served = served("");
    let mut client = served.client();
    let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let mut lines = String::new();
    for request in [
        json!({"action": "list", "id": 1}),
        json!({"action": "dump_memory", "machine": "m", "fd": true, "id": 2}),
        json!({"action": "state", "machine": "m", "id": 3}),
        json!({"action": "screenshot", "machine": "m", "fd": true, "id": 4}),
    ] {
        lines += &format!("{request}\n");
    }
    client.send_with(lines.as_bytes(), &[files[0].as_fd(), files[1].as_fd()]).unwrap();
    for _ in 0..4 {
        assert_eq!(client.next_message().unwrap()["success"], true);
    }
    let magics = files.map(|mut file| {
        let mut magic = [0; 4];
        file.rewind().unwrap();
        file.read_exact(&mut magic).unwrap();
        magic
    });
    assert_eq!(magics, [*b"\x7fELF", *b"\x89PNG"]);
}

#[test]
fn descriptors_are_closed_when_no_request_takes_them() {
    let served = served("");
    let file = tempfile::tempfile().unwrap();
    let mut client = served.client();
    client.ask(json!({"action": "list"})).unwrap();
    let before = served.descriptors();
    for _ in 0..50 {
        client.send_with(b"{\"action\": \"version\"}\n", &[file.as_fd(); 4]).unwrap();
        client.next_message().unwrap();
        client.send_with(b"no json\n", &[file.as_fd()]).unwrap();
        client.next_message().unwrap();
    }
    // They are closed on other threads.
    while served.descriptors() > before {
        client.ask(json!({"action": "list"})).unwrap();
    }
    // Too many at once cost the connection.
    client.send_with(b"{\"action\": \"version\"}\n", &[file.as_fd(); 60]).unwrap();
    assert!(client.wait_for_close());
    while served.descriptors() >= before {
        served.client().ask(json!({"action": "list"})).unwrap();
    }
    served.assert_well();
}

#[test]
fn file_of_another_user_is_created_below_storage_and_belongs_to_that_user() {
    let served = served("");
    let Some(mut stranger) = served.stranger() else { return };
    for (action, name) in [("dump_memory", "memory.dmp"), ("screenshot", "screen.png")] {
        let path = served.path("storage/task").join(name);
        // The second one replaces the first one.
        for _ in 0..2 {
            assert_eq!(stranger.ask(to(action, &path)).unwrap(), success());
            let file = fs::metadata(&path).unwrap();
            assert_eq!((file.uid(), file.gid(), file.mode() & 0o777), (STRANGER, NOGROUP, 0o600));
        }
    }
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t", "memory_dump_path": served.path("storage/task/of-lock")});
    assert_eq!(stranger.ask(lock).unwrap()["success"], true);
    // The lock remembers who has named the path.
    assert_eq!(served.client().act("dump_memory", "m").unwrap(), success());
    assert_eq!(fs::metadata(served.path("storage/task/of-lock")).unwrap().uid(), STRANGER);
    served.assert_well();
}

#[test]
fn file_of_another_user_is_refused_outside_of_storage() {
    let served = served("");
    let Some(mut stranger) = served.stranger() else { return };
    served.cwd.write("secret", "kept").unwrap();
    symlink("../secret", served.path("storage/final")).unwrap();
    symlink(served.cwd.root(), served.path("storage/middle")).unwrap();
    symlink("task", served.path("storage/inner")).unwrap();
    let before = fs::read_dir(served.cwd.root()).unwrap().count();
    for path in [
        "secret",
        "new",
        "conf/machineries/double.yaml",
        "storage/../secret",
        "storage/task/../../new",
        "storage/final",
        "storage/middle/secret",
        "storage/middle/new",
        "storage/inner/new",
        "storage",
        "storage/task/",
    ] {
        for action in ["dump_memory", "screenshot"] {
            let answer = stranger.ask(to(action, &served.path(path))).unwrap();
            assert_eq!(answer["success"], false, "{path}: {answer}");
            println!("{}", answer["reason"]);
        }
    }
    for key in ["pcap_path", "memory_dump_path"] {
        let lock = json!({"action": "lock", "machine": "m", "task_id": "t", key: "/etc/new"});
        assert_fails(&stranger.ask(lock).unwrap(), &["user 54321 may not", "`fd`", "storage"]);
    }
    assert_eq!(fs::read(served.path("secret")).unwrap(), b"kept");
    assert_eq!(fs::read_dir(served.cwd.root()).unwrap().count(), before);
    assert_eq!(fs::read_dir(served.path("storage/task")).unwrap().count(), 1);
    served.assert_well();
}

#[test]
fn file_of_another_user_is_refused_when_something_else_exists() {
    let served = served("");
    let Some(mut stranger) = served.stranger() else { return };
    let task = served.path("storage/task");
    chown(&task, Some(STRANGER), Some(STRANGER)).unwrap();
    fs::write(task.join("foreign"), "kept").unwrap();
    fs::create_dir(task.join("folder")).unwrap();
    mknodat(CWD, task.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    for name in ["foreign", "folder", "fifo"] {
        for action in ["dump_memory", "screenshot"] {
            let answer = stranger.ask(to(action, &task.join(name))).unwrap();
            assert_fails(&answer, &["cannot write to", name]);
        }
    }
    assert_eq!(fs::read(task.join("foreign")).unwrap(), b"kept");
    assert!(fs::symlink_metadata(task.join("fifo")).unwrap().mode() & 0o010_000 != 0);
    served.assert_well();
}

#[test]
fn symbolic_link_is_not_followed_when_the_hosts_user_names_it() {
    let served = served("");
    served.cwd.write("secret", "kept").unwrap();
    symlink("secret", served.path("link")).unwrap();
    let mut client = served.client();
    for action in ["dump_memory", "screenshot"] {
        assert_fails(&client.ask(to(action, &served.path("link"))).unwrap(), &["cannot write to"]);
    }
    assert_eq!(fs::read(served.path("secret")).unwrap(), b"kept");
    assert_eq!(client.ask(to("dump_memory", &served.path("secret"))).unwrap(), success());
    served.assert_well();
}

#[test]
fn unfinished_files_of_a_killed_host_are_removed() {
    let mut served = served("");
    served.host.kill().unwrap();
    let unfinished = "operational/generated/machinery-host/unfinished";
    served.cwd.write(format!("{unfinished}/.unfinished-x/file"), "memory").unwrap();
    served.host = RunningHost::start(&served.cwd).unwrap();
    assert_eq!(fs::read_dir(served.path(unfinished)).unwrap().count(), 0);
}

#[test]
fn capture_of_a_repeated_lock_gets_a_new_descriptor_when_the_host_has_restarted() {
    let mut served = served("");
    let lock = || json!({"action": "lock", "machine": "n", "task_id": "t", "fd": true});
    let [first, second] = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let mut client = served.client();
    assert_eq!(client.ask_with(lock(), &first).unwrap()["success"], true);
    assert_eq!(client.ask_with(lock(), &first).unwrap()["success"], true);
    assert_fails(&client.ask_with(lock(), &second).unwrap(), &["locked by: t"]);
    let other = json!({"action": "lock", "machine": "m", "task_id": "u", "fd": true});
    assert_fails(&client.ask_with(other, &first).unwrap(), &["n is locked with the same passed file"]);
    served.host.kill().unwrap();
    served.host = RunningHost::start(&served.cwd).unwrap();
    let mut client = served.client();
    assert_eq!(client.machine("n").unwrap()["locked_by"], "t");
    assert_eq!(client.ask_with(lock(), &second).unwrap()["success"], true);
    assert_fails(&client.ask_with(lock(), &first).unwrap(), &["locked by: t"]);
}

#[test]
fn screenshot_fails_when_the_plugin_writes_no_png() {
    let config = "machines:\n  m: {ip: 10.0.0.1, platform: linux, os_version: 12}\n";
    let cwd = ScratchCwd::new(&[("nonconforming", config)]).unwrap();
    cwd.host_yaml("machineries: {nonconforming: {violates: screenshot}}\n").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let (file, path) = (tempfile::tempfile().unwrap(), cwd.root().join("screen"));
    for answer in
        [client.ask(to("screenshot", &path)).unwrap(), client.ask_with(passed("screenshot"), &file).unwrap()]
    {
        assert_fails(&answer, &["no PNG image"]);
    }
    assert!(!path.exists());
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(client.machine("m").unwrap()["disabled"], false);
}

#[test]
fn command_writes_the_file_with_the_rights_of_its_caller() {
    let served = served("");
    let (dump, link) = (served.path("dump"), served.path("link"));
    symlink("secret", &link).unwrap();
    let run = |action: &str, path: &Path| {
        host::run(&served.cwd, &[action, "m", &path.display().to_string()]).unwrap()
    };
    assert_eq!(run("dump-memory", &dump).code, Some(0));
    assert!(fs::read(&dump).unwrap().starts_with(b"\x7fELF"));
    assert_eq!(run("screenshot", &dump).code, Some(0));
    assert!(fs::read(&dump).unwrap().starts_with(b"\x89PNG"));
    let refused = run("screenshot", &link);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("is no file"), "{refused:?}");
    assert_eq!(served.client().act("stop", "m").unwrap(), success());
    assert_eq!(run("screenshot", &served.path("none")).code, Some(1));
    let left = fs::read_dir(served.cwd.root()).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
    assert!(!left.iter().any(|name| name == "none" || name.starts_with(".unfinished-")), "{left:?}");
}
