//! One machine: its entry of the host's `list`, which events change.
//!
//! The entry stays JSON in the words of the protocol, so that the remarks are those of the command `list`.

use serde_json::{Value, json};

use crate::cli::machines::{duration, note};

/// The states in the order of their urgency.
const URGENCY: [&str; 10] = [
    "quarantine",
    "disabled",
    "error",
    "stopping",
    "starting",
    "paused",
    "suspended",
    "restored",
    "running",
    "poweroff",
];

/// Applies an event of the machine.
pub fn apply(machine: &mut Value, event: &Value, now: u64) {
    match event["event"].as_str().unwrap_or("") {
        "state" => {
            machine["state"] = event["state"].clone();
            machine["progress"] = Value::Null;
            if event["state"] == json!("poweroff") {
                machine["running_since"] = Value::Null;
            } else if machine["running_since"].is_null() {
                machine["running_since"] = json!(now);
            }
        }
        "progress" => {
            let goes_on = event["fraction"].as_f64().is_some_and(|fraction| fraction < 1.0);
            machine["progress"] = if goes_on { event["fraction"].clone() } else { Value::Null };
        }
        "disabled" => disable(machine, event),
        "enabled" => (machine["disabled"], machine["quarantine"]) = (json!(false), Value::Null),
        "quarantined" => {
            disable(machine, event);
            let since = machine["quarantine"]["since"].as_u64().unwrap_or(now);
            let (tries, next) = (&event["tries"], &event["next_try_in"]);
            machine["quarantine"] =
                json!({"reason": event["reason"], "tries": tries, "next_try_in": next, "since": since});
            keep_next_try(machine, now);
        }
        "healed" => machine["quarantine"] = Value::Null,
        "locked" => {
            (machine["locked"], machine["locked_since"]) = (json!(true), json!(now));
            (machine["locked_by"], machine["locked_uid"]) = (event["task_id"].clone(), event["uid"].clone());
            machine["run_errors"] = json!([]);
        }
        "unlocked" => machine["locked"] = json!(false),
        "reserved" => {
            (machine["reserved"], machine["reserved_by"]) = (json!(true), event["task_id"].clone());
        }
        "unreserved" => machine["reserved"] = json!(false),
        "ready" => {
            let keys = ["mode", "reason", "memory", "disk"];
            machine["ready"] = keys.into_iter().map(|key| (key.to_owned(), event[key].clone())).collect();
        }
        _ => {}
    }
}

fn disable(machine: &mut Value, event: &Value) {
    (machine["disabled"], machine["disabled_reason"]) = (json!(true), event["reason"].clone());
}

/// Keeps the time of the next try, whose distance the host has sent.
pub fn keep_next_try(machine: &mut Value, now: u64) {
    if let Some(seconds) = machine["quarantine"]["next_try_in"].as_u64() {
        machine["quarantine"]["next_try_at"] = json!(now + seconds);
    }
}

/// Returns the remarks about the machine, as `list` has them.
pub fn remarks(machine: &Value, now: u64) -> String {
    let mut machine = machine.clone();
    if let Some(at) = machine["quarantine"]["next_try_at"].as_u64() {
        machine["quarantine"]["next_try_in"] = json!(at.saturating_sub(now));
    }
    note(&machine, now)
}

/// Returns the text of a key.
pub fn text<'a>(machine: &'a Value, key: &str) -> &'a str {
    machine[key].as_str().unwrap_or("")
}

/// Returns the word for the machine's state: why it is out of the pool, or else the state of its guest.
pub fn state(machine: &Value) -> &str {
    match (machine["quarantine"].is_null(), machine["disabled"] == json!(true)) {
        (false, _) => "quarantine",
        (true, true) => "disabled",
        (true, false) => text(machine, "state"),
    }
}

/// Returns the rank of the machine's state: the most urgent is 0.
pub fn urgency(machine: &Value) -> usize {
    let state = state(machine);
    URGENCY.iter().position(|known| *known == state).unwrap_or(URGENCY.len())
}

/// Returns the task that has the machine. A task in parentheses has reserved it.
pub fn task(machine: &Value) -> String {
    match (machine["locked"] == json!(true), machine["reserved"] == json!(true)) {
        (true, _) => text(machine, "locked_by").to_owned(),
        (false, true) => format!("({})", text(machine, "reserved_by")),
        (false, false) => String::new(),
    }
}

/// Returns the number of the user that has locked the machine.
pub fn uid(machine: &Value) -> Option<u32> {
    let uid = machine["locked_uid"].as_u64().filter(|_| machine["locked"] == json!(true))?;
    u32::try_from(uid).ok()
}

/// Returns the begin of the lock, in seconds since 1970.
pub fn locked_since(machine: &Value) -> Option<u64> {
    machine["locked_since"].as_u64().filter(|_| machine["locked"] == json!(true))
}

