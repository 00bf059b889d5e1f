//! The wall over raw HTTP: who may look, who may act, and the limits of clients.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::client::raise_file_limit;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::requirement::is_root;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::wait::wait_until;
use serde_json::{Value, json};

/// The limit of a read. A connection that the host should close must not hang the test.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A host with a wall, dropped in this order.
struct Wall {
    host: RunningHost,
    cwd: ScratchCwd,
    address: SocketAddr,
}

/// A reply: its head and its body.
#[derive(Debug)]
struct Reply {
    head: String,
    body: String,
}

impl Reply {
    fn status(&self) -> &str {
        self.head.split_whitespace().nth(1).unwrap_or_else(|| panic!("{self:?}"))
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{self:?}"))
    }
}

fn wall(machines: &[(&str, &str)], keys: &str) -> Wall {
    let cwd = ScratchCwd::double(machines).unwrap();
    cwd.host_yaml(&format!("web_listen: 127.0.0.1:0\n{keys}")).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let address = address(&host);
    Wall { host, cwd, address }
}

/// Returns the address in the latest line of the log that has one.
fn address(host: &RunningHost) -> SocketAddr {
    host.wait_for_log(&["the wall is served", "127.0.0.1"]).unwrap();
    let log = host.log();
    let line = log.lines().rfind(|line| line.contains("the wall is served")).unwrap();
    let port = line.split("127.0.0.1:").nth(1).unwrap();
    let port: String = port.chars().take_while(char::is_ascii_digit).collect();
    format!("127.0.0.1:{port}").parse().unwrap()
}

impl Wall {
    /// Waits until the host has served the wall that many times.
    #[track_caller]
    fn wait_until_served(&self, times: usize) {
        let served = || self.host.log().matches("the wall is served").count();
        wait_until("the wall is not served again", || served() == times);
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(READ_TIMEOUT)).unwrap();
        stream
    }

    fn token(&self) -> String {
        let file = self.cwd.root().join("operational/generated/machinery-host/wall.token");
        fs::read_to_string(file).unwrap().trim().to_owned()
    }

    fn bearer(&self) -> String {
        format!("Authorization: Bearer {}", self.token())
    }

    fn origin(&self) -> String {
        format!("Origin: http://{}", self.address)
    }

    /// Logs in, and returns the header with the cookie.
    fn cookie(&self) -> String {
        let reply = self.request("POST /login", &[&self.bearer(), &self.origin()]);
        let cookie = reply.header("set-cookie").unwrap_or_else(|| panic!("{reply:?}"));
        format!("Cookie: {}", cookie.split(';').next().unwrap())
    }

    /// Sends a request with these headers, and with the wall's own name.
    fn request(&self, line: &str, headers: &[&str]) -> Reply {
        self.request_at(&self.address.to_string(), line, headers)
    }

    /// Sends a request with the token.
    fn ask(&self, line: &str) -> Reply {
        self.request(line, &[&self.bearer()])
    }

    fn request_at(&self, name: &str, line: &str, headers: &[&str]) -> Reply {
        let mut stream = self.connect();
        exchange(&mut stream, name, line, headers)
    }

    /// Opens the stream of events.
    fn events(&self) -> Events {
        let mut stream = self.connect();
        let (name, bearer) = (self.address, self.bearer());
        write!(stream, "GET /events HTTP/1.1\r\nHost: {name}\r\n{bearer}\r\n\r\n").unwrap();
        let mut lines = BufReader::new(stream);
        let mut status = String::new();
        lines.read_line(&mut status).unwrap();
        assert!(status.contains("200"), "{status}");
        Events(lines)
    }
}

fn exchange(stream: &mut (impl Read + Write), name: &str, line: &str, headers: &[&str]) -> Reply {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let request = format!("{line} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n{headers}\r\n");
    // The host may close the connection before it has all of it.
    let _ = stream.write_all(request.as_bytes());
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    let reply = String::from_utf8_lossy(&reply).into_owned();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    Reply { head: head.to_owned(), body: body.to_owned() }
}

/// A stream of server-sent events.
struct Events(BufReader<TcpStream>);

