//! The units under a real systemd, with real guests: who lives and who ends when a host stops, restarts, crashes or hangs.
//!
//! ```text
//! unshare: mounts, processes, cgroups of its own ─▶ systemd, with the units of this test alone ─▶ host ─▶ QEMU
//! ```
//!
//! The files are those of this computer, read-only except the test's own folders. Everything ends with the test. These tests
//! need root.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::{artifacts, host, requirement};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::json;

const HOST: &str = include_str!("../integrations/systemd/cuckoo-machinery.service");
const CLEANUP: &str = include_str!("../integrations/systemd/cuckoo-machinery-cleanup.service");
const UNIT: &str = "cuckoo-machinery.service";

const SOON: Duration = Duration::from_secs(60);
/// The pause between two questions to systemd, for whose answers there is no event.
const INTERVAL: Duration = Duration::from_millis(50);

/// Boots systemd. `$1` is the folder of the test, `$2` the name of its cgroup.
const BOOT: &str = r#"
set -eu
mount -t tmpfs tmpfs /run
mount -t proc proc /proc
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$2"
echo 0 > "/sys/fs/cgroup/$2/cgroup.procs"
mount --bind "$1" "$1"
mount -o remount,bind,ro /
exec unshare --cgroup sh -c '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    for systemd in /usr/lib/systemd/systemd /lib/systemd/systemd; do
        [ ! -x $systemd ] || exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$0/units" \
            SYSTEMD_GENERATOR_PATH="$0/none" $systemd --system --unit=ready.target --log-target=console --show-status=no
    done
    echo "systemd is not installed" >&2
' "$1"
"#;

/// A systemd, which ends with this value.
struct Systemd {
    unshare: Child,
    cgroup: String,
    lab: Lab,
}

/// Returns the text of a unit, with the programs of this build.
fn unit(text: &str, lab: &Lab) -> String {
    let (program, plugins) = (artifacts::program().unwrap(), artifacts::folder().unwrap());
    let program = format!("{} --plugin-dir {}", program.display(), plugins.display());
    let cwd = format!("CUCKOO_CWD={}", lab.cwd().root().display());
    text.replace("/usr/local/bin/cuckoo-machinery", &program).replace("CUCKOO_CWD=/srv/cuckoo", &cwd)
}

impl Systemd {
    /// Boots a systemd with the units, and starts the host with a lab of the machine `m`. `None` for a user who may not.
    fn boot(settings: &str) -> Option<Systemd> {
        let has_systemd = requirement::SYSTEMD.is_met(Path::new("/lib/systemd/systemd").exists());
        if !requirement::is_root() || !has_systemd {
            return None;
        }
        let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
        let folder = lab.cwd().root().parent().unwrap().to_owned();
        let units = folder.join("units");
        fs::create_dir_all(&units).unwrap();
        fs::write(units.join(UNIT), unit(HOST, &lab)).unwrap();
        fs::write(units.join("cuckoo-machinery-cleanup.service"), unit(CLEANUP, &lab)).unwrap();
        for target in ["ready", "sysinit", "basic", "shutdown"] {
            let alone = "[Unit]\nDefaultDependencies=no\n";
            fs::write(units.join(format!("{target}.target")), alone).unwrap();
        }
        let systemd = Systemd::spawn(lab, &folder);
        // The folders of the build and of the test may be in the home folder and in /tmp.
        systemd.configure("cuckoo-machinery-cleanup", "");
        systemd.configure("cuckoo-machinery", &format!("RestartSec=100ms\n{settings}"));
        systemd.wait_for("systemd", |systemd| {
            systemd.systemctl(&["is-active", "ready.target"]).status.success()
        });
        systemd.expect(&["start", UNIT]);
        Some(systemd)
    }

    fn spawn(lab: Lab, folder: &Path) -> Systemd {
        let cgroup = format!("test-{}", folder.file_name().unwrap().display());
        let log = fs::File::create(folder.join("systemd.log")).unwrap();
        // Ends with the thread of the test, also when the test is killed.
        let mut unshare = Command::new("setpriv");
        unshare.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts", "--ipc"]);
        unshare.args(["--fork", "--kill-child", "sh", "-c", BOOT, "boot"]);
        unshare.arg(folder).arg(&cgroup).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Systemd { unshare: unshare.spawn().unwrap(), cgroup, lab }
    }

    /// Replaces the drop-in of a unit.
    fn configure(&self, unit: &str, settings: &str) {
        let folder = self.lab.cwd().root().parent().unwrap().to_owned();
        let log = folder.join("units.log");
        let drop_ins = folder.join(format!("units/{unit}.service.d"));
        fs::create_dir_all(&drop_ins).unwrap();
        let text = format!(
            "[Service]\nProtectHome=no\nPrivateTmp=no\nStandardOutput=append:{log}\nStandardError=append:{log}\n{settings}\n",
            log = log.display()
        );
        fs::write(drop_ins.join("test.conf"), text).unwrap();
    }

