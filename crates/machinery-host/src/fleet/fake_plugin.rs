//! A plugin for unit tests, without a library: its machines are names with a state, and a test scripts its answers.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use machinery::host::Instance;
use machinery::{
    Capabilities, Deadline, Diagnosis, DumpFormat, Error, Host, MachineInfo, Reloaded, Report, Result, Setup,
    State,
};
use tokio::sync::broadcast::Receiver;
use tokio::sync::watch;

use super::{Diagnosing, Losses, Machine, Machinery};
use crate::events::{Event, Events};
use crate::plugin::checksum::FileHash;
use crate::plugin::search::PluginFile;

type Answer = Box<dyn FnOnce(&FakePlugin) -> Result<()> + Send>;

/// The plugin. Its clones share everything.
#[derive(Clone, Default)]
pub struct FakePlugin {
    script: Arc<Mutex<Script>>,
    /// The methods that were called, without those for states.
    calls: Arc<watch::Sender<Vec<String>>>,
}

#[derive(Default)]
struct Script {
    states: HashMap<String, State>,
    answers: HashMap<&'static str, VecDeque<Answer>>,
    infos: Vec<MachineInfo>,
    unusable: HashMap<String, String>,
    reloaded: Reloaded,
    able: Option<Capabilities>,
    viewers: VecDeque<UnixStream>,
}

impl FakePlugin {
    /// Has the next call of `method` answered by `answer`, instead of by a change of the state.
    pub fn once(
        &self,
        method: &'static str,
        answer: impl FnOnce(&FakePlugin) -> Result<()> + Send + 'static,
    ) {
        self.script().answers.entry(method).or_default().push_back(Box::new(answer));
    }

    /// Has the next call of `method` fail.
    pub fn fail(&self, method: &'static str, error: Error) {
        self.once(method, move |_| Err(error));
    }

    /// Has the next call of `method` block until the returned sender is used or dropped.
    pub fn block(&self, method: &'static str) -> std::sync::mpsc::Sender<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        self.once(method, move |_| {
            let _ = receiver.recv();
            Ok(())
        });
        sender
    }

    /// Sets the state that the plugin answers for the machine.
    pub fn set_state(&self, machine: &str, state: State) {
        self.script().states.insert(machine.to_owned(), state);
    }

    /// Has the plugin report the machine as unusable, or as usable again.
    pub fn set_unusable(&self, machine: &str, reason: Option<&str>) {
        let unusable = &mut self.script().unusable;
        match reason {
            Some(reason) => drop(unusable.insert(machine.to_owned(), reason.to_owned())),
            None => drop(unusable.remove(machine)),
        }
    }

    /// Sets the machines that the plugin lists, and its answer to the next reloads.
    pub fn set_machines(&self, infos: Vec<MachineInfo>, reloaded: Reloaded) {
        let mut script = self.script();
        (script.infos, script.reloaded) = (infos, reloaded);
    }

    /// Sets the optional methods that the plugin has. Without this, it has all but screenshots.
    pub fn set_capabilities(&self, able: Capabilities) {
        self.script().able = Some(able);
    }

    /// Waits until the plugin is called with that method.
    pub async fn called(&self, method: &str) {
        // The sender is here, so this cannot fail.
        let _ = self.calls.subscribe().wait_for(|calls| calls.iter().any(|call| call == method)).await;
    }

    /// Returns the calls since the last time, without those for states.
    pub fn take_calls(&self) -> Vec<String> {
        self.calls.send_replace(Vec::new())
    }

    /// Returns a machinery of this plugin.
    pub fn machinery(&self, name: &str) -> Arc<Machinery> {
        Arc::new(Machinery {
            name: name.to_owned(),
            instance: Arc::new(Instance::in_process(self.clone())),
            capabilities: machinery::Machinery::capabilities(self),
            version: "1".into(),
            plugin: PluginFile {
                path: PathBuf::from("/none"),
                sha256: FileHash::of(Path::new("/dev/null")).unwrap(),
            },
            diagnosing: Diagnosing::default(),
            adopts: AtomicBool::new(false),
            losses: Losses::default(),
        })
    }

    /// Returns a machine of this plugin, which is powered off, with its events.
    pub fn machine(&self, name: &str, events: &Events) -> Arc<Machine> {
        self.set_state(name, State::Poweroff);
        Arc::new(Machine::new(info(name), self.machinery("fake"), State::Poweroff, events.clone()))
    }

    /// Returns the machine's end of the first connection to a console that no test has taken.
    pub fn take_viewer(&self) -> Option<UnixStream> {
        self.script().viewers.pop_front()
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, method: &'static str, machine: &str, state: Option<State>) -> Result<()> {
        self.calls.send_modify(|calls| calls.push(method.to_owned()));
        let scripted = self.script().answers.get_mut(method).and_then(VecDeque::pop_front);
        if let Some(scripted) = scripted {
            return scripted(self);
        }
        if let Some(state) = state {
            self.set_state(machine, state);
        }
        Ok(())
    }
}