impl Events {
    /// Returns the name and the data of the next event.
    fn next(&mut self) -> (String, Value) {
        let (mut name, mut line) = (String::new(), String::new());
        loop {
            line.clear();
            assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "the stream has ended");
            if let Some(event) = line.trim_end().strip_prefix("event: ") {
                event.clone_into(&mut name);
            } else if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return (name, serde_json::from_str(data).unwrap());
            }
        }
    }

    /// Returns the tile of the machine, once the condition holds for it.
    fn tile(&mut self, machine: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        loop {
            let (_, data) = self.next();
            let mut tiles = data["machines"].as_array().unwrap().iter();
            if let Some(tile) = tiles.find(|tile| tile["name"] == machine && is_so(tile)) {
                return tile.clone();
            }
        }
    }
}

const PRIVATE: [&str; 5] = [
    "GET /events",
    "GET /machines/m",
    "GET /machines/m/screen",
    "POST /machines/m/stop",
    "POST /machines/m/restore",
];

#[test]
fn wall_is_off_by_default() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    assert!(!host.log().contains("the wall"), "{}", host.log());
    let ran = host::run(&cwd, &["wall"]).unwrap();
    assert!(ran.code == Some(1) && ran.stderr.contains("web_listen"), "{ran:?}");
    assert!(!cwd.root().join("operational/generated/machinery-host/wall.token").exists());
}

#[test]
fn page_is_served_with_rules_for_browsers() {
    let wall = wall(&[("m", "")], "");
    let page = wall.request("GET /", &[&wall.cookie()]);
    assert_eq!(page.status(), "200");
    for (name, part) in [
        ("content-security-policy", "default-src 'none'; script-src 'self'"),
        ("content-security-policy", "frame-ancestors 'none'"),
        ("x-content-type-options", "nosniff"),
        ("cache-control", "no-store"),
        ("referrer-policy", "same-origin"),
    ] {
        assert!(page.header(name).is_some_and(|value| value.contains(part)), "{name}: {page:?}");
    }
    assert!(!page.body.contains("style=") && !page.body.contains("<style") && !page.body.contains("onclick"));
    let files = page.body.split('"').filter(|word| word.ends_with(".js") || word.ends_with(".css"));
    for file in files.chain(["/tiles.js", "/machine.js", "/login.js", "/icon.svg"]) {
        let file = wall.request(&format!("GET {file}"), &[]);
        assert_eq!((file.status(), file.header("x-content-type-options")), ("200", Some("nosniff")));
        assert!(!file.body.is_empty());
    }
}

#[test]
fn visitor_without_the_token_sees_no_machine() {
    let wall = wall(&[("m", "")], "web_actions: true\n");
    let page = wall.request("GET /", &[]);
    assert!(page.status() == "401" && page.body.contains("Log in"), "{page:?}");
    for line in PRIVATE {
        for proof in [
            "X-Nothing: 1",
            "Authorization: Bearer 0000000000000000000000000000000000000000000000000000000000000000",
            "Authorization: Basic eDp4",
            "Cookie: cuckoo_wall_00000000=0000",
        ] {
            let reply = wall.request(line, &[proof, &wall.origin()]);
            assert_eq!(reply.status(), "401", "{line} {proof}: {reply:?}");
            assert!(!reply.body.contains("\"name\""), "{reply:?}");
        }
    }
    let wrong = wall.request("POST /login", &["Authorization: Bearer wrong", &wall.origin()]);
    assert_eq!((wrong.status(), wrong.header("set-cookie")), ("401", None));
    assert_eq!(wall.request("GET /login", &[]).status(), "401");
    assert!(!wall.host.log().contains(&wall.token()));
}

