//! Whole analyses: Cuckoo3 from `cuckoo submit` to the report, with real machines.
//!
//! ```text
//! network of the lab   main process ── node ── result server     10.66.0.1   names and pages of a server
//!                                       │          ▲                 ▲
//!                              host ── QEMU m1 …   └── monitor, sample in the guest   10.66.0.11 …
//! ```
//!
//! The CWD is Cuckoo3's. Its programs run unchanged, in the environment of the Python that the lab gets. The machines are
//! [analysis guests](crate::guest::analysis).

mod cuckoo;
mod machines;
mod programs;
mod report;
mod server;
mod timeline;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

pub use self::cuckoo::Cuckoo;
pub use self::programs::Manager;
use self::programs::Programs;
pub use self::report::Report;
use self::server::Server;
pub use self::timeline::{Step, Timeline};
use super::Lab;
use crate::error::{Context, Error};
use crate::file_content::{ContentWatch, Wait};
use crate::guest::analysis::{Agent, MONITOR, SAMPLE, STAGER};
use crate::network::TestNetwork;
use crate::process::{self, CommandOutput};
use crate::{Result, capture};

/// The duration of a sample's run, after which Cuckoo3 stops the machine. An emulated guest is slow.
const RUN: Duration = Duration::from_secs(20);
/// The maximum time of a wait for a report, behind other analyses on a busy computer.
const ANALYSIS_TIMEOUT: Duration = Duration::from_secs(900);
/// The name of the sample. Cuckoo3 runs it as a Windows program.
pub const SAMPLE_NAME: &str = "invoice.exe";

/// A lab with Cuckoo3. Declare it before its [`Cuckoo`].
pub struct AnalysisLab {
    lab: Lab,
    programs: Programs,
    run: Duration,
    _server: Server,
}

/// A submitted analysis.
#[derive(Debug, Clone)]
pub struct Analysis {
    /// Cuckoo3's identifier.
    pub id: String,
    /// The content of its sample.
    pub sample: String,
}

impl AnalysisLab {
    /// Makes a lab with that many machines, which are restored instantly or from a standby. `python` is the Python of an
    /// environment that has Cuckoo3. `None` for a user who may not make a network.
    pub fn new(python: &Path, machines: u8, agent: Agent) -> Result<Option<Self>> {
        let Some(lab) = Lab::with_agents(machines, agent)? else { return Ok(None) };
        lab.ahead("instant: auto, standby: on")?;
        let server = Server::start(lab.network())?;
        let programs = Programs { python: python.to_owned(), cwd: lab.cwd().root().to_owned() };
        let lab = AnalysisLab { lab, programs, run: RUN, _server: server };
        lab.make_cwd()?;
        Ok(Some(lab))
    }

    /// Changes the duration of a sample's run.
    pub fn run_for(&mut self, run: Duration) {
        self.run = run;
    }

    /// Returns the lab of its machines.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Completes the CWD by Cuckoo3, with the stand-ins for its stager and its monitor.
    fn make_cwd(&self) -> Result<()> {
        let cwd = self.lab.cwd();
        let replaced = cwd.root().join("conf/cuckoo.yaml");
        fs::remove_file(&replaced).context(|| format!("removing {}", replaced.display()))?;
        self.run_main(&["createcwd", "--update-directories"])?;
        self.run_main(&["createcwd", "--regen-configs"])?;
        let mut migrate = self.programs.command("cuckoo.scripts.migrate", "main");
        migrate.args(["database", "all"]);
        succeed(migrate)?;
        cwd.change_cuckoo_yaml("listen_ip: 192.168.30.1", &format!("listen_ip: {}", TestNetwork::HOST))?;
        cwd.change_cuckoo_yaml(
            "path: /usr/bin/tcpdump",
            &format!("path: {}", capture::tcpdump()?.display()),
        )?;
        // The folders must be there, and may be empty.
        for signatures in ["network", "windows"] {
            cwd.write(Path::new("signatures/cuckoo/pattern").join(signatures).join(".keep"), "")?;
        }
        // It would send the sample's hash over the internet.
        cwd.change("conf/processing/virustotal.yaml", "enabled: True", "enabled: False")?;
        let monitor = Path::new("monitor/windows/amd64");
        cwd.write(monitor.join("default"), "threemon")?;
        let threemon = monitor.join("threemon");
        for (name, file, content) in [("stager", "tmstage.exe", STAGER), ("monitor", "threemon.sys", MONITOR)]
        {
            cwd.write(threemon.join(format!("default_{name}")), "1")?;
            cwd.write(threemon.join(name).join("1").join(file), content)?;
        }
        Ok(())
    }

    /// Starts Cuckoo3, and waits until it accepts submissions.
    pub fn start(&self, manager: Manager) -> Result<Cuckoo> {
        let mut command = self.programs.main(manager)?;
        self.lab.network().attach(&mut command);
        Cuckoo::start(command, self.lab.cwd().root())
    }

