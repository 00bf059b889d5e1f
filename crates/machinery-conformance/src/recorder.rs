//! The host of the suite: it records the plugin's events, and lets a test wait for them.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{HostServices, LogLevel, LogRecord, Readiness, RestoreReadiness, State};

/// An event that the plugin reported to its host.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    StateChanged {
        machine: String,
        state: State,
    },
    Progress {
        machine: String,
        fraction: f64,
    },
    Ready {
        machine: String,
        mode: Readiness,
        reason: String,
    },
    PreparationInvalidated {
        machine: String,
    },
    /// Any other event of a machine.
    Other {
        machine: String,
        service: &'static str,
    },
}

impl Event {
    /// Returns the machine of the event.
    pub fn machine(&self) -> &str {
        match self {
            Event::StateChanged { machine, .. }
            | Event::Progress { machine, .. }
            | Event::Ready { machine, .. }
            | Event::PreparationInvalidated { machine }
            | Event::Other { machine, .. } => machine,
        }
    }

    /// Returns the mode of the machine's next restore and its reason, if the event reports them. A lost preparation
    /// means a plain restore.
    pub fn readiness_of(&self, wanted: &str) -> Option<(Readiness, String)> {
        match self {
            Event::Ready { machine, mode, reason } if machine == wanted => Some((*mode, reason.clone())),
            Event::PreparationInvalidated { machine } if machine == wanted => {
                Some((Readiness::Plain, String::new()))
            }
            _ => None,
        }
    }

    /// Returns the final state of the machine, if the event reports the end of its run.
    pub fn end_of(&self, wanted: &str) -> Option<State> {
        match self {
            Event::StateChanged { machine, state: state @ (State::Poweroff | State::Error) } => {
                (machine == wanted).then_some(*state)
            }
            _ => None,
        }
    }
}

#[derive(Default)]
pub struct EventRecorder {
    events: Mutex<Vec<Event>>,
    added: Condvar,
}

impl EventRecorder {
    /// Returns the number of events so far, as a position for [`since`](Self::since) and [`wait`](Self::wait).
    pub fn position(&self) -> usize {
        self.lock().len()
    }

    /// Returns the events from that position on.
    pub fn since(&self, position: usize) -> Vec<Event> {
        self.lock().get(position..).unwrap_or_default().to_vec()
    }

    /// Waits for an event from that position on, until `find` returns a value.
    pub fn wait<T>(
        &self,
        position: usize,
        timeout: Duration,
        find: impl Fn(&Event) -> Option<T>,
    ) -> Option<T> {
        let found = |events: &[Event]| events.iter().skip(position).find_map(&find);
        let waited = self.added.wait_timeout_while(self.lock(), timeout, |events| found(events).is_none());
        let (events, _) = waited.unwrap_or_else(PoisonError::into_inner);
        found(&events)
    }

    fn record(&self, event: Event) {
        self.lock().push(event);
        self.added.notify_all();
    }

    fn record_other(&self, machine: &str, service: &'static str) {
        self.record(Event::Other { machine: machine.to_owned(), service });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostServices for EventRecorder {
    fn log(&self, _: LogRecord) {}

    fn state_changed(&self, machine: &str, state: State, _: &str) {
        self.record(Event::StateChanged { machine: machine.to_owned(), state });
    }

    fn progress(&self, machine: &str, fraction: f64) {
        self.record(Event::Progress { machine: machine.to_owned(), fraction });
    }

    fn step(&self, machine: &str, _: &str, _: Duration) {
        self.record_other(machine, "step");
    }

    fn ready(&self, machine: &str, readiness: &RestoreReadiness) {
        let (mode, reason) = (readiness.mode, readiness.reason.clone());
        self.record(Event::Ready { machine: machine.to_owned(), mode, reason });
    }

    fn preparation_invalidated(&self, machine: &str, _: &str) {
        self.record(Event::PreparationInvalidated { machine: machine.to_owned() });
    }

    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
}

/// A host that discards all events, for tests that call a plugin themselves.
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
    fn recorder_waits_for_later_events_and_ignores_earlier_ones() {
        let recorder = EventRecorder::default();
        recorder.progress("m", 0.5);
        let position = recorder.position();
        thread::scope(|scope| {
            scope.spawn(|| recorder.state_changed("m", State::Poweroff, ""));
            let event = recorder.wait(position, Duration::from_secs(10), |event| Some(event.clone()));
            assert_eq!(event, Some(Event::StateChanged { machine: "m".into(), state: State::Poweroff }));
        });
        assert_eq!(recorder.wait(recorder.position(), Duration::ZERO, |_| Some(())), None);
    }
}
