//! A machine as the page reads it.

use serde_json::{Value, json};

use crate::fleet::Machine;

/// Returns the values of a tile.
pub fn tile(machine: &Machine) -> Value {
    let (info, status) = (machine.info(), machine.status());
    let availability = &status.availability;
    let quarantine = availability.quarantine.as_ref();
    json!({
        "name": info.name,
        "clone_of": info.clone_of,
        "machinery": machine.machinery.name,
        "platform": info.platform,
        "os_version": info.os_version,
        "tags": info.tags,
        "ip": info.ip,
        "state": status.state,
        "task": availability.lock.as_ref().map(|lock| &lock.task_id),
        "reserved_by": availability.reserved_by,
        "since": status.run_begin.map(|begin| begin.unix),
        "mode": status.ready.as_ref().map(|ready| ready.mode),
        "disabled": availability.disabled_reason().filter(|_| quarantine.is_none()),
        "quarantine": quarantine.map(|quarantine| &quarantine.reason),
        "error": status.errors.last(),
        "errors": status.errors.len(),
        "run_errors": availability.run_errors.len(),
        "console": info.console,
        "screen": machine.machinery.capabilities.screenshot,
    })
}
