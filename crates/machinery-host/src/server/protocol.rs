//! The protocol: from a line to a request, and what is answered.
//!
//! Cuckoo3's part (`restore_start`, `norestore_start`, `stop`, `acpi_stop`) is kept to the word:
//! its order of checks, its reasons, and after which of them the connection closes. Source:
//! `MachineryManager.handle_message` in Cuckoo3's `node/machinery.py`.

use std::path::PathBuf;
use std::sync::Arc;

use machinery::{DumpFormat, Error};
use serde_json::{Map, Value, json};

use crate::actions::{Action, Occasion, Outcome};
use crate::fleet::Machine;
use crate::fleet::pool::Wanted;
use crate::fleet::standing::Hold;

/// What a client wants.
#[derive(Clone)]
pub enum Request {
    /// Something done with a machine.
    Act(Arc<Machine>, Action),
    /// A machine's state.
    State(Arc<Machine>),
    /// A machine back in the pool.
    EnableMachine(Arc<Machine>),
    /// A machine out of the pool, with the reason.
    DisableMachine(Arc<Machine>, String),
    /// This machine for a task.
    Lock(Arc<Machine>, Hold),
    /// A machine that its task needs no more; with the task, if it is named.
    Unlock(Arc<Machine>, Option<String>),
    /// This machine kept for a task.
    Reserve(Arc<Machine>, String),
    /// A machine kept for nobody any more.
    Unreserve(Arc<Machine>),
    /// Some machine for a task.
    Acquire(Wanted, Hold),
    /// To hear when no action waits or runs.
    WaitIdle,
    /// Read the configuration anew.
    Reload,
    /// All machines.
    List,
    /// The versions of everything.
    Version,
    /// How often each action was done, and how long it took.
    Metrics,
    /// Events, from now on.
    Subscribe,
    /// All machines stopped.
    ShutdownAll,
    /// The manager disabled or enabled.
    SetEnabled(bool),
}

/// Why a line is no request.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the client is told.
    pub reason: String,
    /// Whether the connection closes after it.
    pub close: bool,
}

impl Refusal {
    fn open(reason: impl Into<String>) -> Self {
        Refusal { reason: reason.into(), close: false }
    }

    fn closing(reason: impl Into<String>) -> Self {
        Refusal { reason: reason.into(), close: true }
    }
}

/// A line as an object, if it is one.
///
/// # Errors
/// It is not JSON, or not an object.
pub fn object(line: &[u8]) -> Result<Map<String, Value>, Refusal> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => {
            Err(Refusal::open("the line is JSON, but not an object. Send {\"action\": …, \"machine\": …}."))
        }
        Err(error) => {
            Err(Refusal::open(format!("the line is not JSON: {error}. Send one JSON object a line.")))
        }
    }
}

/// The longest `id`, as JSON, and the longest machine's name that is repeated: what a client sends
/// it gets back, and must not cost more than its share.
const ECHOED: usize = 256;

/// A request's `id`, if it has one.
///
/// # Errors
/// It is too long.
pub fn id(object: &Map<String, Value>) -> Result<Option<Value>, Refusal> {
    match object.get("id") {
        Some(id) if id.to_string().len() > ECHOED => {
            Err(Refusal::open(format!("the id is longer than {ECHOED} bytes of JSON")))
        }
        id => Ok(id.cloned()),
    }
}