#[test]
fn token_gives_a_cookie_that_scripts_and_other_sites_cannot_use() {
    let wall = wall(&[("m", "")], "");
    let reply = wall.request("POST /login", &[&wall.bearer(), &wall.origin()]);
    let cookie = reply.header("set-cookie").unwrap();
    assert!(cookie.contains("; HttpOnly; SameSite=Strict"), "{cookie}");
    assert!(!cookie.contains(&wall.token()), "the token itself stays here");
    let cookie = wall.cookie();
    assert_eq!(wall.request("GET /login", &[&cookie]).status(), "204");
    let seen = wall.request("GET /machines/m", &[&cookie]);
    assert_eq!(seen.json()["machine"]["name"], "m");
    let printed = host::run(&wall.cwd, &["wall"]).unwrap().stdout;
    assert_eq!(printed.trim(), format!("http://{}/#{}", wall.address, wall.token()));
    let status = host::run(&wall.cwd, &["status"]).unwrap().stdout;
    assert!(status.contains(&format!("http://{}", wall.address)), "{status}");
    assert!(!status.contains(&wall.token()));
    let file = wall.cwd.root().join("operational/generated/machinery-host/wall.token");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn name_of_another_site_is_refused() {
    let wall = wall(&[("m", "")], "web_origins: [https://wall.lab]\n");
    for name in ["evil.example", "127.0.0.1.evil.example", "", "wall.lab.evil.example", "a b"] {
        for line in PRIVATE.iter().chain(&["GET /", "GET /wall.js", "POST /login"]) {
            let reply = wall.request_at(name, line, &[&wall.bearer()]);
            assert!(["421", "400"].contains(&reply.status()), "{name} {line}: {reply:?}");
        }
    }
    for name in ["localhost", "wall.lab", "[::1]:1", "10.9.8.7"] {
        assert_eq!(wall.request_at(name, "GET /machines/m", &[&wall.bearer()]).status(), "200", "{name}");
    }
    // A request without any name.
    let mut stream = wall.connect();
    write!(stream, "GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.contains(" 421 "), "{reply}");
}

#[test]
fn page_of_another_origin_is_refused() {
    let wall = wall(&[("m", "")], "web_actions: true\nweb_origins: [https://wall.lab]\n");
    let cookie = wall.cookie();
    let elsewhere = format!("Origin: http://127.0.0.1:{}", wall.address.port() ^ 1);
    for foreign in [
        "Origin: http://evil.example",
        "Origin: null",
        &elsewhere,
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
    ] {
        for line in PRIVATE {
            let reply = wall.request(line, &[&cookie, foreign]);
            assert_eq!(reply.status(), "403", "{line} {foreign}: {reply:?}");
        }
        assert_eq!(wall.request("POST /login", &[&wall.bearer(), foreign]).status(), "403");
    }
    // A browser names the origin of each change.
    assert_eq!(wall.request("POST /machines/m/stop", &[&cookie]).status(), "403");
    for own in [wall.origin().as_str(), "Origin: https://wall.lab"] {
        assert_eq!(wall.request("POST /machines/m/stop", &[&cookie, own]).status(), "200");
    }
}

#[test]
fn wall_only_shows_unless_actions_are_allowed() {
    let wall = wall(&[("m", "")], "");
    for action in ["stop", "restore", "enable", "disable", "nonsense"] {
        let reply = wall.ask(&format!("POST /machines/m/{action}"));
        assert!(reply.status() == "403" && reply.body.contains("web_actions"), "{action}: {reply:?}");
    }
    for method in ["PUT", "DELETE", "POST"] {
        assert_eq!(wall.ask(&format!("{method} /machines/m")).status(), "405", "{method}");
    }
    assert_eq!(wall.host.client().unwrap().machine("m").unwrap()["state"], "poweroff");
}

#[test]
fn actions_reply_when_they_have_ended() {
    let wall = wall(&[("m", ""), ("fails", "faults: {stop: fail}")], "web_actions: true\n");
    let act = |machine: &str, action: &str| wall.ask(&format!("POST /machines/{machine}/{action}"));
    let machine = |name: &str| wall.host.client().unwrap().machine(name).unwrap();
    assert_eq!(act("m", "restore").json(), json!({"success": true}));
    assert_eq!(machine("m")["state"], "running");
    assert_eq!(act("m", "stop").json(), json!({"success": true}));
    assert_eq!(machine("m")["state"], "poweroff");
    let mut stream = wall.connect();
    let (name, bearer) = (wall.address, wall.bearer());
    let body = "broken <disk>";
    let head = format!("POST /machines/m/disable HTTP/1.1\r\nHost: {name}\r\n{bearer}\r\nConnection: close");
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    stream.read_to_string(&mut String::new()).unwrap();
    assert_eq!(machine("m")["disabled_reason"], body);
    assert_eq!(act("m", "enable").status(), "200");
    assert_eq!(machine("m")["disabled"], false);
    act("fails", "restore");
    let failed = act("fails", "stop");
    assert!(failed.status() == "409" && failed.body.contains("configured to fail"), "{failed:?}");
    assert_eq!(act("m", "nonsense").status(), "404");
    assert_eq!(wall.ask("GET /machines/m/stop").status(), "405");
    wall.host.client().unwrap().ask(json!({"action": "disable"})).unwrap();
    assert!(act("m", "restore").body.contains("Machinery manager is disabled"));
    assert_eq!(act("m", "stop").status(), "200");
}

#[test]
fn name_with_path_tricks_is_an_unknown_machine() {
    let wall = wall(&[("m", "")], "web_actions: true\n");
    let long = "x".repeat(5000);
    for name in [
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "m%00",
        "m%2f..%2fm",
        "..%5c",
        "%ff%fe",
        "none",
        "M",
        "m%20",
        &long,
    ] {
        for line in ["GET /machines/{}", "GET /machines/{}/screen", "POST /machines/{}/stop"] {
            let reply = wall.ask(&line.replace("{}", name));
            assert!(["404", "400", "431", "414"].contains(&reply.status()), "{line} {name}: {reply:?}");
        }
    }
    for path in [
        "/../../etc/passwd",
        "/machines/../m",
        "/machines//screen",
        "//etc/passwd",
        "/wall.css/..",
        "/page/wall.html",
    ] {
        let reply = wall.ask(&format!("GET {path}"));
        assert!(["404", "405"].contains(&reply.status()), "{path}: {reply:?}");
    }
}

#[test]
fn events_are_a_snapshot_and_then_changes() {
    let wall = wall(&[("m", "poweroff_after_ms: 200"), ("n", "")], "");
    let mut events = wall.events();
    let (name, snapshot) = events.next();
    assert_eq!((name.as_str(), snapshot["machines"].as_array().unwrap().len()), ("snapshot", 2));
    assert_eq!(
        (&snapshot["machines"][0]["state"], &snapshot["actions"]),
        (&json!("poweroff"), &json!(false))
    );
    let mut client = wall.host.client().unwrap();
    client.ask(json!({"action": "lock", "machine": "m", "task_id": "7"})).unwrap();
    let locked = events.tile("m", |tile| tile["task"] == "7");
    assert_eq!(locked["screen"], true);
    client.act("restore_start", "m").unwrap();
    events.tile("m", |tile| tile["state"] == "running" && tile["since"].is_u64());
    events.tile("m", |tile| tile["state"] == "poweroff" && tile["since"].is_null());
    let full = wall.ask("GET /machines/m").json();
    let kinds: Vec<_> = full["events"].as_array().unwrap().iter().map(|event| &event["event"]).collect();
    assert_eq!(kinds[0], "locked", "{full}");
    let last = full["events"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["state"], &last["reason"]),
        (&json!("poweroff"), &json!("the machine powered itself off"))
    );
    client.ask(json!({"action": "disable_machine", "machine": "n", "reason": "x"})).unwrap();
    assert_eq!(events.tile("n", |tile| tile["disabled"] == "x")["state"], "poweroff");
}

#[test]
fn screen_is_that_of_a_running_machine_and_sent_once() {
    let wall = wall(&[("m", ""), ("fails", "faults: {screenshot: fail}, fault_times: 1")], "");
    let off = wall.ask("GET /machines/m/screen");
    assert!(off.status() == "409" && off.body.contains("does not run"), "{off:?}");
    let mut client = wall.host.client().unwrap();
    for machine in ["m", "fails"] {
        client.act("restore_start", machine).unwrap();
    }
    let screen = wall.ask("GET /machines/m/screen");
    assert_eq!((screen.status(), screen.header("content-type")), ("200", Some("image/png")));
    assert_eq!(screen.header("cache-control"), Some("no-store"));
    let etag = screen.header("etag").unwrap();
    let again = wall.request("GET /machines/m/screen", &[&wall.bearer(), &format!("If-None-Match: {etag}")]);
    assert_eq!((again.status(), again.body.as_str()), ("304", ""));
    // Only the first question fails. All viewers get its answer, so the machine is asked once.
    let replies: Vec<String> = thread::scope(|scope| {
        let viewers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| wall.ask("GET /machines/fails/screen").status().to_owned()))
            .collect();
        viewers.into_iter().map(|viewer| viewer.join().unwrap()).collect()
    });
    assert_eq!(replies, ["502"; 8]);
    let listed = client.machine("fails").unwrap();
    assert_eq!((&listed["errors"], &listed["disabled"]), (&json!([]), &json!(false)));
}

