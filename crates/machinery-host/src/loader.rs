//! From a name in the `machineries` list to a loaded machinery.
//!
//! ```text
//! name ─▶ file (searched in folders) ─▶ to be trusted ─▶ opened ─▶ says the same name ─▶ no conflict
//!                                                                                   ─▶ loaded
//! ```
//!
//! Only listed names are opened: loading a library runs its code. Before that, [`trust`] sees that nobody
//! else could have changed the file, and [`hashes`] that it is the one the operator means.
//!
//! What is wrong anywhere on this way keeps the host from starting, with one exception: a plugin that
//! needs a library which is not installed on this host is left out, and the others serve without it.

pub mod hashes;
pub mod trust;

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use machinery::config::ConfigFile;
use machinery::host::{Instance, OpenError, Plugin};
use machinery::{Capabilities, Deadline, Error, HostServices, MachineInfo, Result, Setup, State};

use crate::actions::rules::plugin_at_fault;
use crate::config::{Config, Timeouts};
use crate::cuckoo;
use crate::cwd::{Cwd, make_folder};
use crate::events::Events;
use crate::exit;
use crate::fleet::services::Services;
use crate::fleet::{Fleet, Machine, Machinery, Roll};
use crate::patience::{not_back, within};

use hashes::{AllowList, FileHash};

/// How long a question to a plugin may take while it is loaded.
const QUESTION: Duration = Duration::from_secs(30);
/// How much later than that it may answer.
const GRACE: Duration = Duration::from_secs(2);

/// Where plugins are searched, and which are taken.
#[derive(Debug, Clone)]
pub struct Search {
    /// The folders, in their order.
    pub folders: Vec<PathBuf>,
    /// Whether plugins are taken that others could have changed.
    pub allow_insecure: bool,
}

/// An open plugin, and the hash of its file.
pub struct Opened {
    /// The plugin.
    pub plugin: Plugin,
    /// What `sha256sum` says of its file.
    pub sha256: FileHash,
}

