//! Analyses by CAPE: on the host with our module `hosted`, and with CAPE's own module `kvm`.
//!
//! CAPE's own code runs, with a PostgreSQL of its own, from its scheduler to its module. Its guest manager is replaced: a
//! guest's run is only a wait. The program `measure.py` beside the module's tests runs CAPE, and returns the times of the
//! phases of each task.
//!
//! | contestant | module | machines |
//! | --- | --- | --- |
//! | `host` | `hosted` | domains of libvirt, by the host's machinery `kvm` |
//! | `CAPE` | `kvm`, through libvirt's Python | the same domains |
//! | `host (qemu)` | `hosted` | QEMU processes with the same guest, by the host's machinery `qemu` |

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::host;
use machinery_testkit::lab::{KvmLab, Lab};
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;

use super::steps::{CAPE, HOST, HOST_QEMU, RESTORE, RUN, STOP, TASKS, step};
use crate::bench::figures::{Figures, Kind, Place};
use crate::bench::host::{Mode, Served, Session};
use crate::bench::kvm;
use crate::bench::plan::{Plan, guest};
use crate::run::{CHECKOUT, Context, Result, note, output, succeeds};

/// The RAM of a guest, in MiB. The machinery `kvm` prepares domains from this size on.
const RAM_MIB: u32 = 512;

/// The steps of a task: their first and their last phases.
const STEPS: [(&str, &str, Kind); 4] = [
    ("submitted", "start", step("until the restore", "a task's wait for CAPE's scheduler and for a machine")),
    ("start", "runs", step(RESTORE, "CAPE requests the start of a machine, until its module returns")),
    ("stop", "off", step(STOP, "CAPE requests the stop of a machine, until its module returns")),
    ("off", "finished", step("end", "the machine is off, until CAPE has ended the task")),
];

/// The times of a task's phases, in seconds.
type Task = BTreeMap<String, f64>;

/// A checkout of CAPE, in `$CAPE_SOURCE`, and a Python with its packages, `$CAPE_PYTHON`.
pub struct Cape {
    source: PathBuf,
    python: PathBuf,
}

impl Cape {
    /// Returns the CAPE that the variables name.
    pub fn given() -> Option<Self> {
        // An empty path is none.
        let given = |name| std::path::absolute(env::var_os(name)?).ok();
        Some(Cape { source: given("CAPE_SOURCE")?, python: given("CAPE_PYTHON")? })
    }