/// What an object asks for.
///
/// # Errors
/// Nothing that can be done; the reasons are Cuckoo3's where it has one.
pub fn request(
    object: &Map<String, Value>,
    enabled: bool,
    find: impl Fn(&str) -> Option<Arc<Machine>>,
) -> Result<Request, Refusal> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let action = text("action");
    if let Some(request) = action.and_then(of_all_machines) {
        return Ok(request);
    }
    if !enabled && !action.is_some_and(goes_on_while_disabled) {
        return Err(Refusal::closing("Machinery manager is disabled"));
    }
    if action == Some("acquire") {
        if object.contains_key("machine") {
            return Err(Refusal::open("'acquire' takes the machine's name as 'name', and not as 'machine'"));
        }
        return Ok(Request::Acquire(wanted(object)?, hold(object)?));
    }
    let (Some(action), Some(name)) = (action, text("machine")) else {
        return Err(Refusal::closing("Missing action or machine name"));
    };
    let machine =
        find(name).ok_or_else(|| Refusal::open(Error::no_such_machine(&shortened(name)).to_string()))?;
    let act = |action| Ok(Request::Act(Arc::clone(&machine), action));
    match action {
        "restore_start" => act(Action::RestoreStart),
        "norestore_start" => act(Action::NorestoreStart),
        "stop" => act(Action::Stop),
        "acpi_stop" => act(Action::AcpiStop),
        "dump_memory" => {
            let path = match path(object, "path")? {
                Some(path) => path,
                None => machine.hold().and_then(|hold| hold.memory_dump_path).ok_or_else(missing_path)?,
            };
            act(Action::DumpMemory { path, format: format(object)? })
        }
        "screenshot" => act(Action::Screenshot { path: path(object, "path")?.ok_or_else(missing_path)? }),
        "prepare" => act(Action::Prepare(Occasion::Request)),
        "state" => Ok(Request::State(machine)),
        "enable_machine" => Ok(Request::EnableMachine(machine)),
        "disable_machine" => Ok(Request::DisableMachine(machine, reason(object)?)),
        "lock" => Ok(Request::Lock(machine, hold(object)?)),
        "unlock" => Ok(Request::Unlock(machine, optional_task_id(object)?)),
        "reserve" => Ok(Request::Reserve(machine, task_id(object)?)),
        "unreserve" => Ok(Request::Unreserve(machine)),
        _ => Err(Refusal::closing("No such action")),
    }
}

fn shortened(name: &str) -> String {
    name.chars().take(ECHOED).collect()
}

fn of_all_machines(action: &str) -> Option<Request> {
    Some(match action {
        "list" => Request::List,
        "version" => Request::Version,
        "metrics" => Request::Metrics,
        "subscribe" => Request::Subscribe,
        "shutdown_all" => Request::ShutdownAll,
        "wait_idle" => Request::WaitIdle,
        "reload" => Request::Reload,
        "disable" => Request::SetEnabled(false),
        "enable" => Request::SetEnabled(true),
        _ => return None,
    })
}

/// What ends something, or only looks.
fn goes_on_while_disabled(action: &str) -> bool {
    matches!(action, "stop" | "state" | "enable_machine" | "disable_machine" | "unlock" | "unreserve")
}

/// A key's text; a missing one, null and an empty text are all the same.
fn optional_text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, Refusal> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(Refusal::open(format!("'{key}' must be a text"))),
    }
}

/// The longest path that Linux takes.
const LONGEST_PATH: usize = 4095;

/// The host's own folder means nothing to a client, so a path has to be absolute.
fn path(object: &Map<String, Value>, key: &str) -> Result<Option<PathBuf>, Refusal> {
    match optional_text(object, key)? {
        Some(text) if text.len() > LONGEST_PATH || text.contains('\0') => {
            Err(Refusal::open(format!("'{key}' is no path: it is too long, or has a zero byte")))
        }
        Some(text) if !text.starts_with('/') => {
            Err(Refusal::open(format!("'{key}' must be an absolute path, and {} is not", shortened(text))))
        }
        path => Ok(path.map(PathBuf::from)),
    }
}

fn missing_path() -> Refusal {
    Refusal::open("Missing path: this action needs an absolute 'path' to write to")
}

fn optional_task_id(object: &Map<String, Value>) -> Result<Option<String>, Refusal> {
    match optional_text(object, "task_id")? {
        Some(id) if id.len() > ECHOED => {
            Err(Refusal::open(format!("the task_id is longer than {ECHOED} bytes")))
        }
        id => Ok(id.map(str::to_owned)),
    }
}

fn task_id(object: &Map<String, Value>) -> Result<String, Refusal> {
    let missing = || Refusal::open("Missing task_id: say which task the machine is for");
    optional_task_id(object)?.ok_or_else(missing)
}

fn hold(object: &Map<String, Value>) -> Result<Hold, Refusal> {
    Ok(Hold {
        task_id: task_id(object)?,
        pcap_path: path(object, "pcap_path")?,
        memory_dump_path: path(object, "memory_dump_path")?,
    })
}

