//! Whole analyses by Cuckoo3, on the host and on Cuckoo3's own manager, and the agent's first answers.
//!
//! Both managers get the same machines, CWD and samples, one after the other. The steps are those of Cuckoo3's log.

use std::env;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use machinery_testkit::guest::AGENT_PORT;
use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::lab::{AnalysisLab, Lab, Manager, Report, TestNetwork};

use super::figures::{Figures, Kind, Place, Unit};
use super::host::{Mode, Served, Session};
use super::plan::Plan;
use super::turns::{self, ms, timed};
use crate::run::{Context, Result, note};

/// The duration of a sample's run.
const RUN: Duration = Duration::from_secs(12);
/// The RAM of an analysis guest, in MiB.
const RAM_MIB: u32 = 256;
const AGENT_TIMEOUT: Duration = Duration::from_secs(30);

/// A step of a task: its first and its last moment in Cuckoo3's log, and its kinds with the host and with Cuckoo3.
type StepKinds = (&'static str, &'static str, Kind, Kind);

const STEPS: [StepKinds; 6] = [
    (
        "submitted",
        "restore begins",
        step("host: until the restore", BEFORE),
        step("Cuckoo3: until the restore", BEFORE),
    ),
    ("restore begins", "machine runs", step("host: restore", RESTORE), step("Cuckoo3: restore", RESTORE)),
    ("machine runs", "agent answers", step("host: agent", AGENT), step("Cuckoo3: agent", AGENT)),
    (
        "payload is delivered",
        "sample runs",
        step("host: payload", PAYLOAD),
        step("Cuckoo3: payload", PAYLOAD),
    ),
    ("stop begins", "machine is off", step("host: stop", STOP), step("Cuckoo3: stop", STOP)),
    ("machine is off", "report", step("host: report", REPORT), step("Cuckoo3: report", REPORT)),
];
const BEFORE: &str = "a task's identification, its preparation, and its wait for a machine";
const RESTORE: &str = "Cuckoo3 requests the start of a machine, until it has the answer";
const AGENT: &str = "the machine runs, until its agent accepts a connection";
const PAYLOAD: &str = "the agent gets the payload, and starts the sample";
const STOP: &str = "Cuckoo3 requests the stop of a machine, until it has the answer";
const REPORT: &str = "the machine is off, until the report is written";

const fn step(name: &'static str, what: &'static str) -> Kind {
    Kind { name, what, unit: Unit::Ms }
}

const fn rate(name: &'static str) -> Kind {
    Kind {
        name,
        what: "the first submission until the last report, all samples at once",
        unit: Unit::PerHour,
    }
}

/// Measures, if `$CUCKOO3_PYTHON` names a Python with Cuckoo3.
pub fn measure(plan: &Plan, figures: &mut Figures) -> Result<()> {
    let python = env::var_os("CUCKOO3_PYTHON").filter(|python| !python.is_empty()).map(PathBuf::from);
    let python = python.ok_or_else(|| "CUCKOO3_PYTHON names no Python with Cuckoo3".to_owned())?;
    let agent = if Agent::Cuckoo.is_known() { Agent::Cuckoo } else { Agent::Own };
    figures.about.push(("agent", format!("{agent:?}")));
    let machines = u8::try_from(plan.machines).context(|| "counting the machines".to_owned())?;
    let lab = AnalysisLab::new(&python, machines, agent)?;
    let mut lab = lab.ok_or_else(|| "analyses need root, for a network of their own".to_owned())?;
    figures.about.push(("qemu", lab.lab().qemu().version()?));
    lab.run_for(RUN);
    measure_agent(lab.lab(), plan, figures)?;
    lab.lab().ahead("instant: auto, standby: on")?;
    for manager in [Manager::Host, Manager::Cuckoo] {
        note(&format!("{} analyses on {machines} machines: {manager:?}", plan.analyses));
        measure_analyses(&lab, manager, plan, figures)?;
    }
    Ok(())
}

