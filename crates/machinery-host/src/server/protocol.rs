//! The protocol: parses a line into a request. `reply.rs` has the other direction.
//!
//! Cuckoo3's part (`restore_start`, `norestore_start`, `stop`, `acpi_stop`) is identical with Cuckoo3's: the
//! order of the checks, the reasons, and whether the connection closes after a reason. Source:
//! `MachineryManager.handle_message` in Cuckoo3's `node/machinery.py`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use machinery::{DumpFormat, Error};
use serde_json::{Map, Value, json};

use super::framing::{MAX_VALUES, count_values};
use super::peers::Peer;
use crate::actions::{Action, PrepareOrigin};
use crate::client_file::{ClientFile, NamedFile, PassedFile};
use crate::fleet::Machine;
use crate::fleet::availability::TaskLock;
use crate::fleet::pool::MachineQuery;

/// A request of a client.
#[derive(Clone)]
pub enum Request {
    /// Run an action on a machine.
    Act(Arc<Machine>, Action),
    /// Report the machine's state.
    State(Arc<Machine>),
    /// Report the socket of the machine's console.
    Console(Arc<Machine>),
    /// Put the machine back into the pool.
    EnableMachine(Arc<Machine>),
    /// Take the machine out of the pool, for this reason.
    DisableMachine(Arc<Machine>, String),
    /// Take the machine out of the pool until it is released, for this reason; without one, release it.
    Hold(Arc<Machine>, Option<String>),
    /// Lock the machine for a task.
    Lock(Arc<Machine>, TaskLock),
    /// Release the machine's lock; with a task, only that task's.
    Unlock(Arc<Machine>, Option<String>),
    /// Reserve the machine for a task.
    Reserve(Arc<Machine>, String),
    /// Cancel the machine's reservation.
    Unreserve(Arc<Machine>),
    /// Lock a machine that matches, for a task.
    Acquire(MachineQuery, TaskLock),
    /// Reply when no action waits or runs.
    WaitIdle,
    /// Read the configuration again.
    Reload,
    /// List all machines.
    List,
    /// Report the versions of the host, the interface and the hypervisors.
    Version,
    /// Report counts and durations of actions.
    Metrics,
    /// Send all later events.
    Subscribe,
    /// Stop all machines.
    ShutdownAll,
    /// Disable or enable the manager.
    SetEnabled(bool),
    /// Execute the host's program again.
    Upgrade,
    /// End the host.
    Shutdown,
}

/// The sender of a request.
pub struct Sender<'a> {
    /// The client's user.
    pub peer: Peer,
    /// The file that the client has passed with the request.
    pub file: Option<PassedFile>,
    /// The folder below which every client may name files.
    pub storage: &'a Path,
}

/// A line that is no valid request.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The reason, for the client.
    pub reason: String,
    /// True if the connection closes after the reply.
    pub close: bool,
}

impl Refusal {
    /// Returns a refusal that keeps the connection.
    pub fn open(reason: impl Into<String>) -> Self {
        Refusal { reason: reason.into(), close: false }
    }

    fn closing(reason: impl Into<String>) -> Self {
        Refusal { reason: reason.into(), close: true }
    }
}

/// Parses a line into an object.
///
/// # Errors
/// The line is not JSON, not an object, or has too many values.
pub fn object(line: &[u8]) -> Result<Map<String, Value>, Refusal> {
    if count_values(line) > MAX_VALUES {
        return Err(Refusal::open(format!("the line has more than {MAX_VALUES} JSON values")));
    }
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

/// The length of an `id`, as JSON, and of the part of a name that a reply repeats, at most. A client must not
/// make replies longer than its share of the outbox.
const MAX_ECHO: usize = 256;

/// Returns the request's `id`, if it has one.
///
/// # Errors
/// The `id` is too long.
pub fn id(object: &Map<String, Value>) -> Result<Option<Value>, Refusal> {
    match object.get("id") {
        Some(id) if id.to_string().len() > MAX_ECHO => {
            Err(Refusal::open(format!("the id is longer than {MAX_ECHO} bytes of JSON")))
        }
        id => Ok(id.cloned()),
    }
}

/// Parses an object into a request.
///
/// # Errors
/// The object is no request. The reasons are Cuckoo3's where it has one.
pub fn request(
    object: &Map<String, Value>,
    enabled: bool,
    sender: &Sender<'_>,
    find: impl Fn(&str) -> Option<Arc<Machine>>,
) -> Result<Request, Refusal> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
    let action = text("action");
    if let Some(request) = action.and_then(of_the_host) {
        let is_refused =
            matches!(request, Request::Upgrade | Request::Shutdown) && sender.peer.owner.is_some();
        let refusal = || Refusal::open("only root and the host's own user may upgrade the host or end it");
        return if is_refused { Err(refusal()) } else { Ok(request) };
    }
    if !enabled && !action.is_some_and(is_accepted_while_disabled) {
        return Err(Refusal::closing("Machinery manager is disabled"));
    }
    if action == Some("acquire") {
        if object.contains_key("machine") {
            return Err(Refusal::open("'acquire' takes the machine's name as 'name', and not as 'machine'"));
        }
        return Ok(Request::Acquire(query(object)?, task_lock(object, sender)?));
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
            let of_lock = || machine.task_lock().and_then(|lock| lock.memory_dump());
            let file = client_file(object, sender)?.or_else(of_lock).ok_or_else(missing_path)?;
            act(Action::DumpMemory { file, format: format(object)? })
        }
        "screenshot" => {
            act(Action::Screenshot { file: client_file(object, sender)?.ok_or_else(missing_path)? })
        }
        "prepare" => act(Action::Prepare(PrepareOrigin::Request)),
        "state" => Ok(Request::State(machine)),
        "console" => Ok(Request::Console(machine)),
        "enable_machine" => Ok(Request::EnableMachine(machine)),
        "disable_machine" => Ok(Request::DisableMachine(machine, reason(object)?)),
        "hold_machine" => Ok(Request::Hold(machine, Some(reason(object)?))),
        "release_machine" => Ok(Request::Hold(machine, None)),
        "lock" => Ok(Request::Lock(machine, task_lock(object, sender)?)),
        "unlock" => Ok(Request::Unlock(machine, optional_task_id(object)?)),
        "reserve" => Ok(Request::Reserve(machine, task_id(object)?)),
        "unreserve" => Ok(Request::Unreserve(machine)),
        _ => Err(Refusal::closing("No such action")),
    }
}

