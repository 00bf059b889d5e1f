//! The fixture of the unit tests of actions: a machine of a fake plugin, and the context of its actions.

use std::path::PathBuf;
use std::sync::Arc;

use machinery::State;

use super::Action;
use super::context::ActionContext;
use super::executor::ActionExecutor;
use super::metrics::Metrics;
use crate::client_file::{ClientFile, Folders, NamedFile};
use crate::config::Config;
use crate::cwd::Cwd;
use crate::events::Events;
use crate::fleet::fake_plugin::FakePlugin;
use crate::fleet::quarantine::Quarantine;
use crate::fleet::state_file::StateStore;
use crate::fleet::{Fleet, Machine, Roster};

/// A fleet of one machine `m`, which is powered off.
pub struct Lab {
    pub plugin: FakePlugin,
    pub machine: Arc<Machine>,
    pub context: Arc<ActionContext>,
    pub fleet: Arc<Fleet>,
    pub state: Arc<StateStore>,
    pub events: Events,
    pub folder: tempfile::TempDir,
}

impl Lab {
    /// Returns a lab whose host has this `machinery-host.yaml`.
    pub fn new(host_yaml: &str) -> Self {
        Lab::with(FakePlugin::default(), host_yaml)
    }

    /// Returns a lab with this plugin.
    pub fn with(plugin: FakePlugin, host_yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = configuration(&folder, host_yaml);
        let events = Events::default();
        let machine = plugin.machine("m", &events);
        let fleet = Arc::<Fleet>::default();
        fleet.set(Roster::new(vec![Arc::clone(&machine.machinery)], vec![Arc::clone(&machine)]));
        let state = StateStore::open(folder.path(), Arc::clone(&fleet)).unwrap();
        let path = || folder.path().to_owned();
        let folders = Folders { storage: path(), staging: path(), consoles: path().join("console") };
        let metrics = Arc::<Metrics>::default();
        let context = Arc::new(ActionContext::new(&config, folders, metrics, Arc::clone(&state)));
        Lab { plugin, machine, context, fleet, state, events, folder }
    }

    /// Returns the CWD of the host.
    pub fn cwd(&self) -> Cwd {
        Cwd::find(Some(self.folder.path())).unwrap()
    }

    /// Returns an executor of the machine.
    pub fn executor(&self) -> ActionExecutor {
        ActionExecutor::new(Arc::clone(&self.machine), Arc::clone(&self.context))
    }

    /// Has the machine run since a start of the host.
    pub fn start_own_run(&self) {
        self.start_foreign_run();
        self.machine.set_own_run();
    }

    /// Has the machine run, although the host has not started it.
    pub fn start_foreign_run(&self) {
        self.plugin.set_state("m", State::Running);
        self.machine.set_state(State::Running);
    }

    /// Returns the machine's quarantine.
    pub fn quarantine(&self) -> Option<Quarantine> {
        self.machine.status().availability.quarantine
    }

    /// Returns the reason why the machine is out of the pool.
    pub fn disabled_reason(&self) -> Option<String> {
        self.machine.status().availability.disabled_reason().map(str::to_owned)
    }

    /// Returns the saved state of the fleet, or nothing if none was saved.
    pub fn saved(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("machines.json")).unwrap_or_default()
    }

    /// Returns a memory dump, and the path of its file.
    pub fn dump(&self) -> (Action, PathBuf) {
        let path = self.folder.path().join("dump");
        let file = ClientFile::Named(NamedFile { path: path.clone(), owner: None });
        (Action::DumpMemory { file, format: machinery::DumpFormat::default() }, path)
    }
}

/// Returns the configuration of a CWD with this `machinery-host.yaml`.
pub fn configuration(folder: &tempfile::TempDir, host_yaml: &str) -> Config {
    let conf = folder.path().join("conf");
    std::fs::create_dir_all(&conf).unwrap();
    std::fs::write(folder.path().join(".cuckoocwd"), "").unwrap();
    std::fs::write(conf.join("cuckoo.yaml"), "machineries: [fake]\n").unwrap();
    std::fs::write(conf.join("machinery-host.yaml"), host_yaml).unwrap();
    Config::read(&Cwd::find(Some(folder.path())).unwrap()).unwrap()
}
