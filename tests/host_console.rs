//! The sockets of consoles: who may connect, how many, and when they come and go. The double's machines send back the bytes
//! of a viewer.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::requirement::is_root;
use machinery_testkit::scratch::{self, ScratchCwd};
use machinery_testkit::viewer::Viewer;
use machinery_testkit::wait::wait_until;
use serde_json::{Value, json};

const CONSOLE: &str = "console: true";
/// The number of viewers that a machine may have.
const MAX_VIEWERS: usize = 8;
/// A user and a group without names.
const STRANGER: u32 = 54_321;
/// A group that exists on each Debian.
const GROUP: (&str, u32) = ("nogroup", 65_534);

/// A host with its CWD and a client; dropped in this order.
struct Served {
    client: Client,
    host: RunningHost,
    cwd: ScratchCwd,
}

fn served(machines: &[(&str, &str)]) -> Served {
    served_in(ScratchCwd::double(machines).unwrap())
}

fn served_in(cwd: ScratchCwd) -> Served {
    let host = RunningHost::start(&cwd).unwrap();
    Served { client: host.client().unwrap(), host, cwd }
}

fn good() -> Value {
    json!({"success": true})
}

fn folder(cwd: &ScratchCwd) -> PathBuf {
    cwd.root().join("operational/sockets/console")
}

impl Served {
    fn socket(&self, machine: &str) -> PathBuf {
        folder(&self.cwd).join(format!("{machine}.sock"))
    }

    #[track_caller]
    fn act(&mut self, action: &str, machine: &str) {
        assert_eq!(self.client.act(action, machine).unwrap(), good(), "{}", self.host.log());
    }

    /// Returns the reason why the console of the machine is refused.
    #[track_caller]
    fn refusal(&mut self, machine: &str) -> String {
        let answer = self.client.act("console", machine).unwrap();
        answer["reason"].as_str().unwrap_or_else(|| panic!("not refused: {answer}")).to_owned()
    }

    fn watch(&self, machine: &str) -> Viewer {
        let socket = self.socket(machine);
        wait_until("there is no socket", || socket.exists());
        Viewer::connect(&socket).unwrap()
    }
}

/// Expects that the machine answers the viewer.
#[track_caller]
fn assert_answers(viewer: &mut Viewer) {
    viewer.send(b"ping").unwrap();
    assert_eq!(&viewer.read::<4>().unwrap(), b"ping");
}

#[test]
fn viewers_have_connections_of_their_own_until_the_run_ends() {
    let mut served = served(&[("m", CONSOLE), ("other", CONSOLE)]);
    served.act("restore_start", "m");
    served.act("restore_start", "other");
    let answer = served.client.act("console", "m").unwrap();
    let socket = served.socket("m");
    assert!(socket.exists(), "a host that is ready has its sockets");
    assert_eq!(answer, json!({"success": true, "path": socket}));
    assert_eq!(served.client.machine("m").unwrap()["console"], json!(socket));
    let [mut first, mut second, mut stays] = ["m", "m", "other"].map(|machine| served.watch(machine));
    for viewer in [&mut first, &mut second, &mut stays] {
        viewer.greeting().unwrap();
        assert_answers(viewer);
    }
    served.act("stop", "m");
    first.wait_for_close().unwrap();
    second.wait_for_close().unwrap();
    assert_answers(&mut stays);
    assert_eq!(served.host.terminate().unwrap().code(), Some(0));
    stays.wait_for_close().unwrap();
    assert!(!folder(&served.cwd).exists());
}

#[test]
fn console_is_refused_when_it_is_off_or_the_machine_is() {
    let mut served =
        served(&[("m", CONSOLE), ("without", ""), ("failing", "console: true, faults: {console: fail}")]);
    assert!(served.refusal("m").contains("because it is poweroff"));
    served.watch("m").wait_for_close().unwrap();
    served.host.wait_for_log(&["a viewer was refused", "poweroff"]).unwrap();
    served.act("restore_start", "without");
    let reason = served.refusal("without");
    assert!(reason.contains("`console: true`") && reason.contains("'double'"), "{reason}");
    assert_eq!(served.client.machine("without").unwrap()["console"], Value::Null);
    assert!(!served.socket("without").exists());
    served.act("restore_start", "failing");
    served.watch("failing").wait_for_close().unwrap();
    served.host.wait_for_log(&["a viewer was refused", "configured to fail"]).unwrap();
    let failing = served.client.machine("failing").unwrap();
    assert_eq!((&failing["state"], &failing["disabled"]), (&json!("running"), &json!(false)));
}

