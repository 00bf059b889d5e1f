//! Checks a plugin against the requirements, and reports the results.

use std::path::Path;

use machinery::Setup;

use crate::keep;
use crate::plugin_under_test::PluginUnderTest;
use crate::report::{Check, CheckFailure, Report, Result, failed};
use crate::requirements::{REQUIREMENTS, Requirement};
use crate::session::Session;
use crate::spec::BackendSpec;

/// Checks the plugin file against every requirement.
pub fn run(plugin: &Path, setup: &Setup, spec: &BackendSpec) -> Report {
    run_some(plugin, setup, spec, &names())
}

/// Checks the plugin file against the named requirements only. An unknown name fails.
pub fn run_some(plugin: &Path, setup: &Setup, spec: &BackendSpec, names: &[&str]) -> Report {
    match PluginUnderTest::open(plugin, setup, spec) {
        Ok(plugin) => check_all(&plugin, names),
        Err(why) => {
            let why = format!("opening {}: {why}", plugin.display());
            Report::new(vec![Check::new("open", Err(CheckFailure::Failed(why)))])
        }
    }
}

/// Returns the names of all requirements, in the order in which they are checked.
pub fn names() -> Vec<&'static str> {
    REQUIREMENTS.iter().map(|requirement| requirement.name).collect()
}

/// Returns the meaning of the requirement of that name, if there is one.
pub fn meaning(name: &str) -> Option<&'static str> {
    REQUIREMENTS.iter().find(|requirement| requirement.name == name).map(|requirement| requirement.meaning)
}

fn check_all(plugin: &PluginUnderTest<'_>, names: &[&str]) -> Report {
    let known = REQUIREMENTS.iter().filter(|requirement| names.contains(&requirement.name));
    let mut checks: Vec<_> = known.map(|requirement| check_one(plugin, requirement)).collect();
    let skipped = plugin.spec.skip.iter().map(|(name, _)| name.as_str());
    let unknown = names.iter().copied().chain(skipped).filter(|name| meaning(name).is_none());
    checks.extend(
        unknown
            .map(|name| Check::new(name, Err(CheckFailure::Failed("there is no such requirement".into())))),
    );
    Report::new(checks)
}

fn check_one(plugin: &PluginUnderTest<'_>, requirement: &Requirement) -> Check {
    let result = result_of(plugin, requirement);
    Check { notes: plugin.take_notes(), ..Check::new(requirement.name, result) }
}

fn result_of(plugin: &PluginUnderTest<'_>, requirement: &Requirement) -> Result {
    if let Some(reason) = plugin.spec.skip_reason(requirement.name) {
        return Err(CheckFailure::Skipped(reason.to_owned()));
    }
    if let Some(call) = plugin.hung_call() {
        return Err(CheckFailure::Skipped(format!("the plugin is still in {call}")));
    }
    let folder = tempfile::tempdir().map_err(|error| failed("creating a scratch folder", &error))?;
    let result = in_session(plugin, folder.path(), requirement);
    keep::unless_passed(result, folder)
}

fn in_session(plugin: &PluginUnderTest<'_>, folder: &Path, requirement: &Requirement) -> Result {
    let mut session = Session::load(plugin, folder)?;
    let result = session.list_machines().and_then(|()| (requirement.check)(&session));
    let result = if requirement.since_1_1 { plugin.since_1_1(result) } else { result };
    let closed = session.close();
    // The first failure is the cause of the later ones.
    result.and(closed)
}