#[test]
fn screen_is_not_taken_while_an_action_runs() {
    let wall = wall(&[("m", "delays_ms: {stop: 2000}")], "");
    let mut client = wall.host.client().unwrap();
    client.subscribe().unwrap();
    client.act("restore_start", "m").unwrap();
    assert_eq!(wall.ask("GET /machines/m/screen").status(), "200");
    client.send(&json!({"action": "acpi_stop", "machine": "m"})).unwrap();
    client.wait_for_state("m", "stopping").unwrap();
    let begun = Instant::now();
    let reply = wall.ask("GET /machines/m/screen");
    assert!(["409", "204", "200"].contains(&reply.status()), "{reply:?}");
    assert!(begun.elapsed() < Duration::from_secs(2), "it has waited for the stop");
}

#[test]
fn large_requests_are_refused() {
    let wall = wall(&[("m", "")], "web_actions: true\n");
    let long = format!("X-Long: {}", "x".repeat(100_000));
    let reply = wall.request("GET /", &[&long]);
    assert!(reply.head.is_empty() || reply.status() == "431", "{reply:?}");
    let many: Vec<String> = (0..2000).map(|index| format!("X-{index}: 1")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let reply = wall.request("GET /", &many);
    assert!(reply.head.is_empty() || reply.status() == "431", "{reply:?}");
    let mut stream = wall.connect();
    let (name, bearer) = (wall.address, wall.bearer());
    let head = format!("POST /machines/m/disable HTTP/1.1\r\nHost: {name}\r\n{bearer}\r\nConnection: close");
    let _ = write!(stream, "{head}\r\nContent-Length: 100000\r\n\r\n{}", "x".repeat(100_000));
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    assert!(reply.is_empty() || reply.contains(" 413 "), "{reply}");
    assert_eq!(wall.host.client().unwrap().machine("m").unwrap()["disabled"], false);
    assert_eq!(wall.ask("GET /machines/m").status(), "200");
}

#[test]
fn slow_clients_are_disconnected() {
    let wall = wall(&[("m", "")], "web_actions: true\n");
    let (name, bearer) = (wall.address, wall.bearer());
    let starts = [
        String::new(),
        "GET / HT".to_owned(),
        format!("GET / HTTP/1.1\r\nHost: {name}\r\nX-Slow: "),
        // The connection is idle after the reply.
        format!("GET /icon.svg HTTP/1.1\r\nHost: {name}\r\n\r\n"),
        // The body never comes.
        format!(
            "POST /machines/m/disable HTTP/1.1\r\nHost: {name}\r\n{bearer}\r\nContent-Length: 9\r\n\r\nx"
        ),
    ];
    let streams: Vec<TcpStream> = starts
        .iter()
        .map(|start| {
            let mut stream = wall.connect();
            stream.write_all(start.as_bytes()).unwrap();
            stream
        })
        .collect();
    for (mut stream, start) in streams.into_iter().zip(&starts) {
        let ended = stream.read_to_end(&mut Vec::new());
        assert!(ended.is_ok(), "{start}: {ended:?}");
    }
}

#[test]
fn thousand_connections_are_bounded() {
    raise_file_limit().unwrap();
    let wall = wall(&[("m", "")], "");
    let before = wall.host.resources().unwrap();
    let begun = Instant::now();
    // Connections that the kernel does not accept for the host are refused in the end.
    let connect = || {
        let mut stream = TcpStream::connect_timeout(&wall.address, Duration::from_millis(300)).ok()?;
        stream.write_all(b"GET /machines/m HTT").ok()?;
        Some(stream)
    };
    let slow: Vec<TcpStream> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..100).map(|_| scope.spawn(|| (0..10).filter_map(|_| connect()).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(slow.len() >= 128, "{}", slow.len());
    let mut client = wall.host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    let during = wall.host.resources().unwrap();
    println!("{} connections in {:?}: {before:?}, then {during:?}", slow.len(), begun.elapsed());
    assert!(during.files < before.files + 200, "{before:?} {during:?}");
    drop(slow);
    assert_eq!(wall.ask("GET /machines/m").status(), "200");
    println!("answered after {:?}", begun.elapsed());
}

#[test]
fn reload_moves_the_wall_and_ends_all_pages_of_an_old_token() {
    let mut wall = wall(&[("m", "")], "");
    let cookie = wall.cookie();
    let (first, old) = (wall.address, wall.token());
    let mut events = wall.events();
    events.next();
    let file = wall.cwd.root().join("operational/generated/machinery-host/wall.token");
    fs::write(&file, "a-token-of-the-operators-own-12345\n").unwrap();
    let mut client = wall.host.client().unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    wall.wait_until_served(2);
    wall.cwd.host_yaml("web_listen: 127.0.0.1:0\nweb_actions: true\n").unwrap();
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["settings"], json!(["web_actions"]), "{answer}");
    wall.wait_until_served(3);
    // The stream ends in the middle, or after a last event.
    let _ = events.0.read_to_end(&mut Vec::new());
    wall.address = address(&wall.host);
    assert!(wall.address == first || TcpStream::connect(first).is_err());
    assert_eq!(wall.request("GET /machines/m", &[&cookie]).status(), "401");
    assert_eq!(wall.request("GET /machines/m", &[&format!("Authorization: Bearer {old}")]).status(), "401");
    assert_eq!(wall.ask("POST /machines/m/stop").status(), "200");
    wall.cwd.host_yaml("").unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    wait_until("the port is open", || TcpStream::connect(wall.address).is_err());
    for (keys, key) in [("web_listen: here\n", "web_listen"), ("web_origins: [wall.lab]\n", "web_origins")] {
        wall.cwd.host_yaml(keys).unwrap();
        let answer = client.ask(json!({"action": "reload"})).unwrap();
        assert!(answer["reason"].as_str().unwrap().contains(key), "{answer}");
    }
}

#[test]
fn wall_with_an_unsafe_token_or_a_taken_address_is_not_served() {
    let first = wall(&[("m", "")], "");
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let token = cwd.root().join("token");
    fs::write(&token, "a".repeat(40)).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    let keys = |address: &str| format!("web_listen: {address}\nweb_token_file: {}\n", token.display());
    cwd.host_yaml(&keys("127.0.0.1:0")).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    host.wait_for_log(&["the wall is not served", "0600"]).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    cwd.host_yaml(&keys(&first.address.to_string())).unwrap();
    host.client().unwrap().ask(json!({"action": "reload"})).unwrap();
    host.wait_for_log(&["the wall is not served", "cannot listen"]).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap()["success"], true);
}