/// Returns the machine `m`, which is powered off, and its later events.
pub fn machine() -> (Arc<Machine>, Receiver<Event>) {
    let events = Events::default();
    let subscriber = events.subscribe();
    (FakePlugin::default().machine("m", &events), subscriber)
}

/// Returns the description of a machine with that name, and with addresses of its own.
pub fn info(name: &str) -> MachineInfo {
    MachineInfo {
        name: name.to_owned(),
        label: format!("label of {name}"),
        ip: format!("ip of {name}"),
        platform: "windows".into(),
        os_version: "10".into(),
        tags: Vec::new(),
        snapshot: None,
        architecture: "amd64".into(),
        interface: None,
        agent_port: 8000,
        mac_address: None,
        jail: None,
        console: false,
        own_network: false,
        clone_of: None,
        hypervisor: None,
    }
}

impl machinery::Machinery for FakePlugin {
    const NAME: &'static str = "fake";

    fn load(_setup: &Setup, _host: Host) -> Result<Self> {
        Ok(FakePlugin::default())
    }

    fn check(_setup: &Setup, _report: &mut Report) {}

    fn version(&self, _deadline: Deadline) -> Result<String> {
        Ok("1".into())
    }

    fn capabilities(&self) -> Capabilities {
        let all = Capabilities {
            norestore_start: true,
            acpi_stop: true,
            dump_memory: true,
            prepare: true,
            ..Capabilities::default()
        };
        self.script().able.unwrap_or(all)
    }

    fn machines(&self) -> Vec<MachineInfo> {
        self.script().infos.clone()
    }

    fn state(&self, machine: &str, _deadline: Deadline) -> Result<State> {
        let scripted = self.script().answers.get_mut("state").and_then(VecDeque::pop_front);
        scripted.map_or(Ok(()), |scripted| scripted(self))?;
        Ok(self.script().states.get(machine).copied().unwrap_or(State::Poweroff))
    }

    fn restore_start(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("restore_start", machine, Some(State::Running))
    }

    fn norestore_start(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("norestore_start", machine, Some(State::Running))
    }

    fn stop(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("stop", machine, Some(State::Poweroff))
    }

    fn acpi_stop(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("acpi_stop", machine, Some(State::Poweroff))
    }

    fn dump_memory(
        &self,
        machine: &str,
        path: &Path,
        _format: DumpFormat,
        _deadline: Deadline,
    ) -> Result<()> {
        self.answer("dump_memory", machine, None)?;
        std::fs::write(path, "dump").map_err(|error| Error::io("write", path, &error))
    }

    /// Writes no file.
    fn screenshot(&self, machine: &str, _path: &Path, _deadline: Deadline) -> Result<()> {
        self.answer("screenshot", machine, None)
    }

    fn prepare(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("prepare", machine, None)
    }

    fn reload(&self, _setup: &Setup, _in_use: &[String], _deadline: Deadline) -> Result<Reloaded> {
        self.answer("reload", "", None)?;
        Ok(self.script().reloaded.clone())
    }

    fn diagnose(&self, machines: &[String], _deadline: Deadline) -> Result<Vec<Diagnosis>> {
        self.answer("diagnose", "", None)?;
        let unusable = self.script().unusable.clone();
        let one = |name: &String| Diagnosis {
            unusable: unusable.get(name).map(Error::environment),
            ..Diagnosis::new(name.clone())
        };
        Ok(machines.iter().map(one).collect())
    }

    fn console(&self, machine: &str, _deadline: Deadline) -> Result<OwnedFd> {
        self.answer("console", machine, None)?;
        let failed = |error| Error::io("make", Path::new("a pair of sockets"), &error);
        let (viewer, server) = UnixStream::pair().map_err(failed)?;
        self.script().viewers.push_back(server);
        Ok(viewer.into())
    }

    fn open_network(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("open_network", machine, None)
    }

    fn close_network(&self, machine: &str, _deadline: Deadline) -> Result<()> {
        self.answer("close_network", machine, None)
    }

    fn shutdown(&self, _deadline: Deadline) -> Result<()> {
        Ok(())
    }
}