fn measure_analyses(lab: &AnalysisLab, manager: Manager, plan: &Plan, figures: &mut Figures) -> Result<()> {
    let place = Place::Analyses(plan.machines);
    let cuckoo = lab.start(manager)?;
    let tokens: Vec<_> = (1..=plan.analyses).map(|number| format!("{manager:?}-{number}")).collect();
    let analyses = lab.submit(&tokens.iter().map(String::as_str).collect::<Vec<_>>())?;
    let reports =
        analyses.iter().map(|analysis| Ok(lab.wait(&cuckoo, analysis)?)).collect::<Result<Vec<_>>>()?;
    cuckoo.end()?;
    let ended = |report: &Report| Some(report.timeline.begun + report.timeline.at("report")?);
    let begun = reports.iter().map(|report| report.timeline.begun).min();
    if let (Some(begun), Some(ended)) = (begun, reports.iter().filter_map(ended).max()) {
        let hours = ended.duration_since(begun).as_secs_f64() / 3600.0;
        let kind = rate(if manager == Manager::Host { "host: tasks" } else { "Cuckoo3: tasks" });
        figures.add(place, kind, reports.len() as f64 / hours);
    }
    for report in &reports {
        for (from, to, host, cuckoo3) in STEPS {
            if let Some(took) = report.timeline.between(from, to) {
                figures.add(place, if manager == Manager::Host { host } else { cuckoo3 }, ms(took));
            }
        }
    }
    let complete =
        reports.iter().filter(|report| report.dropped.len() == 3 && report.errors.is_empty()).count();
    note(&format!("{complete} of {} analyses have all files, and no error", reports.len()));
    Ok(())
}

/// Measures how long the agent takes to answer after a restore, in each mode.
fn measure_agent(lab: &Lab, plan: &Plan, figures: &mut Figures) -> Result<()> {
    turns::take(
        plan.modes.clone(),
        |_| plan.rounds,
        |mode, rounds| {
            let served = Served { cwd: lab.cwd(), machinery: "qemu", memory_mib: RAM_MIB };
            let mut session = Session::start_in(Some(lab.network()), served, mode)?;
            for round in 0..=rounds {
                session.prepare("m1")?;
                session.act("restore_start", "m1")?;
                let restored = Instant::now();
                ask(lab, "GET /")?;
                let answered = ms(restored.elapsed());
                let ((), first) = timed(|| ask(lab, "POST /mkdtemp"))?;
                let ((), later) = timed(|| ask(lab, "POST /mkdtemp"))?;
                session.act("stop", "m1")?;
                if round > 0 {
                    for (kind, took) in agent_kinds(mode).into_iter().zip([answered, first, later]) {
                        figures.add(Place::Qemu(RAM_MIB), kind, took);
                    }
                }
            }
            session.end()
        },
    )
}

fn agent_kinds(mode: Mode) -> [Kind; 3] {
    let names = match mode {
        Mode::Plain => ["plain: agent answers", "plain: first POST", "plain: later POST"],
        Mode::Instant => ["instant: agent answers", "instant: first POST", "instant: later POST"],
        Mode::Standby => ["standby: agent answers", "standby: first POST", "standby: later POST"],
    };
    let what = [
        "a restore is answered, until the agent has answered a GET",
        "the first POST after that, until it is answered",
        "another POST after that, until it is answered",
    ];
    [0, 1, 2].map(|at| Kind { name: names[at], what: what[at], unit: Unit::Ms })
}

/// Sends the agent a request, and reads the answer to its end.
fn ask(lab: &Lab, request: &str) -> Result<()> {
    let what = || format!("asking the agent: {request}");
    let address = SocketAddr::from((TestNetwork::machine(1), AGENT_PORT));
    let connect = || TcpStream::connect_timeout(&address, AGENT_TIMEOUT);
    let mut agent = lab.network().inside(connect)?.context(what)?;
    agent.set_read_timeout(Some(AGENT_TIMEOUT)).context(what)?;
    let form = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 10\r\n\r\nprefix=tmp";
    let rest = if request.starts_with("POST") { form } else { "\r\n" };
    write!(agent, "{request} HTTP/1.0\r\n{rest}").context(what)?;
    let mut answer = String::new();
    agent.read_to_string(&mut answer).context(what)?;
    match answer.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(format!("{}: it says {answer}", what()).into()),
    }
}
