//! Prints the list of machines, as a table or as JSON.

use std::collections::HashMap;

use machinery::{Error, format_bytes};
use serde_json::{Value, json};

use super::clones::{self, Row};
use super::output::{reply, table};
use crate::fleet::quarantine::unix_now;

/// Keeps the machines of these names, and the clones of those. Keeps all if there are no names.
pub fn named(mut answer: Value, names: &[String]) -> Value {
    let Some(machines) = answer["machines"].as_array_mut().filter(|_| !names.is_empty()) else {
        return answer;
    };
    let is = |machine: &Value, name: &str| machine["name"] == *name || machine["clone_of"] == *name;
    if let Some(name) = names.iter().find(|name| !machines.iter().any(|machine| is(machine, name))) {
        return json!({"success": false, "reason": Error::no_such_machine(name).to_string()});
    }
    machines.retain(|machine| names.iter().any(|name| is(machine, name)));
    answer
}

/// Prints the machines as a table, each in a row of its own if `all`.
pub fn machines(answer: &Value, all: bool, json: bool) {
    if json || answer["success"] != json!(true) {
        return reply(answer, json);
    }
    let machines = answer["machines"].as_array().map_or(&[][..], Vec::as_slice);
    println!("{}", text(machines, all, unix_now()));
}

fn text(machines: &[Value], all: bool, now: u64) -> String {
    let heads = ["NAME", "STATE", "SINCE", "RESTORE", "MACHINERY", "IP", "PLATFORM", "TAGS", "NOTE"];
    let rows = clones::rows(&(0..machines.len()).collect::<Vec<_>>(), machines, |_| !all);
    let cells = |row: &Row| {
        let members: Vec<&Value> = row.members.iter().map(|index| &machines[*index]).collect();
        match (row.clone_of.as_deref(), members.as_slice()) {
            (Some(of), members) => of_clones(of, members),
            (None, members) => members.first().map(|machine| of_machine(machine, now)).unwrap_or_default(),
        }
    };
    let mut text =
        table(&[heads.map(str::to_owned)].into_iter().chain(rows.iter().map(cells)).collect::<Vec<_>>());
    if let Some(usage) = prepared_usage(machines) {
        text += &format!("\n\n{usage}");
    }
    if rows.iter().any(|row| row.clone_of.is_some()) {
        text += "\n\nthe clones of a machine are one row: `list --all` shows each, `list NAME` those of one machine";
    }
    text
}

fn of_machine(machine: &Value, now: u64) -> [String; 9] {
    let [machinery, ip, platform, tags] = shared(machine);
    let text = |key: &str| machine[key].as_str().unwrap_or("").to_owned();
    let since = age(&machine["running_since"], now).unwrap_or_default();
    let mode = machine["ready"]["mode"].as_str().unwrap_or("plain").to_owned();
    [text("name"), text("state"), since, mode, machinery, ip, platform, tags, note(machine, now)]
}

/// Returns the row of all clones of one machine, which differ only by their name and address.
fn of_clones(of: &str, clones: &[&Value]) -> [String; 9] {
    let [machinery, _, platform, tags] = clones.first().map(|first| shared(first)).unwrap_or_default();
    let ips: Vec<&str> = clones.iter().filter_map(|clone| clone["ip"].as_str()).collect();
    let ips = [ips.first(), ips.last()].into_iter().flatten().copied().collect::<Vec<_>>().join(" … ");
    let [title, states, modes] = [clones::title(of, clones), clones::states(clones), clones::modes(clones)];
    [title, states, String::new(), modes, machinery, ips, platform, tags, clones::remarks(clones)]
}

