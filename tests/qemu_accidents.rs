//! Accidents of real machines: processes that die or hang, hosts that die, QEMUs that refuse, damaged files,
//! missing ports and missing space.
//!
//! After each accident the reason names the cause, nothing is left, and the machine restores again.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{FileEvent, FileWatch, Lab, TinyDisk};
use machinery_testkit::requirement;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const SERIAL: &str = "serial.log";
/// The events until QEMU has begun: the host opens the file first, to give it to the machine's user.
const QEMU_BEGINS: [FileEvent<'_>; 2] = [FileEvent::Opened(SERIAL), FileEvent::Opened(SERIAL)];
const MICRO: (&str, Guest, SnapshotFormat) = ("m", Guest::Micro, SnapshotFormat::Lz4);
/// A machine whose restore takes a while.
const LARGE: (&str, Guest, SnapshotFormat) =
    ("m", Guest::Linux { ram_mib: 512, noise_mib: 256 }, SnapshotFormat::Lz4);

fn good() -> Value {
    json!({"success": true})
}

fn subscribed(host: &RunningHost) -> Client {
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    client
}

fn kill(process: Pid) {
    kill_process(process, Signal::KILL).unwrap();
}

/// Checks that the action fails with all of these words in the reason, and that nothing is left.
#[track_caller]
fn assert_fails(lab: &Lab, client: &mut Client, action: &str, words: &[&str]) -> String {
    let answer = client.act(action, "m").unwrap();
    assert_eq!(answer["success"], false, "{answer}");
    assert_reason(&answer, &[words, &["machine 'm' failed: "]].concat());
    lab.assert_clean();
    let listed = client.machine("m").unwrap();
    assert_eq!((&listed["state"], &listed["disabled_reason"]), (&json!("poweroff"), &answer["reason"]));
    answer["reason"].as_str().unwrap().to_owned()
}

#[track_caller]
fn assert_reason(answer: &Value, words: &[&str]) {
    let reason = answer["reason"].as_str().unwrap();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in {reason:?}");
    }
}