#[test]
fn socket_needs_no_token_and_ends_with_the_host() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let path = cwd.root().join("wall.sock");
    let keys =
        format!("web_listen: {}\nweb_actions: true\nweb_origins: [https://wall.lab]\n", path.display());
    cwd.host_yaml(&keys).unwrap();
    fs::write(&path, "somebody's file").unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    host.wait_for_log(&["the wall is not served", "is no socket"]).unwrap();
    host.client().unwrap().ask(json!({"action": "reload"})).unwrap();
    wait_until("it is not tried again", || host.log().matches("the wall is not served").count() == 2);
    assert_eq!(fs::read_to_string(&path).unwrap(), "somebody's file");
    fs::remove_file(&path).unwrap();
    host.client().unwrap().ask(json!({"action": "reload"})).unwrap();
    host.wait_for_log(&["the wall is served"]).unwrap();
    let found = path.metadata().unwrap();
    assert!(found.file_type().is_socket() && found.permissions().mode() & 0o777 == 0o600);
    let request = |name: &str, line: &str, headers: &[&str]| {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(READ_TIMEOUT)).unwrap();
        exchange(&mut stream, name, line, headers)
    };
    let own = ["Origin: https://wall.lab"];
    assert_eq!(request("wall.lab", "GET /", &[]).status(), "200");
    assert_eq!(request("wall.lab", "POST /machines/m/restore", &own).status(), "200");
    assert_eq!(request("wall.lab", "POST /machines/m/stop", &[]).status(), "403");
    assert_eq!(request("wall.lab", "GET /machines/m", &["Origin: https://evil"]).status(), "403");
    assert_eq!(request("evil.example", "GET /", &own).status(), "421");
    let printed = host::run(&cwd, &["wall"]).unwrap().stdout;
    assert_eq!(printed.trim(), format!("unix:{}", path.display()));
    assert!(host.terminate().unwrap().success());
    assert!(!path.exists());
}

