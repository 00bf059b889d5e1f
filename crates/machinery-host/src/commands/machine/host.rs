//! The running host: it must not use a machine whose files a command replaces or removes.
//!
//! An entry of the configuration can be several machines of the host: its clones.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use machinery::{Error, Result};
use serde_json::{Value, json};

use crate::client::Client;
use crate::cwd::Cwd;
use crate::cwd_lock::lock_without_host;

/// The ends of the names of files that record a run. A host that was killed leaves them.
const RUN_RECORDS: [&str; 3] = ["run", "standby", "starting"];

/// The time in which a host that starts has to answer, and the interval of attempts.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const START_INTERVAL: Duration = Duration::from_millis(100);
/// The interval of looks at a machine that the host uses.
const USE_INTERVAL: Duration = Duration::from_secs(1);
/// The reason why a machine is out of the pool while a command replaces its files.
pub const HELD: &str = "its snapshot is taken anew";

/// Has a running host reload its configuration. Returns a note if it does not.
pub fn reload(cwd: &Cwd) -> Option<String> {
    let why = act(cwd, json!({"action": "reload"})).err()?;
    Some(format!("the running host has not reloaded its configuration: {why}"))
}

/// Sends a request to the host. Returns `None` if no host serves the CWD.
///
/// # Errors
/// A host may serve the CWD, and does not answer.
pub fn ask(cwd: &Cwd, request: Value) -> Result<Option<Value>> {
    match Presence::of_host(cwd, START_TIMEOUT)? {
        Presence::Serves(mut client) => client.request(request, |_| ()).map(Some),
        Presence::Absent(_) => Ok(None),
    }
}

/// Keeps a host from starting until the file is dropped, unless one answers already.
///
/// # Errors
/// A host serves the CWD, and does not answer.
pub fn keep_out(cwd: &Cwd) -> Result<Option<File>> {
    match Presence::of_host(cwd, START_TIMEOUT)? {
        Presence::Serves(_) => Ok(None),
        Presence::Absent(lock) => Ok(lock),
    }
}

/// A host that serves the CWD, or none.
enum Presence {
    Serves(Client),
    /// No host can start while the file is held. Without a file, there is no state of a host either.
    Absent(Option<File>),
}

impl Presence {
    /// Waits that long for a host that starts or ends.
    fn of_host(cwd: &Cwd, limit: Duration) -> Result<Presence> {
        let begun = Instant::now();
        loop {
            if let Some(client) = Client::find(&cwd.manager_socket())? {
                return Ok(Presence::Serves(client));
            }
            if !cwd.state().exists() {
                return Ok(Presence::Absent(None));
            }
            if let Some(lock) = lock_without_host(&cwd.state())? {
                return Ok(Presence::Absent(Some(lock)));
            }
            if begun.elapsed() >= limit {
                let reason = format!("a host serves this CWD, and has not answered within {limit:?}");
                return Err(Error::environment(reason).advice("Look at its log, and repeat the command"));
            }
            thread::sleep(START_INTERVAL);
        }
    }
}

/// Sends a request to a running host, and expects its success.
///
/// # Errors
/// The host refuses the request, or cannot be asked.
pub fn act(cwd: &Cwd, request: Value) -> Result<Option<Value>> {
    match ask(cwd, request)? {
        Some(answer) if answer["success"] != json!(true) => {
            Err(Error::failed(answer["reason"].as_str().unwrap_or("it gives no reason")))
        }
        answer => Ok(answer),
    }
}

/// Returns the machines of a running host that have the files of these entries: machines of these names, and clones.
///
/// # Errors
/// The host cannot be asked, or runs of an earlier host remain.
pub fn machines_of(cwd: &Cwd, machinery: &str, entries: &[String]) -> Result<Vec<Value>> {
    match listed(cwd, machinery, entries)? {
        Some(machines) => Ok(machines),
        None => expect_no_runs(cwd, machinery).map(|()| Vec::new()),
    }
}

