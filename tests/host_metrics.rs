//! The exporter of metrics: the endpoint, the file, and the rules and the dashboard for Prometheus and Grafana.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::prometheus::promtool;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::wait::wait_until;
use rustix::process::Signal;
use serde_json::{Value, json};

/// The limit of a read. A connection that the host should close must not hang the test.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const INTEGRATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../integrations/prometheus");

fn cwd(machines: &[(&str, &str)], host_yaml: &str) -> ScratchCwd {
    let cwd = ScratchCwd::double(machines).unwrap();
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: true}\n").unwrap();
    cwd.host_yaml(host_yaml).unwrap();
    cwd
}

/// Starts a host that serves its metrics, and returns their address.
fn served(machines: &[(&str, &str)]) -> (RunningHost, ScratchCwd, SocketAddr) {
    let cwd = cwd(machines, "metrics_listen: 127.0.0.1:0\n");
    let host = RunningHost::start(&cwd).unwrap();
    let address = address(&host);
    (host, cwd, address)
}

/// Returns the address in the latest line of the log that has one.
fn address(host: &RunningHost) -> SocketAddr {
    host.wait_for_log(&["metrics are served"]).unwrap();
    let log = host.log();
    let line = log.lines().rfind(|line| line.contains("metrics are served")).unwrap();
    let address = line.split("127.0.0.1:").nth(1).unwrap();
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    format!("127.0.0.1:{port}").parse().unwrap()
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(READ_TIMEOUT)).unwrap();
    stream
}

