//! The host that the suite plays: it listens, and lets a test wait for what it hears.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{HostServices, LogLevel, LogRecord, RestoreReadiness, State};

/// What the plugin told its host.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    Changed {
        machine: String,
        state: State,
    },
    Progress {
        machine: String,
        fraction: f64,
    },
    /// Something else about a machine.
    Note {
        machine: String,
        what: &'static str,
    },
}

impl Heard {
    /// The machine that it is about.
    pub fn machine(&self) -> &str {
        match self {
            Heard::Changed { machine, .. }
            | Heard::Progress { machine, .. }
            | Heard::Note { machine, .. } => machine,
        }
    }

    /// In which state the machine has ended, if that is what it says.
    pub fn end_of(&self, wanted: &str) -> Option<State> {
        match self {
            Heard::Changed { machine, state: state @ (State::Poweroff | State::Error) } => {
                (machine == wanted).then_some(*state)
            }
            _ => None,
        }
    }
}

#[derive(Default)]
pub struct EventRecorder {
    heard: Mutex<Vec<Heard>>,
    news: Condvar,
}

impl EventRecorder {
    /// How much has been heard so far: a mark from which to look on.
    pub fn mark(&self) -> usize {
        self.lock().len()
    }

    /// What has been heard since the mark.
    pub fn since(&self, mark: usize) -> Vec<Heard> {
        self.lock().get(mark..).unwrap_or_default().to_vec()
    }

    /// Waits for something that was heard since the mark.
    pub fn wait<T>(&self, mark: usize, limit: Duration, find: impl Fn(&Heard) -> Option<T>) -> Option<T> {
        let found = |heard: &[Heard]| heard.iter().skip(mark).find_map(&find);
        let waited = self.news.wait_timeout_while(self.lock(), limit, |heard| found(heard).is_none());
        let (heard, _) = waited.unwrap_or_else(PoisonError::into_inner);
        found(&heard)
    }

    fn hear(&self, heard: Heard) {
        self.lock().push(heard);
        self.news.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostServices for EventRecorder {
    fn log(&self, _: LogRecord) {}

    fn state_changed(&self, machine: &str, state: State, _: &str) {
        self.hear(Heard::Changed { machine: machine.to_owned(), state });
    }

    fn progress(&self, machine: &str, fraction: f64) {
        self.hear(Heard::Progress { machine: machine.to_owned(), fraction });
    }

    fn step(&self, machine: &str, _: &str, _: Duration) {
        self.hear(Heard::Note { machine: machine.to_owned(), what: "step" });
    }

    fn ready(&self, machine: &str, _: &RestoreReadiness) {
        self.hear(Heard::Note { machine: machine.to_owned(), what: "ready" });
    }

    fn preparation_invalidated(&self, machine: &str, _: &str) {
        self.hear(Heard::Note { machine: machine.to_owned(), what: "preparation_invalidated" });
    }

    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
}

/// A host that does not listen, for tests that call a plugin themselves.
pub struct NullHost;

impl HostServices for NullHost {
    fn log(&self, _: LogRecord) {}
    fn state_changed(&self, _: &str, _: State, _: &str) {}
    fn progress(&self, _: &str, _: f64) {}
    fn step(&self, _: &str, _: &str, _: Duration) {}
    fn ready(&self, _: &str, _: &RestoreReadiness) {}
    fn preparation_invalidated(&self, _: &str, _: &str) {}
    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn what_comes_later_is_waited_for_and_what_came_before_is_not_taken() {
        let recorder = EventRecorder::default();
        recorder.progress("m", 0.5);
        let mark = recorder.mark();
        thread::scope(|scope| {
            scope.spawn(|| recorder.state_changed("m", State::Poweroff, ""));
            let heard = recorder.wait(mark, Duration::from_secs(10), |heard| Some(heard.clone()));
            assert_eq!(heard, Some(Heard::Changed { machine: "m".into(), state: State::Poweroff }));
        });
        assert_eq!(recorder.wait(recorder.mark(), Duration::ZERO, |_| Some(())), None);
    }
}