/// Checks that the machine restores to its snapshot, and stops.
#[track_caller]
fn assert_restores(lab: &Lab, client: &mut Client) {
    client.act("enable_machine", "m").unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    // The Linux guest prints nothing after a restore.
    if MICRO.1 == guest_of(lab) {
        assert_eq!(lab.folder("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
    }
    assert_eq!(client.act("stop", "m").unwrap(), good());
    lab.assert_clean();
}

fn guest_of(lab: &Lab) -> Guest {
    let linux = lab.folder("m").start_args.iter().any(|arg| arg == "-kernel");
    if linux { LARGE.1 } else { MICRO.1 }
}

/// Checks that the host ends with everything stopped.
#[track_caller]
fn assert_ends_well(lab: &Lab, host: &mut RunningHost) {
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}

#[test]
fn death_of_a_machine_is_reported_at_once() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let mut host = lab.host().unwrap();
    let (mut subscriber, mut client) = (subscribed(&host), host.client().unwrap());
    for _ in 0..5 {
        assert_eq!(client.act("restore_start", "m").unwrap(), good());
        subscriber.wait_for_state("m", "running").unwrap();
        let qemu = lab.qemu_of("m").unwrap();
        let begun = Instant::now();
        kill(qemu);
        let reason = subscriber.wait_for_state("m", "poweroff").unwrap();
        let took = begun.elapsed();
        println!("reported {took:?} after the kill: {reason}");
        assert!(took < Duration::from_secs(2), "{took:?}");
        assert!(reason.contains("killed by signal 9"), "{reason}");
        lab.assert_clean();
        let state = client.act("state", "m").unwrap();
        assert_eq!(state, json!({"success": true, "state": "poweroff"}));
        let errors = client.machine("m").unwrap()["errors"].clone();
        let error = errors.as_array().unwrap().last().unwrap().as_str().unwrap();
        assert!(error.contains("machine 'm'") && error.contains("killed by signal 9"), "{errors}");
        assert!(host.log().lines().any(|line| line.contains("WARN") && line.contains("killed by signal 9")));
    }
    assert_restores(&lab, &mut client);
    assert_ends_well(&lab, &mut host);
}

/// Sends a restore, waits for these steps of its QEMU, and kills it.
fn killed_in_restore(lab: &Lab, client: &mut Client, steps: &[FileEvent<'_>]) -> Value {
    let watch = FileWatch::new(&lab.folder("m").dir).unwrap();
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    watch.wait(steps, SOON).unwrap();
    kill(lab.qemu_of("m").unwrap());
    client.next_message().unwrap()
}

#[test]
fn restore_fails_and_the_next_works_when_qemu_dies_early() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let mut host = lab.host().unwrap();
    let (mut subscriber, mut client) = (subscribed(&host), host.client().unwrap());
    for _ in 0..5 {
        let answer = killed_in_restore(&lab, &mut client, &QEMU_BEGINS);
        // The machine may be on already; then its death is an event.
        match answer["success"].as_bool() {
            Some(true) => assert!(subscriber.wait_for_state("m", "poweroff").unwrap().contains("signal 9")),
            _ => assert_reason(&answer, &["QEMU ", "restore_start of machine 'm' failed: "]),
        }
        println!("{answer}");
        lab.assert_clean();
        assert_restores(&lab, &mut client);
        while !subscriber.wait_for_state("m", "poweroff").unwrap().is_empty() {}
    }
    assert_ends_well(&lab, &mut host);
}

#[test]
fn restore_fails_and_the_next_works_when_qemu_dies_while_it_loads() {
    let lab = Lab::new(&[LARGE]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for _ in 0..3 {
        let loading = [QEMU_BEGINS[0], QEMU_BEGINS[1], FileEvent::Read("memory.snapshot")];
        let answer = killed_in_restore(&lab, &mut client, &loading);
        println!("{answer}");
        assert_eq!(answer["success"], false, "{answer}");
        assert_reason(&answer, &["killed by signal 9", "restore_start of machine 'm'"]);
        // The reason must not blame a complete snapshot.
        assert!(!answer["reason"].as_str().unwrap().contains("truncated or corrupt"), "{answer}");
        lab.assert_clean();
        assert_restores(&lab, &mut client);
    }
    assert_ends_well(&lab, &mut host);
}

#[test]
fn next_host_clears_leftovers_when_a_host_was_killed_and_adoption_is_off() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.host_yaml("adopt: off\n", "").unwrap();
    let mut killed = lab.host().unwrap();
    assert_eq!(killed.client().unwrap().act("restore_start", "m").unwrap(), good());
    killed.kill().unwrap();
    let left = lab.leftovers().unwrap();
    assert_eq!(left.len(), 4, "a process, its disk, its socket and its record: {left:?}");
    let mut host = lab.host().unwrap();
    lab.assert_clean();
    assert!(host.log().contains("ending a QEMU of a host that died"), "{}", host.log());
    let mut client = host.client().unwrap();
    assert_eq!(client.machine("m").unwrap()["state"], "poweroff");
    assert_restores(&lab, &mut client);
    assert_ends_well(&lab, &mut host);
}

#[test]
fn machine_is_not_touched_when_it_runs_in_another_cwd() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    let copy = ScratchCwd::new(&[("qemu", &lab.yaml().unwrap())]).unwrap();
    let mut second = RunningHost::start(&copy).unwrap();
    let listed = second.client().unwrap().machine("m").unwrap();
    let reason = listed["disabled_reason"].as_str().unwrap();
    assert!(reason.contains("uses the overlay") && reason.contains("not of this CWD"), "{listed}");
    assert_eq!(second.terminate().unwrap().code(), Some(0), "{}", second.log());
    assert_eq!(client.ask(json!({"action": "state", "machine": "m"})).unwrap()["state"], "running");
    assert!(lab.disposable("m").exists());
    assert_ends_well(&lab, &mut host);
}

