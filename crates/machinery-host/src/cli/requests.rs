//! Sends the requests of commands to the running host.

use std::fs::File;

use machinery::{Error, Result};
use serde_json::{Value, json};

use super::args::Command;
use super::progress::{Progress, Spinner};
use crate::client::Client;
use crate::cwd::Cwd;
use crate::exit::ExitCode;

/// Returns the request of a command that acts on one machine.
pub fn request(command: &Command) -> Result<Value> {
    let simple = |action: &str, machine: &str| json!({"action": action, "machine": machine});
    Ok(match command {
        Command::RestoreStart { machine } => simple("restore_start", machine),
        Command::NorestoreStart { machine } => simple("norestore_start", machine),
        Command::Stop { machine } => simple("stop", machine),
        Command::AcpiStop { machine } => simple("acpi_stop", machine),
        Command::EnableMachine { machine } => simple("enable_machine", machine),
        Command::DisableMachine { machine, reason } => {
            json!({"action": "disable_machine", "machine": machine, "reason": reason})
        }
        Command::Unlock { machine } => simple("unlock", machine),
        Command::DumpMemory { machine, format, .. } => {
            json!({"action": "dump_memory", "machine": machine, "fd": true, "format": format})
        }
        Command::Screenshot { machine, .. } => {
            json!({"action": "screenshot", "machine": machine, "fd": true})
        }
        _ => return Err(Error::failed("this command does not act on a machine: a bug of the command line")),
    })
}

/// Sends a request, and returns the answer.
///
/// # Errors
/// No host answers.
pub fn send_request(cwd: &Cwd, request: Value, json: bool) -> Result<Value> {
    let _spinner = Spinner::start(request["action"].as_str().unwrap_or(""), json);
    Client::connect(&cwd.manager_socket())?.request(request, |_| ())
}

/// Runs an action, which may write the file, and shows its progress.
pub fn run_action(cwd: &Cwd, request: &Value, file: Option<&File>, json: bool) -> Result<ExitCode> {
    let mut client = Client::connect(&cwd.manager_socket())?;
    let mut progress = Progress::new(request, json);
    let mut answer = client.request(json!({"action": "subscribe"}), |_| ())?;
    if answer["success"] == json!(true) {
        answer = client.request_with(request.clone(), file, |event| progress.on_event(event))?;
    }
    progress.done(&answer);
    Ok(exit_code(&answer))
}

/// Prepares the machines one by one, so that each shows its progress. A failure does not stop the others.
pub fn prepare(cwd: &Cwd, machines: &[String], json: bool) -> Result<ExitCode> {
    let mut machines = machines.to_vec();
    if machines.is_empty() {
        let answer = send_request(cwd, json!({"action": "list"}), json)?;
        let all = answer["machines"].as_array().into_iter().flatten();
        machines = all.filter_map(|machine| machine["name"].as_str().map(str::to_owned)).collect();
    }
    let mut worst = ExitCode::SUCCESS;
    for machine in machines {
        let code = run_action(cwd, &json!({"action": "prepare", "machine": machine}), None, json)?;
        if code != ExitCode::SUCCESS {
            worst = code;
        }
    }
    Ok(worst)
}

/// Returns the exit code for an answer.
pub fn exit_code(answer: &Value) -> ExitCode {
    if answer["success"] == json!(true) { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
