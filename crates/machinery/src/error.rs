//! The error type of the interface.
//!
//! A message consists of the action, the machine, the reason and the advice. The host decides by the kind; the
//! other parts are for people.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::text::cut;

/// The maximum number of problems in one message.
const MAX_PROBLEMS: usize = 200;

/// The result of a call of the interface.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of an error. The host's reaction to a failed action depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operator's configuration is wrong.
    Configuration,
    /// Something on this host is missing or forbidden: a binary, a permission, an interface.
    Environment,
    /// The machinery does not support the action. The machine stays in the pool.
    Unsupported,
    /// The machine is already in the state that the action leads to.
    StateReached,
    /// The machine is in a state from which the action cannot start, or ended in a wrong state.
    UnexpectedState,
    /// The deadline passed.
    Timeout,
    /// No machine has that name.
    NoSuchMachine,
    /// Another action ended this one, such as a stop a preparation. That is no failure of the machine.
    Interrupted,
    /// The machine cannot do this now, such as a screenshot of a paused guest, and is in order.
    NotNow,
    /// The plugin's code panicked.
    PluginPanicked,
    /// The plugin returned an invalid value.
    PluginMisbehaved,
    /// The action failed.
    #[serde(other)]
    Failed,
}

/// The place of an error in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1, if it is known.
    pub line: Option<usize>,
    /// The key with all keys above it, such as `machines.win10.ip`.
    pub key: Option<String>,
}

/// A failure with its context: the action, the machine, the reason and the advice.
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
    /// Creates an error of that kind, with its reason.
    pub fn new(kind: ErrorKind, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Error(Box::new(Parts { kind, reason, action: None, machine: None, place: None, advice: None }))
    }

    /// Creates an error of a wrong configuration.
    pub fn configuration(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Configuration, reason)
    }

    /// Creates an error of something that this host lacks or forbids.
    pub fn environment(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Environment, reason)
    }

    /// Creates an error of an action that failed.
    pub fn failed(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Failed, reason)
    }

    /// Creates an error of a deadline that passed.
    pub fn timeout(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Timeout, reason)
    }

    /// Creates an error of a machine in the wrong state.
    pub fn unexpected_state(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::UnexpectedState, reason)
    }

    /// Creates an error of a machine that is already in the state that the action leads to.
    pub fn state_reached(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::StateReached, reason)
    }

    /// Creates an error of an action that another one has ended.
    pub fn interrupted(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::Interrupted, reason)
    }

    /// Creates an error of an action that works at another time.
    pub fn not_now(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::NotNow, reason)
    }

    /// Creates an error of an action or option that the machinery does not support.
    pub fn unsupported(what: &str) -> Self {
        Error::new(ErrorKind::Unsupported, format!("this machinery does not support {what}"))
    }

    /// Creates an error of a name that no machine has.
    pub fn no_such_machine(name: &str) -> Self {
        Error::new(ErrorKind::NoSuchMachine, format!("Machine with name {name} does not exist"))
    }

    /// Creates an error of a plugin that returned an invalid value.
    pub fn misbehaved(reason: impl Into<String>) -> Self {
        Error::new(ErrorKind::PluginMisbehaved, reason)
    }

    /// Creates an error of I/O on a path; `action` is a phrase such as `read the snapshot`.
    pub fn io(action: &str, path: &Path, error: &std::io::Error) -> Self {
        let advice = match error.kind() {
            std::io::ErrorKind::NotFound => Some("Check that the path is right"),
            std::io::ErrorKind::PermissionDenied => {
                Some("Check the permissions of the path and the user the host runs as")
            }
            std::io::ErrorKind::StorageFull => Some("Free some space on that file system"),
            _ => None,
        };
        let new = Error::environment(format!("cannot {action} {}: {error}", path.display()));
        match advice {
            Some(advice) => new.advice(advice),
            None => new,
        }
    }

    /// Combines several problems into one error, with the kind of the first; `None` if there are none. A long list
    /// is cut, and its length is added.
    pub fn all(mut problems: Vec<Error>) -> Option<Self> {
        match problems.len() {
            0 => None,
            1 => problems.pop(),
            count => {
                let lines = problems.iter().take(MAX_PROBLEMS).map(|problem| format!("  - {problem}"));
                let mut list = lines.collect::<Vec<_>>().join("\n");
                if count > MAX_PROBLEMS {
                    list += &format!("\n  - and {} more", count - MAX_PROBLEMS);
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

    /// Sets the action, unless it is already set nearer to the cause.
    #[must_use]
    pub fn action(mut self, action: impl Into<String>) -> Self {
        self.0.action.get_or_insert_with(|| action.into());
        self
    }

    /// Sets the machine, unless it is already set.
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

    /// Sets the advice, unless it is already set: for advice that fits many errors.
    #[must_use]
    pub fn default_advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice.get_or_insert_with(|| advice.into());
        self
    }

    /// Sets the place in a configuration file, unless it is already set.
    #[must_use]
    pub fn place(mut self, place: Place) -> Self {
        self.0.place.get_or_insert(place);
        self
    }

    /// Returns the error with each of its texts cut to that length.
    pub(crate) fn cut(mut self, max: usize) -> Self {
        let Parts { kind: _, reason, action, machine, place, advice } = &mut *self.0;
        let shorten = |text: &mut String| *text = cut(std::mem::take(text), max);
        [action, machine, advice].into_iter().flatten().for_each(shorten);
        shorten(reason);
        if let Some(Place { file, line: _, key }) = place {
            key.iter_mut().for_each(shorten);
            *file = cut(file.to_string_lossy().into_owned(), max).into();
        }
        self
    }

    /// Reports whether the plugin is at fault: it panicked, or returned an invalid value.
    pub fn is_plugin_fault(&self) -> bool {
        matches!(self.kind(), ErrorKind::PluginPanicked | ErrorKind::PluginMisbehaved)
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the reason, without the context.
    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    /// Returns the place in a configuration file, if the error has one.
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
    fn message_contains_action_machine_reason_and_advice() {
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
    fn context_is_kept_when_it_is_set_again() {
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
    fn configuration_error_starts_with_its_place() {
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
    fn kind_is_read_as_failed_when_it_is_unknown() {
        let kind: ErrorKind = serde_json::from_str("\"quantum_decoherence\"").unwrap();
        assert_eq!(kind, ErrorKind::Failed);
    }

    #[test]
    fn error_is_a_plugin_fault_when_the_plugin_panicked_or_misbehaved() {
        for kind in [ErrorKind::PluginPanicked, ErrorKind::PluginMisbehaved] {
            assert!(Error::new(kind, "x").is_plugin_fault(), "{kind:?}");
        }
        for kind in [ErrorKind::Failed, ErrorKind::Timeout, ErrorKind::Unsupported, ErrorKind::Environment] {
            assert!(!Error::new(kind, "x").is_plugin_fault(), "{kind:?}");
        }
    }

    #[test]
    fn error_is_cut_when_its_texts_are_too_long() {
        let long = || "x".repeat(1000);
        let place = Place { file: long().into(), line: None, key: Some(long()) };
        let error = Error::failed(long()).action(long()).machine(long()).advice(long()).place(place);
        let text = error.cut(10).to_string();
        assert_eq!(text.matches("xxxxxxxxxx… (cut, it had 1000 bytes)").count(), 6, "{text}");
        assert!(!text.contains("xxxxxxxxxxx"), "{text}");
        assert_eq!(Error::failed("short").cut(10), Error::failed("short"));
    }

    #[test]
    fn problems_are_combined_into_one_error() {
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
