//! A machinery that is loaded for one requirement, and the calls and demands that requirements consist of.
//!
//! `attempt` and `try_call` return the plugin's own result. All other methods *demand*: they return a failure
//! unless the plugin does what the method's name says.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Capabilities, Deadline, Error, ErrorKind, Reloaded, Setup, State};

use crate::call::{Call, Outcome};
use crate::plugin_under_test::{GRACE, PluginUnderTest};
use crate::recorder::Event;
use crate::report::{CheckFailure, Result, demand, failed};
use crate::spec::{BackendSpec, Hook, MachineProbe, RunCounts};

pub struct Session<'a> {
    plugin: &'a PluginUnderTest<'a>,
    /// None once it is dropped.
    instance: Mutex<Option<Arc<Instance>>>,
    /// All machines that the plugin lists.
    listed: Vec<String>,
    /// The machines to test with.
    machines: Vec<String>,
    /// Earlier events belong to other sessions.
    first_event: usize,
    folder: &'a Path,
    /// The requirement has shut the machinery down.
    shut_down: AtomicBool,
}

impl<'a> Session<'a> {
    /// Loads the machinery. Files of the session go into the folder.
    pub fn load(plugin: &'a PluginUnderTest<'a>, folder: &'a Path) -> Result<Self> {
        Session::load_with(plugin, plugin.setup, folder)
    }

    /// Loads the machinery with that setup.
    pub fn load_with(plugin: &'a PluginUnderTest<'a>, setup: &Setup, folder: &'a Path) -> Result<Self> {
        let first_event = plugin.recorder.position();
        let instance = plugin.load(setup)?.expect_success("load")?;
        Ok(Session {
            plugin,
            instance: Mutex::new(Some(Arc::new(instance))),
            listed: Vec::new(),
            machines: Vec::new(),
            first_event,
            folder,
            shut_down: AtomicBool::new(false),
        })
    }

    /// Reads the list of machines, which is the first call of every host.
    pub fn list_machines(&mut self) -> Result {
        self.listed = self.names()?;
        let chosen = &self.spec().machines;
        self.machines = if chosen.is_empty() { self.listed.clone() } else { chosen.clone() };
        demand!(!self.machines.is_empty(), "the configuration has no machine to test with");
        Ok(())
    }

    pub fn plugin(&self) -> &'a PluginUnderTest<'a> {
        self.plugin
    }

