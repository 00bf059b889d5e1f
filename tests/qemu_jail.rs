//! The jail of the qemu machinery: code inside QEMU reaches nothing.
//!
//! A probe in QEMU's place makes the attempts of `docs/security.md`, with real files, sockets and processes of a lab. Each
//! attempt succeeds with `jail: off`, so that each test can fail.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::net::{TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::Value;

/// EPERM, EACCES, and ESRCH of a process that another user cannot see.
const DENIED: [&str; 3] = ["1", "13", "3"];

/// Attempts for which QEMU's `-sandbox` kills QEMU.
const KILLED: [&str; 3] = ["fork", "namespace", "schedule"];

const MODES: [&str; 2] = ["auto", "strict"];

fn lab(names: &[&str]) -> Lab {
    let machines: Vec<_> = names.iter().map(|name| (*name, Guest::Micro, SnapshotFormat::Lz4)).collect();
    Lab::new(&machines).unwrap()
}

/// A lab whose QEMU is the probe, and everything that the attempts are about.
struct Host {
    lab: Lab,
    _sockets: Vec<UnixListener>,
    _log: UnixDatagram,
    tcp: TcpListener,
    udp: UdpSocket,
    abstract_name: String,
}

impl Host {
    fn new() -> Host {
        let lab = lab(&["m", "other"]);
        let root = lab.cwd().root();
        let probe = root.join("probe");
        fs::copy(artifacts::folder().unwrap().join("jail-probe"), &probe).unwrap();
        fs::set_permissions(&probe, Permissions::from_mode(0o755)).unwrap();
        lab.change_yaml(&lab.qemu().system.display().to_string(), &probe.display().to_string()).unwrap();
        fs::create_dir_all(root.join("machineries")).unwrap();
        fs::write(root.join("secret"), "secret").unwrap();
        let attempts = lab.folder("m").dir.join("attempts");
        lab.change_start_args("m", |args| args.extend(["-cdrom".into(), attempts.display().to_string()]))
            .unwrap();
        let abstract_name = format!("qemu-jail-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let sockets = vec![
            UnixListener::bind_addr(&address).unwrap(),
            UnixListener::bind(root.join("libvirt-sock")).unwrap(),
        ];
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let log = UnixDatagram::bind(lab.cwd().root().join("log")).unwrap();
        Host { lab, _sockets: sockets, _log: log, tcp, udp, abstract_name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.cwd().root().join(name)
    }

    /// Returns the attempts that the jail denies, for a host process of that number.
    fn attempts(&self, host: u32) -> Vec<String> {
        let other = self.lab.folder("other");
        let named = |attempt: &str, path: &Path| format!("{attempt}={}", path.display());
        vec![
            named("write", &other.disk),
            named("write", &other.snapshot),
            named("write", &self.lab.folder("m").disk),
            named("write", &self.path("conf/machineries/qemu.yaml")),
            named("create", &self.path("machineries/libmachinery_evil.so")),
            named("create", &self.lab.folder("m").dir.join("new")),
            named("connect", &self.path("operational/sockets/machinerymanager.sock")),
            named("connect", &self.path("libvirt-sock")),
            named("chmod", &other.disk),
            named("chown", &other.disk),
            named("attribute", &other.disk),
            named("datagram", &self.path("log")),
            named("raw-pair", &self.path("log")),
            named("read", &self.path("secret")),
            named("list", self.lab.cwd().root()),
            "read=/etc/shadow".to_owned(),
            format!("abstract={}", self.abstract_name),
            format!("tcp={}", self.tcp.local_addr().unwrap()),
            format!("udp={}", self.udp.local_addr().unwrap()),
            "listen=127.0.0.1:0".to_owned(),
            format!("trace={host}"),
            format!("memory={host}"),
            format!("signal={host}"),
            format!("limits={host}"),
            format!("schedule={host}"),
            "signal-group".to_owned(),
            "fork".to_owned(),
            "namespace".to_owned(),
        ]
    }

    fn jail(&self, mode: &'static str) {
        self.lab.set_jail(mode).unwrap();
    }

    /// Has the probe make the attempts, and returns the end of each.
    fn report(&self, attempts: impl FnOnce(u32) -> Vec<String>) -> BTreeMap<String, String> {
        self.report_of_host(|_| (), attempts)
    }

    /// As [`report`](Host::report), with a host whose command was changed.
    fn report_of_host(
        &self,
        change: impl FnOnce(&mut Command),
        attempts: impl FnOnce(u32) -> Vec<String>,
    ) -> BTreeMap<String, String> {
        // The arguments name the file, so it has to exist.
        let file = self.lab.folder("m").dir.join("attempts");
        fs::write(&file, "").unwrap();
        let mut host = RunningHost::start_with(self.lab.cwd(), change).unwrap();
        let mut client = host.client().unwrap();
        fs::write(&file, attempts(host.pid()).join("\n")).unwrap();
        client.perform("restore_start", "m");
        let report = fs::read_to_string(&self.lab.folder("m").serial).unwrap();
        client.perform("stop", "m");
        assert!(host.terminate().unwrap().success());
        let line =
            |line: &str| line.rsplit_once(": ").map(|(attempt, end)| (attempt.into(), end.into())).unwrap();
        report.lines().map(line).collect()
    }
}

#[test]
fn attempts_succeed_when_the_jail_is_off() {
    let host = Host::new();
    host.jail("off");
    let report = host.report(|pid| host.attempts(pid));
    assert_eq!(report.len(), host.attempts(0).len(), "{report:?}");
    for (attempt, end) in report {
        assert_eq!(end, "ok", "{attempt}");
    }
}

#[test]
fn attempts_are_denied_when_the_jail_is_on() {
    let host = Host::new();
    for mode in MODES {
        host.jail(mode);
        let report = host.report(|pid| host.attempts(pid));
        assert_eq!(report.len(), host.attempts(0).len(), "{report:?}");
        for (attempt, end) in report {
            assert!(DENIED.contains(&end.as_str()), "{attempt} under {mode}: {end}");
        }
    }
}

/// Without a user of its own, layer A alone denies everything.
#[test]
fn attempts_are_denied_when_the_machine_has_no_user_of_its_own() {
    let host = Host::new();
    let closed = host.lab.cwd().root().parent().unwrap();
    fs::set_permissions(closed, Permissions::from_mode(0o700)).unwrap();
    host.jail("auto");
    let report = host.report(|pid| host.attempts(pid));
    for (attempt, end) in report {
        assert!(DENIED.contains(&end.as_str()), "{attempt}: {end}");
    }
}

/// A user who owns nothing.
const STRANGER: u32 = 54321;

/// Gives everything below the folder to that user.
fn give(folder: &Path, user: u32) {
    chown(folder, Some(user), Some(user)).unwrap();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            give(&path, user);
        } else {
            chown(&path, Some(user), Some(user)).unwrap();
        }
    }
}