/// The folders that are searched, in order; those that do not exist are left out.
pub fn folders(given: &[PathBuf], cwd: &Cwd) -> Vec<PathBuf> {
    let mut folders = given.to_vec();
    if let Some(list) = env::var_os("CUCKOO_MACHINERY_PLUGINS") {
        folders.extend(env::split_paths(&list).filter(|folder| !folder.as_os_str().is_empty()));
    }
    folders.push(cwd.plugins());
    if let Some(own) = env::current_exe().ok().as_deref().and_then(Path::parent) {
        folders.push(own.join("../lib/cuckoo-machinery"));
        folders.push(own.to_owned());
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// The plugin files in the folders, by machinery name; the first of a name counts. Nothing is opened.
pub fn available(folders: &[PathBuf]) -> Vec<(String, PathBuf)> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for folder in folders {
        let Ok(entries) = folder.read_dir() else { continue };
        let mut here: Vec<_> = entries.flatten().filter_map(|entry| named(&entry.path())).collect();
        here.sort();
        for (name, path) in here {
            if found.iter().all(|(known, _)| *known != name) {
                found.push((name, path));
            }
        }
    }
    found
}

fn named(path: &Path) -> Option<(String, PathBuf)> {
    let name = path.file_name()?.to_str()?.strip_prefix("libmachinery_")?.strip_suffix(".so")?;
    Some((name.to_owned(), path.to_owned()))
}

/// Why a listed machinery has no open plugin, by what that costs.
#[derive(Debug)]
pub enum NotOpened {
    /// Its plugin needs a library that is not installed on this host. That costs this machinery alone.
    LibraryMissing(Error),
    /// There is no such plugin, or it is not what it should be. The host does not start.
    Wrong(Error),
}

impl NotOpened {
    fn of(path: &Path, error: &OpenError) -> Self {
        let reason = format!("cannot use {} as a plugin: {error}", path.display());
        match error {
            OpenError::LibraryMissing { .. } => NotOpened::LibraryMissing(Error::environment(reason)),
            _ => NotOpened::Wrong(Error::configuration(reason)),
        }
    }
}

/// For those who only tell it.
impl From<NotOpened> for Error {
    fn from(why: NotOpened) -> Error {
        match why {
            NotOpened::LibraryMissing(error) | NotOpened::Wrong(error) => error,
        }
    }
}

/// Finds and opens the plugin of that name, if it is to be trusted.
///
/// # Errors
/// It is in none of the folders, is not trusted, or cannot be opened; the error says which and why.
pub fn open(
    name: &str,
    search: &Search,
    allowed: Option<&AllowList>,
    limit: Duration,
) -> Result<Opened, NotOpened> {
    let found =
        find(name, &search.folders).ok_or_else(|| NotOpened::Wrong(not_found(name, &search.folders)))?;
    let (path, sha256) = trusted(name, &found, search, allowed).map_err(NotOpened::Wrong)?;
    let file = path.clone();
    // Its initialisers are code like any other.
    let opened = within(limit, &format!("opening {}", path.display()), move || Plugin::open(&file));
    let plugin = opened.map_err(NotOpened::Wrong)?.map_err(|error| NotOpened::of(&path, &error))?;
    if plugin.name() != name {
        return Err(NotOpened::Wrong(misnamed(&found, plugin.name(), name)));
    }
    tracing::debug!(machinery = name, path = %path.display(), version = plugin.version(), "plugin opened");
    Ok(Opened { plugin, sha256 })
}

/// The plugin file of that name: the first in the folders.
fn find(name: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let paths = |folder: &PathBuf| files_of(name).map(|file| folder.join(file));
    folders.iter().flat_map(paths).find(|path| path.exists())
}

/// What the file of that machinery may be called: cargo makes no library with a `-` in its name.
fn files_of(name: &str) -> [String; 2] {
    [name.to_owned(), name.replace('-', "_")].map(|name| format!("libmachinery_{name}.so"))
}

/// Whether a file of a name that is [`available`] is the one that is listed, as far as names tell.
pub fn is_listed(file: &str, listed: &[String]) -> bool {
    listed.iter().any(|name| name == file || name.replace('-', "_") == file)
}

/// The file behind the path that was found, and its hash.
fn trusted(
    name: &str,
    found: &Path,
    search: &Search,
    allowed: Option<&AllowList>,
) -> Result<(PathBuf, FileHash)> {
    let path = trust::resolve(name, found, search.allow_insecure)?;
    let sha256 = FileHash::of(&path)?;
    if let Some(list) = allowed {
        list.expect(name, &path, &sha256)?;
    }
    Ok((path, sha256))
}

fn misnamed(path: &Path, real: &str, name: &str) -> Error {
    let path = path.display();
    Error::configuration(format!("{path} holds the machinery '{real}', not '{name}'"))
        .advice(format!("Name the file libmachinery_{real}.so and list '{real}'"))
}

fn not_found(name: &str, folders: &[PathBuf]) -> Error {
    let searched: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let there: Vec<String> = available(folders).into_iter().map(|(name, _)| name).collect();
    let there = if there.is_empty() { "no plugin at all".to_owned() } else { there.join(", ") };
    Error::configuration(format!(
        "there is no plugin for the machinery '{name}': no libmachinery_{name}.so in {}; found there: {there}",
        searched.join(", ")
    ))
    .advice("Correct the name in cuckoo.yaml, put the plugin into one of these folders, or give its folder with --plugin-dir")
}

/// Opens the listed plugins and sees that they can live together. Those whose libraries are missing
/// are left out, as long as others are left.
fn open_all(config: &Config, search: &Search) -> Result<Vec<Opened>> {
    let mut plugins = Vec::new();
    let mut left_out = Vec::new();
    let mut problems = Vec::new();
    for name in &config.machineries {
        match open(name, search, config.plugin_hashes.as_ref(), config.timeouts.load) {
            Ok(plugin) => plugins.push(plugin),
            Err(NotOpened::LibraryMissing(error)) => left_out.push((name, error)),
            Err(NotOpened::Wrong(error)) => problems.push(error),
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
            "left out with all its machines: install what is missing and start the host anew"
        );
    }
    Ok(plugins)
}

/// Those of the plugins that cannot share a host, as errors.
pub fn conflicts(plugins: &[Opened]) -> Vec<Error> {
    let mut found = Vec::new();
    let plugins: Vec<&Plugin> = plugins.iter().map(|opened| &opened.plugin).collect();
    for (index, one) in plugins.iter().enumerate() {
        for other in &plugins[index + 1..] {
            let why = one.conflict_with(other.name()).or_else(|| other.conflict_with(one.name()));
            if let Some(why) = why {
                let reason = format!(
                    "the machineries '{}' and '{}' cannot share a host: {why}",
                    one.name(),
                    other.name()
                );
                found.push(Error::configuration(reason).advice("List only one of them in cuckoo.yaml"));
            }
        }
    }
    found
}

/// A plugin file as it was when it was loaded.
#[derive(Debug, PartialEq, Eq)]
pub struct PluginFile {
    /// Where it is, with no link on the way.
    pub path: PathBuf,
    /// The hash of what was in it.
    pub sha256: FileHash,
}

impl PluginFile {
    /// Whether it is still what would be loaded for that machinery.
    pub fn is_current(&self, name: &str, search: &Search) -> bool {
        let found = find(name, &search.folders).and_then(|found| trusted(name, &found, search, None).ok());
        found.is_some_and(|(path, sha256)| path == self.path && sha256 == self.sha256)
    }
}

/// What a plugin is given.
///
/// # Errors
/// Its configuration file cannot be read.
pub fn setup(name: &str, cwd: &Cwd, config: &Config) -> Result<Setup> {
    Ok(setup_with(ConfigFile::read(&cwd.machinery_yaml(name))?, name, cwd, config))
}

/// Returns the setup of the machinery with this configuration file.
pub fn setup_with(file: ConfigFile, name: &str, cwd: &Cwd, config: &Config) -> Setup {
    Setup {
        config: file,
        host_config: config.host_file.clone(),
        sockets_dir: cwd.sockets(),
        state_dir: cwd.machinery_state(name),
        cache_dir: cwd.machinery_cache(name),
    }
}

/// Loads the listed machineries with their machines, into the fleet. One whose plugin needs a library that is not
/// installed is told in the log and left out, as long as others are left.
///
/// # Errors
/// Everything that is wrong, at once. What was loaded by then is shut down again.
pub fn load_all(cwd: &Cwd, config: &Config, search: &Search, events: &Events) -> Result<Arc<Fleet>> {
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
    problems.extend(doubles(&loaded));
    if let Some(problems) = Error::all(problems) {
        for (machinery, _) in loaded {
            let name = machinery.name.clone();
            let_go(&name, Arc::clone(&machinery.instance), config.timeouts.shutdown);
        }
        return Err(problems);
    }
    let machineries = loaded.iter().map(|(machinery, _)| Arc::clone(machinery)).collect();
    let limits = &config.timeouts;
    let machines = loaded
        .into_iter()
        .flat_map(|(machinery, infos)| machines(&machinery, infos, limits.state, limits.load, events));
    fleet.set(Roll::new(machineries, machines.collect()));
    Ok(fleet)
}

fn load(
    Opened { plugin, sha256 }: &Opened,
    cwd: &Cwd,
    config: &Config,
    services: Arc<dyn HostServices>,
) -> Result<(Arc<Machinery>, Vec<MachineInfo>)> {
    let setup = setup(plugin.name(), cwd, config)?;
    for folder in [&setup.sockets_dir, &setup.state_dir, &setup.cache_dir] {
        make_folder(folder)?;
    }
    let (name, limits) = (plugin.name(), &config.timeouts);
    let loading = plugin.clone();
    let loaded = within(limits.load, &format!("load of '{name}'"), move || loading.load(&setup, services));
    let instance = Arc::new(loaded.flatten()?);
    match answers(name, &instance, limits) {
        Ok((capabilities, version, infos)) => {
            let plugin = PluginFile { path: plugin.path().to_owned(), sha256: sha256.clone() };
            let (name, diagnosing) = (name.to_owned(), Arc::default());
            let machinery = Machinery { name, capabilities, version, instance, plugin, diagnosing };
            tell(&machinery, &infos);
            Ok((Arc::new(machinery), infos))
        }
        Err(error) => {
            let_go(name, instance, limits.shutdown);
            Err(error)
        }
    }
}

/// What a machinery says of itself.
fn answers(
    name: &str,
    instance: &Arc<Instance>,
    limits: &Timeouts,
) -> Result<(Capabilities, String, Vec<MachineInfo>)> {
    let limit = QUESTION.min(limits.load);
    let infos = ask(name, instance, limit, "machines", Instance::machines)?;
    let capabilities = ask(name, instance, limit, "capabilities", Instance::capabilities)?;
    let version =
        ask(name, instance, limit, "version", move |instance| instance.version(Deadline::after(limit)))?;
    Ok((capabilities, version, infos))
}

/// Asks a machinery by one of its methods.
fn ask<T: Send + 'static>(
    name: &str,
    instance: &Arc<Instance>,
    limit: Duration,
    method: &str,
    question: impl FnOnce(&Instance) -> Result<T> + Send + 'static,
) -> Result<T> {
    let what = format!("{method} of '{name}'");
    let instance = Arc::clone(instance);
    let answer = within(limit + GRACE, &what, move || question(&instance)).flatten();
    answer.map_err(|error| error.action(what))
}