#[test]
fn machine_is_not_touched_when_another_manager_runs_it() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let mut killed = lab.host().unwrap();
    assert_eq!(killed.client().unwrap().act("restore_start", "m").unwrap(), good());
    killed.kill().unwrap();
    // The machines belong to the manager that answers on the socket, even if it has not started them.
    fs::remove_file(lab.cwd().socket()).unwrap();
    let other = UnixListener::bind(lab.cwd().socket()).unwrap();
    let refused = lab.run(&["serve"]).unwrap();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("another machinery manager answers"), "{refused:?}");
    assert_eq!(lab.leftovers().unwrap().len(), 4, "leftovers were touched");
    drop(other);
    assert_ends_well(&lab, &mut lab.host().unwrap());
}

#[test]
fn next_host_clears_leftovers_when_a_host_was_killed_in_a_restore() {
    let lab = Lab::new(&[LARGE]).unwrap();
    let mut killed = lab.host().unwrap();
    let watch = FileWatch::new(&lab.folder("m").dir).unwrap();
    killed.client().unwrap().send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    watch.wait(&[QEMU_BEGINS[0], QEMU_BEGINS[1], FileEvent::Read("memory.snapshot")], SOON).unwrap();
    killed.kill().unwrap();
    assert!(!lab.leftovers().unwrap().is_empty());
    let mut host = lab.host().unwrap();
    lab.assert_clean();
    assert_restores(&lab, &mut host.client().unwrap());
    assert_ends_well(&lab, &mut host);
}

#[test]
fn stop_ends_a_machine_when_its_qemu_hangs() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    kill_process(lab.qemu_of("m").unwrap(), Signal::STOP).unwrap();
    let begun = Instant::now();
    assert_eq!(client.act("stop", "m").unwrap(), good());
    println!("a hanging QEMU is stopped in {:?}", begun.elapsed());
    lab.assert_clean();
    assert_restores(&lab, &mut client);
    assert_ends_well(&lab, &mut host);
}

#[test]
fn reason_quotes_qemu_when_it_refuses_its_arguments() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.change_start_args("m", |args| args.push("-no-such-option".to_owned())).unwrap();
    lab.accept_unsafe_args("m").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for start in ["restore_start", "norestore_start"] {
        let words = ["QEMU exited with code 1", "-no-such-option: invalid option", "machineinfo.json"];
        println!("{}", assert_fails(&lab, &mut client, start, &words));
        client.act("enable_machine", "m").unwrap();
    }
    assert_ends_well(&lab, &mut host);
}

#[test]
fn reason_quotes_qemu_when_a_port_is_in_use() {
    let lab = Lab::new(&[LARGE]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let taken = TcpListener::bind((lab.folder("m").ip.as_str(), 8000)).unwrap();
    let words = ["hostfwd=tcp", "Could not set up host forwarding rule"];
    println!("{}", assert_fails(&lab, &mut client, "restore_start", &words));
    drop(taken);
    assert_restores(&lab, &mut client);
    assert_ends_well(&lab, &mut host);
}

/// Checks the failure of a program in QEMU's place that never connects the monitor.
fn assert_no_qemu(script: &str, words: &[&str]) {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.host_yaml("timeouts: {restore_start: 1, norestore_start: 1}", "").unwrap();
    lab.fake_qemu("7.2.0", script).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for start in ["restore_start", "norestore_start"] {
        let begun = Instant::now();
        println!("{}", assert_fails(&lab, &mut client, start, words));
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(20), "{took:?}");
        client.act("enable_machine", "m").unwrap();
    }
    assert_ends_well(&lab, &mut host);
}

#[test]
fn start_times_out_when_qemu_never_connects_its_monitor() {
    assert_no_qemu("exec tail -f \"$0\"", &["waited 1.0 s", "QEMU to answer on its monitor"]);
    // Its child still holds its stderr after the timeout, and ends by itself.
    assert_no_qemu("sleep 1.2 & echo 'thinking' >&2; exec tail -f \"$0\"", &["waited 1.0 s", "thinking"]);
}