#[test]
fn attempts_are_denied_when_the_host_is_a_plain_user() {
    let bin = tempfile::Builder::new().prefix("machinery-bin.").tempdir().unwrap();
    fs::set_permissions(bin.path(), Permissions::from_mode(0o755)).unwrap();
    for file in ["cuckoo-machinery", "cuckoo-machinery-jail", "libmachinery_qemu.so"] {
        fs::copy(artifacts::folder().unwrap().join(file), bin.path().join(file)).unwrap();
    }
    for (mode, is_denied) in [("off", false), ("auto", true)] {
        let host = Host::new();
        host.jail(mode);
        give(host.lab.cwd().root(), STRANGER);
        let as_stranger = |command: &mut Command| {
            let mut plain = Command::new("setpriv");
            plain.args([
                format!("--reuid={STRANGER}"),
                format!("--regid={STRANGER}"),
                "--clear-groups".into(),
            ]);
            plain.arg(bin.path().join("cuckoo-machinery")).args(command.get_args()).current_dir("/");
            *command = plain;
        };
        // A plain user reads no secrets of root, with or without a jail.
        let attempts =
            |pid| host.attempts(pid).into_iter().filter(|attempt| attempt != "read=/etc/shadow").collect();
        let report = host.report_of_host(as_stranger, attempts);
        assert!(report.len() + 1 >= host.attempts(0).len(), "{report:?}");
        for (attempt, end) in report {
            assert_eq!(DENIED.contains(&end.as_str()), is_denied, "{attempt} under {mode}: {end}");
        }
    }
}

fn listed(client: &mut Client, machine: &str) -> Value {
    client.machine(machine).unwrap()
}