/// Lets go of a machinery that the host does not start with.
fn let_go(name: &str, instance: Arc<Instance>, limit: Duration) {
    let gone = within(limit, &format!("shutdown of '{name}'"), move || {
        let done = instance.shutdown(Deadline::after(limit));
        // Here, because its end may take its time too.
        drop(instance);
        done
    });
    if let Err(error) = gone.flatten() {
        tracing::warn!(machinery = name, %error, "did not let go cleanly");
    }
}

fn tell(machinery: &Machinery, infos: &[MachineInfo]) {
    tracing::info!(
        machinery = machinery.name,
        hypervisor = machinery.version,
        machines = infos.len(),
        plugin = %machinery.plugin.path.display(),
        sha256 = %machinery.plugin.sha256,
        "machinery loaded"
    );
}

/// Makes machines of what a plugin lists, by asking it for their states: for each within `limit`, and for all
/// within `all`. One whose state the plugin does not tell as it should is disabled.
pub fn machines(
    machinery: &Arc<Machinery>,
    infos: Vec<MachineInfo>,
    limit: Duration,
    all: Duration,
    events: &Events,
) -> Vec<Arc<Machine>> {
    let names = infos.iter().map(|info| info.name.clone()).collect();
    let states = states(machinery, names, limit, all);
    let machine = |(info, answer): (MachineInfo, Result<State>)| {
        let state = *answer.as_ref().unwrap_or(&State::Error);
        let machine = Machine::new(info, Arc::clone(machinery), state, events.clone());
        if let Err(error) = answer {
            let costs = plugin_at_fault(&error);
            let reason = error.action("telling the state").machine(machine.name()).to_string();
            machine.add_error(&reason);
            if costs {
                machine.disable(&reason);
            } else {
                tracing::warn!(machine = machine.name(), reason, "cannot tell its state");
            }
        }
        Arc::new(machine)
    };
    infos.into_iter().zip(states).map(machine).collect()
}

