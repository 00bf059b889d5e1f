//! `conformance`: checks a built plugin against every requirement of the interface, without its source.
//!
//! A faulty plugin may end the process or never return. So a child process checks each requirement. The child is
//! this same program. Its exit status is the result if it writes no outcome.
//!
//! ```text
//! conformance FILE ─▶ for each requirement: conformance FILE --only REQUIREMENT --outcome FILE ─▶ outcome
//!                                            └─▶ ended without an outcome ─▶ failed, with the exit status
//! ```
//!
//! Each child writes into a scratch folder of its own, which is removed after the child has ended.

use std::env;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::Args;
use machinery::config::ConfigFile;
use machinery::{Error, Result};
use machinery_conformance::{
    BackendSpec, Check, CheckFailure, Commands, HOST_PROCESS, Report, keeps_folders, names, run_some,
    setup_in,
};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::plugin::trust;

/// The arguments of the command.
#[derive(Debug, Clone, Args)]
pub struct Conformance {
    /// The plugin, a shared library
    #[arg(required_unless_present_any = ["list", "host_process"])]
    file: Option<PathBuf>,
    /// The plugin's configuration file, as in conf/machineries
    #[arg(long, value_name = "YAML", required_unless_present_any = ["list", "host_process"])]
    config: Option<PathBuf>,
    /// A machinery-host.yaml with a section for the plugin
    #[arg(long, value_name = "YAML")]
    host_config: Option<PathBuf>,
    /// Check with this machine; can be repeated [default: all configured machines]
    #[arg(long = "machine", value_name = "NAME")]
    machines: Vec<String>,
    /// Check only this requirement; can be repeated [default: all]
    #[arg(long, value_name = "REQUIREMENT")]
    only: Vec<String>,
    /// Skip this requirement; can be repeated
    #[arg(long, alias = "without", value_name = "REQUIREMENT")]
    skip: Vec<String>,
    /// Time limit of each call that has to succeed
    #[arg(long, alias = "patience", value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// Rounds of requirements that may pass by chance; 100 are a soak test
    #[arg(long, value_name = "NUMBER", default_value_t = 3)]
    rounds: usize,
    /// Shell command that ends the running machine $MACHINERY_MACHINE
    #[arg(long, value_name = "COMMAND")]
    kill: Option<String>,
    /// Shell command that makes restores of $MACHINERY_MACHINE fail
    #[arg(long = "break", value_name = "COMMAND", requires = "mend")]
    breaking: Option<String>,
    /// Shell command that repairs the effect of --break
    #[arg(long, value_name = "COMMAND", requires = "breaking")]
    mend: Option<String>,
    /// Shell command that pauses the running machine $MACHINERY_MACHINE
    #[arg(long, value_name = "COMMAND", requires = "resume")]
    pause: Option<String>,
    /// Shell command that resumes a machine after --pause
    #[arg(long, value_name = "COMMAND", requires = "pause")]
    resume: Option<String>,
    /// Shell command that prints each leftover of a run as a line
    #[arg(long, value_name = "COMMAND")]
    leftovers: Option<String>,
    /// List the requirements, and check none
    #[arg(long)]
    pub list: bool,
    /// Run the plugin for this request: for a child process that is killed, or whose resources are counted
    #[arg(long, hide = true, value_name = "FILE")]
    pub host_process: Option<PathBuf>,
    /// Write the outcome to this file: for a child process
    #[arg(long, hide = true, value_name = "FILE")]
    outcome: Option<PathBuf>,
}

impl Conformance {
    /// Returns the given shell commands, each with its option.
    fn commands(&self) -> Vec<(&str, &str)> {
        let given = [
            ("--kill", &self.kill),
            ("--break", &self.breaking),
            ("--mend", &self.mend),
            ("--pause", &self.pause),
            ("--resume", &self.resume),
            ("--leftovers", &self.leftovers),
        ];
        given.into_iter().filter_map(|(option, command)| Some((option, command.as_deref()?))).collect()
    }

    /// Returns the shell commands as functions of the backend spec.
    fn author_commands(&self, scratch: &Path) -> Commands {
        let pair = |[first, second]: [&Option<String>; 2]| Some([first.clone()?, second.clone()?]);
        Commands {
            kill: self.kill.clone(),
            breakage: pair([&self.breaking, &self.mend]),
            pause: pair([&self.pause, &self.resume]),
            leftovers: self.leftovers.clone(),
            scratch: scratch.to_owned(),
        }
    }
}

/// The result of a requirement, as a child process writes it.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    name: String,
    failed: Option<String>,
    skipped: Option<String>,
    notes: Vec<String>,
}

impl Outcome {
    fn of(check: &Check) -> Self {
        let (failed, skipped) = match &check.result {
            Ok(()) => (None, None),
            Err(CheckFailure::Failed(how)) => (Some(how.clone()), None),
            Err(CheckFailure::Skipped(why)) => (None, Some(why.clone())),
        };
        Outcome { name: check.name.clone(), failed, skipped, notes: check.notes.clone() }
    }

    fn into_check(self) -> Check {
        let failure = self.failed.map(CheckFailure::Failed).or(self.skipped.map(CheckFailure::Skipped));
        Check { notes: self.notes, ..Check::new(&self.name, failure.map_or(Ok(()), Err)) }
    }
}

