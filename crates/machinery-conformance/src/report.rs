//! What came of it: every requirement by name, and what was seen instead where it was not kept.

use std::fmt;

/// What a requirement comes to.
pub(super) type Result<T = (), E = CheckFailure> = std::result::Result<T, E>;

/// A requirement that was not kept, or not seen to be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckFailure {
    /// It was broken: how.
    Failed(String),
    /// It was not tried: why not.
    Skipped(String),
}

/// One requirement, by name. Shown, it is a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Its name.
    pub name: String,
    /// Whether it was kept.
    pub result: std::result::Result<(), CheckFailure>,
}

impl Check {
    pub(super) fn new(name: &str, result: Result) -> Self {
        Check { name: name.to_owned(), result }
    }

    fn failed(&self) -> bool {
        matches!(self.result, Err(CheckFailure::Failed(_)))
    }
}

/// All requirements that were asked for. Shown, it is a line for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    checks: Vec<Check>,
}

impl Report {
    /// What these came to.
    pub fn new(checks: Vec<Check>) -> Self {
        Report { checks }
    }

    /// The requirements, in the order in which they were tried.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// Whether none was broken. One that was not tried does not count against the plugin.
    pub fn passed(&self) -> bool {
        !self.checks.iter().any(Check::failed)
    }

    /// The names of those that were broken.
    pub fn broken(&self) -> Vec<&str> {
        self.named(Check::failed)
    }

    /// The names of those that were not tried.
    pub fn skipped(&self) -> Vec<&str> {
        self.named(|check| matches!(check.result, Err(CheckFailure::Skipped(_))))
    }

    fn named(&self, which: impl Fn(&Check) -> bool) -> Vec<&str> {
        self.checks.iter().filter(|check| which(check)).map(|check| check.name.as_str()).collect()
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
        }
    }
}

/// Leaves with what was seen instead, unless the condition holds.
macro_rules! demand {
    ($condition:expr, $($what:tt)+) => {
        if !$condition {
            return Err($crate::CheckFailure::Failed(format!($($what)+)));
        }
    };
}
pub(super) use demand;
