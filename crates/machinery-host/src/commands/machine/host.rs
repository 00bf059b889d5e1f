//! The running host: it must not use a machine whose files a command replaces or removes.
//!
//! An entry of the configuration can be several machines of the host: its clones.

use std::fs::{self, File};

use machinery::{Error, Result};
use serde_json::{Value, json};

use crate::client::Client;
use crate::cwd::Cwd;
use crate::cwd_lock::lock_without_host;

/// The ends of the names of files that record a run. A host that was killed leaves them.
const RUN_RECORDS: [&str; 3] = ["run", "standby", "starting"];

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
    match Client::find(&cwd.manager_socket())? {
        Some(mut client) => client.request(request, |_| ()).map(Some),
        None => keep_out(cwd).map(|_| None),
    }
}

/// Keeps a host from starting until the file is dropped, unless one answers already.
///
/// # Errors
/// A host serves the CWD, and does not answer.
pub fn keep_out(cwd: &Cwd) -> Result<Option<File>> {
    if !cwd.state().exists() || Client::find(&cwd.manager_socket())?.is_some() {
        return Ok(None);
    }
    lock_without_host(&cwd.state())?.map(Some).ok_or_else(|| {
        Error::environment("a host serves this CWD, and does not answer")
            .advice("Wait until it has started or ended, and repeat the command")
    })
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
    let Some(mut list) = act(cwd, json!({"action": "list"}))? else {
        return expect_no_runs(cwd, machinery).map(|()| Vec::new());
    };
    let is_of = |machine: &Value, key: &str| entries.iter().any(|entry| machine[key] == json!(entry));
    let Value::Array(mut machines) = list["machines"].take() else { return Ok(Vec::new()) };
    machines.retain(|machine| {
        machine["machinery_name"] == machinery && (is_of(machine, "name") || is_of(machine, "clone_of"))
    });
    Ok(machines)
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

/// Reports whether the host restores the machine by itself: for tasks, or to heal it.
pub fn is_in_use(machine: &Value) -> bool {
    machine["disabled"] == json!(false) || !machine["quarantine"].is_null()
}

/// Has a running host give the machine to no task.
///
/// # Errors
/// The host refuses, or cannot be asked.
pub fn disable(cwd: &Cwd, name: &str) -> Result<()> {
    let reason = "its snapshot is taken anew";
    let disabled = act(cwd, json!({"action": "disable_machine", "machine": name, "reason": reason}));
    disabled.map(drop).map_err(|error| error.action("disabling the machine").machine(name))
}

/// Has a running host end the standby of a machine, which has the machine's tap and address.
///
/// # Errors
/// The host refuses, or cannot be asked.
pub fn stop(cwd: &Cwd, name: &str) -> Result<()> {
    let stopped = act(cwd, json!({"action": "stop", "machine": name}));
    stopped.map(drop).map_err(|error| error.action("ending the standby").machine(name))
}

/// Has a running host give the machine to tasks again, and prepare its next restore. Nobody waits for the preparation.
pub fn enable(cwd: &Cwd, name: &str) {
    if let Err(error) = act(cwd, json!({"action": "enable_machine", "machine": name})) {
        tracing::warn!(machine = name, %error, "the machine is still disabled: enable it with `enable-machine`");
    }
    let prepare = json!({"action": "prepare", "machine": name});
    let _ = Client::connect(&cwd.manager_socket()).and_then(|client| client.split().0.send(&prepare, None));
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
        assert!(disable(&cwd, "w-1").unwrap_err().to_string().contains("no"));
    }

    #[test]
    fn machines_are_unknown_when_a_host_does_not_answer_or_has_left_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path());
        let ask = || machines_of(&cwd, MACHINERY, &["m".to_owned()]).map_err(|error| error.to_string());
        assert_eq!(ask(), Ok(Vec::new()));
        let host = crate::cwd_lock::lock(&cwd.state(), std::time::Duration::ZERO).unwrap();
        assert!(ask().unwrap_err().contains("does not answer"));
        drop(host);
        for record in RUN_RECORDS {
            let path = cwd.machinery_state(MACHINERY).join(format!("m-1.{record}"));
            fs::write(&path, "").unwrap();
            assert!(ask().unwrap_err().contains("has left a run"), "{record}");
            fs::remove_file(path).unwrap();
        }
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

    #[test]
    fn machine_is_in_use_when_a_task_can_have_it_or_the_host_heals_it() {
        let machine =
            |disabled: bool, quarantine: Value| json!({"disabled": disabled, "quarantine": quarantine});
        assert!(is_in_use(&machine(false, Value::Null)) && is_in_use(&machine(true, json!({"tries": 1}))));
        assert!(!is_in_use(&machine(true, Value::Null)));
    }
}