#[test]
fn restore_works_when_a_wrapper_becomes_qemu() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.fake_qemu("7.2.0", &format!("exec {} \"$@\"", lab.qemu().system.display())).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_restores(&lab, &mut client);
    assert_ends_well(&lab, &mut host);
}

#[test]
fn start_fails_and_leaves_nothing_when_a_wrapper_stays_alive() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.host_yaml("timeouts: {restore_start: 2}", "").unwrap();
    lab.fake_qemu("7.2.0", &format!("{} \"$@\"\nexit", lab.qemu().system.display())).unwrap();
    lab.set_jail("auto").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    println!("{}", assert_fails(&lab, &mut client, "restore_start", &["QEMU exited", "fork"]));
    assert_ends_well(&lab, &mut host);
}

#[test]
fn reason_has_the_exit_status_when_qemu_ends_at_once() {
    assert_no_qemu("echo 'not today' >&2; exit 3", &["QEMU exited with code 3", "not today"]);
    assert_no_qemu("exit 0", &["QEMU exited with code 0"]);
    assert_no_qemu("kill -SEGV $$", &["QEMU was killed by signal 11"]);
}

#[test]
fn host_stops_its_machines_when_it_is_terminated() {
    let formats = SnapshotFormat::ALL.map(|format| (format!("{format:?}").to_lowercase(), format));
    let machines: Vec<_> =
        formats.iter().map(|(name, format)| (name.as_str(), Guest::Micro, *format)).collect();
    let lab = Lab::new(&machines).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for name in lab.names() {
        assert_eq!(client.act("restore_start", name).unwrap(), good());
    }
    assert_eq!(lab.leftovers().unwrap().len(), 4 * 4);
    assert_ends_well(&lab, &mut host);
}

