//! Loads the listed machineries: from the configuration to a fleet of machines.
//!
//! ```text
//! listed names ─▶ plugins opened ─▶ no conflict ─▶ loaded ─▶ machines listed, names unique ─▶ states queried
//! ```
//!
//! Any fault keeps the host from starting, with one exception: a plugin that needs a library which is not
//! installed on this host is left out, and the others serve without it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::Instance;
use machinery::{Capabilities, Deadline, Error, ErrorKind, HostServices, MachineInfo, Result, Setup, State};

use crate::config::{Config, Heal, Timeouts};
use crate::cuckoo;
use crate::cwd::{Cwd, make_reachable_folder};
use crate::events::Events;
use crate::fleet::quarantine::is_plugin_fault;
use crate::fleet::services::Services;
use crate::fleet::{Diagnosing, Fleet, Losses, Machine, Machinery, Roster};
use crate::plugin::call::{GRACE, call_all, call_blocking, call_each};
use crate::plugin::open::{OpenFailure, OpenedPlugin, conflicts, open};
use crate::plugin::search::{PluginFile, PluginSearch};

/// The time that a query to a plugin may take while it is loaded.
const MAX_QUERY_TIMEOUT: Duration = Duration::from_secs(30);

/// Opens the listed plugins, and expects no conflict between them. A plugin with a missing library is left
/// out, unless no plugin remains.
fn open_all(config: &Config, search: &PluginSearch) -> Result<Vec<OpenedPlugin>> {
    let mut plugins = Vec::new();
    let mut left_out = Vec::new();
    let mut problems = Vec::new();
    for name in &config.machineries {
        match open(name, search, config.plugin_hashes.as_ref(), config.timeouts.load) {
            Ok(plugin) => plugins.push(plugin),
            Err(OpenFailure::LibraryMissing(error)) => left_out.push((name, error)),
            Err(OpenFailure::Invalid(error)) => problems.push(error),
        }
    }
    problems.extend(conflicts(&plugins));
    if plugins.is_empty() || !problems.is_empty() {
        problems.extend(left_out.drain(..).map(|(_, error)| error));
    }
    if let Some(problems) = Error::all(problems) {
        return Err(problems);
    }
    for (machinery, error) in left_out {
        tracing::error!(
            machinery,
            %error,
            "machinery left out with all its machines: install the missing library and start the host anew"
        );
    }
    Ok(plugins)
}

/// Returns the setup of the machinery: what its plugin gets from the host.
///
/// # Errors
/// The configuration file of the machinery cannot be read, or other users could change it.
pub fn setup(name: &str, cwd: &Cwd, config: &Config) -> Result<Setup> {
    Ok(setup_with(ConfigFile::read_trusted(&cwd.machinery_yaml(name))?, name, cwd, config))
}

/// Returns the setup of the machinery with this configuration file.
pub fn setup_with(file: ConfigFile, name: &str, cwd: &Cwd, config: &Config) -> Setup {
    Setup {
        config: file,
        host_config: config.host_file.clone(),
        sockets_dir: cwd.sockets(),
        state_dir: cwd.machinery_state(name),
        cache_dir: cwd.machinery_cache(name),
        adopts: false,
        result_server: config.result_server,
    }
}

/// Loads the listed machineries and their machines.
///
/// # Errors
/// All faults at once. The host shuts down the machineries that were loaded by then.
pub fn load_all(cwd: &Cwd, config: &Config, search: &PluginSearch, events: &Events) -> Result<Arc<Fleet>> {
    let fleet = Arc::new(Fleet::default());
    let mut loaded = Vec::new();
    let mut problems = Vec::new();
    for opened in open_all(config, search)? {
        let plugin = &opened.plugin;
        let services = Arc::new(Services::new(plugin.name(), Arc::clone(&fleet)));
        let file = ConfigFile::read(&cwd.machinery_yaml(plugin.name())).ok();
        let example = file.and_then(|file| cuckoo::example_machine(plugin.name(), &file));
        match load(&opened, cwd, config, services) {
            Ok(machinery) => {
                example.into_iter().for_each(|advice| tracing::warn!("{advice}"));
                loaded.push(machinery);
            }
            Err(error) => {
                problems.push(error.action(format!("loading the machinery '{}'", plugin.name())));
                problems.extend(example);
            }
        }
    }
    problems.extend(duplicate_names(&loaded));
    if let Some(problems) = Error::all(problems) {
        for (machinery, _) in loaded {
            let name = machinery.name.clone();
            shutdown_plugin(&name, Arc::clone(&machinery.instance), config.timeouts.shutdown);
        }
        return Err(problems);
    }
    let machineries = loaded.iter().map(|(machinery, _)| Arc::clone(machinery)).collect();
    let limits = &config.timeouts;
    let machines = loaded.into_iter().flat_map(|(machinery, infos)| {
        let adopted = adopt(&machinery, infos.iter().map(|info| info.name.clone()).collect(), config);
        let machines = machines(&machinery, infos, limits.state, limits.load, config.heal, events);
        machines
            .iter()
            .zip(adopted)
            .for_each(|(machine, adopted)| record_adoption(machine, adopted, config.heal));
        machines
    });
    fleet.set(Roster::new(machineries, machines.collect()));
    Ok(fleet)
}

