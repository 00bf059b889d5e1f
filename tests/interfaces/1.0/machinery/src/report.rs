//! What `check` finds: all of it at once, the good and the bad.

use serde::{Deserialize, Serialize};

use crate::Error;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Good,
    /// Works, with a drawback.
    Warning,
    /// Will not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// What was found, and what to do about it.
    pub text: String,
}

/// The findings of a `check`, in the order they were made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    findings: Vec<Finding>,
}

impl Report {
    /// Something that is as it should be.
    pub fn good(&mut self, text: impl Into<String>) {
        self.findings.push(Finding { level: Level::Good, text: text.into() });
    }

    /// Something that works, with a drawback.
    pub fn warning(&mut self, text: impl Into<String>) {
        self.findings.push(Finding { level: Level::Warning, text: text.into() });
    }

    /// Something that will not work.
    pub fn problem(&mut self, error: &Error) {
        self.findings.push(Finding { level: Level::Problem, text: error.to_string() });
    }

    /// Notes a problem if there is one, and hands the value on.
    pub fn keep<T>(&mut self, result: crate::Result<T>) -> Option<T> {
        result.map_err(|error| self.problem(&error)).ok()
    }

    /// Takes over all findings of another report.
    pub fn append(&mut self, other: Report) {
        self.findings.extend(other.findings);
    }

    /// All findings.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Whether anything will not work.
    pub fn has_problems(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Problem)
    }
}