fn shortened(name: &str) -> String {
    name.chars().take(MAX_ECHO).collect()
}

fn of_the_host(action: &str) -> Option<Request> {
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
        "upgrade" => Request::Upgrade,
        "shutdown" => Request::Shutdown,
        _ => return None,
    })
}

/// Reports whether a disabled manager accepts the action: one that ends something, or only reads.
fn is_accepted_while_disabled(action: &str) -> bool {
    let is_of_pool = matches!(action, "unlock" | "unreserve") || action.ends_with("_machine");
    is_of_pool || matches!(action, "stop" | "state" | "console")
}

/// Returns a key's text. A missing key, null and an empty text are equivalent.
fn optional_text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, Refusal> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(Refusal::open(format!("'{key}' must be a text"))),
    }
}

/// The length of a path, at most. Source: PATH_MAX in limits.h, with its zero byte.
const MAX_PATH: usize = 4095;

/// Returns a key's path. It must be absolute, because a client does not know the host's working directory.
fn path(object: &Map<String, Value>, key: &str) -> Result<Option<PathBuf>, Refusal> {
    match optional_text(object, key)? {
        Some(text) if text.len() > MAX_PATH || text.contains('\0') => {
            Err(Refusal::open(format!("'{key}' is no path: it is too long, or has a zero byte")))
        }
        Some(text) if !text.starts_with('/') => {
            Err(Refusal::open(format!("'{key}' must be an absolute path, and {} is not", shortened(text))))
        }
        path => Ok(path.map(PathBuf::from)),
    }
}

/// Reports whether a descriptor was passed with the request.
///
/// # Errors
/// The key is neither true nor false.
pub fn has_descriptor(object: &Map<String, Value>) -> Result<bool, Refusal> {
    match object.get("fd") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(passed)) => Ok(*passed),
        Some(_) => Err(Refusal::open("'fd' must be true or false")),
    }
}

/// Returns a key's path, if the sender may name it.
fn allowed_path(
    object: &Map<String, Value>,
    key: &str,
    sender: &Sender<'_>,
) -> Result<Option<PathBuf>, Refusal> {
    let path = path(object, key)?;
    if let (Some(path), Some(owner)) = (&path, sender.peer.owner) {
        owner.expect_below(path, sender.storage).map_err(|error| Refusal::open(error.to_string()))?;
    }
    Ok(path)
}

/// Returns the file that the client has passed, or else named.
fn client_file(object: &Map<String, Value>, sender: &Sender<'_>) -> Result<Option<ClientFile>, Refusal> {
    if let Some(file) = &sender.file {
        return Ok(Some(ClientFile::Passed(file.clone())));
    }
    let path = allowed_path(object, "path", sender)?;
    Ok(path.map(|path| ClientFile::Named(NamedFile { path, owner: sender.peer.owner })))
}

fn missing_path() -> Refusal {
    Refusal::open("Missing path: this action needs an absolute 'path' to write to, or a descriptor and 'fd'")
}

fn optional_task_id(object: &Map<String, Value>) -> Result<Option<String>, Refusal> {
    match optional_text(object, "task_id")? {
        Some(id) if id.len() > MAX_ECHO => {
            Err(Refusal::open(format!("the task_id is longer than {MAX_ECHO} bytes")))
        }
        id => Ok(id.map(str::to_owned)),
    }
}

fn task_id(object: &Map<String, Value>) -> Result<String, Refusal> {
    let missing = || Refusal::open("Missing task_id: say which task the machine is for");
    optional_task_id(object)?.ok_or_else(missing)
}