    /// Returns the first process of the namespace, once there is one.
    fn first_process(&self) -> Option<Pid> {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).ok()?;
        Pid::from_raw(children.trim().parse().ok()?)
    }

    /// Runs a command beside this systemd.
    fn command(&self, words: &[&str]) -> Output {
        let target =
            self.first_process().map_or_else(|| "none".to_owned(), |pid| pid.as_raw_nonzero().to_string());
        let mut command = Command::new("nsenter");
        command.args(["--target", &target, "--mount", "--pid", "--cgroup"]).args(words).output().unwrap()
    }

    fn systemctl(&self, arguments: &[&str]) -> Output {
        self.command(&[&["systemctl"], arguments].concat())
    }

    #[track_caller]
    fn expect(&self, arguments: &[&str]) {
        let ran = self.systemctl(arguments);
        assert!(ran.status.success(), "systemctl {arguments:?}: {ran:?}\n{}", self.log());
    }

    /// Returns a property of the host's unit.
    fn property(&self, name: &str) -> String {
        let shown = self.systemctl(&["show", "--value", "--property", name, UNIT]).stdout;
        String::from_utf8(shown).unwrap().trim().to_owned()
    }

    #[track_caller]
    fn wait_for(&self, what: &str, mut is_so: impl FnMut(&Systemd) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < SOON, "waiting for {what}:\n{}", self.log());
            thread::sleep(INTERVAL);
        }
    }

    fn log(&self) -> String {
        let folder = self.lab.cwd().root().parent().unwrap();
        let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        format!("{}\n{}", read("systemd.log"), read("units.log"))
    }

    /// Kills the host.
    #[track_caller]
    fn kill(&self) {
        self.expect(&["kill", "--kill-who=main", "--signal=KILL", UNIT]);
    }

    /// Starts the machine, and returns its QEMU.
    #[track_caller]
    fn run(&self) -> Pid {
        let mut client = Client::connect(&self.lab.cwd().socket()).unwrap();
        let done = client.act("restore_start", "m").unwrap();
        assert_eq!(done, json!({"success": true}), "{}", self.log());
        self.lab.qemu_of("m").unwrap()
    }

    /// Waits for the host that follows the one with that process id, and expects that it has adopted that QEMU.
    #[track_caller]
    fn expect_adopted(&self, qemu: Pid, before: &str) {
        // In this order: the state may be that of the host before.
        self.wait_for("the next host", |systemd| {
            systemd.property("MainPID") != before && systemd.property("ActiveState") == "active"
        });
        let mut client = Client::connect(&self.lab.cwd().socket()).unwrap();
        let machine = client.machine("m").unwrap();
        assert_eq!(machine["state"], "running", "{machine}\n{}", self.log());
        assert_eq!(self.lab.qemu_of("m").unwrap(), qemu);
        self.lab.folder("m").wait_for_next_count(SOON).unwrap();
        self.expect_limits(qemu);
    }

    /// Expects that the QEMU has its limits, where this computer has the controllers.
    #[track_caller]
    fn expect_limits(&self, qemu: Pid) {
        let own = fs::read_to_string(format!("/proc/{}/cgroup", qemu.as_raw_nonzero())).unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned();
        let (_, below) = own.split_once(&self.cgroup).unwrap();
        let read = self.command(&["cat", &format!("/sys/fs/cgroup{below}/pids.max")]);
        if requirement::CONTROLLERS.is_met(read.status.success()) {
            assert_ne!(String::from_utf8(read.stdout).unwrap().trim(), "max", "{own}");
        }
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // All processes of the namespace end before the first one, and that one before its parent.
        match self.first_process() {
            Some(first) => drop(kill_process(first, Signal::KILL)),
            None => drop(self.unshare.kill()),
        }
        let _ = self.unshare.wait();
        let script = format!(
            "mount -t cgroup2 none /sys/fs/cgroup && find '/sys/fs/cgroup/{}' -depth -type d -exec rmdir {{}} +",
            self.cgroup
        );
        let mut remove = Command::new("unshare");
        remove.args(["--mount", "sh", "-c", &script]);
        let removed = host::run_command(remove);
        if !thread::panicking() {
            assert_eq!(removed.unwrap().code, Some(0), "the cgroup remains");
        }
    }
}

/// Waits for the end of the process.
#[track_caller]
fn expect_end(systemd: &Systemd, process: Pid) {
    let Ok(process) = pidfd_open(process, PidfdFlags::empty()) else { return };
    let limit = Timespec::try_from(SOON).unwrap();
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ended, 1, "QEMU runs on:\n{}", systemd.log());
}

