//! The findings of a `check`, good and bad.

use serde::{Deserialize, Serialize};

use crate::Error;

/// The level of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// It works.
    Good,
    /// It works, with a drawback.
    Warning,
    /// It does not work.
    Problem,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The level.
    pub level: Level,
    /// The finding, with advice.
    pub text: String,
}

/// The findings of a `check`, in the order in which they were added.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// Adds a finding of something that works.
    pub fn good(&mut self, text: impl Into<String>) {
        self.findings.push(Finding { level: Level::Good, text: text.into() });
    }

    /// Adds a finding of something that works with a drawback.
    pub fn warning(&mut self, text: impl Into<String>) {
        self.findings.push(Finding { level: Level::Warning, text: text.into() });
    }

    /// Adds a finding of something that does not work.
    pub fn problem(&mut self, error: &Error) {
        self.findings.push(Finding { level: Level::Problem, text: error.to_string() });
    }

    /// Adds the error as a problem, or returns the value.
    pub fn keep<T>(&mut self, result: crate::Result<T>) -> Option<T> {
        result.map_err(|error| self.problem(&error)).ok()
    }

    /// Adds all findings of another report.
    pub fn append(&mut self, other: Report) {
        self.findings.extend(other.findings);
    }

    /// Changes the text of each finding.
    #[must_use]
    pub fn map_text(mut self, change: impl Fn(String) -> String) -> Report {
        for finding in &mut self.findings {
            finding.text = change(std::mem::take(&mut finding.text));
        }
        self
    }

    /// Returns all findings.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Reports whether a finding is a problem.
    pub fn has_problems(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Problem)
    }
}