    /// Measures all contestants.
    pub fn measure(&self, plan: &Plan, figures: &mut Figures) -> Result<()> {
        if !succeeds(Command::new(&self.python).args(["-c", "import libvirt"])) {
            let python = self.python.display();
            return Err(
                format!("{python} has no libvirt: complete its folder by `cargo xtask cape-env`").into()
            );
        }
        let names: Vec<String> = (1..=plan.machines).map(|number| format!("m{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.on_domains(&names, plan, figures)?;
        let machines: Vec<_> =
            names.iter().map(|name| (*name, guest(RAM_MIB), SnapshotFormat::Plain)).collect();
        let lab = Lab::new(&machines)?;
        self.on_host(HOST_QEMU, "qemu", lab.cwd(), &names, plan, figures)
    }

    fn on_domains(&self, names: &[&str], plan: &Plan, figures: &mut Figures) -> Result<()> {
        note(&format!("{} domains of libvirt are made", names.len()));
        let machines: Vec<_> = names.iter().map(|name| (*name, guest(RAM_MIB))).collect();
        let lab = KvmLab::new(&machines)?;
        figures.about.push(("libvirt", kvm::version(&lab)?));
        self.on_host(HOST, "kvm", lab.cwd(), names, plan, figures)?;
        let conf = lab.cwd().root().join("kvm.conf");
        lab.cwd().write(&conf, kvm_conf(&lab, names))?;
        self.run(CAPE, &conf, plan, figures)
    }

    /// Measures with a host, whose machines have standbys at the begin.
    fn on_host(
        &self,
        contestant: &'static str,
        machinery: &'static str,
        cwd: &ScratchCwd,
        names: &[&str],
        plan: &Plan,
        figures: &mut Figures,
    ) -> Result<()> {
        let served = Served { cwd, machinery, memory_mib: RAM_MIB * names.len() as u32 };
        let mut session = Session::start(served, Mode::Standby)?;
        names.iter().try_for_each(|name| session.prepare(name))?;
        let exported = host::run(cwd, &["export", "cape"])?;
        if exported.code != Some(0) {
            return Err(format!("the host exports no configuration of CAPE: {}", exported.stderr).into());
        }
        let conf = cwd.root().join("hosted.conf");
        cwd.write(&conf, exported.stdout)?;
        self.run(contestant, &conf, plan, figures)?;
        session.end()
    }

    /// Measures with the module that has this configuration.
    fn run(&self, contestant: &'static str, conf: &Path, plan: &Plan, figures: &mut Figures) -> Result<()> {
        note(&format!("{} analyses by CAPE on {} machines: {contestant}", plan.analyses, plan.machines));
        let mut measure = Command::new(&self.python);
        measure.args(["-B", "-m", "tests.measure"]).arg(conf).env("CAPE_SOURCE", &self.source);
        measure.args([plan.analyses.to_string(), RUN.as_secs().to_string()]);
        let measured = output(measure.current_dir(Path::new(CHECKOUT).join("integrations/cape")))?;
        let tasks: Vec<Task> = serde_json::from_str(&measured)
            .context(|| format!("reading the times of CAPE's tasks: {measured}"))?;
        add(&tasks, contestant, Place::Cape(plan.machines, RAM_MIB), figures);
        Ok(())
    }
}

/// Adds the figures of the tasks.
fn add(tasks: &[Task], contestant: &'static str, place: Place, figures: &mut Figures) {
    let all = |phase| tasks.iter().filter_map(move |task| task.get(phase).copied());
    let begun = all("submitted").fold(f64::INFINITY, f64::min);
    let ended = all("finished").fold(f64::NEG_INFINITY, f64::max);
    figures.add(place, TASKS.by(contestant), tasks.len() as f64 * 3600.0 / (ended - begun));
    for task in tasks {
        for (from, to, kind) in STEPS {
            if let (Some(from), Some(to)) = (task.get(from), task.get(to)) {
                figures.add(place, kind.by(contestant), (to - from) * 1000.0);
            }
        }
    }
}

/// Returns the configuration of CAPE's module `kvm`.
fn kvm_conf(lab: &KvmLab, names: &[&str]) -> String {
    let dsn = lab.libvirtd().dsn();
    let mut conf = format!("[kvm]\nmachines = {}\ninterface = lo\ndsn = {dsn}\n", names.join(","));
    for name in names {
        let machine = lab.machine(name);
        conf += &format!(
            "[{name}]\nlabel = {}\nplatform = windows\nip = {}\narch = x64\ntags = x64\nsnapshot = {SNAPSHOT}\n",
            machine.label, machine.ip
        );
    }
    conf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_the_times_between_the_phases_of_a_task() {
        let phases = ["submitted", "start", "runs", "stop", "off", "finished"];
        let task = |times: [f64; 6]| phases.map(str::to_owned).into_iter().zip(times).collect::<Task>();
        let tasks = [task([10.0, 11.0, 11.5, 20.0, 20.25, 20.5]), task([10.5, 20.5, 21.0, 36.0, 37.0, 46.0])];
        let (mut figures, place) = (Figures::default(), Place::Cape(1, 512));
        add(&tasks, HOST, place, &mut figures);
        let samples = |kind| figures.of(place, kind).map(|figure| figure.samples.clone());
        assert_eq!(samples(TASKS), Some(vec![200.0]));
        let steps = [[1000.0, 10_000.0], [500.0, 500.0], [250.0, 1000.0], [250.0, 9000.0]];
        for ((_, _, kind), expected) in STEPS.into_iter().zip(steps) {
            assert_eq!(samples(kind), Some(expected.to_vec()), "{kind}");
        }
    }
}