fn task_lock(object: &Map<String, Value>, sender: &Sender<'_>) -> Result<TaskLock, Refusal> {
    Ok(TaskLock {
        task_id: task_id(object)?,
        uid: Some(sender.peer.uid),
        pcap_path: match sender.file {
            // The path is only a name then, and is checked again before it is used.
            Some(_) => path(object, "pcap_path")?,
            None => allowed_path(object, "pcap_path", sender)?,
        },
        memory_dump_path: allowed_path(object, "memory_dump_path", sender)?,
        owner: sender.peer.owner,
        pcap_passed: sender.file.is_some(),
        pcap_file: sender.file.clone(),
    })
}

fn query(object: &Map<String, Value>) -> Result<MachineQuery, Refusal> {
    let text = |key: &str| Ok(optional_text(object, key)?.map(shortened).unwrap_or_default());
    let tags = match object.get("tags") {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(tags)) => tags.iter().map(|tag| tag.as_str().map(str::to_owned)).collect(),
        Some(_) => None,
    };
    Ok(MachineQuery {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client_file::Owner;

    fn sender() -> Sender<'static> {
        Sender { peer: Peer { uid: 0, owner: None }, file: None, storage: Path::new("/cwd/storage") }
    }

    fn refused(line: &str, enabled: bool) -> Refusal {
        let object = object(line.as_bytes()).unwrap();
        request(&object, enabled, &sender(), |_| None).err().unwrap()
    }

    #[test]
    fn request_without_action_or_machine_closes_connection() {
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
    fn request_for_unknown_machine_names_it_and_keeps_connection() {
        let refusal = refused(r#"{"action": "restore_start", "machine": "nope"}"#, true);
        assert_eq!(refusal, Refusal::open("Machine with name nope does not exist"));
    }

    #[test]
    fn disabled_manager_accepts_only_requests_that_end_or_read() {
        let disabled = Refusal::closing("Machinery manager is disabled");
        assert_eq!(refused(r#"{"action": "restore_start", "machine": "m"}"#, false), disabled);
        assert_eq!(refused("{}", false), disabled);
        assert_ne!(refused(r#"{"action": "stop", "machine": "m"}"#, false), disabled);
        let list = object(br#"{"action": "list"}"#).unwrap();
        assert!(request(&list, false, &sender(), |_| None).is_ok());
    }

    #[test]
    fn line_that_is_no_object_is_refused_and_keeps_connection() {
        for line in ["", "nonsense", "{\"a\":", "[1]", "7", "\u{0}"] {
            let refusal = object(line.as_bytes()).unwrap_err();
            assert!(!refusal.close && refusal.reason.contains("JSON"), "{line:?}: {refusal:?}");
        }
        assert!(object(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn line_with_too_many_values_is_refused_and_keeps_connection() {
        let line = |values: usize| format!("{{\"tags\": [{}\"a\"]}}", "1,".repeat(values));
        let refusal = object(line(MAX_VALUES).as_bytes()).unwrap_err();
        assert!(!refusal.close && refusal.reason.contains("10000 JSON values"), "{refusal:?}");
        object(line(MAX_VALUES - 10).as_bytes()).unwrap();
        let text = format!("{{\"reason\": \"\\\\\\\"{}\"}}", ",[{".repeat(MAX_VALUES));
        object(text.as_bytes()).unwrap();
    }

    #[test]
    fn paths_of_other_users_are_refused_outside_of_storage() {
        let sender = Sender { peer: Peer { uid: 7, owner: Some(Owner { uid: 7, gid: 7 }) }, ..sender() };
        let acquire = |path: &str| {
            let line = json!({"action": "acquire", "task_id": "t", "pcap_path": path}).to_string();
            request(&object(line.as_bytes()).unwrap(), true, &sender, |_| None)
        };
        assert!(acquire("/cwd/storage/analyses/dump.pcap").is_ok());
        for path in ["/etc/passwd", "/cwd/storage/../conf", "/cwd/storage", "/cwd/storage/a/../../x"] {
            let refusal = acquire(path).err().unwrap();
            assert!(refusal.reason.contains("user 7 may not") && !refusal.close, "{refusal:?}");
        }
    }

    #[test]
    fn fd_is_refused_when_it_is_no_switch() {
        for (fd, expected) in [(json!(true), Some(true)), (json!(null), Some(false)), (json!(3), None)] {
            let object = json!({"fd": fd});
            assert_eq!(has_descriptor(object.as_object().unwrap()).ok(), expected);
        }
    }

    #[test]
    fn echo_of_long_names_and_ids_is_bounded() {
        let long = "x".repeat(100_000);
        let refusal = refused(&format!("{{\"action\": \"stop\", \"machine\": \"{long}\"}}"), true);
        assert!(refusal.reason.len() < 400 && !refusal.close);
        let with_id = object(format!("{{\"id\": \"{long}\"}}").as_bytes()).unwrap();
        assert!(id(&with_id).unwrap_err().reason.contains("256"));
    }
}