/// Returns a line of a process's status.
fn status(pid: rustix::process::Pid, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn qemu_has_no_rights_and_no_descriptors_of_the_host() {
    let lab = lab(&["m", "other"]);
    lab.set_jail("strict").unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    for machine in ["m", "other"] {
        client.perform("restore_start", machine);
    }
    let processes = ["m", "other"].map(|machine| lab.qemu_of(machine).unwrap());
    let users = processes.map(|pid| status(pid, "Uid:"));
    assert_ne!(users[0], users[1], "two machines share a user");
    for (pid, user) in processes.into_iter().zip(&users) {
        assert!(!user.split(' ').any(|uid| uid == "0"), "{user}");
        assert_eq!(status(pid, "Groups:"), "");
        for (key, expected) in [("NoNewPrivs:", "1"), ("Seccomp:", "2"), ("CapEff:", "0000000000000000")] {
            assert_eq!(status(pid, key), expected, "{key}");
        }
        assert_descriptors_are_its_own(&lab, pid);
    }
    let inode = |pid: rustix::process::Pid, kind: &str| {
        fs::metadata(format!("/proc/{}/ns/{kind}", pid.as_raw_nonzero())).unwrap().ino()
    };
    let own = rustix::process::getpid();
    assert_ne!(inode(processes[0], "ipc"), inode(own, "ipc"));
    assert_ne!(inode(processes[0], "net"), inode(own, "net"));
    assert!(
        listed(&mut client, "m")["jail"].as_str().unwrap().starts_with("A+B"),
        "{}",
        listed(&mut client, "m")
    );
    assert!(host.terminate().unwrap().success());
}

/// No descriptor leads to a file outside of the machine's folder, and none can write to its disk.
fn assert_descriptors_are_its_own(lab: &Lab, pid: rustix::process::Pid) {
    for entry in fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap() {
        let path = entry.unwrap().path();
        let Ok(target) = fs::read_link(&path) else { continue };
        let info = path.display().to_string().replace("/fd/", "/fdinfo/");
        let info = fs::read_to_string(info).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default();
        let writes = flags.trim().chars().last().is_some_and(|digit| digit == '1' || digit == '2');
        let is_below = target.starts_with(lab.cwd().root());
        let disks = ["m", "other"].map(|machine| lab.folder(machine).disk.clone());
        assert!(!(writes && disks.contains(&target)), "{target:?} is open for writing");
        let harmless = ["/dev/null", "/dev/urandom", "pipe:", "socket:", "anon_inode:", "/memfd:"];
        let is_harmless = harmless.iter().any(|start| target.to_string_lossy().starts_with(start));
        let is_system = !writes && (target.starts_with("/usr") || target.starts_with("/var/cache"));
        assert!(is_below || is_harmless || is_system, "{target:?}");
    }
}

/// A machine of another user's files: a strict jail refuses it, and says why.
#[test]
fn machine_is_refused_when_the_jail_is_strict_and_its_files_are_closed() {
    let lab = lab(&["m"]);
    let closed = lab.cwd().root().parent().unwrap().to_owned();
    fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    lab.set_jail("strict").unwrap();
    let checked = lab.run(&["-v", "check"]).unwrap();
    assert!(checked.stdout.contains("layer B does not hold"), "{}", checked.stdout);
    let (mut host, mut client) = lab.serve().unwrap();
    let reason = client.act("restore_start", "m").unwrap()["reason"].as_str().unwrap().to_owned();
    let why = format!("the folder {} is closed to other users", closed.display());
    assert!(reason.contains("the jail is strict") && reason.contains(&why), "{reason}");
    assert!(listed(&mut client, "m")["jail"].as_str().unwrap().contains(&why));
    assert!(host.terminate().unwrap().success());
}

/// Copies the probe for QEMU's emulator, with the version of the interface that this QEMU takes.
fn copy_plugin(to: &Path, qemu: &str) {
    let mut library = fs::read(artifacts::folder().unwrap().join("libjail_probe.so")).unwrap();
    let marker = b"version of probe";
    let at = library.windows(marker.len()).position(|bytes| bytes == marker).unwrap() - size_of::<i32>();
    let number: i32 = if qemu.contains("version 7.") || qemu.contains("version 8.") { 1 } else { 2 };
    library[at..at + size_of::<i32>()].copy_from_slice(&number.to_ne_bytes());
    fs::write(to, library).unwrap();
}

/// Code inside a real QEMU, as that of malware which has escaped: a plugin of its emulator.
#[test]
fn code_in_qemu_is_denied_what_it_may_do_without_a_jail() {
    for (mode, is_denied) in [("off", false), ("auto", true), ("strict", true)] {
        let host = Host::new();
        let (lab, m) = (&host.lab, host.lab.folder("m"));
        let probe = host.path("probe");
        lab.change_yaml(&probe.display().to_string(), &lab.qemu().system.display().to_string()).unwrap();
        let (library, report) = (host.path("libjail_probe.so"), m.dir.join("report"));
        copy_plugin(&library, &lab.qemu().version().unwrap());
        fs::write(m.dir.join("attempts"), "").unwrap();
        fs::write(&report, "").unwrap();
        let shown = |path: &Path| path.display().to_string();
        let attempts = shown(&m.dir.join("attempts"));
        let plugin = format!("file={},attempts={attempts},report={}", shown(&library), shown(&report));
        // The report is a file that QEMU may write, as the log of a serial port is.
        lab.change_start_args("m", |args| {
            args.extend(["-plugin", &plugin, "-cdrom", &attempts].map(str::to_owned));
            let log = format!("file,id=report,path={},append=on", shown(&report));
            args.extend(["-chardev".to_owned(), log]);
        })
        .unwrap();
        lab.set_jail(mode).unwrap();
        lab.accept_unsafe_args("m").unwrap();
        let (mut running, mut client) = lab.serve().unwrap();
        // QEMU's own filter kills QEMU for some of them.
        let mut attempts = host.attempts(running.pid());
        attempts.retain(|attempt| !KILLED.iter().any(|killed| attempt.starts_with(killed)));
        fs::write(m.dir.join("attempts"), attempts.join("\n")).unwrap();
        client.perform("norestore_start", "m");
        let said = fs::read_to_string(&report).unwrap();
        client.perform("stop", "m");
        assert!(running.terminate().unwrap().success());
        assert_eq!(said.lines().count(), attempts.len(), "{said}");
        for line in said.lines() {
            let (attempt, end) = line.rsplit_once(": ").unwrap();
            assert_eq!(DENIED.contains(&end), is_denied, "{attempt} under {mode}: {end}");
        }
    }
}

/// Returns a script that mounts cgroup v2 in the folder, for itself alone, and continues with `more`.
fn in_cgroups(folder: &Path, more: &str) -> String {
    let folder = folder.display();
    format!("mkdir -p {folder} && mount -t cgroup2 none {folder} && cd {folder} && {more}")
}

/// A host whose cgroup is delegated, as systemd does it for `Delegate=yes`.
#[test]
fn run_is_in_a_cgroup_that_ends_with_it_also_when_the_host_is_killed() {
    let lab = lab(&["m"]);
    lab.host_yaml("adopt: off\n", "").unwrap();
    let (mount, name) = (lab.cwd().root().join("cgroups"), format!("machinery-test-{}", std::process::id()));
    let probe = artifacts::folder().unwrap().join("jail-probe");
    let delegate = format!(
        "mkdir -p {name} && {} delegate={name} && echo $$ > {name}/cgroup.procs && exec \"$@\"",
        probe.display()
    );
    let delegated = || {
        RunningHost::start_with(lab.cwd(), |command| {
            let mut unshare = Command::new("unshare");
            unshare.args(["--mount", "sh", "-c", &in_cgroups(&mount, &delegate), "sh"]);
            unshare.arg(command.get_program()).args(command.get_args());
            *command = unshare;
        })
        .unwrap()
    };
    let mut host = delegated();
    let mut client = host.client().unwrap();
    client.perform("restore_start", "m");
    assert!(
        listed(&mut client, "m")["jail"].as_str().unwrap().starts_with("A+B+C"),
        "{}",
        listed(&mut client, "m")
    );
    let cgroup = |pid: rustix::process::Pid| {
        fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero())).unwrap()
    };
    let qemu = lab.qemu_of("m").unwrap();
    assert!(cgroup(qemu).contains(&format!("0::/{name}/machine-")), "{}", cgroup(qemu));
    host.kill().unwrap();
    let mut host = delegated();
    assert!(lab.qemu_of("m").is_err(), "QEMU runs on");
    let mut client = host.client().unwrap();
    client.perform("restore_start", "m");
    client.perform("stop", "m");
    assert!(host.terminate().unwrap().success());
    // No cgroup of the machine is left.
    let remove = in_cgroups(&mount, &format!("rmdir {name}/host {name}"));
    let removed = Command::new("unshare").args(["--mount", "sh", "-c", &remove]).output().unwrap();
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
}

#[test]
fn template_is_built_anew_when_the_jail_was_switched_on() {
    let lab = lab(&["m"]);
    for jail in ["off", "auto", "off", "strict"] {
        lab.set_jail(jail).unwrap();
        lab.ahead("instant: auto, standby: off").unwrap();
        let (mut host, mut client) = lab.serve().unwrap();
        client.perform("prepare", "m");
        client.perform("restore_start", "m");
        let ready = listed(&mut client, "m")["ready"].clone();
        assert_eq!(ready["mode"], "instant", "{jail}: {ready}");
        assert!(!host.log().contains("the template is not used"), "{jail}: {}", host.log());
        assert!(host.terminate().unwrap().success());
    }
}