fn wanted(object: &Map<String, Value>) -> Result<Wanted, Refusal> {
    let text = |key: &str| Ok(optional_text(object, key)?.map(shortened).unwrap_or_default());
    let tags = match object.get("tags") {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(tags)) => tags.iter().map(|tag| tag.as_str().map(str::to_owned)).collect(),
        Some(_) => None,
    };
    Ok(Wanted {
        name: text("name")?,
        platform: text("platform")?,
        os_version: text("os_version")?,
        architecture: text("architecture")?,
        tags: tags.ok_or_else(|| Refusal::open("'tags' must be a list of texts"))?,
    })
}

fn reason(object: &Map<String, Value>) -> Result<String, Refusal> {
    let given = optional_text(object, "reason")?.map(shortened);
    Ok(given.unwrap_or_else(|| "taken out of the pool by request".to_owned()))
}

fn format(object: &Map<String, Value>) -> Result<DumpFormat, Refusal> {
    let Some(text) = optional_text(object, "format")? else { return Ok(DumpFormat::default()) };
    serde_json::from_value(json!(text)).map_err(|_| {
        let text = shortened(text);
        Refusal::open(format!("'{text}' is not a format of memory dumps. Use elf, kdump-zlib or win-dmp."))
    })
}

/// The answer to an action that has ended.
pub fn outcome(outcome: Outcome) -> Value {
    match outcome {
        Ok(()) => json!({"success": true}),
        Err(reason) => failure(&reason),
    }
}

/// The answer to what failed.
pub fn failure(reason: &str) -> Value {
    json!({"success": false, "reason": reason})
}

/// A line to send, with the request's `id` if it had one.
pub fn line(mut answer: Value, id: Option<&Value>) -> Vec<u8> {
    if let (Some(object), Some(id)) = (answer.as_object_mut(), id) {
        object.insert("id".to_owned(), id.clone());
    }
    let mut line = answer.to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str, enabled: bool) -> Refusal {
        let object = object(line.as_bytes()).unwrap();
        request(&object, enabled, |_| None).err().unwrap()
    }

    #[test]
    fn what_is_missing_closes_the_connection() {
        for line in [
            "{}",
            r#"{"action": "stop"}"#,
            r#"{"machine": "m"}"#,
            r#"{"action": "", "machine": "m"}"#,
            r#"{"action": null, "machine": "m"}"#,
            r#"{"action": "stop", "machine": 7}"#,
        ] {
            assert_eq!(refused(line, true), Refusal::closing("Missing action or machine name"), "{line}");
        }
    }

    #[test]
    fn an_unknown_machine_is_named_and_the_connection_stays() {
        let refusal = refused(r#"{"action": "restore_start", "machine": "nope"}"#, true);
        assert_eq!(refusal, Refusal::open("Machine with name nope does not exist"));
    }

    #[test]
    fn while_disabled_only_stop_and_looking_go_on() {
        let disabled = Refusal::closing("Machinery manager is disabled");
        assert_eq!(refused(r#"{"action": "restore_start", "machine": "m"}"#, false), disabled);
        assert_eq!(refused("{}", false), disabled);
        assert_ne!(refused(r#"{"action": "stop", "machine": "m"}"#, false), disabled);
        let list = object(br#"{"action": "list"}"#).unwrap();
        assert!(request(&list, false, |_| None).is_ok());
    }

    #[test]
    fn garbage_is_told_and_the_connection_stays() {
        for line in ["", "nonsense", "{\"a\":", "[1]", "7", "\u{0}"] {
            let refusal = object(line.as_bytes()).unwrap_err();
            assert!(!refusal.close && refusal.reason.contains("JSON"), "{line:?}: {refusal:?}");
        }
        assert!(object(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn what_is_echoed_has_a_limit() {
        let long = "x".repeat(100_000);
        let refusal = refused(&format!("{{\"action\": \"stop\", \"machine\": \"{long}\"}}"), true);
        assert!(refusal.reason.len() < 400 && !refusal.close);
        let with_id = object(format!("{{\"id\": \"{long}\"}}").as_bytes()).unwrap();
        assert!(id(&with_id).unwrap_err().reason.contains("256"));
    }

    #[test]
    fn an_id_is_echoed_whatever_it_is() {
        let line = line(outcome(Ok(())), Some(&json!({"a": [1]})));
        assert_eq!(line, b"{\"id\":{\"a\":[1]},\"success\":true}\n");
    }
}