#[test]
fn host_serves_without_the_wall_until_the_folder_of_its_socket_exists() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let folder = cwd.root().join("run");
    let socket = folder.join("wall.sock");
    cwd.host_yaml(&format!("web_listen: {}\nweb_novnc: /none/novnc\n", socket.display())).unwrap();
    let checked = host::run(&cwd, &["-v", "check"]).unwrap();
    for words in ["so the wall is not served: create it", "/none/novnc (web_novnc) does not exist"] {
        assert!(checked.stdout.contains(words), "{words}: {checked:?}");
    }
    assert!(!checked.stdout.contains("PROBLEM"), "{checked:?}");
    let host = RunningHost::start(&cwd).unwrap();
    host.wait_for_log(&["the wall is not served", "cannot open the folder"]).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap()["success"], true);
    fs::create_dir(&folder).unwrap();
    host.client().unwrap().ask(json!({"action": "reload"})).unwrap();
    host.wait_for_log(&["the wall is served"]).unwrap();
    assert!(socket.metadata().unwrap().file_type().is_socket());
}

#[test]
fn socket_is_open_to_the_group_of_the_wall_and_not_to_that_of_the_host() {
    if !is_root() {
        return;
    }
    // Groups of each Debian.
    let of_wall = ("web_socket_group: nogroup\n", 0o660, 65_534);
    for (keys, mode, gid) in [("", 0o600, rustix::process::getegid().as_raw()), of_wall] {
        let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
        let path = cwd.root().join("wall.sock");
        cwd.host_yaml(&format!("socket_group: daemon\nweb_listen: {}\n{keys}", path.display())).unwrap();
        let host = RunningHost::start(&cwd).unwrap();
        host.wait_for_log(&["the wall is served"]).unwrap();
        let found = path.metadata().unwrap();
        assert_eq!((found.mode() & 0o777, found.gid()), (mode, gid), "{keys}");
    }
}

