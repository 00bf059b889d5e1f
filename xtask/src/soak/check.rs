//! The invariants after a round, and the pool that they need.
//!
//! Each machine returns to the pool by itself, restores and stops. Then, with all machines out of the pool, nothing of a
//! run is left, and the host has the resources that it had.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use machinery_testkit::client::Client;
use serde_json::{Value, json};

use super::phase::SOON;
use super::served::{Served, act, all_machines, ask, disable, until};
use super::site::{REAL, Site};
use crate::run::{Context, Result};

/// The time in which a machine returns to the pool: the first try comes after 5 s, and the second one after 30 s more.
const HEALING: Duration = Duration::from_secs(100);
/// The rounds of a host after which its resources count.
const WARM_UP: usize = 3;
/// The time in which the leftovers of a cancelled preparation go, and idle threads end.
const CLEANING: Duration = Duration::from_secs(15);

/// Waits until all machines are in the pool and off, and describes those that are not.
pub fn wait_for_pool(served: &Served) -> Result<Vec<String>> {
    let mut client = served.client()?;
    let mut last = Vec::new();
    let all = until(HEALING, || {
        last = list(&mut client)?.iter().filter_map(not_in_pool).collect();
        let lasts = last.iter().any(|(lasts, _)| *lasts);
        Ok((last.is_empty() || lasts).then_some(()))
    })?;
    let late = if all.is_none() { "does not return to the pool: " } else { "" };
    Ok(last.into_iter().map(|(_, why)| format!("{late}{why}")).collect())
}

/// Describes a machine that is not in the pool, and reports whether that lasts.
fn not_in_pool(machine: &Value) -> Option<(bool, String)> {
    let is_free = machine["disabled"] == false
        && machine["locked"] == false
        && machine["reserved"] == false
        && machine["state"] == "poweroff";
    let is_disabled = machine["disabled"] == true && machine["quarantine"].is_null();
    (!is_free).then(|| (is_disabled, format!("{}: {machine}", machine["name"].as_str().unwrap_or_default())))
}

fn list(client: &mut Client) -> Result<Vec<Value>> {
    let mut answer = ask(client, json!({"action": "list"}))?;
    Ok(answer["machines"].as_array_mut().map(std::mem::take).unwrap_or_default())
}

/// Checks all invariants, with each machine in the pool and off, and leaves the machines so. Returns the violations.
pub fn check(site: &Site, served: &mut Served) -> Result<Vec<String>> {
    let mut found = restore_all(site, served);
    found.extend(leftovers(site, served)?);
    found.extend(resources(served)?);
    let mut client = served.client()?;
    found.extend(state_file(site, &mut client)?);
    for machine in all_machines() {
        act(&mut client, "enable_machine", machine)?;
    }
    found.extend(state_file(site, &mut client)?);
    Ok(found)
}

/// Restores and stops all machines at the same time; each is out of the pool afterwards.
fn restore_all(site: &Site, served: &Served) -> Vec<String> {
    thread::scope(|scope| {
        let threads: Vec<_> = all_machines()
            .map(|machine| (machine, scope.spawn(move || restore(site, served, machine))))
            .collect();
        let failure =
            |(machine, thread): (&str, thread::ScopedJoinHandle<'_, Result<()>>)| match thread.join() {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(format!("{machine}: {failure}")),
                Err(_) => Some(format!("{machine}: the check panicked")),
            };
        threads.into_iter().filter_map(failure).collect()
    })
}

fn restore(site: &Site, served: &Served, machine: &str) -> Result<()> {
    let mut client = served.client()?;
    act(&mut client, "restore_start", machine)?;
    if REAL.contains(&machine) {
        let first = site.probe(machine).first_count(SOON)?;
        if first != site.restored_count() {
            return Err(format!("the guest begins at {first}, not at {}", site.restored_count()).into());
        }
    }
    disable(&mut client, machine)?;
    act(&mut client, "stop", machine)
}

/// Describes everything of a run that is left, with all machines off and out of the pool.
fn leftovers(site: &Site, served: &Served) -> Result<Vec<String>> {
    let mut left = Vec::new();
    until(CLEANING, || {
        left = site.leftovers()?;
        left.extend(names(&site.overlays(), |_| true)?);
        let sockets = site.cwd().socket();
        let is_other = |name: &str| !sockets.ends_with(name);
        left.extend(names(sockets.parent().unwrap_or(&sockets), is_other)?);
        left.extend(mounts(site)?);
        left.extend(namespaces(served)?);
        let cgroups = site.cgroups().of_machines();
        left.extend(cgroups.into_iter().map(|cgroup| format!("the cgroup {}", cgroup.display())));
        if let Some(libvirtd) = site.libvirtd() {
            left.extend(libvirtd.virsh(&["list", "--name"])?.split_whitespace().map(str::to_owned));
        }
        Ok(left.is_empty().then_some(()))
    })?;
    let outputs = site.outputs();
    for output in names(&outputs, |name| name.ends_with(".pcap"))? {
        fs::remove_file(&output).context(|| format!("cannot remove {output}"))?;
    }
    left.extend(names(&outputs, |_| true)?);
    Ok(left.into_iter().map(|left| format!("left: {left}")).collect())
}

