//! The outcome of an import.

use machinery::{Error, Result};
use serde::Serialize;

/// The machines that an import added and skipped.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Imported {
    /// The names of the machines that were added to the file, or would be added.
    pub added: Vec<String>,
    /// The machines that were not added.
    pub skipped: Vec<Skipped>,
    /// Facts that the operator has to know.
    pub notes: Vec<String>,
    /// The text of the new entries, if nothing was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<String>,
}

/// A machine that was not added, although it has no fault.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The machine's name, or its folder's name if the machine is unfinished.
    pub name: String,
    /// The reason, as text.
    pub reason: String,
}

/// Collects all results, or returns all errors as one.
pub fn collect_all<T>(results: impl Iterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut problems = Vec::new();
    let values = results.filter_map(|result| result.map_err(|error| problems.push(error)).ok()).collect();
    match Error::all(problems) {
        None => Ok(values),
        Some(problems) => Err(problems),
    }
}