#[test]
fn machine_has_a_limited_number_of_viewers() {
    let mut served = served(&[("m", CONSOLE)]);
    served.act("restore_start", "m");
    let mut viewers: Vec<Viewer> = (0..MAX_VIEWERS).map(|_| served.watch("m")).collect();
    viewers.iter_mut().for_each(|viewer| viewer.greeting().unwrap());
    served.watch("m").wait_for_close().unwrap();
    served.host.wait_for_log(&["a viewer was refused", "8 viewers already"]).unwrap();
    viewers.iter_mut().for_each(assert_answers);
    drop(viewers.pop());
    wait_until("the place of a viewer that has left is taken", || served.watch("m").greeting().is_ok());
}

#[test]
fn viewer_that_reads_nothing_delays_neither_others_nor_a_stop() {
    let mut served = served(&[("m", CONSOLE)]);
    served.act("restore_start", "m");
    let (mut slow, mut other) = (served.watch("m"), served.watch("m"));
    slow.flood().unwrap();
    other.greeting().unwrap();
    assert_answers(&mut other);
    served.act("stop", "m");
    slow.wait_for_close().unwrap();
    served.act("restore_start", "m");
    served.watch("m").greeting().unwrap();
}

#[test]
fn sockets_follow_the_configuration() {
    let mut served = served(&[("m", ""), ("gone", CONSOLE)]);
    wait_until("there is no socket", || served.socket("gone").exists());
    served.cwd.write_yaml("double", &scratch::double(&[("m", CONSOLE), ("new", CONSOLE)])).unwrap();
    assert_eq!(served.client.ask(json!({"action": "reload"})).unwrap()["success"], json!(true));
    wait_until("the old socket remains", || !served.socket("gone").exists());
    served.act("restore_start", "m");
    served.watch("m").greeting().unwrap();
    wait_until("there is no socket", || served.socket("new").exists());
    // A change of a machine in use is applied when it is free.
    let mut watching = served.watch("m");
    watching.greeting().unwrap();
    served.cwd.write_yaml("double", &scratch::double(&[("m", ""), ("new", CONSOLE)])).unwrap();
    let reloaded = served.client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(reloaded["deferred"], json!(["m"]), "{reloaded}");
    assert_answers(&mut watching);
    served.act("stop", "m");
    watching.wait_for_close().unwrap();
    wait_until("the socket remains", || !served.socket("m").exists());
}

#[test]
fn sockets_of_a_killed_host_are_removed_by_the_next_one() {
    let mut served = served(&[("m", CONSOLE)]);
    wait_until("there is no socket", || served.socket("m").exists());
    served.host.kill().unwrap();
    let stale = folder(&served.cwd).join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(served.socket("m").exists());
    let mut served = served_in(served.cwd);
    served.act("restore_start", "m");
    wait_until("a stale socket remains", || !stale.exists());
    wait_until("the viewer is not served", || {
        Viewer::connect(&served.socket("m")).is_ok_and(|mut viewer| viewer.greeting().is_ok())
    });
}

#[test]
fn viewer_of_a_machine_that_powers_itself_off_is_disconnected() {
    let mut served = served(&[("m", "console: true, poweroff_after_ms: 300")]);
    served.act("restore_start", "m");
    let mut viewer = served.watch("m");
    viewer.wait_for_close().unwrap();
}

#[test]
fn console_has_no_socket_when_the_path_is_too_long_for_viewers() {
    let name = "m".repeat(90);
    let mut served = served(&[(&name, CONSOLE)]);
    served.act("restore_start", &name);
    let reason = served.refusal(&name);
    assert!(reason.contains("an address holds 107") && reason.contains("shorter path"), "{reason}");
    assert_eq!(served.client.machine(&name).unwrap()["console"], Value::Null);
    served.host.wait_for_log(&["a console has no socket"]).unwrap();
}

#[test]
fn host_serves_without_consoles_when_their_sockets_cannot_be_made() {
    let cwd = ScratchCwd::double(&[("m", CONSOLE)]).unwrap();
    cwd.write("operational/sockets/console", "a file of somebody else").unwrap();
    let mut served = served_in(cwd);
    served.act("restore_start", "m");
    assert!(served.refusal("m").contains("the host's log may have the reason"));
    served.host.wait_for_log(&["a console has no socket", "make the folder"]).unwrap();
    served.act("stop", "m");
}

