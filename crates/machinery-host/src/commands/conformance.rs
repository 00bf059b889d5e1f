//! `conformance`: puts a built plugin to every requirement of the interface, without its source.
//!
//! What is broken may end the process or never come back. So each requirement is tried by a child, which is this
//! same program and has that one requirement to try; where it does not tell what came of it, its end does.
//!
//! ```text
//! conformance FILE ─▶ for each requirement: conformance FILE --only PROMISE --outcome FILE ─▶ its outcome
//!                                            └─▶ ended before it told one ─▶ broken, and how it ended
//! ```
//!
//! All that a child writes is in a folder of its own, which goes with it, however it ends.

use std::env;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::Args;
use machinery::config::ConfigFile;
use machinery::{Error, Result};
use machinery_conformance::{BackendSpec, Check, CheckFailure, Report, names, run_some, setup_in};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::plugin::trust;

/// What the command line says.
#[derive(Debug, Clone, Args)]
pub struct Conformance {
    /// The plugin, a shared library
    #[arg(required_unless_present = "list")]
    file: Option<PathBuf>,
    /// Its configuration, as it would stand in conf/machineries
    #[arg(long, value_name = "YAML", required_unless_present = "list")]
    config: Option<PathBuf>,
    /// A machinery-host.yaml that has a section for it
    #[arg(long, value_name = "YAML")]
    host_config: Option<PathBuf>,
    /// A machine to try things with; can be given several times [default: all that are configured]
    #[arg(long = "machine", value_name = "NAME")]
    machines: Vec<String>,
    /// A requirement to try; can be given several times [default: all]
    #[arg(long, value_name = "REQUIREMENT")]
    only: Vec<String>,
    /// A requirement that is not tried; can be given several times
    #[arg(long, alias = "without", value_name = "REQUIREMENT")]
    skip: Vec<String>,
    /// How long a call may take that ought to succeed
    #[arg(long, alias = "patience", value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// Say what the requirements are, and try nothing
    #[arg(long)]
    pub list: bool,
    /// Where to write what came of it: for a child
    #[arg(long, hide = true, value_name = "FILE")]
    outcome: Option<PathBuf>,
}

/// What a child tells of a requirement.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    name: String,
    broken: Option<String>,
    skipped: Option<String>,
}

impl Outcome {
    fn of(check: &Check) -> Self {
        let (broken, skipped) = match &check.result {
            Ok(()) => (None, None),
            Err(CheckFailure::Failed(how)) => (Some(how.clone()), None),
            Err(CheckFailure::Skipped(why)) => (None, Some(why.clone())),
        };
        Outcome { name: check.name.clone(), broken, skipped }
    }

    fn check(self) -> Check {
        let unmet = self.broken.map(CheckFailure::Failed).or(self.skipped.map(CheckFailure::Skipped));
        Check { name: self.name, result: unmet.map_or(Ok(()), Err) }
    }
}

/// Tries what is asked for; `tell` hears of each requirement as soon as it was tried.
///
/// # Errors
/// A file that is not there, a requirement that there is none of, a plugin that others can change.
pub fn run(asked: &Conformance, allow_insecure: bool, tell: impl Fn(&Check)) -> Result<Report> {
    let (Some(file), Some(config)) = (&asked.file, &asked.config) else {
        return Err(Error::configuration("a plugin and its configuration are needed"));
    };
    if let Some(outcome) = &asked.outcome {
        return try_and_tell(asked, file, config, outcome);
    }
    for file in [file, config].into_iter().chain(&asked.host_config) {
        if !file.is_file() {
            return Err(Error::configuration(format!("there is no file {}", file.display())));
        }
    }
    expect_requirements(asked.only.iter().chain(&asked.skip))?;
    trust::resolve("conformance", file, allow_insecure)
        .map_err(|error| Error::configuration(error.to_string()))?;
    let wanted = names().into_iter().filter(|name| asked.only.is_empty() || is_among(&asked.only, name));
    let mut checks = Vec::new();
    for requirement in wanted {
        let check = if is_among(&asked.skip, requirement) {
            left_out(requirement)
        } else {
            in_child(asked, file, config, requirement)?
        };
        tell(&check);
        let is_open = check.name == requirement;
        checks.push(check);
        if !is_open {
            // It cannot even be opened, and that is the same for every requirement.
            break;
        }
    }
    Ok(Report::new(checks))
}