/// Has the plugin adopt the runs that an earlier host has left. Returns for each machine whether there was one.
fn adopt(machinery: &Arc<Machinery>, names: Vec<String>, config: &Config) -> Vec<Result<bool>> {
    if !config.adopts {
        return Vec::new();
    }
    let (instance, limits) = (Arc::clone(&machinery.instance), &config.timeouts);
    let (what, limit) = (format!("adopt of '{}'", machinery.name), limits.stop);
    let adopt = move |name: &String| instance.adopt(name, Deadline::after(limit));
    let adopted = call_all(&what, names, limit, limits.load, adopt);
    let is_unsupported =
        |adopted: &Result<bool>| matches!(adopted, Err(error) if error.kind() == ErrorKind::Unsupported);
    // A machinery without machines may get some by a reload.
    let adopts = adopted.is_empty() || !adopted.iter().all(is_unsupported);
    machinery.adopts.store(adopts, Ordering::SeqCst);
    let nothing_left = |adopted| if is_unsupported(&adopted) { Ok(false) } else { adopted };
    adopted.into_iter().map(nothing_left).collect()
}

/// Records the outcome of an adoption. A task finds in the errors of its machine that its run is lost. A machine leaves the
/// pool if it is on nevertheless, or if its plugin has not answered. Whose run that is, the host does not know: so it does
/// not end it, and does not try the machine while it is on.
fn record_adoption(machine: &Arc<Machine>, adopted: Result<bool>, heal: Heal) {
    match adopted {
        Ok(true) => machine.set_adopted(),
        Ok(false) => {}
        Err(error) => {
            let kind = error.kind();
            let error =
                error.action("adopting the run of an earlier host").machine(machine.name()).to_string();
            tracing::warn!(machine = machine.name(), error, "its run is lost");
            machine.add_error(&error);
            if machine.status().state != State::Poweroff || is_plugin_fault(kind) {
                machine.take_out(kind, &error, heal);
            }
        }
    }
}

fn load(
    OpenedPlugin { plugin, sha256 }: &OpenedPlugin,
    cwd: &Cwd,
    config: &Config,
    services: Arc<dyn HostServices>,
) -> Result<(Arc<Machinery>, Vec<MachineInfo>)> {
    let setup = Setup { adopts: config.adopts, ..setup(plugin.name(), cwd, config)? };
    for folder in [&setup.sockets_dir, &setup.state_dir, &setup.cache_dir] {
        make_reachable_folder(folder)?;
    }
    let (name, limits) = (plugin.name(), &config.timeouts);
    let loading = plugin.clone();
    let what = format!("load of '{name}'");
    let loaded = call_blocking(limits.load, &what, move || loading.load(&setup, services));
    let instance = Arc::new(loaded?);
    match describe(name, &instance, limits) {
        Ok((capabilities, version, infos)) => {
            let plugin = PluginFile { path: plugin.path().to_owned(), sha256: sha256.clone() };
            let (name, diagnosing) = (name.to_owned(), Diagnosing::default());
            let (adopts, losses) = (AtomicBool::new(false), Losses::default());
            let machinery =
                Machinery { name, capabilities, version, instance, plugin, diagnosing, adopts, losses };
            log_loaded(&machinery, &infos);
            Ok((Arc::new(machinery), infos))
        }
        Err(error) => {
            shutdown_plugin(name, instance, limits.shutdown);
            Err(error)
        }
    }
}

