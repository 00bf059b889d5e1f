//! The plugin that the suite tests, and the guard around all calls of it.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use machinery::Setup;
use machinery::host::{Instance, Plugin};

use crate::call::{NoValue, Outcome, run_with_timeout};
use crate::folders::{self, Listing};
use crate::recorder::{Event, EventRecorder};
use crate::report::{CheckFailure, Result, demand, failed};
use crate::spec::BackendSpec;

/// The time that a call may exceed its deadline by. Far more than any plugin needs, so that a slow computer is
/// not reported as a faulty plugin.
pub const GRACE: Duration = Duration::from_secs(5);

/// A plugin, its configuration, the specification of its backend, and the events that it reported.
pub struct PluginUnderTest<'a> {
    pub plugin: Plugin,
    pub setup: &'a Setup,
    pub spec: &'a BackendSpec,
    pub recorder: Arc<EventRecorder>,
    /// The call that never returned.
    hung: OnceLock<String>,
    notes: Mutex<Vec<String>>,
    /// The folders and sockets after the first load: they belong to no run.
    loaded: OnceLock<Listing>,
    /// The names that the suite has given to machines.
    given_names: Mutex<Vec<String>>,
}

impl<'a> PluginUnderTest<'a> {
    /// Opens the file. This runs its initialisers, which may never return.
    pub fn open(file: &Path, setup: &'a Setup, spec: &'a BackendSpec) -> Result<Self, String> {
        let (path, timeout) = (file.to_owned(), spec.timeout + GRACE);
        let opened = run_with_timeout(timeout, move || Plugin::open(&path));
        let opened = opened.map_err(|_| format!("it has not returned after {timeout:?}"))?;
        let plugin = opened.map_err(|error| error.to_string())?;
        Ok(PluginUnderTest {
            plugin,
            setup,
            spec,
            recorder: Arc::default(),
            hung: OnceLock::new(),
            notes: Mutex::default(),
            loaded: OnceLock::new(),
            given_names: Mutex::default(),
        })
    }

    /// Loads the machinery, and returns the plugin's own result.
    pub fn load(&self, setup: &Setup) -> Result<Outcome<Instance>> {
        let (plugin, setup, recorder) = (self.plugin.clone(), setup.clone(), Arc::clone(&self.recorder));
        let load = move || plugin.load(&setup, recorder).into();
        let outcome = self.run("load", self.spec.timeout + GRACE, load)?;
        self.loaded.get_or_init(|| folders::list_runs(self.setup));
        Ok(outcome)
    }

    /// Runs the function with a timeout. After a timeout, the plugin must not be called any more.
    pub fn run<T: Send + 'static>(
        &self,
        action: &str,
        timeout: Duration,
        function: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        run_with_timeout(timeout, function).map_err(|reason| match reason {
            NoValue::Panicked => CheckFailure::Failed(format!("{action}: the test's own code panicked")),
            NoValue::TimedOut => {
                let _ = self.hung.set(action.to_owned());
                CheckFailure::Failed(format!("{action} has not returned after {timeout:?}"))
            }
        })
    }

    /// Applies a rule that plugins of interface 1.0 did not have to follow: their violation is a note, and no failure.
    pub fn since_1_1(&self, result: Result) -> Result {
        match result {
            Err(CheckFailure::Failed(how)) if self.plugin.interface() == "1.0" => {
                self.notes().push(how);
                Ok(())
            }
            result => result,
        }
    }

    /// Returns the notes since the last call.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.notes())
    }

    fn notes(&self) -> MutexGuard<'_, Vec<String>> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the call that never returned, if there is one.
    pub fn hung_call(&self) -> Option<&str> {
        self.hung.get().map(String::as_str)
    }

    /// Demands that no leftovers of the machines are on this computer.
    pub fn no_leftovers(&self, when: &str) -> Result {
        let leftovers = (self.spec.leftovers)();
        let leftovers = leftovers.map_err(|error| failed("finding leftovers", error.as_ref()))?;
        demand!(leftovers.is_empty(), "{when}, these leftovers exist: {}", leftovers.join(", "));
        self.since_1_1(self.no_run_folders(when))
    }

    fn no_run_folders(&self, when: &str) -> Result {
        let mut leftovers = folders::list_runs(self.setup);
        let known = self.loaded.get();
        leftovers.retain(|path, _| known.is_some_and(|known| !known.contains_key(path)));
        let paths: Vec<String> = leftovers.keys().map(|path| path.display().to_string()).collect();
        demand!(paths.is_empty(), "{when}, these folders or sockets of a run exist: {}", paths.join(", "));
        Ok(())
    }

    /// Notes that a machine gets this name, so that its events are valid.
    pub fn give_name(&self, name: &str) {
        self.given_names().push(name.to_owned());
    }

    fn given_names(&self) -> MutexGuard<'_, Vec<String>> {
        self.given_names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Demands that the events from that position on are valid, and belong to these machines.
    pub fn events_are_valid(&self, position: usize, machines: &[String]) -> Result {
        let given = self.given_names();
        for event in self.recorder.since(position) {
            let mut known = machines.iter().chain(given.iter());
            let known = known.any(|name| name == event.machine());
            demand!(known, "the plugin reported an event of an unknown machine: {event:?}");
            if let Event::Progress { fraction, .. } = event {
                demand!((0.0..=1.0).contains(&fraction), "{event:?} is not between 0 and 1");
            }
        }
        Ok(())
    }
}