/// Returns the begin of the run, in seconds since 1970.
pub fn running_since(machine: &Value) -> Option<u64> {
    machine["running_since"].as_u64()
}

/// Returns the age of the run, or the progress of the action under way.
pub fn run(machine: &Value, now: u64) -> String {
    match machine["progress"].as_f64() {
        Some(fraction) => format!("{:.0} %", fraction * 100.0),
        None => short_age(running_since(machine), now),
    }
}

/// Returns the mode of the next restore.
pub fn mode(machine: &Value) -> &str {
    machine["ready"]["mode"].as_str().unwrap_or("plain")
}

/// Returns the number of errors that the host keeps of the machine.
pub fn errors(machine: &Value) -> usize {
    machine["errors"].as_array().map_or(0, Vec::len)
}

/// Returns the latest error: of the run, or else of the machine.
pub fn latest_error(machine: &Value) -> Option<&str> {
    let latest = |key: &str| machine[key].as_array()?.last()?.as_str();
    latest("run_errors").or_else(|| latest("errors"))
}

/// Returns the time since that moment, in at most six characters.
pub fn short_age(since: Option<u64>, now: u64) -> String {
    since
        .map(|since| duration(now.saturating_sub(since)).replace(" min", "m").replace(' ', ""))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(events: &[Value]) -> Value {
        let mut machine = json!({"name": "m", "state": "poweroff", "locked": false, "running_since": null,
            "quarantine": null, "disabled": false, "errors": [], "run_errors": ["lost"]});
        events.iter().for_each(|event| apply(&mut machine, event, 100));
        machine
    }

    #[test]
    fn run_begins_with_the_first_state_and_ends_with_the_poweroff() {
        let state = |state: &str| json!({"event": "state", "machine": "m", "state": state});
        let mut machine = after(&[state("starting")]);
        apply(&mut machine, &state("running"), 130);
        assert_eq!((run(&machine, 225).as_str(), super::state(&machine)), ("2m5s", "running"));
        apply(&mut machine, &state("poweroff"), 300);
        assert_eq!((run(&machine, 400).as_str(), super::state(&machine)), ("", "poweroff"));
    }

    #[test]
    fn progress_replaces_the_age_until_the_action_ends() {
        let progress = |fraction: f64| json!({"event": "progress", "machine": "m", "fraction": fraction});
        assert_eq!(run(&after(&[progress(0.41)]), 100), "41 %");
        assert_eq!(run(&after(&[progress(0.41), progress(1.0)]), 100), "");
    }

    #[test]
    fn lock_has_its_task_its_user_and_its_age() {
        let locked = json!({"event": "locked", "machine": "m", "task_id": "t1", "uid": 1000});
        let machine = after(std::slice::from_ref(&locked));
        assert_eq!(
            (task(&machine).as_str(), uid(&machine), locked_since(&machine)),
            ("t1", Some(1000), Some(100))
        );
        assert_eq!(latest_error(&machine), None, "the errors were of the run before");
        let machine = after(&[locked, json!({"event": "unlocked", "machine": "m"})]);
        assert_eq!((task(&machine).as_str(), uid(&machine), locked_since(&machine)), ("", None, None));
        let reserved = json!({"event": "reserved", "machine": "m", "task_id": "t2"});
        assert_eq!(task(&after(&[reserved])), "(t2)");
    }

    #[test]
    fn quarantine_counts_down_to_its_next_try_and_ends_when_the_machine_is_healed() {
        let quarantined = json!({"event": "quarantined", "machine": "m", "reason": "killed", "tries": 1, "next_try_in": 30});
        let machine = after(std::slice::from_ref(&quarantined));
        assert_eq!(state(&machine), "quarantine");
        assert!(remarks(&machine, 110).contains("again in 20 s"), "{}", remarks(&machine, 110));
        let machine = after(&[quarantined, json!({"event": "enabled"}), json!({"event": "healed"})]);
        assert_eq!((state(&machine), remarks(&machine, 110).as_str()), ("poweroff", ""));
    }

    #[test]
    fn disabled_machine_is_more_urgent_than_a_running_one() {
        let disabled = after(&[json!({"event": "disabled", "reason": "by hand"})]);
        let running = after(&[json!({"event": "state", "state": "running"})]);
        assert!(urgency(&disabled) < urgency(&running) && urgency(&running) < urgency(&after(&[])));
        assert_eq!(remarks(&disabled, 100), "disabled: by hand");
    }

    #[test]
    fn age_is_short() {
        for (seconds, expected) in [(5, "5s"), (3599, "59m59s"), (86_399, "23h59m"), (9_999_999, "115d17h")] {
            assert_eq!(short_age(Some(0), seconds), expected);
        }
    }
}