#[test]
fn command_shows_the_socket_and_viewers() {
    let mut served = served(&[("win 10", CONSOLE)]);
    let refused = host::run(&served.cwd, &["console", "win 10"]).unwrap();
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stdout.contains("because it is poweroff")
            || refused.stderr.contains("because it is poweroff")
    );
    served.act("restore_start", "win 10");
    let shown = host::run(&served.cwd, &["console", "win 10"]).unwrap();
    let socket = served.socket("win 10").display().to_string();
    assert_eq!((shown.code, shown.stdout.lines().next()), (Some(0), Some(socket.as_str())), "{shown:?}");
    assert!(shown.stdout.contains(&format!("xtigervncviewer '{socket}'")), "{shown:?}");
    let json = host::run(&served.cwd, &["--json", "console", "win 10"]).unwrap();
    assert_eq!(
        serde_json::from_str::<Value>(&json.stdout).unwrap(),
        json!({"success": true, "path": socket})
    );
}

/// Connects as that user and group, and reports whether the machine greets.
fn is_greeted(user: u32, group: u32, socket: &Path) -> bool {
    let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(30); s.connect(sys.argv[1]); \
                  sys.exit(s.recv(12) != b'RFB 003.008\\n')";
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()]);
    command.args(["/usr/bin/python3", "-c", script]).arg(socket).current_dir("/");
    command.status().unwrap().success()
}

#[test]
fn console_is_for_the_users_of_the_hosts_socket() {
    if !is_root() {
        return;
    }
    let cwd = ScratchCwd::double(&[("m", CONSOLE)]).unwrap();
    cwd.write("operational/sockets/.keep", "").unwrap();
    for folder in ["..", ".", "operational", "operational/sockets"] {
        fs::set_permissions(cwd.root().join(folder), Permissions::from_mode(0o755)).unwrap();
    }
    cwd.host_yaml(&format!("socket_group: {}\n", GROUP.0)).unwrap();
    let mut served = served_in(cwd);
    served.act("restore_start", "m");
    let socket = served.socket("m");
    served.watch("m").greeting().unwrap();
    let found = fs::symlink_metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!((found.mode() & 0o777, found.gid()), (0o660, GROUP.1));
    assert_eq!(fs::metadata(folder(&served.cwd)).unwrap().mode() & 0o777, 0o710);
    assert!(is_greeted(STRANGER, GROUP.1, &socket), "{}", served.host.log());
    assert!(!is_greeted(STRANGER, STRANGER, &socket));
    // The modes no longer protect the socket.
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(folder(&served.cwd), Permissions::from_mode(0o755)).unwrap();
    assert!(!is_greeted(STRANGER, STRANGER, &socket));
    served.host.wait_for_log(&["a viewer was refused", "user 54321"]).unwrap();
}

#[test]
fn root_changes_no_folder_of_others_when_a_link_replaces_that_of_the_sockets() {
    if !is_root() {
        return;
    }
    let cwd = ScratchCwd::double(&[("m", CONSOLE)]).unwrap();
    cwd.write("operational/sockets/.keep", "").unwrap();
    let sockets = cwd.root().join("operational/sockets");
    chown(&sockets, Some(STRANGER), Some(STRANGER)).unwrap();
    cwd.host_yaml(&format!("socket_group: {}\n", GROUP.0)).unwrap();
    let mut served = served_in(cwd);
    wait_until("there is no socket", || served.socket("m").exists());
    let victim = served.cwd.root().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::set_permissions(&victim, Permissions::from_mode(0o700)).unwrap();
    let before = (fs::metadata(&victim).unwrap().mode(), fs::metadata(&victim).unwrap().gid());
    // The owner of the parent may rename the folder of root.
    fs::rename(sockets.join("console"), sockets.join("old")).unwrap();
    let replace: [fn(&Path, &Path); 2] = [
        |victim, folder| symlink(victim, folder).unwrap(),
        |_, folder| {
            fs::remove_file(folder).unwrap();
            fs::create_dir(folder).unwrap();
            chown(folder, Some(STRANGER), Some(STRANGER)).unwrap();
        },
    ];
    for (number, replace) in replace.iter().enumerate() {
        replace(&victim, &sockets.join("console"));
        let added = format!("added_{number}");
        served.cwd.write_yaml("double", &scratch::double(&[("m", CONSOLE), (&added, CONSOLE)])).unwrap();
        assert_eq!(served.client.ask(json!({"action": "reload"})).unwrap()["success"], json!(true));
        served.host.wait_for_log(&["a console has no socket", &added]).unwrap();
    }
    let after = fs::metadata(&victim).unwrap();
    assert_eq!((after.mode(), after.gid()), before);
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
    let other = fs::metadata(sockets.join("console")).unwrap();
    assert_eq!((other.uid(), other.gid()), (STRANGER, STRANGER));
}