#[test]
fn host_finishes_a_restore_when_it_is_terminated() {
    let lab = Lab::new(&[LARGE]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let watch = FileWatch::new(&lab.folder("m").dir).unwrap();
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    watch.wait(&QEMU_BEGINS, SOON).unwrap();
    host.signal(Signal::TERM).unwrap();
    assert_eq!(client.next_message().unwrap(), good());
    assert_eq!(host.wait().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}

#[test]
fn reason_names_the_snapshot_when_it_is_damaged() {
    for format in SnapshotFormat::ALL {
        let lab = Lab::new(&[("m", Guest::Micro, format)]).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        let snapshot = &lab.folder("m").snapshot;
        let whole = fs::read(snapshot).unwrap();
        let half = &whole[..whole.len() / 2];
        let path = snapshot.display().to_string();
        for (content, word) in [
            (half, "truncated or corrupt"),
            (b"PK\x03\x04", "is no memory snapshot"),
            (b"", "is empty, so it is no memory snapshot"),
        ] {
            fs::write(snapshot, content).unwrap();
            println!("{}", assert_fails(&lab, &mut client, "restore_start", &[&path, word]));
            fs::write(snapshot, &whole).unwrap();
            assert_eq!(client.act("enable_machine", "m").unwrap(), good());
        }
        fs::remove_file(snapshot).unwrap();
        assert_fails(&lab, &mut client, "restore_start", &[&path, "No such file"]);
        fs::write(snapshot, &whole).unwrap();
        assert_restores(&lab, &mut client);
        assert_ends_well(&lab, &mut host);
    }
}

/// Some of these snapshots decompress to not a single byte, for which QEMU would wait forever.
#[test]
fn restore_fails_at_once_when_the_snapshot_turns_into_garbage() {
    for format in SnapshotFormat::ALL {
        let lab = Lab::new(&[("m", Guest::Micro, format)]).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        let snapshot = &lab.folder("m").snapshot;
        let whole = fs::read(snapshot).unwrap();
        for good_part in [format.magic().len(), 8, whole.len() / 2] {
            fs::write(snapshot, [&whole[..good_part], &[0x5a; 100_000]].concat()).unwrap();
            let begun = Instant::now();
            let path = snapshot.display().to_string();
            let reason = assert_fails(&lab, &mut client, "restore_start", &["snapshot", &path]);
            println!("failed after {:?}: {reason}", begun.elapsed());
            let causes = ["is truncated or corrupt", "is no memory snapshot"];
            assert!(causes.iter().any(|words| reason.contains(words)), "{reason}");
            client.act("enable_machine", "m").unwrap();
        }
        fs::write(snapshot, whole).unwrap();
        assert_restores(&lab, &mut client);
        assert_ends_well(&lab, &mut host);
    }
}

#[test]
fn reason_names_the_disk_when_it_is_missing() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let disk = &lab.folder("m").disk;
    let away = disk.with_extension("away");
    fs::rename(disk, &away).unwrap();
    let path = disk.display().to_string();
    for start in ["restore_start", "norestore_start"] {
        let words = [path.as_str(), "No such file or directory"];
        println!("{}", assert_fails(&lab, &mut client, start, &words));
        let refused = client.act("enable_machine", "m").unwrap();
        assert_reason(&refused, &["cannot be used yet", &path]);
        fs::rename(&away, disk).unwrap();
        assert_eq!(client.act("enable_machine", "m").unwrap(), good());
        fs::rename(disk, &away).unwrap();
    }
    fs::rename(&away, disk).unwrap();
    assert_restores(&lab, &mut client);
    assert_ends_well(&lab, &mut host);
}

#[test]
fn reason_names_the_folder_when_there_is_no_space_for_the_overlay() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let Some(tiny) = requirement::MOUNT.or_skip(TinyDisk::mount(lab.cwd(), 64).unwrap()) else { return };
    let folder = tiny.path().display().to_string();
    lab.change_yaml("disposable_copy_dir:", &format!("disposable_copy_dir: {folder}")).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let words = ["qemu-img", "cannot make an overlay", &folder, "No space left", "Check the space"];
    println!("{}", assert_fails(&lab, &mut client, "restore_start", &words));
    assert!(Path::new(&folder).read_dir().unwrap().next().is_none());
    assert_ends_well(&lab, &mut host);
}

/// Starts a host with this limit of open files.
fn host_with_limit(lab: &Lab, limit: u32) -> RunningHost {
    let limited = |command: &mut Command| {
        let mut sh = Command::new("sh");
        let script = format!("ulimit -Sn {limit}; exec \"$@\"");
        sh.args(["-c", &script, "sh"]).arg(command.get_program()).args(command.get_args());
        sh.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        *command = sh;
    };
    RunningHost::start_with(lab.cwd(), limited).unwrap()
}