#[test]
fn strangers_who_keep_their_connections_exclude_nobody() {
    let wall = wall(&[("m", "")], "");
    let mut known = wall.events();
    known.next();
    let strangers: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = wall.connect();
            write!(stream, "GET /icon.svg HTTP/1.1\r\nHost: {}\r\n\r\n", wall.address).unwrap();
            stream
        })
        .collect();
    let begun = Instant::now();
    wall.cookie();
    // A stranger is closed after 10 seconds without a request.
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    wall.host.client().unwrap().act("restore_start", "m").unwrap();
    known.tile("m", |tile| tile["state"] == "running");
    drop(strangers);
}

/// Asks for the console of `m`, and returns the connection and the status.
fn console(wall: &Wall, headers: &[&str]) -> (BufReader<TcpStream>, String) {
    let mut stream = wall.connect();
    let name = wall.address;
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13";
    let key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    write!(stream, "GET /machines/m/console HTTP/1.1\r\nHost: {name}\r\n{upgrade}\r\n{key}\r\n{headers}\r\n")
        .unwrap();
    let mut stream = BufReader::new(stream);
    let mut status = String::new();
    stream.read_line(&mut status).unwrap();
    (stream, status.split(' ').nth(1).unwrap().to_owned())
}

/// Reads a short frame of a WebSocket: its first byte, and its content. Source: RFC 6455, 5.2.
fn frame(stream: &mut BufReader<TcpStream>) -> (u8, Vec<u8>) {
    let mut head = [0; 2];
    stream.read_exact(&mut head).unwrap();
    let mut content = vec![0; head[1].into()];
    stream.read_exact(&mut content).unwrap();
    (head[0], content)
}

