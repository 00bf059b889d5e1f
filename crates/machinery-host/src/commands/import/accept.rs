//! Decides by the plugin's findings whether new machines are accepted.

use machinery::config::ConfigFile;
use machinery::{Error, Level, Report, Result};

/// Asks the plugin to check the content of the file before it is written.
pub type Check<'a> = &'a dyn Fn(ConfigFile) -> Result<Report>;

/// Returns the problems that the plugin finds in the file, without their lines.
///
/// # Errors
/// The plugin fails.
pub fn problems_of(file: &ConfigFile, check: Check<'_>) -> Result<Vec<String>> {
    let report = check(ConfigFile { path: file.path.clone(), text: file.text.clone() })?;
    Ok(problems(&report).map(without_lines).collect())
}

fn problems(report: &Report) -> impl Iterator<Item = &str> {
    let problems = report.findings().iter().filter(|finding| finding.level == Level::Problem);
    problems.map(|finding| finding.text.as_str())
}

/// Returns the text of a problem without the lines of its places, which a new machine may shift.
pub fn without_lines(problem: &str) -> String {
    let is_line = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    problem.split(':').filter(|part| !is_line(part)).collect::<Vec<_>>().join(":")
}

/// Expects that the plugin finds no problem that refuses the new machines. With the problems that are `known`, each other
/// one does. Returns another problem that the plugin has found.
///
/// # Errors
/// The plugin refuses the machines, or has to accept them and fails.
pub fn expect_accepted(
    checked: Result<Report>,
    is_refusal: impl Fn(&str) -> bool,
    known: Option<&[String]>,
) -> Result<Option<String>> {
    let report = match checked {
        Ok(report) => report,
        Err(error) if known.is_some() => return Err(error),
        Err(error) => {
            tracing::warn!(%error, "the machines were not checked");
            return Ok(None);
        }
    };
    let is_new = |text: &str| known.is_some_and(|known| !known.contains(&without_lines(text)));
    let (refused, others): (Vec<&str>, Vec<&str>) =
        problems(&report).partition(|text| is_new(text) || is_refusal(text));
    match Error::all(refused.into_iter().map(Error::configuration).collect()) {
        Some(problems) => Err(problems),
        None => Ok(others.first().map(|first| first.lines().map(str::trim).collect::<Vec<_>>().join(" "))),
    }
}
