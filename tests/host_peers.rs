//! Access to the socket. Only root can act as another user; plain users may skip most of these
//! tests.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::requirement::is_root;
use machinery_testkit::scratch::ScratchCwd;
use serde_json::json;
use tempfile::TempDir;

/// Debian's `nobody` and its group, which own nothing.
const NOBODY: u32 = 65_534;
const NOGROUP: &str = "nogroup";
/// A user and a group without names.
const STRANGER: u32 = 54_321;
/// A user without a name, as which a host runs. The kernel also shows `nobody` for unknown owners.
const PLAIN: u32 = 54_322;

/// Copies of the program and a plugin in a folder that all users can read.
struct Installed(TempDir);

impl Installed {
    fn new() -> Self {
        let bin = tempfile::Builder::new().prefix("machinery-bin.").tempdir().unwrap();
        set_mode(bin.path(), 0o755);
        for file in [artifacts::program().unwrap(), artifacts::plugin("double").unwrap()] {
            fs::copy(&file, bin.path().join(file.file_name().unwrap())).unwrap();
        }
        Installed(bin)
    }

    /// Returns the program's command for the CWD, run by another user.
    fn run_by(&self, user: u32, group: u32, cwd: &ScratchCwd) -> Command {
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()]);
        command.arg(self.0.path().join("cuckoo-machinery")).arg("--cwd").arg(cwd.root());
        command.current_dir("/");
        command
    }

    fn ask_by(&self, user: u32, group: u32, cwd: &ScratchCwd, arguments: &[&str]) -> CommandOutput {
        let mut command = self.run_by(user, group, cwd);
        command.arg("--json").args(arguments);
        host::run_command(command).unwrap()
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Creates a CWD whose socket other users can reach.
fn open_cwd() -> ScratchCwd {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.write("operational/sockets/.keep", "").unwrap();
    for folder in ["..", ".", "operational", "operational/sockets"] {
        set_mode(&cwd.root().join(folder), 0o755);
    }
    cwd
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn host_refuses_other_users_by_socket_mode_and_by_credentials() {
    if !is_root() {
        return;
    }
    let (cwd, installed) = (open_cwd(), Installed::new());
    let host = RunningHost::start(&cwd).unwrap();
    let refused = installed.ask_by(STRANGER, STRANGER, &cwd, &["restore-start", "m"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stdout.contains("this user may not use"), "{refused:?}");
    // The mode no longer protects the socket.
    set_mode(&cwd.socket(), 0o666);
    let reported = installed.ask_by(STRANGER, STRANGER, &cwd, &["restore-start", "m"]);
    assert_eq!(reported.code, Some(1), "{reported:?}");
    let reason = "user 54321 may not use the machinery host: it is for user 0, root";
    assert!(reported.stdout.contains(reason), "{reported:?}");
    assert_eq!(host.client().unwrap().machine("m").unwrap()["state"], "poweroff");
}

#[test]
fn host_serves_members_of_the_socket_group() {
    if !is_root() {
        return;
    }
    let (cwd, installed) = (open_cwd(), Installed::new());
    cwd.host_yaml(&format!("socket_group: {NOGROUP}\n")).unwrap();
    let _host = RunningHost::start(&cwd).unwrap();
    let socket = fs::metadata(cwd.socket()).unwrap();
    assert_eq!((mode(&cwd.socket()), socket.gid()), (0o660, NOBODY));
    let ask = |user, group| installed.ask_by(user, group, &cwd, &["list"]);
    let served = ask(STRANGER, NOBODY);
    assert_eq!(served.code, Some(0), "{served:?}");
    // The socket's group may be any of the client's supplementary groups.
    let mut member = Command::new("setpriv");
    member.args([
        format!("--reuid={STRANGER}"),
        format!("--regid={STRANGER}"),
        format!("--groups=1,{NOBODY},2"),
    ]);
    member.arg(installed.0.path().join("cuckoo-machinery")).arg("--cwd").arg(cwd.root()).arg("list");
    let served = host::run_command(member).unwrap();
    assert_eq!(served.code, Some(0), "{served:?}");
    set_mode(&cwd.socket(), 0o666);
    let refused = ask(STRANGER, STRANGER);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stdout.contains("members of the group nogroup"), "{refused:?}");
}

#[test]
fn host_serves_root_when_it_runs_as_a_plain_user() {
    if !is_root() {
        return;
    }
    let (cwd, installed) = (open_cwd(), Installed::new());
    for path in [".", "operational", "operational/sockets"] {
        chown(cwd.root().join(path), Some(PLAIN), None).unwrap();
    }
    let host = RunningHost::start_with(&cwd, |command| {
        *command = installed.run_by(PLAIN, PLAIN, &cwd);
        command.arg("serve");
    });
    let host = host.unwrap();
    assert_eq!(fs::metadata(cwd.socket()).unwrap().uid(), PLAIN);
    let answer = host.client().unwrap().act("restore_start", "m").unwrap();
    assert_eq!(answer, json!({"success": true}));
}

#[test]
fn serve_fails_when_the_socket_group_does_not_exist() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.host_yaml("socket_group: no-such-group-here\n").unwrap();
    let ran = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("no-such-group-here") && ran.stderr.contains("groupadd"), "{ran:?}");
}