fn soft_limit(pid: impl std::fmt::Display) -> String {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

/// Returns the nice value that the host can give itself.
fn best_nice() -> String {
    let nice = Command::new("nice").args(["-n", "-10", "nice"]).output().unwrap();
    String::from_utf8(nice.stdout).unwrap().trim().to_owned()
}

#[test]
fn children_have_the_limit_of_open_files_and_the_priority_that_the_host_was_started_with() {
    let lab = Lab::new(&[MICRO]).unwrap();
    // QEMU 10.0 raises its own limit, so a wrapper records the one that it was given.
    let given = |name: &str, program: &Path| {
        let file = lab.cwd().root().join(name);
        let script =
            format!("echo $(ulimit -Sn) $(nice) > {}; exec {} \"$@\"", file.display(), program.display());
        let wrapped = lab.cwd().script(&format!("wrapped-{name}"), &script).unwrap();
        lab.change_yaml(&program.display().to_string(), &wrapped.display().to_string()).unwrap();
        file
    };
    // The wrappers write files.
    lab.set_jail("off").unwrap();
    let limits = [given("qemu-img", &lab.qemu().img), given("qemu-system", &lab.qemu().system)];
    let mut host = host_with_limit(&lab, 321);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    for limit in limits {
        assert_eq!(fs::read_to_string(&limit).unwrap().trim(), "321 0", "{}", limit.display());
    }
    let stat = fs::read_to_string(format!("/proc/{}/stat", host.pid())).unwrap();
    assert_eq!(stat.split_whitespace().nth(18), Some(best_nice().as_str()), "{stat}");
    assert_ne!(soft_limit(host.pid()), "321", "the host has not raised its own");
    assert_ends_well(&lab, &mut host);
}

/// Puts a program in QEMU's place that starts a helper, as with `swtpm`. The helper cleans up when QEMU has
/// ended, unless it is killed before.
fn with_helper(lab: &Lab) {
    let (root, qemu) = (lab.cwd().root().display(), lab.qemu().system.display());
    let helper = format!("{{ cat {root}/pipe; rm {root}/lock; }} >/dev/null 2>&1 &");
    let script = format!(
        "case \"$1\" in --version) exec {qemu} \"$@\";; esac\n\
         [ -e {root}/lock ] && {{ echo 'qemu-helper: locked' >&2; exit 1; }}\n: > {root}/lock\n{helper}\n\
         exec 9>{root}/pipe\nexec {qemu} \"$@\""
    );
    let made = Command::new("mkfifo").arg(lab.cwd().root().join("pipe")).status().unwrap();
    assert!(made.success());
    let path = lab.cwd().script("qemu-with-helper", &script).unwrap();
    lab.change_yaml(&qemu.to_string(), &path.display().to_string()).unwrap();
}

/// Adds a pidfile, which QEMU removes only when it ends cleanly.
fn with_pidfile(lab: &Lab) -> std::path::PathBuf {
    let file = lab.folder("m").dir.join("qemu.pid");
    let argument = file.display().to_string();
    lab.change_start_args("m", |args| args.extend(["-pidfile".to_owned(), argument])).unwrap();
    file
}

#[test]
fn helper_of_qemu_cleans_up_when_its_qemu_is_ended() {
    let lab = Lab::new(&[MICRO]).unwrap();
    // The helper is another process.
    lab.set_jail("off").unwrap();
    with_helper(&lab);
    let pidfile = with_pidfile(&lab);
    lab.ahead("instant: auto, standby: auto").unwrap();
    let lock = lab.cwd().root().join("lock");
    let ended_well = |what: &str| {
        assert!(!lock.exists(), "the helper was killed: {what}");
        assert!(!pidfile.exists(), "QEMU was killed: {what}");
    };
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    // The host makes the next standby by itself only for a machine that no task has.
    let lock_of_task = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock_of_task).unwrap()["success"], true);
    for action in ["stop", "restore_start", "stop"] {
        assert_eq!(client.act("prepare", "m").unwrap(), good());
        assert!(lock.exists() && pidfile.exists(), "there is no standby");
        assert_eq!(client.act("stop", "m").unwrap(), good(), "discarded");
        ended_well("a standby that is discarded");
        assert_eq!(client.act("restore_start", "m").unwrap(), good(), "{action}");
        assert!(lock.exists() && pidfile.exists(), "there is no run");
        assert_eq!(client.act("stop", "m").unwrap(), good(), "{action}");
        ended_well("a run that is stopped");
    }
    assert_eq!(client.act("prepare", "m").unwrap(), good());
    assert_ends_well(&lab, &mut host);
    ended_well("a clean end of the host");
    // A host that is killed ends no process. The next host does, in the same order.
    let mut killed = lab.host().unwrap();
    assert_eq!(killed.client().unwrap().act("prepare", "m").unwrap(), good());
    killed.kill().unwrap();
    let mut host = lab.host().unwrap();
    assert_eq!(host.client().unwrap().act("prepare", "m").unwrap(), good());
    assert_ends_well(&lab, &mut host);
    ended_well("the end of a host that died");
}
