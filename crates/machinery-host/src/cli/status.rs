//! Prints the status of the running host: who has started it, and what it has.

use machinery::format_bytes;
use serde_json::{Value, json};

use super::machines::{age, standby_memory, template_disk};
use super::output::{reply, table};
use crate::fleet::quarantine::unix_now;

/// Prints the status, from the host's answers to `version` and `list`.
pub fn status(version: &Value, list: &Value, json: bool) {
    let Some(machines) = list["machines"].as_array() else { return reply(list, json) };
    let (disk, memory) = (template_disk(machines), standby_memory(machines));
    let counts = counts(machines);
    if json {
        let mut status = version.clone();
        status["machines"] = json!(counts.iter().copied().collect::<std::collections::BTreeMap<_, _>>());
        (status["template_bytes"], status["standby_bytes"]) = (json!(disk), json!(memory));
        return reply(&status, true);
    }
    let text = |key: &str| version[key].as_str().unwrap_or("unknown").to_owned();
    let since = json!(version["started"].as_u64().map(|started| started / 1000));
    let machineries = version["machineries"].as_object().into_iter().flatten();
    let machineries: Vec<String> =
        machineries.map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or(""))).collect();
    let counts: Vec<String> = counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
    let rows = [
        ("process", version["pid"].to_string()),
        ("running for", age(&since, unix_now()).unwrap_or_default()),
        ("started by", text("started_by")),
        ("version", format!("{}, interface {}", text("version"), text("interface"))),
        ("wall", version["wall"].as_str().unwrap_or("none").to_owned()),
        ("machineries", machineries.join(", ")),
        ("machines", counts.join(", ")),
        ("templates", format!("{} on disk", format_bytes(disk))),
        ("standbys", format!("{} of memory", format_bytes(memory))),
    ];
    println!("{}", table(&rows.map(|(key, value)| [key.to_owned(), value])));
}

/// Returns the numbers of machines: all, and those in a state that an operator asks for.
pub fn counts(machines: &[Value]) -> [(&'static str, usize); 5] {
    let count = |is: &dyn Fn(&Value) -> bool| machines.iter().filter(|machine| is(machine)).count();
    [
        ("configured", machines.len()),
        ("on", count(&|machine| machine["state"] != json!("poweroff"))),
        ("locked", count(&|machine| machine["locked"] == json!(true))),
        ("disabled", count(&|machine| machine["disabled"] == json!(true))),
        ("quarantined", count(&|machine| !machine["quarantine"].is_null())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_counted_by_what_they_are() {
        let machines = [
            json!({"state": "running", "locked": true, "disabled": false, "quarantine": null}),
            json!({"state": "poweroff", "locked": false, "disabled": true, "quarantine": {"tries": 1}}),
        ];
        assert_eq!(counts(&machines).map(|(_, count)| count), [2, 1, 1, 1, 1]);
    }
}