const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;

#[test]
fn console_passes_bytes_until_the_run_or_the_wall_ends() {
    let wall = wall(&[("m", "console: true")], "web_actions: true\n");
    let mut client = wall.host.client().unwrap();
    let cookie = wall.cookie();
    let own = wall.origin();
    assert_eq!(console(&wall, &[&cookie, &own]).1, "409", "the machine is off");
    client.act("restore_start", "m").unwrap();
    let connect = || {
        let (mut stream, status) = console(&wall, &[&cookie, &own]);
        assert_eq!(status, "101");
        let mut line = String::new();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).unwrap();
        }
        assert_eq!(frame(&mut stream), (BINARY, b"RFB 003.008\n".to_vec()));
        stream
    };
    let mut stream = connect();
    // The double sends back all bytes. A page masks its content, here by zeros.
    stream.get_mut().write_all(&[BINARY, 0x80 | 4, 0, 0, 0, 0, b'k', b'e', b'y', b's']).unwrap();
    assert_eq!(frame(&mut stream), (BINARY, b"keys".to_vec()));
    client.act("stop", "m").unwrap();
    assert_eq!(frame(&mut stream).0, CLOSE);
    client.act("restore_start", "m").unwrap();
    let mut stream = connect();
    wall.cwd.host_yaml("web_listen: 127.0.0.1:0\nweb_actions: true\ntimeouts: {stop: 50}\n").unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    stream.get_mut().write_all(&[BINARY, 0x80 | 4, 0, 0, 0, 0, b'm', b'o', b'r', b'e']).unwrap();
    assert_eq!(frame(&mut stream), (BINARY, b"more".to_vec()), "that reload changes nothing of the wall");
    wall.cwd.host_yaml("web_listen: 127.0.0.1:0\n").unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(frame(&mut stream).0, CLOSE);
    assert!(wall.host.log().contains("console opened on the wall"));
}

#[test]
fn console_needs_a_proof_its_own_origin_and_actions() {
    let keys = "console: true";
    let acting = wall(&[("m", keys)], "web_actions: true\n");
    acting.host.client().unwrap().act("restore_start", "m").unwrap();
    let cookie = acting.cookie();
    assert_eq!(console(&acting, &[&acting.origin()]).1, "401");
    assert_eq!(console(&acting, &[&cookie]).1, "403");
    assert_eq!(console(&acting, &[&cookie, "Origin: http://evil.example"]).1, "403");
    assert_eq!(console(&acting, &[&cookie, &acting.origin(), "Sec-Fetch-Site: cross-site"]).1, "403");
    assert_eq!(console(&acting, &[&acting.bearer()]).1, "101");
    let plain = acting.request("GET /machines/m/console", &[&acting.bearer()]);
    assert!(["400", "426"].contains(&plain.status()), "{plain:?}");
    let shows = wall(&[("m", keys)], "");
    shows.host.client().unwrap().act("restore_start", "m").unwrap();
    assert_eq!(console(&shows, &[&shows.bearer()]).1, "403");
    let without = wall(&[("m", "")], "web_actions: true\n");
    without.host.client().unwrap().act("restore_start", "m").unwrap();
    assert_eq!(console(&without, &[&without.bearer()]).1, "409");
    for file in ["core/rfb.js", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "core%2f..%2f..%2fx.js"] {
        assert_eq!(acting.request(&format!("GET /novnc/{file}"), &[]).status(), "401", "{file}");
        let reply = acting.ask(&format!("GET /novnc/{file}"));
        assert!(file == "core/rfb.js" || reply.status() == "404", "{file}: {reply:?}");
    }
}

#[test]
fn host_with_a_wall_uses_no_processor_time_when_nobody_looks() {
    let wall = wall(&[("m", "")], "");
    wall.host.client().unwrap().act("restore_start", "m").unwrap();
    let mut events = wall.events();
    events.next();
    assert_eq!(wall.ask("GET /machines/m/screen").status(), "200");
    drop(events);
    wall.host.wait_until_quiet(Duration::from_secs(20)).unwrap();
}