    /// Submits a sample for each of these tokens, which differ.
    pub fn submit(&self, tokens: &[&str]) -> Result<Vec<Analysis>> {
        let folder = tempfile::tempdir().context(|| "making a folder for samples".to_owned())?;
        let (mut paths, mut samples) = (Vec::new(), Vec::new());
        for token in tokens {
            let path = folder.path().join(token).join(SAMPLE_NAME);
            let sample = SAMPLE.replace("TOKEN", token);
            let written =
                fs::create_dir_all(path.with_file_name("")).and_then(|()| fs::write(&path, &sample));
            written.context(|| format!("writing {}", path.display()))?;
            samples.push(sample);
            paths.push(path.to_string_lossy().into_owned());
        }
        let run = self.run.as_secs().to_string();
        let mut args = vec!["submit", "--platform", "windows,10", "--orig-filename", "--timeout", &run];
        args.extend(paths.iter().map(String::as_str));
        let said = self.run_main(&args)?.stdout;
        let id_of = |path: &String| {
            let line = said.lines().find(|line| line.contains(path.as_str()))?;
            line.split_whitespace().find(|word| word.len() == "20260101-ABCDEF".len() && word.contains('-'))
        };
        let analysis = |(path, sample)| match id_of(path) {
            Some(id) => Ok(Analysis { id: id.to_owned(), sample }),
            None => Err(Error::new(format!("Cuckoo3 does not accept {path}. It said:\n{said}"))),
        };
        paths.iter().zip(samples).map(analysis).collect()
    }

    /// Waits for the end of an analysis, and returns its report.
    pub fn wait(&self, cuckoo: &Cuckoo, analysis: &Analysis) -> Result<Report> {
        let state = self.wait_for_end(cuckoo, analysis)?;
        if state != "finished" {
            return Err(self.failed(analysis, &state, cuckoo));
        }
        let timeline = cuckoo.timeline(&analysis.id);
        let timeline = timeline.ok_or_else(|| self.failed(analysis, "it is not in Cuckoo3's log", cuckoo))?;
        Report::read(&self.folder(&analysis.id), timeline)
            .map_err(|error| self.failed(analysis, &error.to_string(), cuckoo))
    }

    /// Waits for the end of an analysis whose task fails, and returns the task's state and errors.
    pub fn wait_for_failure(&self, cuckoo: &Cuckoo, analysis: &Analysis) -> Result<(String, Vec<String>)> {
        self.wait_for_end(cuckoo, analysis)?;
        report::failure(&self.folder(&analysis.id))
    }

    /// Waits for the end of an analysis, and returns its state.
    fn wait_for_end(&self, cuckoo: &Cuckoo, analysis: &Analysis) -> Result<String> {
        let folder = self.folder(&analysis.id);
        let path = folder.join("analysis.json");
        let watch = ContentWatch::new(&path)?;
        let ended = watch.wait_for(ANALYSIS_TIMEOUT, Some(cuckoo.fd()), || {
            // Cuckoo3 replaces the file in place, so that it may be incomplete.
            let text = fs::read_to_string(&path).unwrap_or_default();
            let analysis: Value = serde_json::from_str(&text).unwrap_or_default();
            let state = analysis["state"].as_str().unwrap_or_default();
            Ok(matches!(state, "finished" | "fatal_error" | "no_selected").then(|| state.to_owned()))
        })?;
        match ended {
            Wait::Found(state) => Ok(state),
            Wait::GaveUp(why) => Err(self.failed(analysis, &why, cuckoo)),
        }
    }

    fn failed(&self, analysis: &Analysis, why: &str, cuckoo: &Cuckoo) -> Error {
        let task = self.folder(&analysis.id).join("task_1/task.log");
        let log = fs::read_to_string(task).unwrap_or_default();
        Error::new(format!(
            "the analysis {} has no report: {why}. Its log:\n{log}\n{}",
            analysis.id,
            cuckoo.log()
        ))
    }

    fn folder(&self, id: &str) -> PathBuf {
        let (day, identifier) = id.split_once('-').unwrap_or((id, ""));
        self.lab.cwd().root().join("storage/analyses").join(day).join(identifier)
    }

    fn run_main(&self, arguments: &[&str]) -> Result<CommandOutput> {
        let mut command = self.programs.command("cuckoo.main", "main");
        command.args(arguments);
        succeed(command)
    }
}

fn succeed(command: Command) -> Result<CommandOutput> {
    let line = format!("{command:?}");
    let output = process::run_command(command)?;
    match output.code {
        Some(0) => Ok(output),
        code => Err(Error::new(format!("{line} ended with {code:?}:\n{}{}", output.stdout, output.stderr))),
    }
}
