//! The wall behind a real nginx, with the configuration of `docs/wall.md`.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use machinery_testkit::host::RunningHost;
use machinery_testkit::requirement;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::wait::wait_until;
use rustix::process::{Pid, Signal, kill_process};

const WALL: &str = include_str!("../docs/wall.md");
const PROGRAM: &str = "/usr/sbin/nginx";
/// The password `op` of the user `op`, as `Authorization` has it.
const PASSWORD: &str = "Authorization: Basic b3A6b3A=";

/// Returns the documented block of that language.
fn documented(language: &str, has: &str) -> String {
    let begin = format!("```{language}\n");
    let blocks = WALL.split(&begin).skip(1);
    let mut blocks = blocks.filter_map(|block| block.split("```").next());
    blocks.find(|block| block.contains(has)).unwrap().to_owned()
}

/// Replaces a part that must be there.
fn replaced(text: &str, old: &str, new: &str) -> String {
    assert!(text.contains(old), "{old}: {text}");
    text.replace(old, new)
}

/// A host and its proxy, which listens at a Unix socket instead of a port with encryption.
struct Proxied {
    _nginx: Nginx,
    _host: RunningHost,
    cwd: ScratchCwd,
}

/// A running nginx, which ends its workers at its end.
struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

fn proxied() -> Proxied {
    let cwd = ScratchCwd::double(&[("m", "console: true")]).unwrap();
    let path = |name: &str| cwd.root().join(name).display().to_string();
    let keys = documented("yaml", "web_socket_group");
    let keys = replaced(&keys, "/run/cuckoo-machinery/wall.sock", &path("wall.sock"));
    let keys = replaced(&keys, "wall.example.org]", "wall.example.org, 'https://wall.example.org:8443']");
    // Only root can give the socket to the group.
    let keys =
        if requirement::is_root() { keys } else { replaced(&keys, "web_socket_group: www-data\n", "") };
    cwd.host_yaml(&format!("{keys}web_actions: true\n")).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    host.wait_for_log(&["the wall is served"]).unwrap();

    cwd.write("wall.users", "op:{PLAIN}op\n").unwrap();
    let server = documented("nginx", "proxy_pass");
    let server = replaced(&server, "listen 443 ssl;", &format!("listen unix:{};", path("proxy.sock")));
    let server = replaced(&server, "/etc/nginx/wall.users", &path("wall.users"));
    let server = replaced(&server, "/run/cuckoo-machinery/wall.sock", &path("wall.sock"));
    let folders: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {};\n", path(kind)))
        .concat();
    let whole = format!(
        "user www-data;\ndaemon off;\npid {};\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n{folders}{server}}}\n",
        path("nginx.pid")
    );
    cwd.write("nginx.conf", whole).unwrap();
    for name in [".", "wall.users"] {
        fs::set_permissions(cwd.root().join(name), Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = Command::new(PROGRAM);
    command.args(["-e", "stderr", "-c", &path("nginx.conf")]);
    let nginx = Nginx(command.stdin(Stdio::null()).spawn().unwrap());
    let socket = cwd.root().join("proxy.sock");
    wait_until("nginx does not listen", || UnixStream::connect(&socket).is_ok());
    Proxied { _nginx: nginx, _host: host, cwd }
}

/// Sends a request, and returns the status and the rest of the connection.
fn request(cwd: &Path, line: &str, headers: &[&str]) -> (String, BufReader<UnixStream>) {
    let mut stream = UnixStream::connect(cwd.join("proxy.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    write!(stream, "{line} HTTP/1.1\r\n{headers}\r\n").unwrap();
    let mut stream = BufReader::new(stream);
    let mut status = String::new();
    stream.read_line(&mut status).unwrap();
    (status.split(' ').nth(1).unwrap_or_else(|| panic!("{status}")).to_owned(), stream)
}

#[test]
fn documented_proxy_passes_the_page_its_events_actions_and_consoles() {
    if requirement::NGINX.or_skip(Path::new(PROGRAM).exists().then_some(())).is_none() {
        return;
    }
    let proxied = proxied();
    let cwd = proxied.cwd.root();
    assert_eq!(request(cwd, "GET /", &["Host: wall.example.org"]).0, "401");
    for name in ["wall.example.org", "wall.example.org:8443"] {
        let (host, origin) = (format!("Host: {name}"), format!("Origin: https://{name}"));
        assert_eq!(request(cwd, "GET /", &[&host, PASSWORD]).0, "200", "{name}");
        let headers = [host.as_str(), &origin, PASSWORD, "Content-Length: 0"];
        assert_eq!(request(cwd, "POST /machines/m/restore", &headers).0, "200", "{name}");
    }
    let host = "Host: wall.example.org";
    let wrong = [host, "Origin: http://wall.example.org", PASSWORD, "Content-Length: 0"];
    assert_eq!(request(cwd, "POST /machines/m/stop", &wrong).0, "403");
    let (status, events) = request(cwd, "GET /events", &[host, PASSWORD]);
    let mut lines = events.lines().map_while(Result::ok);
    assert!(status == "200" && lines.any(|line| line.contains("event: snapshot")));
    let upgrade = [
        host,
        "Origin: https://wall.example.org",
        PASSWORD,
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ];
    let (status, mut console) = request(cwd, "GET /machines/m/console", &upgrade);
    assert_eq!(status, "101");
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        console.read_line(&mut line).unwrap();
    }
    let mut greeting = [0; 14];
    console.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[2..], b"RFB 003.008\n");
}
