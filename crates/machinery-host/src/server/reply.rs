//! The replies and events of the protocol, as JSON.
//!
//! Some words of the protocol have new names since 0.2. Replies and events have both names in this release, so
//! that older clients go on working: see `with_old_words`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use machinery::{Error, State};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::actions::metrics::Metrics;
use crate::events::{Event, ReloadSummary};
use crate::fleet::quarantine::Quarantine;
use crate::fleet::{Machine, Roster};
use crate::manager::console::console_socket;
use crate::origin::Origin;

/// New words and the old ones that clients may still read.
const OLD_WORDS: [(&str, &str); 5] = [
    ("deferred", "later"),
    ("restart_required", "notes"),
    ("change_pending", "outdated"),
    ("mode", "how"),
    ("reason", "why"),
];

/// Adds the old word to each new word of an object.
fn with_old_words(mut object: Value) -> Value {
    if let Some(object) = object.as_object_mut() {
        for (new, old) in OLD_WORDS {
            if let Some(value) = object.get(new).cloned() {
                object.insert(old.to_owned(), value);
            }
        }
    }
    object
}

/// Returns the line to send, with the request's `id` if it had one.
pub fn line(mut reply: Value, id: Option<&Value>) -> Vec<u8> {
    if let (Some(object), Some(id)) = (reply.as_object_mut(), id) {
        object.insert("id".to_owned(), id.clone());
    }
    let mut line = reply.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// The reply to a request that succeeded.
pub fn success() -> Value {
    json!({"success": true})
}

/// The reply to a request that failed.
pub fn failure(reason: &str) -> Value {
    json!({"success": false, "reason": reason})
}

/// The reply to a request without a value.
pub fn result(result: Result<(), String>) -> Value {
    match result {
        Ok(()) => success(),
        Err(reason) => failure(&reason),
    }
}

/// The reply to `state`.
pub fn state(state: Result<State, String>) -> Value {
    match state {
        Ok(state) => json!({"success": true, "state": state}),
        Err(reason) => failure(&reason),
    }
}

/// The reply to `console`.
pub fn console(path: Result<PathBuf, String>) -> Value {
    match path {
        Ok(path) => json!({"success": true, "path": path}),
        Err(reason) => failure(&reason),
    }
}

/// The reply to `lock` and `acquire`.
pub fn locked(locked: Result<Arc<Machine>, String>, consoles: &Path) -> Value {
    match locked {
        Ok(locked) => json!({"success": true, "machine": machine(&locked, consoles)}),
        Err(reason) => failure(&reason),
    }
}

/// The reply to `reload`.
pub fn reloaded(reloaded: Result<ReloadSummary, Error>) -> Value {
    match reloaded {
        Ok(summary) => {
            let mut reply = with_old_words(json!(summary));
            reply["success"] = json!(true);
            reply
        }
        Err(error) => failure(&error.to_string()),
    }
}

/// The reply to `list`. Its machines become text one after the other: the values of a large fleet are many times longer.
#[derive(Serialize)]
struct List<'a> {
    success: bool,
    #[serde(serialize_with = "write_machines")]
    machines: (&'a Roster, &'a Path),
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
}

fn write_machines<S: Serializer>(
    (roster, consoles): &(&Roster, &Path),
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(roster.machines().iter().map(|one| machine(one, consoles)))
}

