//! A plugin that is loaded for one machine alone, in the process of the command.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::Instance;
use machinery::{
    Deadline, Error, HostServices, LogLevel, LogRecord, RestoreReadiness, Result, Setup, State, format_bytes,
};
use serde_json::{Map, Value, json};

use super::arguments::LOOPBACK;
use super::context::Context;
use crate::load::shutdown_plugin;
use crate::logging;
use crate::plugin::call::{GRACE, call_blocking};
use crate::plugin::open::open;

/// A loaded plugin with its machine.
pub struct Session {
    instance: Arc<Instance>,
    events: Arc<Events>,
    machine: String,
}

/// Loads the plugin for a machine, does the work, and shuts the plugin down, which ends its runs.
///
/// # Errors
/// The plugin cannot be loaded, or the work fails.
pub fn with_session<T>(
    context: &Context<'_>,
    setup: &Setup,
    machine: &str,
    work: impl FnOnce(&Session) -> Result<T>,
) -> Result<T> {
    let limits = &context.config.timeouts;
    let opened = open(context.machinery, context.search, context.config.plugin_hashes.as_ref(), limits.load)?;
    let (plugin, setup) = (opened.plugin, setup.clone());
    let events = Arc::new(Events::new(plugin.name()));
    let services = Arc::clone(&events);
    let what = format!("load of '{}'", plugin.name());
    let instance = Arc::new(call_blocking(limits.load, &what, move || plugin.load(&setup, services))?);
    let session = Session { instance, events, machine: machine.to_owned() };
    let done = work(&session);
    shutdown_plugin(context.machinery, session.instance, limits.shutdown);
    done
}

/// Returns the setup without machines, and without the folder and the interface of the one that it had.
pub fn without_machines(setup: &Setup) -> Setup {
    let mut setup = setup.clone();
    let mut config: Map<String, Value> = serde_json::from_str(&setup.config.text).unwrap_or_default();
    config.remove("disposable_copy_dir");
    config.extend([("interface".to_owned(), json!(LOOPBACK)), ("machines".to_owned(), json!({}))]);
    setup.config.text = Value::Object(config).to_string();
    setup.host_config = setup.host_config.map(|host| {
        let mut all: Value = serde_json::from_str(&host.text).unwrap_or_default();
        let sections = all["machineries"].as_object_mut().into_iter().flatten();
        sections.for_each(|(_, section)| section["machines"] = json!({}));
        ConfigFile { text: all.to_string(), ..host }
    });
    setup
}

impl Session {
    /// Calls a method of the plugin for the machine, with a deadline.
    ///
    /// # Errors
    /// The plugin's, or it does not return in time.
    pub fn call<T: Send + 'static>(
        &self,
        action: &str,
        limit: Duration,
        work: impl FnOnce(&Instance, &str, Deadline) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (instance, machine) = (Arc::clone(&self.instance), self.machine.clone());
        let called =
            call_blocking(limit + GRACE, action, move || work(&instance, &machine, Deadline::after(limit)));
        called.map_err(|error| error.action(action).machine(&self.machine))
    }

    /// Has the plugin make the network of the next run, if the machine is isolated.
    ///
    /// # Errors
    /// The plugin's, or it does not return in time.
    pub fn open_network(&self, limit: Duration) -> Result<()> {
        if !self.is_isolated()? {
            return Ok(());
        }
        self.call("opening the network", limit, |instance, machine, deadline| {
            instance.open_network(machine, deadline)
        })
    }

    /// Has the plugin remove the network of the last run, if the machine is isolated.
    ///
    /// # Errors
    /// The plugin's, or it does not return in time.
    pub fn close_network(&self, limit: Duration) -> Result<()> {
        if !self.is_isolated()? {
            return Ok(());
        }
        self.call("closing the network", limit, |instance, machine, deadline| {
            instance.close_network(machine, deadline)
        })
    }

    fn is_isolated(&self) -> Result<bool> {
        let machines = self.instance.machines()?;
        Ok(machines.iter().any(|machine| machine.name == self.machine && machine.own_network))
    }

    /// Returns the machine's readiness, as the plugin has reported it last.
    pub fn readiness(&self) -> RestoreReadiness {
        self.events.lock().readiness.clone()
    }

    /// Returns the progress of the present action in words, if the plugin reports it.
    pub fn progress(&self) -> Option<String> {
        self.events.lock().progress.map(|part| format!("{:.0}%", part * 100.0))
    }

    /// Waits for `timeout`, and expects that the machine's run does not end meanwhile.
    ///
    /// # Errors
    /// The run has ended by itself.
    pub fn expect_run(&self, timeout: Duration) -> Result<()> {
        let known = self.events.lock();
        let waited = self.events.changed.wait_timeout_while(known, timeout, |known| known.ended.is_none());
        match &waited.unwrap_or_else(PoisonError::into_inner).0.ended {
            None => Ok(()),
            Some(why) => Err(Error::failed(format!("the guest has ended: {why}"))
                .machine(&self.machine)
                .advice("Look at its screen with --screenshot FILE, and check its disk and its arguments")),
        }
    }
}

/// The plugin's reports about the machine.
#[derive(Default)]
struct Known {
    readiness: RestoreReadiness,
    progress: Option<f64>,
    /// The reason for the end of the run.
    ended: Option<String>,
}

/// The host services of the session.
struct Events {
    machinery: String,
    known: Mutex<Known>,
    changed: Condvar,
}

impl Events {
    fn new(machinery: &str) -> Events {
        Events { machinery: machinery.to_owned(), known: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostServices for Events {
    fn log(&self, record: LogRecord) {
        logging::from_plugin(&self.machinery, &record);
    }

    fn state_changed(&self, _: &str, state: State, reason: &str) {
        if matches!(state, State::Poweroff | State::Error) && !reason.is_empty() {
            self.lock().ended = Some(reason.to_owned());
            self.changed.notify_all();
        }
    }

    fn progress(&self, _: &str, fraction: f64) {
        self.lock().progress = Some(fraction);
    }

    fn step(&self, machine: &str, step: &str, took: Duration) {
        tracing::debug!(machine, step, ?took, "step");
    }

    fn ready(&self, machine: &str, ready: &RestoreReadiness) {
        tracing::debug!(machine, mode = %ready.mode, disk = format_bytes(ready.disk), "ready");
        self.lock().readiness = ready.clone();
    }

    fn preparation_invalidated(&self, _: &str, _: &str) {}

    fn max_level(&self) -> LogLevel {
        logging::max_level()
    }
}
