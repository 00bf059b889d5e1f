//! From a name in the `machineries` list to a loaded machinery.
//!
//! ```text
//! name ─▶ file (searched in folders) ─▶ opened ─▶ says the same name ─▶ no conflict ─▶ loaded
//! ```
//!
//! Only listed names are opened: loading a library runs its code.
//!
//! What is wrong anywhere on this way keeps the host from starting, with one exception: a plugin that
//! needs a library which is not installed on this host is left out, and the others serve without it.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::{OpenError, Plugin};
use machinery::{Deadline, Error, HostServices, MachineInfo, Result, Setup, State};

use crate::config::Config;
use crate::cwd::{Cwd, make_folder};
use crate::events::Events;
use crate::fleet::services::Services;
use crate::fleet::{Fleet, Machine, Machinery};

/// How long a question to a plugin may take while it is loaded.
const QUESTION: Duration = Duration::from_secs(30);

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

/// Finds and opens the plugin of that name.
///
/// # Errors
/// It is in none of the folders, or cannot be opened; the error says which and why.
pub fn open(name: &str, folders: &[PathBuf]) -> Result<Plugin, NotOpened> {
    let path = folders
        .iter()
        .flat_map(|folder| files_of(name).map(|file| folder.join(file)))
        .find(|path| path.exists())
        .ok_or_else(|| NotOpened::Wrong(not_found(name, folders)))?;
    let plugin = Plugin::open(&path).map_err(|error| NotOpened::of(&path, &error))?;
    if plugin.name() != name {
        return Err(NotOpened::Wrong(misnamed(&plugin, name)));
    }
    tracing::debug!(machinery = name, path = %path.display(), version = plugin.version(), "plugin opened");
    Ok(plugin)
}

/// What the file of that machinery may be called: cargo makes no library with a `-` in its name.
fn files_of(name: &str) -> [String; 2] {
    [name.to_owned(), name.replace('-', "_")].map(|name| format!("libmachinery_{name}.so"))
}

/// Whether a file of a name that is [`available`] is the one that is listed, as far as names tell.
pub fn is_listed(file: &str, listed: &[String]) -> bool {
    listed.iter().any(|name| name == file || name.replace('-', "_") == file)
}

fn misnamed(plugin: &Plugin, name: &str) -> Error {
    let (path, real) = (plugin.path().display(), plugin.name());
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
fn open_all(config: &Config, folders: &[PathBuf]) -> Result<Vec<Plugin>> {
    let mut plugins = Vec::new();
    let mut left_out = Vec::new();
    let mut problems = Vec::new();
    for name in &config.machineries {
        match open(name, folders) {
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
pub fn conflicts(plugins: &[Plugin]) -> Vec<Error> {
    let mut found = Vec::new();
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

/// What a plugin is given.
///
/// # Errors
/// Its configuration file cannot be read.
pub fn setup(name: &str, cwd: &Cwd, config: &Config) -> Result<Setup> {
    Ok(Setup {
        config: ConfigFile::read(&cwd.machinery_yaml(name))?,
        host_config: config.host_file.clone(),
        sockets_dir: cwd.sockets(),
        state_dir: cwd.machinery_state(name),
        cache_dir: cwd.machinery_cache(name),
    })
}

/// Loads the listed machineries with their machines. One whose plugin needs a library that is not
/// installed is told in the log and left out, as long as others are left.
///
/// # Errors
/// Everything that is wrong, at once. What was loaded by then is shut down again.
pub fn load_all(
    cwd: &Cwd,
    config: &Config,
    folders: &[PathBuf],
    events: &Events,
) -> Result<Arc<OnceLock<Fleet>>> {
    let fleet = Arc::new(OnceLock::new());
    let mut loaded = Vec::new();
    let mut problems = Vec::new();
    for plugin in open_all(config, folders)? {
        let services = Arc::new(Services::new(plugin.name(), Arc::clone(&fleet)));
        match load(&plugin, cwd, config, services) {
            Ok(machinery) => loaded.push(machinery),
            Err(error) => problems.push(error.action(format!("loading the machinery '{}'", plugin.name()))),
        }
    }
    problems.extend(doubles(&loaded));
    if let Some(problems) = Error::all(problems) {
        for (machinery, _) in &loaded {
            let _ = machinery.instance.shutdown(Deadline::after(QUESTION));
        }
        return Err(problems);
    }
    let machines =
        loaded.into_iter().flat_map(|(machinery, infos)| machines(machinery, infos, events)).collect();
    // Nobody else has this cell yet but the plugins' services, which only read it.
    let _ = fleet.set(Fleet::new(machines));
    Ok(fleet)
}

fn load(
    plugin: &Plugin,
    cwd: &Cwd,
    config: &Config,
    services: Arc<dyn HostServices>,
) -> Result<(Arc<Machinery>, Vec<MachineInfo>)> {
    let setup = setup(plugin.name(), cwd, config)?;
    for folder in [&setup.sockets_dir, &setup.state_dir, &setup.cache_dir] {
        make_folder(folder)?;
    }
    let instance = plugin.load(&setup, services)?;
    let infos = instance.machines()?;
    let machinery = Machinery {
        name: plugin.name().to_owned(),
        capabilities: instance.capabilities()?,
        version: instance.version(Deadline::after(QUESTION))?,
        instance,
    };
    tracing::info!(
        machinery = machinery.name,
        hypervisor = machinery.version,
        machines = infos.len(),
        plugin = %plugin.path().display(),
        "machinery loaded"
    );
    Ok((Arc::new(machinery), infos))
}

fn machines(machinery: Arc<Machinery>, infos: Vec<MachineInfo>, events: &Events) -> Vec<Arc<Machine>> {
    let machine = |info: MachineInfo| {
        let state = machinery.instance.state(&info.name, Deadline::after(QUESTION)).unwrap_or_else(|error| {
            tracing::warn!(machine = info.name, %error, "cannot tell its state");
            State::Error
        });
        Arc::new(Machine::new(info, Arc::clone(&machinery), state, events.clone()))
    };
    infos.into_iter().map(machine).collect()
}

/// Names are unique over all machineries.
fn doubles(loaded: &[(Arc<Machinery>, Vec<MachineInfo>)]) -> Vec<Error> {
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