/// Returns these machines as a running host lists them. Returns `None` if no host serves the CWD.
fn listed(cwd: &Cwd, machinery: &str, entries: &[String]) -> Result<Option<Vec<Value>>> {
    let Some(mut list) = act(cwd, json!({"action": "list"}))? else { return Ok(None) };
    let is_of = |machine: &Value, key: &str| entries.iter().any(|entry| machine[key] == json!(entry));
    let Value::Array(mut machines) = list["machines"].take() else { return Ok(Some(Vec::new())) };
    machines.retain(|machine| {
        machine["machinery_name"] == machinery && (is_of(machine, "name") || is_of(machine, "clone_of"))
    });
    Ok(Some(machines))
}

/// Returns the name of a machine.
pub fn name(machine: &Value) -> &str {
    machine["name"].as_str().unwrap_or_default()
}

/// Expects that no run of an earlier host remains, which the next one adopts.
fn expect_no_runs(cwd: &Cwd, machinery: &str) -> Result<()> {
    let entries = fs::read_dir(cwd.machinery_state(machinery)).into_iter().flatten().flatten();
    let is_record = |extension: &std::ffi::OsStr| RUN_RECORDS.iter().any(|record| extension == *record);
    match entries.map(|entry| entry.path()).find(|path| path.extension().is_some_and(is_record)) {
        None => Ok(()),
        Some(record) => {
            let reason = format!("an earlier host has left a run: {}", record.display());
            Err(Error::unexpected_state(reason).advice("Start the host, or run `cuckoo-machinery end-runs`"))
        }
    }
}

/// Expects that a running host uses none of these machines.
///
/// # Errors
/// A machine is on, or locked by a task.
pub fn expect_unused(machines: &[Value]) -> Result<()> {
    for machine in machines {
        let is_locked = machine["locked"] == json!(true);
        if is_locked || machine["state"] != json!("poweroff") {
            let state = machine["state"].as_str().unwrap_or_default();
            let lock = if is_locked { " and locked by a task" } else { "" };
            let reason = format!("the running host uses the machine: it is {state}{lock}");
            return Err(Error::unexpected_state(reason)
                .machine(name(machine))
                .advice("Stop it, or wait until its task has ended"));
        }
    }
    Ok(())
}

/// Waits until a running host uses none of the machines of these entries.
///
/// # Errors
/// The host cannot be asked.
pub fn wait_until_unused(cwd: &Cwd, machinery: &str, entries: &[String], step: &dyn Fn(&str)) -> Result<()> {
    loop {
        let Err(error) = expect_unused(&machines_of(cwd, machinery, entries)?) else { return Ok(()) };
        step(&format!("waiting until it is off and not locked: {}", error.reason()));
        thread::sleep(USE_INTERVAL);
    }
}

/// Has a running host give the machine to no task, nor restore it by itself, until it is [released](release).
///
/// # Errors
/// The host refuses, or cannot be asked.
pub fn hold(cwd: &Cwd, name: &str) -> Result<()> {
    let held = act(cwd, json!({"action": "hold_machine", "machine": name, "reason": HELD}));
    held.map(drop).map_err(|error| error.action("holding the machine").machine(name))
}

/// Has a running host end the standby of a machine, which has the machine's tap and address.
///
/// # Errors
/// The host refuses, or cannot be asked.
pub fn stop(cwd: &Cwd, name: &str) -> Result<()> {
    let stopped = act(cwd, json!({"action": "stop", "machine": name}));
    stopped.map(drop).map_err(|error| error.action("ending the standby").machine(name))
}

