//! `machine create` for isolated machines and clones: from an installed Debian to clones with two commands, both entries
//! of the configuration or neither, and the removal.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::capture::{self, Packet};
use machinery_testkit::client::Client;
use machinery_testkit::guest::debian::{ADDRESS, APPEND, Debian, WEB_PORT};
use machinery_testkit::guest::{AGENT_PORT, Guest};
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::lab::Lab;
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
const CLONES: u8 = 10;

/// The configuration of the host, with blocks to which a section can be added.
const HOST_YAML: &str = "\
free_space_reserve: 0
# the operator's
machineries:
  qemu:
    jail: strict
    instant_space_limit: 16 GiB  # templates
";

/// Creates a lab with a disk and without a machine; none if this user may not make its network.
fn lab(seeds: &[(&str, Guest, SnapshotFormat)]) -> Option<Lab> {
    let lab = requirement::NETWORK.or_skip(Lab::in_network(seeds, None).unwrap())?;
    let yaml = lab.yaml().unwrap();
    let (top, _) = yaml.split_once("machines:\n").unwrap();
    lab.write_yaml(&format!("{top}machines: {{}}\n")).unwrap();
    lab.cwd().host_yaml(HOST_YAML).unwrap();
    Some(lab)
}

/// Creates a lab with the disk of a guest that needs no agent.
fn micro() -> Option<Lab> {
    lab(&[("seed", Guest::Micro, SnapshotFormat::Lz4)])
}

/// Returns the arguments of the creation of `m` from the disk of the micro guest.
fn creation(lab: &Lab, more: &[&str]) -> Vec<String> {
    let disk = lab.folder("seed").disk.display().to_string();
    let words = ["machine", "create", "m", "--disk", &disk, "--accel", "tcg", "--cpus", "1", "--ram", "32M"];
    let words = words.iter().chain(&["--ready-after", "1"]).chain(more);
    words.map(|word| (*word).to_owned()).collect()
}

/// Returns the command `cuckoo-machinery` in the network of the lab.
fn command(lab: &Lab) -> Command {
    let mut command = host::command(lab.cwd()).unwrap();
    lab.network().attach(&mut command);
    command
}

fn run(lab: &Lab, words: &[String]) -> Output {
    command(lab).args(words).output().unwrap()
}