/// The setting of a host that hands over.
fn handover() -> String {
    let line = HOST.lines().find(|line| line.starts_with("ExecStart=")).unwrap();
    let (program, plugins) = (artifacts::program().unwrap(), artifacts::folder().unwrap());
    let program = format!("{} --plugin-dir {}", program.display(), plugins.display());
    format!("ExecStart=\n{} --handover", line.replace("/usr/local/bin/cuckoo-machinery", &program))
}

#[test]
fn guest_outlives_a_crash_and_ends_when_the_service_stops() {
    // A value that systemd may set without CAP_SYS_RESOURCE, which a container lacks.
    let Some(systemd) = Systemd::boot("OOMScoreAdjust=300") else { return };
    let qemu = systemd.run();
    systemd.expect_limits(qemu);
    // The adjustment is the host's alone.
    let host = systemd.command(&["cat", &format!("/proc/{}/oom_score_adj", systemd.property("MainPID"))]);
    assert_eq!(host.stdout, b"300\n", "{host:?}");
    assert_eq!(fs::read_to_string(format!("/proc/{}/oom_score_adj", qemu.as_raw_nonzero())).unwrap(), "0\n");
    let nice = fs::read_to_string(format!("/proc/{}/stat", qemu.as_raw_nonzero())).unwrap();
    assert_eq!(
        nice.rsplit(')').next().unwrap().split_whitespace().nth(16),
        Some("0"),
        "the priority is the host's alone"
    );
    // An isolated network has parameters, which the host sets.
    let mounts = systemd.command(&["cat", &format!("/proc/{}/mountinfo", systemd.property("MainPID"))]);
    let mounts = String::from_utf8(mounts.stdout).unwrap();
    assert!(mounts.lines().any(|mount| mount.contains(" /proc/sys/net rw,")), "{mounts}");
    for _ in 0..2 {
        let before = systemd.property("MainPID");
        systemd.kill();
        systemd.expect_adopted(qemu, &before);
    }
    systemd.expect(&["stop", UNIT]);
    assert!(systemd.lab.qemu_of("m").is_err(), "{}", systemd.log());
    // A host that has crashed can end no guest when the service stops.
    systemd.expect(&["start", UNIT]);
    let qemu = systemd.run();
    systemd.kill();
    systemd.expect(&["stop", UNIT]);
    expect_end(&systemd, qemu);
}

#[test]
fn guest_outlives_a_restart_only_if_the_host_hands_over_and_no_stop() {
    let Some(systemd) = Systemd::boot("") else { return };
    let qemu = systemd.run();
    systemd.expect(&["restart", UNIT]);
    expect_end(&systemd, qemu);
    systemd.configure("cuckoo-machinery", &handover());
    systemd.expect(&["daemon-reload"]);
    systemd.expect(&["restart", UNIT]);
    let qemu = systemd.run();
    for _ in 0..2 {
        let before = systemd.property("MainPID");
        systemd.expect(&["restart", UNIT]);
        systemd.expect_adopted(qemu, &before);
    }
    systemd.expect(&["stop", UNIT]);
    expect_end(&systemd, qemu);
}

#[test]
fn guest_ends_when_systemd_gives_the_host_up() {
    // The number of starts does not depend on their speed.
    let limit = "[Unit]\nStartLimitBurst=3\nStartLimitIntervalSec=1h";
    let Some(systemd) = Systemd::boot(limit) else { return };
    let qemu = systemd.run();
    systemd.wait_for("the end of restarts", |systemd| {
        if systemd.property("ActiveState") == "active" {
            systemd.systemctl(&["kill", "--kill-who=main", "--signal=KILL", UNIT]);
        }
        systemd.property("ActiveState") == "failed"
    });
    expect_end(&systemd, qemu);
    systemd.expect(&["reset-failed", UNIT]);
    systemd.expect(&["start", UNIT]);
    systemd.run();
    systemd.expect(&["stop", UNIT]);
}

#[test]
fn guest_outlives_a_host_that_hangs_and_a_replacement() {
    let Some(systemd) = Systemd::boot("WatchdogSec=2") else { return };
    let qemu = systemd.run();
    let before = systemd.property("MainPID");
    systemd.expect(&["kill", "--kill-who=main", "--signal=STOP", UNIT]);
    systemd.expect_adopted(qemu, &before);
    let before = systemd.property("MainPID");
    systemd.expect(&["reload", UNIT]);
    let upgraded = systemd.lab.run(&["upgrade"]).unwrap();
    assert_eq!(upgraded.code, Some(0), "{upgraded:?}");
    systemd.expect_adopted(qemu, "none");
    assert_eq!((systemd.property("MainPID"), systemd.property("SubState")), (before, "running".to_owned()));
    systemd.expect(&["stop", UNIT]);
    assert!(systemd.lab.qemu_of("m").is_err(), "{}", systemd.log());
}