fn left_out(requirement: &str) -> Check {
    let why = CheckFailure::Skipped("left out on the command line".to_owned());
    Check { name: requirement.to_owned(), result: Err(why) }
}

fn is_among(names: &[String], name: &str) -> bool {
    names.iter().any(|known| known == name)
}

fn expect_requirements<'a>(given: impl Iterator<Item = &'a String>) -> Result<()> {
    let unknown: Vec<&str> = given.map(String::as_str).filter(|name| !names().contains(name)).collect();
    match unknown.first() {
        None => Ok(()),
        Some(name) => Err(Error::configuration(format!("there is no requirement '{name}'"))
            .advice("See `cuckoo-machinery conformance --list`")),
    }
}

/// Has a child try the requirement.
fn in_child(asked: &Conformance, file: &Path, config: &Path, requirement: &str) -> Result<Check> {
    let folder = scratch()?;
    let outcome = folder.path().join("outcome.json");
    let own = env::current_exe()
        .map_err(|error| Error::environment(format!("cannot find this program: {error}")))?;
    let mut child = machinery::command(own);
    child.arg("conformance").arg(file).arg("--config").arg(config);
    child.args(asked.host_config.iter().flat_map(|file| ["--host-config".into(), file.clone()]));
    child.args(asked.machines.iter().flat_map(|name| ["--machine", name]));
    child
        .args(["--timeout", &asked.timeout.to_string(), "--only", requirement])
        .arg("--outcome")
        .arg(&outcome);
    // Whatever it makes for the while is gone with the folder, also if it cannot clear up itself.
    child.env("TMPDIR", folder.path());
    // It tells by its outcome; what a plugin may print there is not ours.
    child.stdout(Stdio::null());
    let ended =
        child.status().map_err(|error| Error::environment(format!("cannot start {child:?}: {error}")))?;
    let told = fs::read(&outcome).ok().and_then(|text| serde_json::from_slice::<Outcome>(&text).ok());
    Ok(told.map_or_else(|| ended_in(requirement, ended), Outcome::check))
}

fn ended_in(requirement: &str, ended: ExitStatus) -> Check {
    let how = match ended.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit code {}", ended.code().unwrap_or_default()),
    };
    let broken = CheckFailure::Failed(format!("the process ended in it, with {how}"));
    Check { name: requirement.to_owned(), result: Err(broken) }
}

/// In the child: tries what it is to try, and writes down what came of it.
fn try_and_tell(asked: &Conformance, file: &Path, config: &Path, outcome: &Path) -> Result<Report> {
    let folder = scratch()?;
    let host_config = asked.host_config.as_deref().map(ConfigFile::read).transpose()?;
    let setup = setup_in(folder.path(), ConfigFile::read(config)?, host_config)?;
    let machines: Vec<&str> = asked.machines.iter().map(String::as_str).collect();
    let spec = BackendSpec::new(&machines).timeout(Duration::from_secs(asked.timeout));
    let only: Vec<&str> = asked.only.iter().map(String::as_str).collect();
    let report = run_some(file, &setup, &spec, &only);
    if let Some(check) = report.checks().first() {
        let text = serde_json::to_vec(&Outcome::of(check))
            .map_err(|error| Error::failed(format!("an outcome cannot be written as JSON: {error}")))?;
        fs::write(outcome, text).map_err(|error| Error::io("write the outcome", outcome, &error))?;
    }
    Ok(report)
}

fn scratch() -> Result<TempDir> {
    tempfile::Builder::new().prefix("machinery-").tempdir().map_err(|error| {
        Error::environment(format!("cannot make a scratch folder: {error}"))
            .advice("Point TMPDIR to a folder that can be written to")
    })
}
