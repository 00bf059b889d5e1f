//! The one error that crosses the interface.
//!
//! A message answers four questions: what was being done, to which machine, what went wrong, and
//! what to do about it. The kind is for programs (the host decides by it), the rest for people.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::text::cut;

/// This many problems are told one by one.
const MOST_PROBLEMS: usize = 200;

/// What a call of the interface returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is; the host's rules for an action go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operator's configuration is wrong.
    Configuration,
    /// Something on this host is missing or forbidden: a binary, a permission, an interface.
    Environment,
    /// The machinery cannot do this at all. The machine stays in use.
    Unsupported,
    /// The machine already is in the state the action leads to.
    StateReached,
    /// The machine is in a state from which the action cannot start, or ended in a wrong one.
    UnexpectedState,
    /// The deadline passed.
    Timeout,
    /// There is no machine with that name.
    NoSuchMachine,
    /// The plugin's code panicked.
    PluginPanicked,
    /// The plugin answered something that makes no sense.
    PluginMisbehaved,
    /// The action was tried and failed.
    #[serde(other)]
    Failed,
}

impl ErrorKind {
    /// Reports whether the error shows a fault of the plugin itself, rather than an action that failed.
    pub fn is_plugin_fault(self) -> bool {
        matches!(self, ErrorKind::PluginPanicked | ErrorKind::PluginMisbehaved)
    }
}

/// Where in a configuration file an error is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// Counted from 1, when it is known.
    pub line: Option<usize>,
    /// The key, dotted from the top of the file, such as `machines.win10.ip`.
    pub key: Option<String>,
}

/// A failure with its context: what was being done, to which machine, what went wrong, and what to
/// do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Error(Box<Parts>);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Parts {
    kind: ErrorKind,
    reason: String,
    action: Option<String>,
    machine: Option<String>,
    place: Option<Place>,
    advice: Option<String>,
}

impl Error {
    /// An error of that kind; `reason` says what went wrong.
    pub fn new(kind: ErrorKind, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Error(Box::new(Parts { kind, reason, action: None, machine: None, place: None, advice: None }))
    }