/// Sends the lines of a request, and returns the head and the body of the reply.
fn request(address: SocketAddr, lines: &[&str]) -> (String, String) {
    let mut stream = connect(address);
    stream.write_all(format!("{}\r\nHost: lab\r\n\r\n", lines.join("\r\n")).as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{reply}"));
    (head.to_owned(), body.to_owned())
}

fn scrape(address: SocketAddr) -> String {
    let (head, body) = request(address, &["GET /metrics HTTP/1.1", "Accept: application/openmetrics-text"]);
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("application/openmetrics-text"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
    body
}

/// Returns the value of a sample; its name includes the labels.
fn value(page: &str, sample: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {sample} in {page}")).parse().unwrap()
}

/// Runs promtool, which reads `stdin`, and returns its output.
fn check(arguments: &[&str], files: &[&Path], stdin: &str) -> String {
    let mut command = Command::new(promtool().unwrap());
    command.args(arguments).args(files).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn metrics_show_machines_and_actions_in_both_formats() {
    let (host, cwd, address) = served(&[("m", ""), ("fails", "faults: {stop: fail}")]);
    let mut client = host.client().unwrap();
    for machine in ["m", "fails"] {
        assert_eq!(client.act("prepare", machine).unwrap()["success"], true);
    }
    client.ask(json!({"action": "lock", "machine": "m", "task_id": "t"})).unwrap();
    client.act("restore_start", "m").unwrap();
    client.act("restore_start", "fails").unwrap();
    assert_eq!(client.act("stop", "fails").unwrap()["success"], false);
    client.ask(json!({"action": "disable_machine", "machine": "fails", "reason": "x"})).unwrap();
    let page = scrape(address);
    let of = |name: &str, labels: &str| value(&page, &format!("cuckoo_machinery_{name}{{{labels}}}"));
    let restored = r#"machinery="double",action="restore_start",mode="standby""#;
    assert_eq!(of("action_duration_seconds_count", restored), 2.0);
    assert_eq!(of("action_duration_seconds_bucket", &format!(r#"le="+Inf",{restored}"#)), 2.0);
    assert_eq!(of("action_failures_total", r#"machinery="double",action="stop""#), 1.0);
    assert!(of("machines", r#"machinery="double",state="running""#) >= 1.0);
    assert_eq!(of("machine_locked", r#"machinery="double",machine="m""#), 1.0);
    assert_eq!(of("machine_disabled", r#"machinery="double",machine="fails""#), 1.0);
    assert_eq!(of("machine_quarantined", r#"machinery="double",machine="fails""#), 0.0);
    assert_eq!(of("hypervisor_up", r#"machinery="double""#), 1.0);
    assert_eq!(of("waiting_requests", r#"machinery="double""#), 0.0);
    assert!(value(&page, "cuckoo_machinery_disk_free_bytes") > 0.0);
    assert!(page.contains("# UNIT cuckoo_machinery_action_duration_seconds seconds"), "{page}");
    assert!(
        page.contains(&format!("cuckoo_machinery_build_info{{version=\"{}\"", env!("CARGO_PKG_VERSION")))
    );
    let (head, plain) = request(address, &["GET /metrics HTTP/1.1"]);
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert_eq!(check(&["check", "metrics"], &[], &plain), "");
    let ran = host::run(&cwd, &["metrics"]).unwrap();
    assert!(ran.stdout.contains("P99") && ran.stdout.contains("standby"), "{ran:?}");
}

#[test]
fn clones_of_a_machine_have_one_sample() {
    let (host, _cwd, address) = served(&[("w-1", "clone_of: w"), ("w-2", "clone_of: w"), ("m", "")]);
    let mut client = host.client().unwrap();
    for machine in ["w-1", "w-2", "m"] {
        assert_eq!(client.act("prepare", machine).unwrap()["success"], true);
    }
    client.ask(json!({"action": "lock", "machine": "w-1", "task_id": "t"})).unwrap();
    client.act("restore_start", "w-1").unwrap();
    client.act("disable_machine", "w-2").unwrap();
    let page = scrape(address);
    let of = |name: &str, more: &str| {
        let labels = format!(r#"machinery="double",clone_of="w"{more}"#);
        value(&page, &format!("cuckoo_machinery_{name}{{{labels}}}"))
    };
    assert_eq!([of("clones", r#",state="running""#), of("clones", r#",state="poweroff""#)], [1.0, 1.0]);
    assert_eq!(of("ready_clones", r#",mode="standby""#), 1.0);
    let flags = ["disabled", "quarantined", "locked", "reserved"];
    assert_eq!(flags.map(|flag| of(&format!("clones_{flag}"), "")), [1.0, 0.0, 1.0, 0.0]);
    assert!(page.contains(r#"machine="m""#) && !page.contains(r#"machine="w-"#), "{page}");
}

#[test]
fn waiting_requests_and_restores_are_counted_while_another_restore_has_the_permit() {
    let delayed = "delays_ms: {restore_start: 2000}";
    // Not prepared: a standby of the double is restored without a delay.
    let cwd = ScratchCwd::double(&[("a", delayed), ("b", delayed)]).unwrap();
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: false}\n").unwrap();
    cwd.host_yaml("metrics_listen: 127.0.0.1:0\nmax_parallel_restores: 1\n").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for (action, machine) in [("restore_start", "a"), ("restore_start", "b"), ("stop", "a"), ("stop", "a")] {
        client.send(&json!({"action": action, "machine": machine})).unwrap();
    }
    let counts = || {
        let page = scrape(address(&host));
        let requests = value(&page, r#"cuckoo_machinery_waiting_requests{machinery="double"}"#);
        (value(&page, "cuckoo_machinery_waiting_restores"), requests)
    };
    wait_until("the counts are others", || counts() == (1.0, 2.0));
    (0..4).for_each(|_| assert_eq!(client.next_message().unwrap()["success"], true));
    assert_eq!(counts(), (0.0, 0.0));
}

#[test]
fn losses_of_a_tasks_run_are_counted() {
    let (host, _cwd, address) = served(&[("m", "faults: {stop: fail}, fault_times: 1")]);
    let errors = |page: &str| value(page, r#"cuckoo_machinery_run_errors_total{machinery="double"}"#);
    assert_eq!(errors(&scrape(address)), 0.0);
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    client.ask(json!({"action": "lock", "machine": "m", "task_id": "t"})).unwrap();
    client.act("restore_start", "m").unwrap();
    client.act("stop", "m").unwrap();
    client.wait_for_event("run_error", "m").unwrap();
    assert_eq!(errors(&scrape(address)), 1.0);
}

#[test]
fn hypervisor_is_down_when_it_does_not_answer() {
    let (_host, _cwd, address) = served(&[("m", "faults: {state: fail}")]);
    let up = r#"cuckoo_machinery_hypervisor_up{machinery="double"}"#;
    wait_until("the hypervisor is up", || value(&scrape(address), up) == 0.0);
}

#[test]
fn endpoint_answers_only_get_of_metrics() {
    let (_host, _cwd, address) = served(&[("m", "")]);
    for (line, status) in [
        ("GET / HTTP/1.1", "404"),
        ("GET /metrics/../../etc/passwd HTTP/1.1", "404"),
        ("POST /metrics HTTP/1.1", "405"),
        ("DELETE /metrics HTTP/1.1", "405"),
        ("nonsense", "400"),
    ] {
        let (head, _) = request(address, &[line]);
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{line}: {head}");
    }
    let long = format!("X-Long: {}", "x".repeat(100_000));
    let mut stream = connect(address);
    // The host may close the connection before it has all of it.
    let _ = stream.write_all(format!("GET /metrics HTTP/1.1\r\n{long}\r\n\r\n").as_bytes());
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    assert!(!reply.contains(" 200 "), "{reply}");
    scrape(address);
}

#[test]
fn slow_and_many_clients_neither_stop_the_host_nor_the_metrics() {
    let (host, _cwd, address) = served(&[("m", "")]);
    let files = || host.resources().unwrap();
    let slow: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = connect(address);
            stream.write_all(b"GET /metr").unwrap();
            stream
        })
        .collect();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    println!("with 100 slow clients: {:?}", files());
    drop(slow);
    scrape(address);
}

#[test]
fn slow_client_is_disconnected() {
    let (_host, _cwd, address) = served(&[("m", "")]);
    let mut slow = connect(address);
    slow.write_all(b"GET /metr").unwrap();
    let mut rest = Vec::new();
    let closed = slow.read_to_end(&mut rest);
    assert!(rest.is_empty() && closed.is_ok_and(|read| read == 0), "{rest:?}");
}

#[test]
fn reload_moves_the_endpoint_and_the_file() {
    let (host, cwd, first) = served(&[("m", "")]);
    let file = cwd.root().join("cuckoo.prom");
    cwd.host_yaml(&format!("metrics_textfile: {}\n", file.display())).unwrap();
    let mut client = host.client().unwrap();
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["settings"], json!(["metrics_listen", "metrics_textfile"]), "{answer}");
    wait_until("the file is missing, or the port is open", || {
        file.exists() && TcpStream::connect(first).is_err()
    });
    cwd.host_yaml("metrics_listen: 127.0.0.1:0\n").unwrap();
    client.ask(json!({"action": "reload"})).unwrap();
    let served = || host.log().matches("metrics are served").count();
    wait_until("the file remains, or no port is open", || !file.exists() && served() == 2);
    scrape(address(&host));
    cwd.host_yaml("metrics_listen: here\n").unwrap();
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert!(answer["reason"].as_str().unwrap().contains("machinery-host.yaml:1: metrics_listen"), "{answer}");
}

#[test]
fn reload_interrupts_no_reader_when_it_changes_nothing_of_the_metrics() {
    let (host, cwd, address) = served(&[("m", "")]);
    let mut stream = connect(address);
    stream.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap();
    scrape(address);
    for limit in [10, 20] {
        cwd.host_yaml(&format!("metrics_listen: 127.0.0.1:0\ntimeouts: {{stop: {limit}}}\n")).unwrap();
        let answer = host.client().unwrap().ask(json!({"action": "reload"})).unwrap();
        assert_eq!(answer["settings"], json!(["timeouts"]), "{answer}");
        scrape(address);
    }
    stream.write_all(b"Host: lab\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
}

#[test]
fn host_serves_when_the_address_is_taken() {
    let (first, _cwd, address) = served(&[("m", "")]);
    let second = cwd(&[("m", "")], &format!("metrics_listen: {address}\n"));
    let host = RunningHost::start(&second).unwrap();
    host.wait_for_log(&["the metrics are not served"]).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap()["success"], true);
    scrape(address);
    // The program that has the port ends, and a reload is another try.
    drop(first);
    host.client().unwrap().ask(json!({"action": "reload"})).unwrap();
    host.wait_for_log(&["metrics are served"]).unwrap();
    scrape(address);
}

#[test]
fn file_is_what_promtool_accepts_and_ends_with_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cuckoo.prom");
    let cwd = cwd(&[("m", "")], &format!("metrics_textfile: {}\n", file.display()));
    let mut host = RunningHost::start(&cwd).unwrap();
    wait_until("there is no file", || file.exists());
    assert_eq!(check(&["check", "metrics"], &[], &fs::read_to_string(&file).unwrap()), "");
    host.client().unwrap().act("restore_start", "m").unwrap();
    let restored = || fs::read_to_string(&file).unwrap().contains(r#"action="restore_start""#);
    wait_until("the file has no restore", restored);
    host.signal(Signal::TERM).unwrap();
    assert!(host.wait().unwrap().success());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

#[test]
fn host_with_metrics_uses_no_processor_time_when_idle() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cuckoo.prom");
    let yaml = format!("metrics_listen: 127.0.0.1:0\nmetrics_textfile: {}\n", file.display());
    let cwd = cwd(&[("m", "")], &yaml);
    let host = RunningHost::start(&cwd).unwrap();
    scrape(address(&host));
    // Longer than the time between two versions of the file.
    host.wait_until_quiet(Duration::from_secs(20)).unwrap();
    assert!(file.exists());
}

#[test]
fn scrape_has_each_machine_when_there_are_500() {
    let names: Vec<String> = (0..500).map(|index| format!("m{index}")).collect();
    let machines: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let (_host, _cwd, address) = served(&machines);
    scrape(address);
    let begun = Instant::now();
    let page = scrape(address);
    println!("500 machines: {} bytes in {:?}", page.len(), begun.elapsed());
    assert!(page.contains(r#"machine="m499""#));
}

fn integration(file: &str) -> PathBuf {
    Path::new(INTEGRATION).join(file)
}

#[test]
fn alert_rules_hold_in_promtools_tests() {
    let output = check(&["check", "rules"], &[&integration("alerts.yaml")], "");
    assert!(output.contains("SUCCESS"), "{output}");
    let output = check(&["test", "rules"], &[&integration("alerts_test.yaml")], "");
    assert!(output.contains("SUCCESS"), "{output}");
}

/// Returns all names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_part(c));
    words.filter(|word| word.starts_with("cuckoo_machinery_")).map(str::to_owned).collect()
}

/// Returns all values of the key below a value.
fn values_of<'v>(value: &'v Value, key: &str, found: &mut Vec<&'v str>) {
    match value {
        Value::Object(object) => object.iter().for_each(|(name, value)| match value {
            Value::String(text) if name == key => found.push(text),
            value => values_of(value, key, found),
        }),
        Value::Array(values) => values.iter().for_each(|value| values_of(value, key, found)),
        _ => {}
    }
}

#[test]
fn dashboard_rules_and_documents_name_only_exported_metrics() {
    let (_host, _cwd, address) = served(&[("m", "")]);
    let (_, page) = request(address, &["GET /metrics HTTP/1.1"]);
    let mut exported = BTreeSet::new();
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        exported.insert(name.to_owned());
        if kind == "histogram" {
            exported.extend(["bucket", "count", "sum"].map(|suffix| format!("{name}_{suffix}")));
        }
    }
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(integration("dashboard.json")).unwrap()).unwrap();
    let mut expressions = Vec::new();
    values_of(&dashboard, "expr", &mut expressions);
    assert!(expressions.len() > 10, "{expressions:?}");
    for expression in &expressions {
        assert!(!names(expression).is_empty(), "{expression}");
        // promtool parses the expression as that of a rule.
        let rule = json!({"groups": [{"name": "g", "rules": [{"record": "r", "expr": expression}]}]});
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, rule.to_string().replace("$__rate_interval", "5m").replace("$machinery", "qemu"))
            .unwrap();
        check(&["check", "rules"], &[file.path()], "");
    }
    let monitoring = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/monitoring.md");
    let documented = names(&fs::read_to_string(monitoring).unwrap());
    let used = names(&expressions.join(" "));
    let alerts = names(&fs::read_to_string(integration("alerts.yaml")).unwrap());
    for name in used.union(&alerts).chain(&documented) {
        assert!(exported.contains(name), "{name} is not exported: {exported:#?}");
    }
    let families =
        exported.iter().filter(|name| !["_bucket", "_count", "_sum"].iter().any(|end| name.ends_with(end)));
    let missing: Vec<_> = families.filter(|name| !documented.contains(*name)).collect();
    assert!(missing.is_empty(), "docs/monitoring.md lacks {missing:?}");
}
