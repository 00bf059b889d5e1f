//! Prints the list of machines, as a table or as JSON.

use machinery::format_bytes;
use serde_json::{Value, json};

use super::output::{reply, table};
use crate::fleet::quarantine::unix_now;

/// Prints all machines as a table.
pub fn machines(answer: &Value, json: bool) {
    if json || answer["success"] != json!(true) {
        return reply(answer, json);
    }
    let mut rows = vec![
        ["NAME", "STATE", "SINCE", "RESTORE", "MACHINERY", "IP", "PLATFORM", "TAGS", "NOTE"]
            .map(str::to_owned),
    ];
    let now = unix_now();
    for machine in answer["machines"].as_array().unwrap_or(&Vec::new()) {
        let text = |key: &str| machine[key].as_str().unwrap_or("").to_owned();
        let tags: Vec<&str> =
            machine["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let platform = format!("{} {} {}", text("platform"), text("os_version"), text("architecture"));
        rows.push([
            text("name"),
            text("state"),
            age(&machine["running_since"], now).unwrap_or_default(),
            machine["ready"]["mode"].as_str().unwrap_or("plain").to_owned(),
            text("machinery_name"),
            text("ip"),
            platform,
            tags.join(","),
            note(machine, now),
        ]);
    }
    println!("{}", table(&rows));
    if let Some(usage) = prepared_usage(&answer["machines"]) {
        println!("\n{usage}");
    }
}

/// Returns the memory and the disk space that prepared restores use, if they use any.
fn prepared_usage(machines: &Value) -> Option<String> {
    let machines = machines.as_array()?;
    let standbys = machines.iter().filter(|machine| machine["ready"]["mode"] == json!("standby")).count();
    let (memory, disk) = (sum_of_ready(machines, "memory"), sum_of_ready(machines, "disk"));
    (memory > 0 || disk > 0).then(|| {
        format!(
            "standbys: {standbys}, using {} of memory; templates: {} on disk",
            format_bytes(memory),
            format_bytes(disk)
        )
    })
}

/// Returns the sum of a key of the machines' readiness.
pub fn sum_of_ready(machines: &[Value], key: &str) -> u64 {
    machines.iter().filter_map(|machine| machine["ready"][key].as_u64()).sum()
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
