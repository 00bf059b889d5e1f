//! Decides by the plugin's findings whether new machines are accepted.

use machinery::config::ConfigFile;
use machinery::{Error, Level, Report, Result};

use super::entry::Machine;
use super::{Check, Import};

/// Returns the problems of the file without the new machines, if the import refuses all others.
pub fn problems_before(import: &Import, file: &ConfigFile, check: Check<'_>) -> Result<Option<Vec<String>>> {
    let before = || check(ConfigFile { path: file.path.clone(), text: file.text.clone() });
    let report = import.is_strict.then(before).transpose()?;
    Ok(report.map(|report| problems(&report).map(without_lines).collect()))
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

/// Expects that the plugin accepts all new machines, and finds no problem beside those that are `known`. Returns a note
/// about other problems that it has found.
pub fn expect_accepted(
    import: &Import,
    checked: Result<Report>,
    new: &[Machine],
    known: Option<&[String]>,
) -> Result<Option<String>> {
    let report = match checked {
        Ok(report) => report,
        Err(error) if import.is_strict => return Err(error),
        Err(error) => {
            tracing::warn!(%error, "the machines were not checked");
            return Ok(None);
        }
    };
    let is_refusal = |text: &&str| {
        let is_new = known.is_some_and(|known| !known.contains(&without_lines(text)));
        is_new || new.iter().any(|machine| import.is_refusal(text, &machine.name))
    };
    let (refused, others): (Vec<&str>, Vec<&str>) = problems(&report).partition(is_refusal);
    match Error::all(refused.into_iter().map(Error::configuration).collect()) {
        Some(problems) => Err(problems),
        None => Ok(others.first().map(|first| {
            let first: Vec<&str> = first.lines().map(str::trim).collect();
            format!("`check` reports another problem of {}: {}", import.machinery(), first.join(" "))
        })),
    }
}
