//! A machine on libvirt's test driver, for unit tests. It gets no events but those that a test passes to it.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::{Deadline, Host, HostServices, LogLevel, LogRecord, RestoreReadiness, Setup, State};
use machinery_backend::PrepareOrigin;
use machinery_backend::sync::{lock, wait_while};
use tempfile::TempDir;
use virt_sys as sys;

use super::base::Machine;
use crate::config::Config;
use crate::events::Event;
use crate::foreign::disks_of;
use crate::shared::Kvm;
use crate::test_driver::{DSN, TestDomain};

/// A machine, its domain, and its host. The domain has the snapshot `clean` of a running guest, and is off.
pub struct MachineLab {
    pub machine: Arc<Machine>,
    pub domain: TestDomain,
    pub host: Arc<RecordingHost>,
    folder: TempDir,
}

impl MachineLab {
    /// Makes a machine of that name, with a domain of the same name.
    pub fn new(name: &str) -> Self {
        let domain = TestDomain::new(name);
        domain.start();
        domain.take_snapshot("clean");
        domain.domain.destroy().unwrap();
        let (folder, host) = (tempfile::tempdir().unwrap(), Arc::default());
        let machine = machine(name, &folder, &host);
        MachineLab { machine, domain, host, folder }
    }

    /// Replaces the machine by that of the next host. The domain stays as it is.
    pub fn replace_host(&mut self) {
        self.host = Arc::default();
        self.machine = machine(&self.domain.domain.name().unwrap(), &self.folder, &self.host);
    }

    /// Returns the folder of the machine's markers.
    pub fn state_dir(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the machine with another domain, of that name.
    pub fn with_label(&self, label: &str) -> Machine {
        let mut keys = self.machine.keys.clone();
        keys.info.label = label.to_owned();
        Machine::new(keys, Arc::clone(&self.machine.shared), self.state_dir())
    }

    /// Starts the domain and makes that an own run of the machine.
    pub fn run(&self) {
        self.domain.start();
        let domain = self.domain.look_up();
        self.machine.marker.begin(&domain).unwrap();
        self.machine.marker.mark(&domain).unwrap();
        self.machine.marker.set_resumed(&domain);
        let mut state = self.machine.lock();
        (state.has_run, state.host_knows_running) = (true, true);
        state.run_disks = Some(disks_of(&domain).unwrap());
    }

    /// Makes a standby of the domain.
    pub fn prepare(&self) {
        self.machine.prepare_next(PrepareOrigin::Request, soon()).unwrap();
        assert!(self.machine.lock().standby.is_some());
    }
}

/// A deadline that no test reaches.
pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// An event in the domain's life.
pub fn lifecycle(event: u32, detail: u32) -> Event {
    Event::Lifecycle { event, detail }
}

/// The event that the domain was destroyed.
pub fn destroyed() -> Event {
    lifecycle(sys::VIR_DOMAIN_EVENT_STOPPED, sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED)
}

/// The event that the domain was started.
pub fn started() -> Event {
    lifecycle(sys::VIR_DOMAIN_EVENT_STARTED, sys::VIR_DOMAIN_EVENT_STARTED_BOOTED)
}

fn machine(name: &str, folder: &TempDir, host: &Arc<RecordingHost>) -> Arc<Machine> {
    let file = |path: &str, text: String| ConfigFile { path: path.into(), text };
    let keys = format!("label: {name}, ip: 10.0.0.1, platform: linux, os_version: 1");
    let setup = Setup {
        config: file("kvm.yaml", format!("dsn: {DSN}\ninterface: lo\nmachines:\n  {name}: {{{keys}}}\n")),
        host_config: Some(file("host.yaml", "machineries: {kvm: {standby: on, instant: off}}\n".to_owned())),
        sockets_dir: folder.path().to_owned(),
        state_dir: folder.path().to_owned(),
        cache_dir: folder.path().to_owned(),
        adopts: true,
        result_server: None,
    };
    let config = Config::read(&setup).unwrap();
    let keys = config.machines[0].clone();
    let services = Arc::clone(host);
    let kvm = Kvm::new(&config, folder.path(), Host::new(services), soon()).unwrap();
    let machine = Arc::new(Machine::new(keys, Arc::new(kvm), folder.path()));
    host.machine.set(Arc::downgrade(&machine)).ok().unwrap();
    machine
}

/// A report of the machine's state, and the number of ends that the machine had counted by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateChange {
    pub state: State,
    pub reason: String,
    pub ends: u64,
}

/// A host that records the reports of its machine.
#[derive(Default)]
pub struct RecordingHost {
    machine: OnceLock<Weak<Machine>>,
    changes: Mutex<Vec<StateChange>>,
    /// The reason of the last lost preparation.
    invalidated: Mutex<Option<String>>,
    changed: Condvar,
}

impl RecordingHost {
    /// Takes the reports so far.
    pub fn changes(&self) -> Vec<StateChange> {
        std::mem::take(&mut lock(&self.changes))
    }

    /// Takes the states that were reported so far.
    pub fn states(&self) -> Vec<State> {
        self.changes().into_iter().map(|change| change.state).collect()
    }

    /// Waits until the machine asks for another preparation; returns the reason.
    pub fn wait_for_invalidation(&self) -> String {
        let state = wait_while(&self.changed, lock(&self.invalidated), soon(), |reason| reason.is_none());
        state.clone().expect("the machine asks for no preparation")
    }

    /// Reports whether the machine has asked for another preparation.
    pub fn was_invalidated(&self) -> bool {
        lock(&self.invalidated).is_some()
    }
}

impl HostServices for RecordingHost {
    fn state_changed(&self, _: &str, state: State, reason: &str) {
        let ends = self.machine.get().and_then(Weak::upgrade).map_or(0, |machine| machine.lock().end_count);
        lock(&self.changes).push(StateChange { state, reason: reason.to_owned(), ends });
    }

    fn preparation_invalidated(&self, _: &str, reason: &str) {
        *lock(&self.invalidated) = Some(reason.to_owned());
        self.changed.notify_all();
    }

    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }

    fn log(&self, _: LogRecord) {}
    fn progress(&self, _: &str, _: f64) {}
    fn step(&self, _: &str, _: &str, _: Duration) {}
    fn ready(&self, _: &str, _: &RestoreReadiness) {}
}
