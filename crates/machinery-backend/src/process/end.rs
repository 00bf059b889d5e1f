//! The end of a process: its exit status and its last output.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// The end of a process: its exit status and its output.
#[derive(Debug, Clone)]
pub struct End {
    /// The name of the program.
    pub(super) program: String,
    pub(super) status: Option<ExitStatus>,
    /// True if this plugin ended the process.
    pub(super) by_plugin: bool,
    /// The output of the last step.
    pub(super) output: String,
}

impl End {
    /// Gives the program a name for people, such as `QEMU`.
    pub fn named(self, program: &str) -> End {
        End { program: program.to_owned(), ..self }
    }

    /// Describes the exit status and the output, for people.
    pub fn describe(&self) -> String {
        let program = &self.program;
        let status = match self.status {
            _ if self.by_plugin => format!("{program} was ended by this machinery"),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("{program} exited with code {code}"),
                (None, Some(signal)) => format!("{program} was killed by signal {signal}"),
                (None, None) => format!("{program} ended"),
            },
            None => format!("{program} ended"),
        };
        if self.output.is_empty() { status } else { format!("{status}: {}", self.output) }
    }

    /// Returns the output of the last step.
    pub fn output(&self) -> &str {
        &self.output
    }

    /// Describes a failure, for people; empty if there is nothing useful to report.
    pub fn failure(&self) -> String {
        match (self.by_plugin, self.output.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("{} reports: {}", self.program, self.output),
            (false, _) => self.describe(),
        }
    }

    /// Reports whether this plugin has ended the process.
    pub fn was_requested(&self) -> bool {
        self.by_plugin
    }

    /// Reports whether the process was killed by a signal.
    pub fn by_signal(&self) -> bool {
        self.status.is_some_and(|status| status.signal().is_some())
    }

    /// Reports whether the process exited with code 0, as far as that is known: only the parent of an adopted
    /// process can read its exit status.
    pub fn was_clean(&self) -> bool {
        self.status.is_none_or(|status| status.success())
    }
}