/// Has a running host release the machines of these entries. Those that are in the pool then prepare their next restore, for
/// which nobody waits.
///
/// # Errors
/// The host refuses, or cannot be asked.
pub fn release(cwd: &Cwd, machinery: &str, entries: &[String]) -> Result<()> {
    for machine in listed(cwd, machinery, entries)?.unwrap_or_default() {
        act(cwd, json!({"action": "release_machine", "machine": name(&machine)}))?;
    }
    for machine in listed(cwd, machinery, entries)?.unwrap_or_default() {
        if machine["disabled"] == json!(false) {
            let prepare = json!({"action": "prepare", "machine": name(&machine)});
            Client::connect(&cwd.manager_socket())?.split().0.send(&prepare, None)?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::commands::machine::context::MACHINERY;

    pub fn cwd(folder: &std::path::Path) -> Cwd {
        fs::write(folder.join(".cuckoocwd"), "").unwrap();
        let cwd = Cwd::find(Some(folder)).unwrap();
        fs::create_dir_all(cwd.machinery_state(MACHINERY)).unwrap();
        cwd
    }

    /// Starts a host that gives these answers, one after the other.
    pub fn host(cwd: &Cwd, answers: Vec<Value>) {
        fs::create_dir_all(cwd.sockets()).unwrap();
        let listener = UnixListener::bind(cwd.manager_socket()).unwrap();
        std::thread::spawn(move || {
            for mut answer in answers {
                // The first connection only looks whether a host is there.
                loop {
                    let (mut client, _) = listener.accept().unwrap();
                    if BufReader::new(&client).read_line(&mut String::new()).unwrap() > 0 {
                        answer["id"] = json!("request");
                        writeln!(client, "{answer}").unwrap();
                        break;
                    }
                }
            }
        });
    }

    #[test]
    fn machines_of_an_entry_are_its_clones_and_one_that_is_on_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path());
        let machine = |name: &str, of: Option<&str>, machinery: &str, state: &str| json!({"name": name, "clone_of": of, "machinery_name": machinery, "state": state, "locked": false});
        let machines = [
            machine("w-1", Some("w"), MACHINERY, "poweroff"),
            machine("w-2", Some("w"), MACHINERY, "running"),
            machine("twin", None, MACHINERY, "poweroff"),
            machine("other", None, MACHINERY, "running"),
            machine("w", None, "kvm", "running"),
        ];
        host(
            &cwd,
            vec![json!({"success": true, "machines": machines}), json!({"success": false, "reason": "no"})],
        );
        let found = machines_of(&cwd, MACHINERY, &["w".to_owned(), "twin".to_owned()]).unwrap();
        assert_eq!(found.iter().map(name).collect::<Vec<_>>(), ["w-1", "w-2", "twin"]);
        let refused = expect_unused(&found).unwrap_err().to_string();
        assert!(refused.contains("'w-2'") && refused.contains("it is running"), "{refused}");
        assert!(hold(&cwd, "w-1").unwrap_err().to_string().contains("no"));
    }

    #[test]
    fn machines_are_unknown_when_a_host_has_left_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path());
        let ask = || machines_of(&cwd, MACHINERY, &["m".to_owned()]).map_err(|error| error.to_string());
        assert_eq!(ask(), Ok(Vec::new()));
        for record in RUN_RECORDS {
            let path = cwd.machinery_state(MACHINERY).join(format!("m-1.{record}"));
            fs::write(&path, "").unwrap();
            assert!(ask().unwrap_err().contains("has left a run"), "{record}");
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn host_that_starts_is_waited_for_until_it_answers() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path());
        let _host = crate::cwd_lock::lock(&cwd.state(), Duration::ZERO).unwrap();
        let late = Presence::of_host(&cwd, Duration::ZERO).map(drop).unwrap_err().to_string();
        assert!(late.contains("has not answered"), "{late}");
        thread::scope(|scope| {
            let asking = scope.spawn(|| reload(&cwd));
            host(&cwd, vec![json!({"success": true})]);
            assert_eq!(asking.join().unwrap(), None);
        });
    }

    #[test]
    fn host_is_kept_out_while_the_file_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path());
        let kept = keep_out(&cwd).unwrap().unwrap();
        let start = || crate::cwd_lock::lock(&cwd.state(), std::time::Duration::ZERO);
        assert!(start().is_err());
        // The command itself still sees that there is none.
        assert_eq!(ask(&cwd, json!({"action": "list"})).unwrap(), None);
        drop(kept);
        start().unwrap();
    }
}