    /// A wrong configuration.
    pub fn configuration(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Configuration, reason)
    }

    /// Something this host lacks or forbids.
    pub fn environment(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Environment, reason)
    }

    /// An action that was tried and failed.
    pub fn failed(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Failed, reason)
    }

    /// A deadline that passed.
    pub fn timeout(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Timeout, reason)
    }

    /// A machine in the wrong state.
    pub fn unexpected_state(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::UnexpectedState, reason)
    }

    /// The machine already is where the action would bring it.
    pub fn state_reached(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::StateReached, reason)
    }

    /// Something the machinery cannot do.
    pub fn unsupported(what: &str) -> Self {
        Error::new(ErrorKind::Unsupported, format!("this machinery does not support {what}"))
    }

    /// A name that no machine has.
    pub fn no_such_machine(name: &str) -> Self {
        Error::new(ErrorKind::NoSuchMachine, format!("Machine with name {name} does not exist"))
    }

    /// An answer of a plugin that makes no sense.
    pub fn misbehaved(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::PluginMisbehaved, reason)
    }

    /// An I/O error on a path; `doing` is a phrase such as `read the snapshot`.
    pub fn io(doing: &str, path: &Path, error: &std::io::Error) -> Self {
        let advice = match error.kind() {
            std::io::ErrorKind::NotFound => Some("Check that the path is right"),
            std::io::ErrorKind::PermissionDenied => {
                Some("Check the permissions of the path and the user the host runs as")
            }
            std::io::ErrorKind::StorageFull => Some("Free some space on that file system"),
            _ => None,
        };
        let new = Error::environment(format!("cannot {doing} {}: {error}", path.display()));
        match advice {
            Some(advice) => new.advice(advice),
            None => new,
        }
    }

    /// Several problems as one error of the first one's kind; `None` when there are none. Of very many
    /// the first are told, and how many there are.
    pub fn all(mut problems: Vec<Error>) -> Option<Self> {
        match problems.len() {
            0 => None,
            1 => problems.pop(),
            count => {
                let told = problems.iter().take(MOST_PROBLEMS).map(|problem| format!("  - {problem}"));
                let mut list = told.collect::<Vec<_>>().join("\n");
                if count > MOST_PROBLEMS {
                    list += &format!("\n  - and {} more", count - MOST_PROBLEMS);
                }
                Some(Error::new(problems[0].kind(), format!("{count} problems:\n{list}")))
            }
        }
    }

    /// Adds a detail to the description, such as the hypervisor's own message. An empty detail adds nothing.
    #[must_use]
    pub fn detail(mut self, detail: &str) -> Self {
        if !detail.trim().is_empty() {
            self.0.reason = format!("{}: {detail}", self.0.reason);
        }
        self
    }

    /// Says what was being done, unless that has been said nearer to the cause.
    #[must_use]
    pub fn action(mut self, action: impl Into<String>) -> Self {
        self.0.action.get_or_insert_with(|| action.into());
        self
    }

    /// Says to which machine, unless that has been said.
    #[must_use]
    pub fn machine(mut self, machine: impl Into<String>) -> Self {
        self.0.machine.get_or_insert_with(|| machine.into());
        self
    }

    /// Sets the advice, which replaces an earlier one. The advice is a full sentence without its full stop.
    #[must_use]
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Sets the advice unless there is one already: for advice that fits many errors.
    #[must_use]
    pub fn default_advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice.get_or_insert_with(|| advice.into());
        self
    }

    /// Says where in a configuration file it is.
    #[must_use]
    pub fn place(mut self, place: Place) -> Self {
        self.0.place.get_or_insert(place);
        self
    }

    /// The same with each of its texts cut to that length, and a note where one was.
    pub(crate) fn cut(mut self, longest: usize) -> Self {
        let Parts { kind: _, reason, action, machine, place, advice } = &mut *self.0;
        let shorten = |text: &mut String| *text = cut(std::mem::take(text), longest);
        [action, machine, advice].into_iter().flatten().for_each(shorten);
        shorten(reason);
        if let Some(Place { file, line: _, key }) = place {
            key.iter_mut().for_each(shorten);
            *file = cut(file.to_string_lossy().into_owned(), longest).into();
        }
        self
    }

    /// Reports whether the plugin is at fault: it panicked, or its answer was nonsense.
    pub fn is_plugin_fault(&self) -> bool {
        matches!(self.kind(), ErrorKind::PluginPanicked | ErrorKind::PluginMisbehaved)
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What went wrong, without the context.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// Where in a configuration file it is, if it is in one.
    pub fn placed(&self) -> Option<&Place> {
        self.0.place.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { kind: _, reason, action, machine, place, advice } = &*self.0;
        match (action, machine) {
            (Some(action), Some(machine)) => write!(f, "{action} of machine '{machine}' failed: ")?,
            (Some(action), None) => write!(f, "{action} failed: ")?,
            _ => {}
        }
        if let Some(place) = place {
            write!(f, "{place}: ")?;
        }
        if let (None, Some(machine)) = (action, machine) {
            write!(f, "machine '{machine}': ")?;
        }
        let reason = reason.trim_end().trim_end_matches('.');
        f.write_str(reason)?;
        match advice {
            Some(advice) => write!(f, ". {}.", advice.trim_end_matches('.')),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        match &self.key {
            Some(key) => write!(f, ": {key}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_says_what_which_why_and_what_to_do() {
        let error = Error::failed("QEMU exited with code 1")
            .action("restore_start")
            .machine("win10_1")
            .advice("Look at its stderr");
        assert_eq!(
            error.to_string(),
            "restore_start of machine 'win10_1' failed: QEMU exited with code 1. Look at its stderr."
        );
    }

    #[test]
    fn the_nearest_context_stays() {
        let error = Error::failed("x").machine("inner").machine("outer");
        assert_eq!(error.to_string(), "machine 'inner': x");
    }

    #[test]
    fn advice_replaces_an_earlier_one_and_default_advice_does_not() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        let error = Error::io("read the snapshot", Path::new("/s"), &missing).advice("Take it anew");
        assert!(error.to_string().ends_with(". Take it anew."), "{error}");
        let error = error.default_advice("Look at the log");
        assert!(error.to_string().ends_with(". Take it anew."), "{error}");
        let error = Error::failed("x").default_advice("Look at the log");
        assert_eq!(error.to_string(), "x. Look at the log.");
    }

    #[test]
    fn detail_adds_nothing_when_it_is_empty() {
        assert_eq!(Error::failed("x").detail("").detail(" \n").to_string(), "x");
        assert_eq!(Error::failed("x").detail("y").to_string(), "x: y");
    }

    #[test]
    fn a_configuration_error_starts_with_its_place() {
        let place = Place {
            file: "/c/conf/machineries/qemu.yaml".into(),
            line: Some(7),
            key: Some("interface".into()),
        };
        let error = Error::configuration("'br9' does not exist").place(place);
        assert_eq!(error.to_string(), "/c/conf/machineries/qemu.yaml:7: interface: 'br9' does not exist");
        assert_eq!(
            error.action("loading").to_string(),
            "loading failed: /c/conf/machineries/qemu.yaml:7: interface: 'br9' does not exist"
        );
    }

    #[test]
    fn a_kind_from_a_newer_interface_reads_as_failed() {
        let kind: ErrorKind = serde_json::from_str("\"quantum_decoherence\"").unwrap();
        assert_eq!(kind, ErrorKind::Failed);
    }

    #[test]
    fn kind_is_a_plugin_fault_when_the_plugin_panicked_or_misbehaved() {
        for kind in [ErrorKind::PluginPanicked, ErrorKind::PluginMisbehaved] {
            assert!(kind.is_plugin_fault(), "{kind:?}");
        }
        for kind in [ErrorKind::Failed, ErrorKind::Timeout, ErrorKind::Unsupported, ErrorKind::Environment] {
            assert!(!kind.is_plugin_fault(), "{kind:?}");
        }
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_and_says_so() {
        let long = || "x".repeat(1000);
        let place = Place { file: long().into(), line: None, key: Some(long()) };
        let error = Error::failed(long()).action(long()).machine(long()).advice(long()).place(place);
        let text = error.cut(10).to_string();
        assert_eq!(text.matches("xxxxxxxxxx… (cut, it had 1000 bytes)").count(), 6, "{text}");
        assert!(!text.contains("xxxxxxxxxxx"), "{text}");
        assert_eq!(Error::failed("short").cut(10), Error::failed("short"));
    }

    #[test]
    fn several_problems_are_one_error() {
        assert_eq!(Error::all(vec![]), None);
        let one = Error::failed("a");
        assert_eq!(Error::all(vec![one.clone()]), Some(one.clone()));
        let both = Error::all(vec![one, Error::failed("b")]).unwrap().to_string();
        assert_eq!(both, "2 problems:\n  - a\n  - b");
        let many = Error::all(vec![Error::failed("a"); 100_000]).unwrap().to_string();
        assert!(many.starts_with("100000 problems:\n  - a\n"), "{many}");
        assert!(many.ends_with("  - a\n  - and 99800 more"), "{many}");
    }
}
