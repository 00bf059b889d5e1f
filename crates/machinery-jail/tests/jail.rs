//! The helper program, with a probe in the place of the hypervisor.
//!
//! Each attempt is made twice: it must succeed outside the jail, so that the test can fail, and fail inside.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use machinery_jail::{Network, PROGRAM, Policy, User};
use machinery_testkit::lab::TestNetwork;
use machinery_testkit::requirement::NETWORK;
use tempfile::TempDir;

/// The end of each attempt: `ok`, or the number of the error.
type Ends = BTreeMap<String, String>;

const DENIED: [&str; 3] = ["1", "13", "38"];

/// Returns a program of this workspace, which `cargo build --workspace` has built.
fn program(name: &str) -> PathBuf {
    let own = PathBuf::from(env!("CARGO_BIN_EXE_cuckoo-machinery-jail"));
    own.with_file_name(name)
}

fn ends(output: &[u8]) -> Ends {
    let lines = std::str::from_utf8(output).unwrap().lines();
    lines
        .map(|line| line.rsplit_once(": ").map(|(attempt, end)| (attempt.into(), end.into())).unwrap())
        .collect()
}

fn probe(attempts: &[String]) -> Ends {
    let output = Command::new(program("jail-probe")).args(attempts).output().unwrap();
    ends(&output.stdout)
}

fn jailed(policy: &Policy, attempts: &[String]) -> Ends {
    jailed_at(&program("jail-probe"), policy, attempts)
}

fn jailed_at(probe: &Path, policy: &Policy, attempts: &[String]) -> Ends {
    let output = Command::new(program(PROGRAM))
        .arg(serde_json::to_string(policy).unwrap())
        .arg(probe)
        .args(attempts)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ends(&output.stdout)
}

/// Asserts that each attempt succeeds outside the jail, and is denied inside.
fn assert_denied(policy: &Policy, attempts: &[String]) {
    let (outside, inside) = (probe(attempts), jailed(policy, attempts));
    assert_eq!(outside.len(), attempts.len());
    for (attempt, end) in &outside {
        assert_eq!(end, "ok", "{attempt} outside the jail");
        assert!(DENIED.contains(&inside[attempt].as_str()), "{attempt} inside: {}", inside[attempt]);
    }
}

fn assert_allowed(policy: &Policy, attempts: &[String]) {
    for (attempt, end) in jailed(policy, attempts) {
        assert_eq!(end, "ok", "{attempt}");
    }
}

/// A host as the attempts see it: files, sockets, and a process.
struct Host {
    folder: TempDir,
    _sockets: Vec<UnixListener>,
    _log: UnixDatagram,
    tcp: TcpListener,
    udp: UdpSocket,
    abstract_name: String,
}