/// The states of all its machines. One whose question does not come back is left behind, and the next ones
/// are asked on, as long as there is time for all of them.
fn states(machinery: &Machinery, names: Vec<String>, each: Duration, all: Duration) -> Vec<Result<State>> {
    let end = Instant::now() + all;
    let names: Arc<[String]> = names.into();
    let mut states = Vec::new();
    while states.len() < names.len() {
        let limit = (each + GRACE).min(end.saturating_duration_since(Instant::now()));
        if !limit.is_zero() {
            let answers = ask_states(machinery, Arc::clone(&names), states.len(), each);
            states.extend(std::iter::from_fn(|| answers.recv_timeout(limit).ok()));
        }
        if let Some(name) = names.get(states.len()) {
            states.push(Err(not_back("state", limit).machine(name)));
        }
    }
    states
}

/// Asks for the states of the machines from that one on, on a thread of its own.
fn ask_states(
    machinery: &Machinery,
    names: Arc<[String]>,
    from: usize,
    limit: Duration,
) -> Receiver<Result<State>> {
    let (answer, answers) = sync_channel(0);
    let instance = Arc::clone(&machinery.instance);
    let at = format!("'{}' in state", machinery.name);
    thread::spawn(move || {
        let _call = exit::Call::begin(&at);
        for name in &names[from..] {
            let state = instance.state(name, Deadline::after(limit));
            // Whoever asked may have given up.
            if answer.send(state).is_err() {
                return;
            }
        }
    });
    answers
}

/// Names are unique over all machineries.
pub fn doubles(loaded: &[(Arc<Machinery>, Vec<MachineInfo>)]) -> Vec<Error> {
    let mut seen = std::collections::HashMap::new();
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