/// Returns the line of the reply to `list`, with the request's `id` if it had one.
pub fn list_line(roster: &Roster, consoles: &Path, id: Option<&Value>) -> Vec<u8> {
    let list = List { success: true, machines: (roster, consoles), id };
    // Values of JSON are always written.
    let mut line = serde_json::to_vec(&list).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The reply to `version`.
pub fn version(roster: &Roster, origin: &Origin, wall: Option<&str>) -> Value {
    let machineries: Map<String, Value> = roster
        .machineries()
        .iter()
        .map(|machinery| (machinery.name.clone(), json!(machinery.version)))
        .collect();
    json!({
        "success": true,
        "version": env!("CARGO_PKG_VERSION"),
        "interface": machinery::host::interface_version(),
        "pid": origin.pid,
        "started": origin.started,
        "started_by": origin.started_by,
        "wall": wall,
        "machineries": machineries,
    })
}

/// The reply to `metrics`.
pub fn metrics(metrics: &Metrics, roster: &Roster) -> Value {
    let mut entries = metrics.to_json();
    for entry in entries.as_array_mut().into_iter().flatten() {
        entry["longest_ms"] = entry["max_ms"].clone();
    }
    let in_quarantine = |machine: &&Arc<Machine>| machine.status().availability.quarantine.is_some();
    let machines = roster.machines().iter().filter(in_quarantine).count();
    let (tries, healed) = metrics.tries_and_healed();
    let quarantine = json!({"machines": machines, "tries": tries, "healed": healed});
    json!({"success": true, "metrics": entries, "quarantine": quarantine})
}

fn quarantine(quarantine: &Quarantine) -> Value {
    json!({
        "reason": quarantine.reason,
        "tries": quarantine.tries,
        "next_try_in": (!quarantine.is_left_alone).then(|| quarantine.next_try_in()),
        "since": quarantine.since,
    })
}

/// A machine: the keys that Cuckoo3's `Machine.from_dict` reads, and our own.
pub fn machine(machine: &Machine, consoles: &Path) -> Value {
    let info = machine.info();
    let status = machine.status();
    let availability = &status.availability;
    let disabled = availability.disabled_reason();
    with_old_words(json!({
        "name": info.name,
        "label": info.label,
        "ip": info.ip,
        "platform": info.platform,
        "os_version": info.os_version,
        "tags": info.tags,
        "snapshot": info.snapshot,
        "architecture": info.architecture,
        "interface": info.interface,
        "agent_port": info.agent_port,
        "mac_address": info.mac_address,
        "jail": info.jail,
        "clone_of": info.clone_of,
        "console": info.console.then(|| console_socket(machine, consoles).ok()).flatten(),
        "machinery_name": machine.machinery.name,
        "state": status.state,
        "locked": availability.lock.is_some(),
        "locked_by": availability.lock.as_ref().map_or("", |lock| &lock.task_id),
        "locked_since": availability.locked_since,
        "locked_uid": availability.lock.as_ref().and_then(|lock| lock.uid),
        "running_since": status.run_begin.map(|begin| begin.unix),
        "reserved": availability.reserved_by.is_some(),
        "reserved_by": availability.reserved_by.as_deref().unwrap_or(""),
        "disabled": disabled.is_some(),
        "disabled_reason": disabled.unwrap_or(""),
        "quarantine": availability.quarantine.as_ref().map(quarantine),
        "errors": status.errors,
        "run_errors": availability.run_errors,
        "run_lost": availability.run_lost,
        "ready": with_old_words(json!(status.ready)),
        "change_pending": status.change_pending,
        "warnings": status.warnings,
    }))
}

/// An event, for a subscriber.
pub fn event(event: &Event) -> Value {
    match event {
        Event::Ready { .. } | Event::Reloaded(_) => with_old_words(json!(event)),
        _ => json!(event),
    }
}

/// The events for a subscriber that was too slow: `lagged`, and its old name.
pub fn lagged(count: u64) -> [Value; 2] {
    ["lagged", "lost"].map(|event| json!({"event": event, "count": count}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::{Readiness, RestoreReadiness};

    #[test]
    fn line_echoes_id_of_any_type() {
        let line = line(result(Ok(())), Some(&json!({"a": [1]})));
        assert_eq!(line, b"{\"id\":{\"a\":[1]},\"success\":true}\n");
    }

    #[test]
    fn replies_have_old_words_beside_new_ones() {
        let ready = RestoreReadiness { mode: Readiness::Instant, ..RestoreReadiness::default() };
        let ready = event(&Event::Ready { machine: "m".into(), ready });
        assert_eq!((&ready["mode"], &ready["how"]), (&json!("instant"), &json!("instant")));
        assert_eq!((&ready["reason"], &ready["why"]), (&json!(""), &json!("")));
        let summary = ReloadSummary { deferred: vec!["m".into()], ..ReloadSummary::default() };
        let reply = reloaded(Ok(summary));
        assert_eq!((&reply["deferred"], &reply["later"]), (&json!(["m"]), &json!(["m"])));
        assert_eq!(failure("x"), json!({"success": false, "reason": "x"}));
    }
}