/// Returns the machinery, the address, the platform and the tags of a machine.
fn shared(machine: &Value) -> [String; 4] {
    let text = |key: &str| machine[key].as_str().unwrap_or("").to_owned();
    let tags: Vec<&str> =
        machine["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let platform = format!("{} {} {}", text("platform"), text("os_version"), text("architecture"));
    [text("machinery_name"), text("ip"), platform, tags.join(",")]
}

/// Returns the memory and the disk space that prepared restores use, if they use any.
fn prepared_usage(machines: &[Value]) -> Option<String> {
    let standbys = machines.iter().filter(|machine| machine["ready"]["mode"] == json!("standby")).count();
    let (memory, disk) = (standby_memory(machines), template_disk(machines));
    (memory > 0 || disk > 0).then(|| {
        format!(
            "standbys: {standbys}, using {} of memory; templates: {} on disk",
            format_bytes(memory),
            format_bytes(disk)
        )
    })
}

/// Returns the memory of all standbys.
pub fn standby_memory(machines: &[Value]) -> u64 {
    machines.iter().filter_map(|machine| machine["ready"]["memory"].as_u64()).sum()
}

/// Returns the disk space of all templates. A machine and its clones have one.
pub fn template_disk(machines: &[Value]) -> u64 {
    let mut templates = HashMap::<&str, u64>::new();
    for machine in machines {
        let name = machine["clone_of"].as_str().or(machine["name"].as_str()).unwrap_or("");
        let known = templates.entry(name).or_default();
        *known = machine["ready"]["disk"].as_u64().unwrap_or(0).max(*known);
    }
    templates.values().sum()
}

/// Returns the remarks about a machine: why it is unavailable, why its restores are slow, and its plugin's
/// warnings.
pub fn note(machine: &Value, now: u64) -> String {
    let keys = [("disabled", "disabled_reason"), ("reserved", "reserved_by"), ("locked", "locked_by")];
    let pending = machine["change_pending"] == json!(true);
    let pending = pending.then(|| "its new configuration applies once it is idle".to_owned());
    let said = keys.iter().filter(|(is, _)| machine[*is] == json!(true)).map(|(is, what)| {
        let by = if *is == "disabled" { ":" } else { " by" };
        let reason = first_line(machine[*what].as_str().unwrap_or(""));
        let age = if *is == "locked" { age(&machine["locked_since"], now) } else { None };
        format!("{is}{by} {reason}{}", age.map(|age| format!(" for {age}")).unwrap_or_default())
    });
    let quarantine = quarantine(&machine["quarantine"], now);
    let why = machine["ready"]["reason"].as_str().filter(|why| !why.is_empty());
    let why = why.map(|why| format!("restores no faster: {}", first_line(why)));
    let warnings = machine["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let warnings = warnings.map(|warning| format!("warning: {}", first_line(warning)));
    said.chain(quarantine).chain(pending).chain(why).chain(warnings).collect::<Vec<_>>().join("; ")
}

/// Returns the remark about a machine in quarantine.
fn quarantine(quarantine: &Value, now: u64) -> Option<String> {
    let tries = quarantine["tries"].as_u64()?;
    let tried = if tries == 1 { "once".to_owned() } else { format!("{tries} times") };
    let next = match quarantine["next_try_in"].as_u64() {
        Some(seconds) => format!("again in {}", duration(seconds)),
        None => "and not again, because somebody else has started it".to_owned(),
    };
    let age = age(&quarantine["since"], now).unwrap_or_default();
    Some(format!("in quarantine for {age}: tried {tried}, {next}"))
}

/// Returns the time since that moment, which is in seconds since 1970.
pub fn age(since: &Value, now: u64) -> Option<String> {
    Some(duration(now.saturating_sub(since.as_u64()?)))
}

/// Formats seconds with the two largest units.
pub fn duration(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duration_has_its_two_largest_units() {
        for (seconds, expected) in
            [(0, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (7500, "2 h 5 min"), (200_000, "2 d 7 h")]
        {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn name_of_a_machine_lists_its_clones_too() {
        let machines =
            json!([{"name": "w", "clone_of": null}, {"name": "w-1", "clone_of": "w"}, {"name": "x"}]);
        let listed = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let answer = named(json!({"success": true, "machines": machines}), &names);
            let machines = answer["machines"].as_array().into_iter().flatten();
            machines.map(|machine| machine["name"].as_str().unwrap_or("").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(listed(&[]), ["w", "w-1", "x"]);
        assert_eq!(listed(&["w"]), ["w", "w-1"]);
        assert_eq!(listed(&["x", "w-1"]), ["w-1", "x"]);
        let unknown = named(json!({"success": true, "machines": machines}), &["y".to_owned()]);
        assert_eq!(unknown, json!({"success": false, "reason": "Machine with name y does not exist"}));
    }

    #[test]
    fn template_of_a_machine_and_its_clones_counts_once() {
        let machine = |name: &str, of: Option<&str>| json!({"name": name, "clone_of": of, "ready": {"mode": "standby", "memory": 7, "disk": 100}});
        let machines =
            [machine("w", None), machine("w-1", Some("w")), machine("w-2", Some("w")), machine("x", None)];
        assert_eq!((standby_memory(&machines), template_disk(&machines)), (28, 200));
    }

    #[test]
    fn note_has_the_age_of_a_lock_and_the_next_try_of_a_quarantine() {
        let machine = json!({
            "disabled": true, "disabled_reason": "QEMU was killed\nand more", "locked": true, "locked_by": "t1",
            "locked_since": 40, "quarantine": {"reason": "x", "tries": 1, "next_try_in": 30, "since": 70},
        });
        let expected = "disabled: QEMU was killed; locked by t1 for 1 min 0 s; \
                        in quarantine for 30 s: tried once, again in 30 s";
        assert_eq!(note(&machine, 100), expected);
        assert_eq!(note(&json!({"locked": true, "locked_by": "t", "locked_since": null}), 9), "locked by t");
    }
}