/// Returns the paths in a folder whose names are wanted.
fn names(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).context(|| format!("cannot list {}", folder.display()))?;
    let entries = entries.flatten().filter(|entry| entry.file_name().to_str().is_none_or(&is_wanted));
    Ok(entries.map(|entry| entry.path().display().to_string()).collect())
}

/// Returns the mounts below the site, except its own.
fn mounts(site: &Site) -> Result<Vec<String>> {
    let all = fs::read_to_string("/proc/self/mounts").context(|| "cannot list mounts".to_owned())?;
    let root = site.cwd().root().display().to_string();
    let own: Vec<String> = site.disks().iter().map(|disk| disk.path().display().to_string()).collect();
    let points = all.lines().filter_map(|line| line.split(' ').nth(1));
    let left = points.filter(|point| point.starts_with(&root) && !own.iter().any(|own| own == point));
    Ok(left.map(|point| format!("the mount {point}")).collect())
}

/// Returns the namespaces that the host holds by a descriptor.
fn namespaces(served: &Served) -> Result<Vec<String>> {
    let folder = format!("/proc/{}/fd", served.host.pid());
    let files = fs::read_dir(&folder).context(|| format!("cannot list {folder}"))?;
    let targets = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
    let targets = targets.map(|target| target.display().to_string());
    let is_namespace = |target: &String| {
        target.contains(":[")
            && !target.contains("anon_inode")
            && !target.starts_with("socket:")
            && !target.starts_with("pipe:")
    };
    Ok(targets.filter(is_namespace).map(|target| format!("the host's namespace {target}")).collect())
}

/// Compares the host's resources with those after its first rounds. An idle thread takes a while to end.
fn resources(served: &mut Served) -> Result<Option<String>> {
    let mut growth = None;
    if served.rounds < WARM_UP {
        let now = served.host.resources()?;
        let largest = served.baseline.take().map_or_else(|| now.clone(), |before| before.larger(&now));
        (served.baseline, served.rounds) = (Some(largest), served.rounds + 1);
    }
    if let Some(before) = &served.baseline {
        until(CLEANING, || {
            growth = served.host.resources()?.growth_since(before);
            Ok(growth.is_none().then_some(()))
        })?;
    }
    Ok(growth.map(|growth| format!("the host has children or has grown: {growth}")))
}

/// Restores and stops all machines at the same time, again and again. The host must not grow.
pub fn storm(site: &Site, served: &mut Served, repeats: usize) -> Result<Vec<String>> {
    let mut found = Vec::new();
    (served.baseline, served.rounds) = (None, 0);
    for repeat in 0..repeats {
        found.extend(restore_all(site, served));
        if repeat < WARM_UP || repeat + 1 == repeats {
            found.extend(resources(served)?);
        }
        if !found.is_empty() {
            break;
        }
    }
    found.extend(leftovers(site, served)?);
    Ok(found)
}

/// Compares the state file with the list.
fn state_file(site: &Site, client: &mut Client) -> Result<Vec<String>> {
    let path = site.state_folder().join("machines.json");
    let what = || format!("cannot read {}", path.display());
    let file: Value = serde_json::from_slice(&fs::read(&path).context(what)?).context(what)?;
    let differs = |machine: &Value| {
        let name = machine["name"].as_str().unwrap_or_default();
        let saved = file["machines"].get(name).unwrap_or(&Value::Null);
        let is_out = saved["disabled"].is_string() || saved["quarantine"].is_object();
        let same = machine["disabled"] == is_out
            && machine["locked_by"].as_str().unwrap_or_default()
                == saved["lock"]["task_id"].as_str().unwrap_or_default()
            && machine["reserved_by"].as_str().unwrap_or_default()
                == saved["reserved_by"].as_str().unwrap_or_default();
        (!same).then(|| format!("the state file has {saved} for {machine}"))
    };
    Ok(list(client)?.iter().filter_map(differs).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_is_not_in_the_pool_when_it_is_disabled_locked_or_on() {
        let free = json!({"name": "m", "disabled": false, "locked": false, "reserved": false, "state": "poweroff",
            "quarantine": null});
        assert_eq!(not_in_pool(&free), None);
        for (key, value, lasts) in [
            ("disabled", json!(true), true),
            ("locked", json!(true), false),
            ("state", json!("running"), false),
        ] {
            let mut machine = free.clone();
            machine[key] = value;
            assert_eq!(not_in_pool(&machine).map(|(lasts, _)| lasts), Some(lasts), "{machine}");
        }
        let mut healing = free;
        (healing["disabled"], healing["quarantine"]) = (json!(true), json!({"tries": 0}));
        assert_eq!(not_in_pool(&healing).map(|(lasts, _)| lasts), Some(false));
    }
}