fn run_words(lab: &Lab, words: &[&str]) -> Output {
    run(lab, &words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
}

#[track_caller]
fn succeeds(ran: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(ran.status.success(), "{}{}", text(&ran.stdout), text(&ran.stderr));
    text(&ran.stdout)
}

fn host_yaml_path(lab: &Lab) -> PathBuf {
    lab.cwd().root().join("conf/machinery-host.yaml")
}

fn host_yaml(lab: &Lab) -> String {
    fs::read_to_string(host_yaml_path(lab)).unwrap()
}

#[track_caller]
fn does(client: &mut Client, action: &str, machine: &str) {
    assert_eq!(client.act(action, machine).unwrap(), json!({"success": true}), "{action} of {machine}");
}

/// Runs the task for each clone at the same time, with a client of its own.
fn for_each_clone(host: &RunningHost, task: impl Fn(&mut Client, u8) + Sync) {
    thread::scope(|scope| {
        let workers: Vec<_> = (1..=CLONES)
            .map(|number| {
                let task = &task;
                scope.spawn(move || task(&mut host.client().unwrap(), number))
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}

fn address_of(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 10 + number)
}

/// Returns the web server's answer to `GET path`. The guest may still be busy.
fn get(address: Ipv4Addr, port: u16, path: &str) -> String {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&(address, port).into(), SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().unwrap_or_else(|error| panic!("{address}:{port}: {error}"))
}

#[test]
fn debian_becomes_ten_clones_with_captures_of_their_own_by_two_commands() {
    let Some(lab) = lab(&[]) else { return };
    let begun = Instant::now();
    let debian = Debian::installed().unwrap();
    let args = lab.cwd().root().join("boot.args");
    let text = format!("-kernel vmlinuz\n-initrd initrd.img\n-append {APPEND}\n-serial file:%MACHINE%.log\n");
    fs::write(&args, text).unwrap();
    eprintln!("an installed Debian: {:?}", begun.elapsed());

    let begun = Instant::now();
    let (disk, [kernel, initrd]) = (debian.disk(), debian.boot_files());
    let mut create = command(&lab);
    create.args(["-v", "machine", "create", "deb", "--platform", "linux", "--os-version", "12"]);
    create.args(["--ram", "320M", "--cpus", "1", "--accel", "tcg", "--guest-ip", ADDRESS]);
    create.args(["--clones", "10", "--clone-ips", "10.77.0.11-20", "--timeout", "400"]);
    create.arg("--disk").arg(&disk).arg("--args").arg(&args);
    create.arg("--file").arg(&kernel).arg("--file").arg(&initrd);
    let made = create.output().unwrap();
    assert!(succeeds(&made).contains("its restores are instant"), "{made:?}");
    eprintln!("machine create: {:?}\n{}", begun.elapsed(), String::from_utf8_lossy(&made.stderr));

    let begun = Instant::now();
    let mut host = lab.host().unwrap();
    eprintln!("serve, until it is ready: {:?}", begun.elapsed());
    let pcap = |number: u8| lab.cwd().root().join(format!("{number}.pcap"));
    for_each_clone(&host, |client, number| {
        let clone = format!("deb-{number}");
        let lock = json!({"action": "lock", "machine": clone, "task_id": clone, "pcap_path": pcap(number)});
        assert_eq!(client.ask(lock).unwrap()["success"], true);
        does(client, "restore_start", &clone);
        let get = |port, path: &str| lab.network().inside(|| get(address_of(number), port, path)).unwrap();
        assert!(get(AGENT_PORT, "/").contains("Debian guest"));
        // The capture leaves out the agent.
        let answer = get(WEB_PORT, &path_of(number));
        assert!(answer.contains("404 Not Found"), "{answer}");
    });
    eprintln!("ten clones have answered: {:?}", begun.elapsed());
    for_each_clone(&host, |client, number| does(client, "stop", &format!("deb-{number}")));
    for number in 1..=CLONES {
        has_only_its_own_traffic(&pcap(number), number);
    }
    let checked = succeeds(&run_words(&lab, &["check"]));
    assert!(checked.contains("0 problems, 0 warnings"), "{checked}");
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

/// Returns a path that only one clone is asked for.
fn path_of(number: u8) -> String {
    format!("/clone-{number:02}.")
}

#[track_caller]
fn has_only_its_own_traffic(pcap: &Path, number: u8) {
    let (own, packets) = (address_of(number), capture::packets(pcap).unwrap());
    let strange = packets.iter().find(|packet| !packet.is_from(own) && !packet.is_to(own));
    assert!(strange.is_none(), "{own}: {strange:?}");
    let has =
        |packet: &Packet, path: &str| packet.frame.windows(path.len()).any(|part| part == path.as_bytes());
    for other in 1..=CLONES {
        let is_asked = packets.iter().any(|packet| packet.is_to(own) && has(packet, &path_of(other)));
        assert_eq!(is_asked, other == number, "{own} and {other}");
    }
    assert!(packets.iter().any(|packet| packet.is_from(own) && has(packet, "404 Not Found")), "{own}");
}

#[test]
fn isolated_machine_gets_a_section_that_check_accepts_and_is_removed_with_it() {
    let Some(lab) = micro() else { return };
    let (mut host, yaml) = (lab.host().unwrap(), lab.yaml().unwrap());
    let mut client = host.client().unwrap();
    let made =
        run(&lab, &creation(&lab, &["--isolated", "--ip", "10.77.0.5", "--guest-ip", "192.168.30.11"]));
    succeeds(&made);
    let section = "    machines:\n      m:\n        network: isolated\n        guest_ip: \"192.168.30.11\"\n";
    assert_eq!(host_yaml(&lab), format!("{HOST_YAML}{section}"));
    succeeds(&run_words(&lab, &["check"]));
    let listed = client.machine("m").unwrap();
    assert!(listed["ip"] == "10.77.0.5" && listed["disabled"] == false, "{listed}");
    does(&mut client, "restore_start", "m");
    does(&mut client, "stop", "m");
    // The snapshot anew boots with the same network.
    succeeds(&run_words(&lab, &["machine", "snapshot", "m", "--ready-after", "1"]));
    does(&mut client, "restore_start", "m");
    let refused = run_words(&lab, &["machine", "remove", "m", "--yes"]);
    assert!(!refused.status.success() && host_yaml(&lab).ends_with(section), "{refused:?}");
    does(&mut client, "stop", "m");
    // An operator's change of the section does not keep the machine.
    lab.cwd().change_host_yaml("network: isolated", "clones: 2\n        clone_ips: 10.77.0.6-7").unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    does(&mut client, "restore_start", "m-2");
    does(&mut client, "stop", "m-2");
    succeeds(&run_words(&lab, &["machine", "remove", "m", "--yes"]));
    assert_eq!((host_yaml(&lab).as_str(), lab.yaml().unwrap()), (HOST_YAML, yaml.replace(" {}", "")));
    assert!(client.machine("m-1").is_err());
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

#[test]
fn wrong_addresses_are_refused_before_the_guest_boots() {
    let Some(lab) = micro() else { return };
    succeeds(&run(
        &lab,
        &creation(&lab, &["--clones", "2", "--clone-ips", "10.77.0.6-7", "--ip", "10.9.9.9"]),
    ));
    assert!(
        host_yaml(&lab)
            .contains("clones: 2\n        clone_ips: \"10.77.0.6-7\"\n        guest_ip: \"10.9.9.9\"")
    );
    let (before, host_before) = (lab.yaml().unwrap(), host_yaml(&lab));
    let second = |more: &[&str]| {
        let mut words = creation(&lab, more);
        "other".clone_into(&mut words[2]);
        run(&lab, &words)
    };
    let clones = ["--ip", "10.9.9.9", "--clones", "2", "--clone-ips"];
    for (more, expected) in [
        (&[&clones[..], &["10.77.0.7-9"]].concat()[..], "'10.77.0.7' is already the ip of machine 'm-2'"),
        (&[&clones[..], &["10.77.0.9-9"]].concat(), "it has 1 addresses, and there are 2 clones"),
        (&[&clones[..], &["127.0.0.8-9"]].concat(), "a loopback address"),
        (&[&clones[..], &["10.66.0.1-2"]].concat(), "the address of the result server"),
        (&[&clones[..], &["10.77.0.9"]].concat(), "such as 192.168.30.110-129"),
        (&["--isolated", "--ip", "10.77.0.6"], "the machine 'm' has this ip, too"),
        (&["--isolated", "--ip", "10.77.0.9", "--guest-ip", "127.0.0.1"], "a loopback address"),
        (&["--isolated", "--bridge", "br0", "--ip", "10.77.0.9"], "cannot be used with"),
        (&["--user", "--ip", "127.0.0.9", "--clones", "2"], "--clone-ips"),
        (&["--isolated"], "--ip"),
    ] {
        let refused = second(more);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && error.contains(expected), "{more:?}: {error}");
        assert!(!error.contains("booting"), "{error}");
    }
    // The section cannot be added to mappings in one line.
    lab.cwd()
        .change_host_yaml("  qemu:\n    jail: strict", "  qemu: {jail: strict}\n  kvm:\n    standby: off")
        .unwrap();
    let refused = second(&["--isolated", "--ip", "10.77.0.9"]);
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("      other:\n        network: isolated"),
        "{refused:?}"
    );
    fs::write(host_yaml_path(&lab), &host_before).unwrap();
    assert_eq!(lab.yaml().unwrap(), before);
    assert!(!lab.cwd().root().join("machines/other").exists());
    lab.assert_clean();
}

#[test]
fn interrupted_creation_leaves_both_entries_or_neither() {
    let Some(lab) = micro() else { return };
    let yaml = lab.yaml().unwrap();
    let mut made = 0;
    for (step, signal) in [
        ("booting", Signal::KILL),
        ("saving the memory", Signal::TERM),
        ("restoring", Signal::KILL),
        ("adding the machine", Signal::TERM),
        ("adding the machine", Signal::KILL),
        ("adding the machine", Signal::KILL),
    ] {
        let mut creating = command(&lab);
        creating
            .arg("-v")
            .args(creation(&lab, &["--clones", "2", "--clone-ips", "10.77.0.6-7", "--ip", "10.9.9.9"]));
        let mut process = creating.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains(step) {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended before '{step}'");
        }
        if step == "adding the machine" {
            // The section comes first, and the plugin's check takes longer than this.
            let begun = Instant::now();
            while host_yaml(&lab) == HOST_YAML && begun.elapsed() < SOON {}
        }
        kill_process(Pid::from_child(&process), signal).unwrap();
        log.read_to_string(&mut line).unwrap();
        process.wait().unwrap();
        let cleared = run_words(&lab, &["machine", "clear"]);
        succeeds(&cleared);
        let has_entry = lab.yaml().unwrap() != yaml;
        assert_eq!(host_yaml(&lab) != HOST_YAML, has_entry, "{step}: {line}");
        assert_eq!(lab.cwd().root().join("machines/m").exists(), has_entry, "{step}: {line}");
        if has_entry {
            made += 1;
            succeeds(&run_words(&lab, &["check"]));
            succeeds(&run_words(&lab, &["machine", "remove", "m", "--yes"]));
            lab.write_yaml(&yaml).unwrap();
        }
        lab.assert_clean();
    }
    assert!(made < 6, "no creation was interrupted");
}
