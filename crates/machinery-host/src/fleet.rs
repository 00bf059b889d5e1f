//! The machines of all machineries, and what is known of each.
//!
//! What a machine *is* (name, ip, tags) comes from its plugin and never changes. What it *does*
//! (state, disabled) is its [`Status`]: the worker writes what it ordered, the plugin reports what
//! happened by itself, and every change goes out as an event.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use machinery::host::Instance;
use machinery::{Capabilities, HostServices, LogLevel, LogRecord, MachineInfo, State};
use serde_json::{Value, json};

use crate::events::{Event, Events};
use crate::logging;

/// A loaded machinery.
pub struct Machinery {
    /// Its name in the `machineries` list.
    pub name: String,
    /// Its plugin's methods.
    pub instance: Instance,
    /// Which of the optional ones are real.
    pub capabilities: Capabilities,
    /// The hypervisor's version, for people.
    pub version: String,
}

/// One machine.
pub struct Machine {
    /// What it is.
    pub info: MachineInfo,
    /// Who drives it.
    pub machinery: Arc<Machinery>,
    status: Mutex<Status>,
    /// Whether its plugin is being asked for its state.
    asking: AtomicBool,
    events: Events,
}

/// The right to ask a machine's plugin for its state; one at a time has it.
pub struct Asking(Arc<Machine>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.asking.store(false, Ordering::SeqCst);
    }
}

/// What is known of a machine's doings.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its state, as last ordered or reported.
    pub state: State,
    /// Whether an action is under way.
    pub busy: bool,
    /// Why it was taken out of the pool, if it was.
    pub disabled: Option<String>,
    /// What went wrong lately, oldest first.
    pub errors: Vec<String>,
    /// How often its plugin has reported a state.
    pub reports: u64,
}

/// How many errors are remembered for one machine.
const ERRORS_KEPT: usize = 20;

impl Machine {
    /// A machine that was just loaded.
    pub fn new(info: MachineInfo, machinery: Arc<Machinery>, state: State, events: Events) -> Self {
        let status = Status { state, busy: false, disabled: None, errors: Vec::new(), reports: 0 };
        Machine { info, machinery, status: Mutex::new(status), asking: AtomicBool::new(false), events }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// What is known now.
    pub fn status(&self) -> Status {
        self.lock().clone()
    }

    /// The right to ask the plugin for the state, unless somebody asks already.
    pub fn ask(self: &Arc<Self>) -> Option<Asking> {
        let taken = self.asking.swap(true, Ordering::SeqCst);
        (!taken).then(|| Asking(Arc::clone(self)))
    }

    /// Notes a state that was ordered.
    pub fn set_state(&self, state: State) {
        self.note(self.lock(), state, "");
    }

    /// Notes a state that the plugin answered, unless it has reported one since there were
    /// `reports`: then the answer may be older than that.
    pub fn set_answered(&self, state: State, reports: u64) {
        let status = self.lock();
        if status.reports == reports {
            self.note(status, state, "");
        }
    }

    /// Notes a state that the plugin reported by itself, and why.
    pub fn set_reported(&self, state: State, reason: &str) {
        let mut status = self.lock();
        status.reports += 1;
        self.note(status, state, reason);
    }

    fn note(&self, mut status: MutexGuard<'_, Status>, state: State, reason: &str) {
        if status.state == state {
            return;
        }
        status.state = state;
        // Sent under the lock, so that subscribers hear the changes in their order.
        self.events.send(Event::State { machine: self.info.name.clone(), state, reason: reason.to_owned() });
    }

    /// Notes whether an action is under way.
    pub fn set_busy(&self, busy: bool) {
        self.lock().busy = busy;
    }

    /// Remembers an error.
    pub fn add_error(&self, error: &str) {
        let mut status = self.lock();
        if status.errors.len() == ERRORS_KEPT {
            status.errors.remove(0);
        }
        status.errors.push(error.to_owned());
    }

    /// Takes the machine out of the pool.
    pub fn disable(&self, reason: &str) {
        tracing::error!(machine = self.name(), reason, "machine disabled");
        let mut status = self.lock();
        status.disabled = Some(reason.to_owned());
        self.events.send(Event::Disabled { machine: self.info.name.clone(), reason: reason.to_owned() });
    }

    /// Puts it back.
    pub fn enable(&self) {
        if self.lock().disabled.take().is_some() {
            tracing::info!(machine = self.name(), "machine enabled");
            self.events.send(Event::Enabled { machine: self.info.name.clone() });
        }
    }

    /// Tells how far a long action is.
    pub fn progress(&self, fraction: f64) {
        self.events.send(Event::Progress { machine: self.info.name.clone(), fraction });
    }

    /// The keys that Cuckoo3's `Machine.from_dict` reads.
    pub fn to_json(&self) -> Value {
        let info = &self.info;
        let status = self.lock();
        json!({
            "name": info.name,
            "label": info.label,
            "ip": info.ip,
            "platform": info.platform,
            "os_version": info.os_version,
            "tags": info.tags,
            "snapshot": info.snapshot,
            "architecture": info.architecture,
            "interface": info.interface,
            "agent_port": info.agent_port,
            "mac_address": info.mac_address,
            "machinery_name": self.machinery.name,
            "state": status.state,
            "locked": false,
            "locked_by": "",
            "reserved": false,
            "reserved_by": "",
            "disabled": status.disabled.is_some(),
            "disabled_reason": status.disabled.as_deref().unwrap_or(""),
            "errors": status.errors,
        })
    }

    /// Status is whole after each statement that holds the lock, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All machines, in the order of the configuration.
pub struct Fleet {
    machines: Vec<Arc<Machine>>,
    by_name: HashMap<String, Arc<Machine>>,
}

impl Fleet {
    /// The fleet of these machines, whose names are unique.
    pub fn new(machines: Vec<Arc<Machine>>) -> Self {
        let by_name =
            machines.iter().map(|machine| (machine.info.name.clone(), Arc::clone(machine))).collect();
        Fleet { machines, by_name }
    }

    /// All of them.
    pub fn machines(&self) -> &[Arc<Machine>] {
        &self.machines
    }

    /// The machine of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Machine>> {
        self.by_name.get(name)
    }
}

/// What one plugin is given as its host. It may call before the fleet is complete and after the
/// host has ended; then it is not heard.
pub struct Services {
    machinery: String,
    fleet: Arc<OnceLock<Fleet>>,
}

impl Services {
    /// The services for that machinery's plugin.
    pub fn new(machinery: &str, fleet: Arc<OnceLock<Fleet>>) -> Self {
        Services { machinery: machinery.to_owned(), fleet }
    }

    /// A plugin may only speak of its own machines.
    fn machine(&self, name: &str) -> Option<&Arc<Machine>> {
        let machine = self.fleet.get()?.find(name);
        let own = machine.filter(|machine| machine.machinery.name == self.machinery);
        if own.is_none() {
            tracing::warn!(
                machinery = self.machinery,
                machine = name,
                "the plugin speaks of a machine it does not have"
            );
        }
        own
    }
}

impl HostServices for Services {
    fn log(&self, record: LogRecord) {
        logging::from_plugin(&self.machinery, &record);
    }

    fn state_changed(&self, machine: &str, state: State, reason: &str) {
        if let Some(machine) = self.machine(machine) {
            tracing::debug!(machine = machine.name(), %state, reason, "state reported");
            machine.set_reported(state, reason);
        }
    }

    fn progress(&self, machine: &str, fraction: f64) {
        if let Some(machine) = self.machine(machine) {
            machine.progress(fraction);
        }
    }

    fn max_level(&self) -> LogLevel {
        logging::max_level()
    }
}