impl Host {
    fn new() -> Host {
        let folder = tempfile::tempdir().unwrap();
        for file in ["secret", "other.qcow2", "own.qcow2", "base.qcow2"] {
            std::fs::write(folder.path().join(file), "content").unwrap();
        }
        std::fs::create_dir(folder.path().join("machineries")).unwrap();
        let abstract_name = format!("jail-test-{}-{:p}", std::process::id(), &folder);
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let sockets = vec![
            UnixListener::bind(folder.path().join("host.sock")).unwrap(),
            UnixListener::bind_addr(&address).unwrap(),
        ];
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let log = UnixDatagram::bind(folder.path().join("log.sock")).unwrap();
        Host { folder, _sockets: sockets, _log: log, tcp, udp, abstract_name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn attempt(&self, attempt: &str, name: &str) -> String {
        format!("{attempt}={}", self.path(name).display())
    }

    /// Returns the policy of a machine with a disk and an overlay.
    fn policy(&self) -> Policy {
        Policy {
            read: vec![self.path("base.qcow2")],
            write: vec![self.path("own.qcow2")],
            ..Policy::default()
        }
    }
}

#[test]
fn files_of_others_are_denied() {
    let host = Host::new();
    let attempts = [
        host.attempt("read", "secret"),
        host.attempt("write", "other.qcow2"),
        host.attempt("write", "base.qcow2"),
        host.attempt("create", "machineries/libmachinery_evil.so"),
        host.attempt("list", ""),
        "read=/etc/shadow".to_owned(),
        host.attempt("chmod", "other.qcow2"),
        host.attempt("chown", "other.qcow2"),
        host.attempt("times", "own.qcow2"),
        host.attempt("attribute", "other.qcow2"),
    ];
    assert_denied(&host.policy(), &attempts);
    assert_allowed(&host.policy(), &[host.attempt("read", "base.qcow2"), host.attempt("write", "own.qcow2")]);
}

#[test]
fn sockets_of_others_are_denied() {
    let host = Host::new();
    let attempts = [
        host.attempt("connect", "host.sock"),
        host.attempt("datagram", "log.sock"),
        host.attempt("raw-pair", "log.sock"),
        format!("abstract={}", host.abstract_name),
        format!("tcp={}", host.tcp.local_addr().unwrap()),
        format!("udp={}", host.udp.local_addr().unwrap()),
        "listen=127.0.0.1:0".to_owned(),
        host.attempt("socket", "new.sock"),
    ];
    assert_denied(&host.policy(), &attempts);
}

#[test]
fn internet_is_allowed_only_to_a_policy_that_has_it() {
    let host = Host::new();
    let policy = Policy { network: Network::Internet, ..host.policy() };
    let udp = format!("udp={}", host.udp.local_addr().unwrap());
    assert_allowed(&policy, &[format!("tcp={}", host.tcp.local_addr().unwrap()), udp]);
    assert_denied(&policy, &[host.attempt("connect", "host.sock"), "listen=127.0.0.1:0".to_owned()]);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let policy = Policy { listen: vec![free], ..policy };
    assert_allowed(&policy, &[format!("listen=127.0.0.1:{free}")]);
}

/// A process of the host's, which ends with the test.
struct Victim(std::process::Child);

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn other_processes_are_out_of_reach() {
    let host = Host::new();
    let victim = Victim(Command::new("/bin/sleep").arg("600").spawn().unwrap());
    let own = victim.0.id();
    let attempts = [
        format!("signal={own}"),
        format!("trace={own}"),
        format!("memory={own}"),
        format!("limits={own}"),
        format!("schedule={own}"),
        "owner".to_owned(),
        "priority".to_owned(),
        "signal-group".to_owned(),
        "fork".to_owned(),
        "userfaultfd".to_owned(),
        "key".to_owned(),
    ];
    // A probe that leads a group cannot begin a session, so only the inside is of interest.
    let session = jailed(&host.policy(), &["session".to_owned()]);
    assert_denied(&host.policy(), &attempts);
    assert_eq!(session["session"], "1");
    // A kernel without the x32 interface has none of its calls (ENOSYS), with or without a jail.
    #[cfg(target_arch = "x86_64")]
    assert_eq!(jailed(&host.policy(), &["x32".to_owned()])["x32"], "1");
    assert_allowed(&host.policy(), &["thread".to_owned(), "signal-self".to_owned()]);
}

#[test]
fn descriptors_are_inherited_only_if_the_policy_has_them() {
    let host = Host::new();
    let files =
        [host.path("secret"), host.path("other.qcow2")].map(|path| std::fs::File::open(path).unwrap());
    let numbers = files.each_ref().map(|file| file.as_raw_fd());
    // Both are inheritable, as a descriptor is that another thread is just handing to its own child.
    for number in numbers {
        // SAFETY: the descriptor is open as long as `files` exists.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty()).unwrap();
    }
    let policy = Policy { descriptors: vec![numbers[0]], ..host.policy() };
    let attempts = numbers.map(|number| format!("descriptor={number}"));
    let inside = jailed(&policy, &attempts);
    assert_eq!(inside[&attempts[0]], "ok");
    assert_eq!(inside[&attempts[1]], libc::EBADF.to_string());
}

#[test]
fn process_has_a_user_and_a_network_of_its_own_when_the_host_is_root() {
    if !machinery_testkit::requirement::is_root() {
        return;
    }
    let host = Host::new();
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(host.folder.path(), readable).unwrap();
    ["own.qcow2", "base.qcow2"]
        .iter()
        .for_each(|disk| std::os::unix::fs::chown(host.path(disk), Some(64_999), None).unwrap());
    let user = User { uid: 64_999, gid: 64_999, groups: Vec::new() };
    let policy = Policy { user: Some(user), own_network: true, network: Network::Internet, ..host.policy() };
    // The network of its own is empty, so even an allowed family reaches nobody.
    let tcp = format!("tcp={}", host.tcp.local_addr().unwrap());
    // The user cannot enter root's own folders.
    let probe = host.path("probe");
    std::fs::copy(program("jail-probe"), &probe).unwrap();
    let inside = jailed_at(&probe, &policy, std::slice::from_ref(&tcp));
    assert_eq!(inside[&tcp], libc::ENETUNREACH.to_string());
    let visible = Policy { read: vec!["/proc/self/status".into()], ..policy };
    let status = Command::new(program(PROGRAM))
        .arg(serde_json::to_string(&visible).unwrap())
        .args(["/bin/sh", "-c", "while read line; do echo \"$line\"; done < /proc/self/status"])
        .output()
        .unwrap();
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name}: {status}")).split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!((field("Uid:"), field("CapEff:")), ("64999".into(), "0000000000000000".into()));
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
}

#[test]
fn process_enters_the_network_of_its_run_and_keeps_no_descriptor_of_it() {
    let Some(network) = NETWORK.or_skip(TestNetwork::new().unwrap()) else { return };
    let namespace = network.inside(|| std::fs::File::open("/proc/thread-self/ns/net")).unwrap().unwrap();
    rustix::io::fcntl_setfd(&namespace, rustix::io::FdFlags::empty()).unwrap();
    let listener = network.inside(|| TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
    let tcp = format!("tcp={}", listener.local_addr().unwrap());
    let descriptor = format!("descriptor={}", namespace.as_raw_fd());
    let attempts = [tcp.clone(), descriptor.clone()];
    assert_eq!(probe(&attempts)[&tcp], libc::ECONNREFUSED.to_string());
    let policy = Policy {
        network: Network::Internet,
        network_namespace: Some(namespace.as_raw_fd()),
        ..Policy::default()
    };
    let inside = jailed(&policy, &attempts);
    assert_eq!((inside[&tcp].as_str(), &inside[&descriptor]), ("ok", &libc::EBADF.to_string()));
}

#[test]
fn error_names_the_step_when_the_policy_cannot_be_applied() {
    let failure = |policy: &str| {
        let output = Command::new(program(PROGRAM)).args([policy, "/bin/true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(126));
        String::from_utf8(output.stderr).unwrap()
    };
    let missing = failure(r#"{"read": ["/none/disk"]}"#);
    assert!(missing.contains("cannot restrict the files") && missing.contains("/none/disk"), "{missing}");
    assert!(failure(r#"{"reed": []}"#).contains("the policy is wrong: unknown field `reed`"));
    assert!(failure(r#"{"cgroup": "/none"}"#).contains("cannot join the cgroup"));
    let no_namespace = failure(r#"{"network_namespace": 0}"#);
    assert!(no_namespace.contains("cannot enter the network namespace: EINVAL"), "{no_namespace}");
    let two = failure(r#"{"network_namespace": 9, "own_network": true}"#);
    assert!(two.contains("cannot enter the network namespace: EINVAL"), "{two}");
}
