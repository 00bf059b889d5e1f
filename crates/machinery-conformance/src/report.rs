//! The results: each requirement by name, with the reason if it failed or was skipped.

use std::fmt;

/// The result of a check.
pub(super) type Result<T = (), E = CheckFailure> = std::result::Result<T, E>;

/// The reason why a requirement did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckFailure {
    /// The plugin violates the requirement, as described.
    Failed(String),
    /// The requirement was not checked, for that reason.
    Skipped(String),
}

/// The result of one requirement. It is displayed as one line, and another one for each note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The name of the requirement.
    pub name: String,
    /// The result.
    pub result: std::result::Result<(), CheckFailure>,
    /// The violations that are no failure, because the plugin was built for an interface without that rule.
    pub notes: Vec<String>,
}

impl Check {
    /// Creates the result of a requirement, without notes.
    pub fn new(name: &str, result: std::result::Result<(), CheckFailure>) -> Self {
        Check { name: name.to_owned(), result, notes: Vec::new() }
    }

    fn failed(&self) -> bool {
        matches!(self.result, Err(CheckFailure::Failed(_)))
    }
}

/// The results of all requested requirements. It is displayed as one line for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    checks: Vec<Check>,
}

impl Report {
    /// Creates a report of these results.
    pub fn new(checks: Vec<Check>) -> Self {
        Report { checks }
    }

    /// Returns the results, in the order in which the requirements were checked.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// Reports whether no requirement failed. A skipped requirement is no failure.
    pub fn passed(&self) -> bool {
        !self.checks.iter().any(Check::failed)
    }

    /// Returns the names of the requirements that failed.
    pub fn broken(&self) -> Vec<&str> {
        self.names_of(Check::failed)
    }

    /// Returns the names of the requirements that were skipped.
    pub fn skipped(&self) -> Vec<&str> {
        self.names_of(|check| matches!(check.result, Err(CheckFailure::Skipped(_))))
    }

    /// Returns the numbers of results as one line, with the name and reason of each skipped requirement.
    pub fn summary(&self) -> String {
        let (failed, skipped) = (self.broken().len(), self.skipped().len());
        let mut summary =
            format!("{} passed, {failed} failed, {skipped} skipped", self.checks.len() - failed - skipped);
        let reasons = self.checks.iter().filter_map(|check| match &check.result {
            Err(CheckFailure::Skipped(why)) => Some(format!("{} ({why})", check.name)),
            _ => None,
        });
        if skipped > 0 {
            summary += &format!(": {}", reasons.collect::<Vec<_>>().join(", "));
        }
        summary
    }

    fn names_of(&self, filter: impl Fn(&Check) -> bool) -> Vec<&str> {
        self.checks.iter().filter(|check| filter(check)).map(|check| check.name.as_str()).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.checks.iter().try_for_each(|check| writeln!(f, "{check}"))
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.result {
            Ok(()) => write!(f, "pass  {}", self.name),
            Err(CheckFailure::Failed(how)) => write!(f, "FAIL  {}: {how}", self.name),
            Err(CheckFailure::Skipped(why)) => write!(f, "skip  {}: {why}", self.name),
        }?;
        self.notes.iter().try_for_each(|note| write!(f, "\nnote  {}: {note}", self.name))
    }
}

/// Creates the failure of an action with an error.
pub(super) fn failed(action: &str, error: &(impl fmt::Display + ?Sized)) -> CheckFailure {
    CheckFailure::Failed(format!("{action}: {error}"))
}

/// Returns a failure with the formatted text, unless the condition holds.
macro_rules! demand {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::report::CheckFailure::Failed(format!($($text)+)));
        }
    };
}
pub(super) use demand;
