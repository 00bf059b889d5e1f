//! The meaning of QEMU's states and events for a machine.

use std::time::Duration;

use machinery::{Error, GUEST_POWERED_OFF, Result, State};
use machinery_backend::RateLimit;

use crate::qmp::Event;

/// Returns the machine's state after an event, with the reason; none if the event is not about the state. Source: QEMU's qapi/run-state.json, block-core.json.
pub fn state_of_event(event: &Event) -> Option<(State, String)> {
    let action = || event.data["action"].as_str().unwrap_or("").to_owned();
    Some(match event.name.as_str() {
        "RESUME" => (State::Running, String::new()),
        "SUSPEND" => (State::Suspended, "the guest suspended itself".to_owned()),
        "WAKEUP" => (State::Running, "the guest woke up".to_owned()),
        "SHUTDOWN" => (State::Stopping, String::new()),
        "GUEST_PANICKED" => (State::Error, format!("the guest crashed (QEMU: {})", action())),
        "MEMORY_FAILURE" => (State::Error, "the host's memory failed under the guest".to_owned()),
        "WATCHDOG" if action() == "pause" => (State::Error, "the guest's watchdog expired".to_owned()),
        "BLOCK_IO_ERROR" if action() == "stop" => {
            let why = event.data["reason"].as_str().unwrap_or("no reason given");
            (State::Error, format!("the disk failed and the guest was paused: {why}"))
        }
        _ => return None,
    })
}

/// The states that a QEMU may report: a flood of them would fill the host's log, and keep its subscribers busy. A guest
/// changes its state by a suspend or a wakeup, of which each takes a moment.
pub struct ReportLimit {
    states: RateLimit,
    /// Each of these is a warning in the host's log.
    accidents: RateLimit,
}

impl Default for ReportLimit {
    fn default() -> Self {
        ReportLimit {
            states: RateLimit::new(100, Duration::from_millis(20)),
            accidents: RateLimit::default(),
        }
    }
}

impl ReportLimit {
    /// Counts a report.
    ///
    /// # Errors
    /// There are too many. The text has the reason.
    pub fn admit(&mut self, state: State) -> Result<(), String> {
        let is_accident = matches!(state, State::Error | State::Suspended);
        if self.states.admits() && (!is_accident || self.accidents.admits()) {
            return Ok(());
        }
        Err(format!("it reports its state too often, the last time as {state}"))
    }
}

/// Returns the reason of a shutdown, if the event is one. Source: `ShutdownCause` in QEMU's qapi/run-state.json;
/// before 4.0 there was only `guest`.
pub fn reason_of_shutdown(event: &Event) -> Option<String> {
    if event.name != "SHUTDOWN" {
        return None;
    }
    let cause = event.data["reason"].as_str().unwrap_or("");
    Some(match (event.data["guest"].as_bool(), cause) {
        (_, "guest-reset") => "the guest restarted, and its QEMU ends then (-no-reboot)".to_owned(),
        (_, "host-signal") => "QEMU was asked to end by a signal".to_owned(),
        (Some(true), _) => GUEST_POWERED_OFF.to_owned(),
        (_, cause) => {
            format!("QEMU ended the run: {}", if cause.is_empty() { "no reason given" } else { cause })
        }
    })
}

/// Returns the machine's state for a status of `query-status`. Source: `RunState` in QEMU's qapi/run-state.json.
///
/// # Errors
/// The status is unknown.
pub fn state_of_status(status: &str) -> Result<State> {
    Ok(match status {
        "running" => State::Running,
        "inmigrate" => State::Starting,
        "paused" | "postmigrate" | "prelaunch" | "finish-migrate" | "save-vm" | "restore-vm" => State::Paused,
        "suspended" => State::Suspended,
        "shutdown" => State::Stopping,
        "guest-panicked" | "internal-error" | "io-error" | "watchdog" => State::Error,
        other => {
            return Err(Error::unexpected_state(format!("QEMU reports the unknown state '{other}'"))
                .advice("Stop the machine. If it happens again, this QEMU is too new for this plugin"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn status_of_qemu_has_a_state_unless_it_is_foreign() {
        for status in <qapi::qmp::RunState as qapi::Enum>::NAMES {
            // States of a replication and of a debugger, which this plugin never starts.
            let foreign = ["colo", "debug"].contains(status);
            assert_ne!(state_of_status(status).is_ok(), foreign, "{status}");
        }
        assert!(state_of_status("levitating").unwrap_err().to_string().contains("levitating"));
    }

    #[test]
    fn shutdown_has_its_cause_as_reason() {
        let reason = |data| reason_of_shutdown(&Event { name: "SHUTDOWN".into(), data }).unwrap();
        assert!(reason(json!({"guest": true, "reason": "guest-shutdown"})).contains("powered itself off"));
        assert!(reason(json!({"guest": true})).contains("powered itself off"));
        assert!(reason(json!({"guest": true, "reason": "guest-reset"})).contains("restarted"));
        assert!(reason(json!({"guest": false, "reason": "host-signal"})).contains("signal"));
        assert!(reason_of_shutdown(&Event { name: "STOP".into(), data: json!({}) }).is_none());
    }

    #[test]
    fn error_state_has_qemus_reason() {
        let event = |name: &str, data| state_of_event(&Event { name: name.into(), data });
        let (state, why) =
            event("BLOCK_IO_ERROR", json!({"action": "stop", "reason": "No space left on device"})).unwrap();
        assert_eq!(state, State::Error);
        assert!(why.contains("No space left"), "{why}");
        assert!(event("BLOCK_IO_ERROR", json!({"action": "report"})).is_none());
        assert!(event("NEWER_THAN_US", json!({})).is_none());
    }

    #[test]
    fn reports_are_refused_when_qemu_floods_them() {
        let count = |state| {
            let mut limit = ReportLimit::default();
            (0..1000).take_while(|_| limit.admit(state).is_ok()).count()
        };
        // A slow computer admits some more meanwhile.
        assert!((100..900).contains(&count(State::Running)));
        assert!((20..90).contains(&count(State::Error)));
    }

    #[test]
    fn event_changes_the_state_only_when_the_guest_runs_on_or_not() {
        let state = |name: &str, action: &str| {
            let event = Event { name: name.into(), data: json!({"action": action}) };
            state_of_event(&event).map(|(state, _)| state)
        };
        for (name, action, expected) in [
            ("RESUME", "", Some(State::Running)),
            ("SUSPEND", "", Some(State::Suspended)),
            ("WAKEUP", "", Some(State::Running)),
            ("SHUTDOWN", "", Some(State::Stopping)),
            ("GUEST_PANICKED", "pause", Some(State::Error)),
            ("MEMORY_FAILURE", "ignore", Some(State::Error)),
            ("WATCHDOG", "pause", Some(State::Error)),
            ("WATCHDOG", "reset", None),
            ("WATCHDOG", "shutdown", None),
            ("WATCHDOG", "none", None),
            ("STOP", "", None),
        ] {
            assert_eq!(state(name, action), expected, "{name} {action}");
        }
    }
}
