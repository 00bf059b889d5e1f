//! The result of a machinery's diagnosis of a machine.

use serde::{Deserialize, Serialize};

use crate::text::{MAX_KEPT, cut};
use crate::{Error, Result};

/// The maximum number of warnings that are kept for a machine.
const MAX_WARNINGS: usize = 20;

/// The result of [`Machinery::diagnose`](crate::Machinery::diagnose) for one machine. Since interface 1.1.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Diagnosis {
    /// The machine's name.
    pub machine: String,
    /// The reason why the machine cannot be used, if it cannot. The host disables the machine as long as this
    /// is set.
    pub unusable: Option<Error>,
    /// Warnings about a machine that can be used. Each is a full sentence.
    pub warnings: Vec<String>,
}

impl Diagnosis {
    /// Creates an empty diagnosis of a machine.
    pub fn new(machine: impl Into<String>) -> Self {
        Diagnosis { machine: machine.into(), ..Diagnosis::default() }
    }

    /// Records the error of a test that the machine failed, which makes the machine unusable. Several errors
    /// become one, on one line, because the list of machines displays it.
    pub fn keep<T>(&mut self, result: Result<T>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        self.unusable = Some(match self.unusable.take() {
            None => error,
            Some(first) => {
                let text = first.to_string();
                Error::new(first.kind(), format!("{}; also: {error}", text.trim_end_matches('.')))
            }
        });
        None
    }

    /// Adds a warning for the operator.
    pub fn warn(&mut self, warning: impl Into<String>) {
        self.warnings.push(warning.into());
    }

    /// Reports whether the diagnosis contains an error or a warning.
    pub fn says_anything(&self) -> bool {
        self.unusable.is_some() || !self.warnings.is_empty()
    }

    /// Returns the diagnosis with its texts shortened, so that the host can keep them for every machine.
    pub(crate) fn cut(self) -> Self {
        let warnings = self.warnings.into_iter().take(MAX_WARNINGS);
        Diagnosis {
            machine: cut(self.machine, MAX_KEPT),
            unusable: self.unusable.map(|error| error.cut(MAX_KEPT)),
            warnings: warnings.map(|warning| cut(warning, MAX_KEPT)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diagnosis_lists_every_failed_test_in_one_error() {
        let mut diagnosis = Diagnosis::new("m");
        assert_eq!(diagnosis.keep(Ok(1)), Some(1));
        assert!(!diagnosis.says_anything());
        diagnosis.keep::<()>(Err(Error::failed("no disk").advice("Look")));
        diagnosis.keep::<()>(Err(Error::failed("no snapshot")));
        let text = diagnosis.unusable.unwrap().to_string();
        assert_eq!(text, "no disk. Look; also: no snapshot");
    }

    #[test]
    fn diagnosis_is_read_when_keys_are_missing_or_unknown() {
        let read = |json: &str| serde_json::from_str::<Diagnosis>(json).unwrap();
        assert_eq!(read(r#"{"machine": "m", "mood": "blue"}"#), Diagnosis::new("m"));
    }

    #[test]
    fn diagnosis_is_cut_when_its_texts_are_too_long() {
        let long = "x".repeat(2 * MAX_KEPT);
        let mut diagnosis = Diagnosis::new("m");
        diagnosis.keep::<()>(Err(Error::failed(&long)));
        diagnosis.warnings = vec![long; 2 * MAX_WARNINGS];
        let size = serde_json::to_string(&diagnosis.cut()).unwrap().len();
        assert!(size < (MAX_WARNINGS + 2) * (MAX_KEPT + 100), "{size}");
    }
}