/// Queries a machinery for its capabilities, its version and its machines.
fn describe(
    name: &str,
    instance: &Arc<Instance>,
    limits: &Timeouts,
) -> Result<(Capabilities, String, Vec<MachineInfo>)> {
    let limit = MAX_QUERY_TIMEOUT.min(limits.load);
    let infos = query(name, instance, limit, "machines", Instance::machines)?;
    let capabilities = query(name, instance, limit, "capabilities", Instance::capabilities)?;
    let version =
        query(name, instance, limit, "version", move |instance| instance.version(Deadline::after(limit)))?;
    Ok((capabilities, version, infos))
}

/// Queries a machinery by one of its methods.
fn query<T: Send + 'static>(
    name: &str,
    instance: &Arc<Instance>,
    limit: Duration,
    method: &str,
    work: impl FnOnce(&Instance) -> Result<T> + Send + 'static,
) -> Result<T> {
    let what = format!("{method} of '{name}'");
    let instance = Arc::clone(instance);
    let result = call_blocking(limit + GRACE, &what, move || work(&instance));
    result.map_err(|error| error.action(what))
}

/// Shuts down a machinery that does not serve.
pub fn shutdown_plugin(name: &str, instance: Arc<Instance>, limit: Duration) {
    let result = call_blocking(limit, &format!("shutdown of '{name}'"), move || {
        let done = instance.shutdown(Deadline::after(limit));
        // On this thread, because dropping the plugin may block too.
        drop(instance);
        done
    });
    if let Err(error) = result {
        tracing::warn!(machinery = name, %error, "the plugin did not shut down");
    }
}

fn log_loaded(machinery: &Machinery, infos: &[MachineInfo]) {
    tracing::info!(
        machinery = machinery.name,
        hypervisor = machinery.version,
        machines = infos.len(),
        plugin = %machinery.plugin.path.display(),
        sha256 = %machinery.plugin.sha256,
        "machinery loaded"
    );
}

/// Makes the machines that a plugin lists, and queries their states: each within `limit`, and all within
/// `all`. A machine leaves the pool if the plugin misbehaves in the query.
pub fn machines(
    machinery: &Arc<Machinery>,
    infos: Vec<MachineInfo>,
    limit: Duration,
    all: Duration,
    heal: Heal,
    events: &Events,
) -> Vec<Arc<Machine>> {
    let names: Vec<String> = infos.iter().map(|info| info.name.clone()).collect();
    let instance = Arc::clone(&machinery.instance);
    let what = format!("state of '{}'", machinery.name);
    let states =
        call_each(&what, names, limit, all, move |name| instance.state(name, Deadline::after(limit)));
    let machine = |(info, answer): (MachineInfo, Result<State>)| {
        let state = *answer.as_ref().unwrap_or(&State::Error);
        let machine = Machine::new(info, Arc::clone(machinery), state, events.clone());
        if let Err(error) = answer {
            let kind = error.kind();
            let reason = error.action("querying the state").machine(machine.name()).to_string();
            machine.add_error(&reason);
            if is_plugin_fault(kind) {
                machine.take_out(kind, &reason, heal);
            } else {
                tracing::warn!(machine = machine.name(), reason, "the state of the machine is unknown");
            }
        }
        Arc::new(machine)
    };
    infos.into_iter().zip(states).map(machine).collect()
}

/// Returns an error for each name that two machines have: names are unique over all machineries.
pub fn duplicate_names(loaded: &[(Arc<Machinery>, Vec<MachineInfo>)]) -> Vec<Error> {
    let mut seen = HashMap::new();
    let mut found = Vec::new();
    for (machinery, infos) in loaded {
        for info in infos {
            if let Some(other) = seen.insert(&info.name, &machinery.name) {
                let reason = if *other == machinery.name {
                    format!("the machinery '{other}' lists this machine twice")
                } else {
                    format!("a machine of this name is configured for '{other}' and for '{}'", machinery.name)
                };
                found.push(
                    Error::configuration(reason).machine(&info.name).advice("Give each machine its own name"),
                );
            }
        }
    }
    found
}