/// Checks the requirements. `on_begin` gets the name of each one, and `on_check` each result at once.
///
/// # Errors
/// A file is missing, a requirement is unknown, or other users can change the plugin.
pub fn run(
    options: &Conformance,
    allow_insecure: bool,
    on_begin: impl Fn(&str),
    on_check: impl Fn(&Check),
) -> Result<Report> {
    let (Some(file), Some(config)) = (&options.file, &options.config) else {
        return Err(Error::configuration("a plugin and its configuration are needed"));
    };
    if let Some(outcome) = &options.outcome {
        return check_and_write(options, file, config, outcome);
    }
    for file in [file, config].into_iter().chain(&options.host_config) {
        if !file.is_file() {
            return Err(Error::configuration(format!("there is no file {}", file.display())));
        }
    }
    expect_requirements(options.only.iter().chain(&options.skip))?;
    trust::resolve("conformance", file, allow_insecure)
        .map_err(|error| Error::configuration(error.to_string()))?;
    let wanted = names().into_iter().filter(|name| options.only.is_empty() || is_among(&options.only, name));
    let mut checks = Vec::new();
    for requirement in wanted {
        on_begin(requirement);
        let check = if is_among(&options.skip, requirement) {
            skipped(requirement)
        } else {
            check_in_child(options, file, config, requirement)?
        };
        on_check(&check);
        let is_open = check.name == requirement;
        checks.push(check);
        if !is_open {
            // The plugin cannot be opened, so every other requirement would fail alike.
            break;
        }
    }
    Ok(Report::new(checks))
}

fn skipped(requirement: &str) -> Check {
    let why = CheckFailure::Skipped("skipped on the command line".to_owned());
    Check::new(requirement, Err(why))
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

/// Checks the requirement in a child process.
fn check_in_child(options: &Conformance, file: &Path, config: &Path, requirement: &str) -> Result<Check> {
    let folder = scratch_folder()?;
    let outcome = folder.path().join("outcome.json");
    let own = env::current_exe()
        .map_err(|error| Error::environment(format!("cannot find this program: {error}")))?;
    let mut child = machinery::command(own);
    child.arg("conformance").arg(file).arg("--config").arg(config);
    child.args(options.host_config.iter().flat_map(|file| ["--host-config".into(), file.clone()]));
    child.args(options.machines.iter().flat_map(|name| ["--machine", name]));
    child.args(options.commands().into_iter().flat_map(|(option, command)| [option, command]));
    child.args(["--timeout", &options.timeout.to_string(), "--rounds", &options.rounds.to_string()]);
    child.args(["--only", requirement]).arg("--outcome").arg(&outcome);
    // So temporary files are removed with the folder, even if the child cannot remove them.
    child.env("TMPDIR", folder.path());
    // The outcome is in the file. The plugin may print anything.
    child.stdout(Stdio::null());
    let status =
        child.status().map_err(|error| Error::environment(format!("cannot start {child:?}: {error}")))?;
    let written = fs::read(&outcome).ok().and_then(|text| serde_json::from_slice::<Outcome>(&text).ok());
    let mut check = written.map_or_else(|| ended_early(requirement, status), Outcome::into_check);
    if let (Err(CheckFailure::Failed(how)), true) = (&mut check.result, keeps_folders()) {
        how.push_str(&format!("\n      kept {}", folder.keep().display()));
    }
    Ok(check)
}

fn ended_early(requirement: &str, status: ExitStatus) -> Check {
    let how = match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or_default()),
    };
    let failure = CheckFailure::Failed(format!("the process ended in it, with {how}"));
    Check::new(requirement, Err(failure))
}

/// Checks the requirements in this process, and writes the first outcome to the file.
fn check_and_write(options: &Conformance, file: &Path, config: &Path, outcome: &Path) -> Result<Report> {
    let folder = scratch_folder()?;
    let host_config = options.host_config.as_deref().map(ConfigFile::read).transpose()?;
    let setup = setup_in(folder.path(), ConfigFile::read(config)?, host_config)?;
    let machines: Vec<&str> = options.machines.iter().map(String::as_str).collect();
    let own = env::current_exe()
        .map_err(|error| Error::environment(format!("cannot find this program: {error}")))?;
    let spec = BackendSpec::new(&machines)
        .timeout(Duration::from_secs(options.timeout))
        .rounds(options.rounds)
        .host_program(own, HOST_PROCESS)
        .commands(&options.author_commands(folder.path()));
    let only: Vec<&str> = options.only.iter().map(String::as_str).collect();
    let report = run_some(file, &setup, &spec, &only);
    if keeps_folders() && !report.passed() {
        // The folder is in that of the parent process, which reports it.
        let _ = folder.keep();
    }
    if let Some(check) = report.checks().first() {
        let text = serde_json::to_vec(&Outcome::of(check))
            .map_err(|error| Error::failed(format!("an outcome cannot be written as JSON: {error}")))?;
        fs::write(outcome, text).map_err(|error| Error::io("write the outcome", outcome, &error))?;
    }
    Ok(report)
}

fn scratch_folder() -> Result<TempDir> {
    tempfile::Builder::new().prefix("machinery-").tempdir().map_err(|error| {
        Error::environment(format!("cannot make a scratch folder: {error}"))
            .advice("Set TMPDIR to a writable folder")
    })
}