    pub fn spec(&self) -> &'a BackendSpec {
        self.plugin.spec
    }

    /// Returns the machine for tests that need only one.
    pub fn machine(&self) -> &str {
        self.machines.first().map_or("", String::as_str)
    }

    /// Returns the machine of a function of the author's, which is the first machine by default.
    pub fn machine_or<'m>(&'m self, chosen: &'m Option<String>) -> &'m str {
        chosen.as_deref().unwrap_or(self.machine())
    }

    pub fn machines(&self) -> impl Iterator<Item = &str> {
        self.machines.iter().map(String::as_str)
    }

    /// Returns all machines that the plugin lists.
    pub fn listed(&self) -> &[String] {
        &self.listed
    }

    /// Returns the folder for files of the session.
    pub fn folder(&self) -> &'a Path {
        self.folder
    }

    /// Returns a path in the session's folder, at which no file exists.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn timeout(&self) -> Duration {
        self.spec().timeout
    }

    pub fn capabilities(&self) -> Result<Capabilities> {
        self.call("capabilities", |instance, _| instance.capabilities())
    }

    /// Ends the session. Demands that every machine can be stopped, that no leftovers remain, and that all events
    /// were valid.
    pub fn close(self) -> Result {
        if self.plugin.hung_call().is_some() {
            // The plugin must not be called during the call that hangs. That call also holds the machinery, so
            // the machinery is not dropped.
            return Ok(());
        }
        self.unload()?;
        self.plugin.no_leftovers("after shutdown")?;
        self.plugin.events_are_valid(self.first_event, &self.listed)
    }

    /// Shuts the machinery down, and drops it. Another host can then load it.
    pub fn unload(&self) -> Result {
        let ended = if self.shut_down.load(Ordering::Relaxed) { Ok(()) } else { self.shut_down() };
        let instance = self.instance.lock().unwrap_or_else(PoisonError::into_inner).take();
        ended.and(self.plugin.run("dropping the machinery", GRACE, move || drop(instance)))
    }

    /// Stops all machines and shuts the machinery down, as a host does before it ends.
    pub fn shut_down(&self) -> Result {
        self.shut_down.store(true, Ordering::Relaxed);
        let stopped = self.listed.iter().try_for_each(|machine| self.ensure_off(machine));
        // Also after a failed stop: shutdown may be the last way to end the machine.
        stopped.and(self.call("shutdown", Instance::shutdown))
    }

    /// Stops a machine that may be running or not.
    pub fn ensure_off(&self, machine: &str) -> Result {
        match self.attempt(&Call::Stop, machine, self.timeout())? {
            Outcome::Refusal(error) if error.kind() != ErrorKind::StateReached => Err(failed("stop", &error)),
            _ => self.has_state(machine, State::Poweroff),
        }
    }

    /// Makes a call on a machine with that much time, and returns the plugin's result.
    pub fn attempt(&self, call: &Call, machine: &str, limit: Duration) -> Result<Outcome> {
        let (call, machine) = (call.clone(), machine.to_owned());
        let action = format!("{} of {machine} with a deadline of {limit:?}", call.name());
        self.try_call(&action, limit, move |instance, deadline| call.run(instance, &machine, deadline))
    }

    /// Makes any call with that much time, and returns the plugin's result.
    pub fn try_call<T: Send + 'static>(
        &self,
        action: &str,
        limit: Duration,
        call: impl FnOnce(&Instance, Deadline) -> machinery::Result<T> + Send + 'static,
    ) -> Result<Outcome<T>> {
        let instance = self.instance()?;
        let function = move || call(&instance, Deadline::after(limit));
        let result = self.plugin.run(action, limit + GRACE, function)?.into();
        match &result {
            Outcome::Refusal(error) if error.is_plugin_fault() => Err(failed(action, error)),
            _ => Ok(result),
        }
    }

    /// Makes a call, demands that it succeeds, and returns its value.
    pub fn call<T: Send + 'static>(
        &self,
        action: &str,
        call: impl FnOnce(&Instance, Deadline) -> machinery::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.try_call(action, self.timeout(), call)?.expect_success(action)
    }

    /// Demands that the call succeeds.
    pub fn succeeds(&self, call: &Call, machine: &str) -> Result {
        let outcome = self.attempt(call, machine, self.timeout())?;
        outcome.expect_success(&format!("{} of {machine}", call.name()))
    }

    /// Demands that the call is refused with an error of that kind.
    pub fn is_refused(&self, call: &Call, machine: &str, kind: ErrorKind) -> Result {
        let error = self.fails(call, machine)?;
        let name = call.name();
        demand!(
            error.kind() == kind,
            "{name} of {machine} must be refused with {kind:?}, but returned {error:?}"
        );
        Ok(())
    }

    /// Demands that the call fails with a reason, and returns the error.
    pub fn fails(&self, call: &Call, machine: &str) -> Result<Error> {
        let name = call.name();
        match self.attempt(call, machine, self.timeout())? {
            Outcome::Success(()) => {
                Err(CheckFailure::Failed(format!("{name} of {machine} must fail, but it succeeded")))
            }
            Outcome::Refusal(error) => {
                demand!(!error.reason().trim().is_empty(), "{name} of {machine} failed without a reason");
                Ok(error)
            }
        }
    }

    /// Reloads with the text as the configuration and these machines in use; returns the plugin's result.
    pub fn reload(&self, text: &str, in_use: &[&str]) -> Result<Outcome<Reloaded>> {
        let mut setup = self.plugin.setup.clone();
        setup.config.text = text.to_owned();
        self.reload_setup(setup, in_use)
    }

    /// Reloads with the setup and these machines in use; returns the plugin's result.
    pub fn reload_setup(&self, setup: Setup, in_use: &[&str]) -> Result<Outcome<Reloaded>> {
        let in_use: Vec<String> = in_use.iter().map(|&name| name.to_owned()).collect();
        let reload = move |instance: &Instance, deadline| instance.reload(&setup, &in_use, deadline);
        self.try_call("reload", self.timeout(), reload)
    }

    /// Returns the names of the machines that the plugin lists now.
    pub fn names(&self) -> Result<Vec<String>> {
        let infos = self.call("machines", |instance, _| instance.machines())?;
        Ok(infos.into_iter().map(|info| info.name).collect())
    }

    /// Demands that the machine is in that state.
    pub fn has_state(&self, machine: &str, expected: State) -> Result {
        let name = machine.to_owned();
        let state = self.call("state", move |instance, deadline| instance.state(&name, deadline))?;
        demand!(state == expected, "the state of {machine} must be {expected}, but is {state}");
        Ok(())
    }

    /// Restores the machine. Demands that it runs, and that it runs from its snapshot if the spec has counts.
    pub fn restore(&self, machine: &str) -> Result {
        self.succeeds(&Call::RestoreStart, machine)?;
        self.has_state(machine, State::Running)?;
        self.is_restored(machine)
    }

    /// Demands that the running machine runs from its snapshot, if the spec has counts.
    pub fn is_restored(&self, machine: &str) -> Result {
        if let Some(RunCounts { restored, read }) = &self.spec().counts {
            let count = self.count(machine, read)?;
            demand!(
                restored.contains(&count),
                "{machine} must run from its snapshot with a count in {restored:?}, but its count is {count}"
            );
        }
        Ok(())
    }

    /// Stops the running machine, and demands that it is off.
    pub fn stop(&self, machine: &str) -> Result {
        self.succeeds(&Call::Stop, machine)?;
        self.has_state(machine, State::Poweroff)
    }

    /// Demands that the running machine does not run from its snapshot, if the spec has counts.
    pub fn is_cold_started(&self, machine: &str) -> Result {
        if let Some(RunCounts { restored, read }) = &self.spec().counts {
            let count = self.count(machine, read)?;
            demand!(
                !restored.contains(&count),
                "{machine} must not run from its snapshot after a cold start, but its count is {count}"
            );
        }
        Ok(())
    }

    fn count(&self, machine: &str, read: &MachineProbe<u32>) -> Result<u32> {
        self.probe("reading the count", machine, read)
    }

    /// Demands that the machine is in the state `running`, and shows a sign of life.
    pub fn is_alive(&self, machine: &str) -> Result {
        self.has_state(machine, State::Running)?;
        match &self.spec().alive {
            Some(alive) => self.probe("waiting for a sign of life", machine, alive),
            None => Ok(()),
        }
    }

    /// Demands that no leftovers of the machines are on this computer.
    pub fn no_leftovers(&self, when: &str) -> Result {
        self.plugin.no_leftovers(when)
    }

    /// Demands that no file is at the path, and none beside it whose name contains the same name: an incomplete
    /// file under another name is also a leftover.
    pub fn no_file_at(&self, path: &Path) -> Result {
        let wanted = path.file_name().unwrap_or_default().to_string_lossy();
        let entries = self.folder.read_dir().map_err(|error| failed("reading the scratch folder", &error))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let files: Vec<String> = names.filter(|name| name.contains(&*wanted)).collect();
        demand!(
            files.is_empty(),
            "at or beside {}, these files remain: {}",
            path.display(),
            files.join(", ")
        );
        Ok(())
    }

    /// Runs a function of the author's, such as the one that breaks a start.
    pub fn run_hook(&self, action: &str, machine: &str, hook: &Hook) -> Result {
        hook(machine).map_err(|error| failed(&format!("{action} {machine}"), error.as_ref()))
    }

    /// Waits until `find` returns a value for an event after the first `events` events of this session.
    pub fn wait_for_event<T>(
        &self,
        events: usize,
        limit: Duration,
        find: impl Fn(&Event) -> Option<T>,
    ) -> Option<T> {
        self.plugin.recorder.wait(self.first_event + events, limit, find)
    }

    /// Demands that all events of all sessions were valid.
    pub fn events_are_valid(&self) -> Result {
        self.plugin.events_are_valid(0, &self.listed)
    }

    /// Returns the events of this session so far.
    pub fn events(&self) -> Vec<Event> {
        self.plugin.recorder.since(self.first_event)
    }

    fn instance(&self) -> Result<Arc<Instance>> {
        let instance = self.instance.lock().unwrap_or_else(PoisonError::into_inner).clone();
        instance.ok_or_else(|| CheckFailure::Failed("the suite has dropped the machinery".to_owned()))
    }

    fn probe<T: Send + 'static>(&self, action: &str, machine: &str, probe: &MachineProbe<T>) -> Result<T> {
        let action = format!("{action} of {machine}");
        let (instance, name, probe) = (self.instance()?, machine.to_owned(), Arc::clone(probe));
        let result = self.plugin.run(&action, self.timeout() + GRACE, move || probe(&instance, &name))?;
        result.map_err(|error| failed(&action, error.as_ref()))
    }
}
