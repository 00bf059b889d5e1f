//! The host's side: opening a plugin file, step by step, and calling it.
//!
//! ```text
//! open ─▶ is it a library? ─▶ is it a plugin? ─▶ same interface version?      nothing of it runs
//!                    ─▶ are those it needs there? ─▶ same layout? ─▶ Plugin    it is loaded
//! Plugin::load(setup, services) ─▶ Instance, on which the methods are called
//! ```
//!
//! The version is plain data in the file, and is compared before the library is loaded, because loading
//! runs its initialisers; each step has its own error. A library once opened stays open for good: code of it may run in any
//! thread.

mod header;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use abi_stable::abi_stability::StableAbi;
use abi_stable::abi_stability::abi_checking::check_layout_compatibility;
use abi_stable::library::AbiHeaderRef;
use abi_stable::std_types::RResult;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::abi::{
    InterfaceVersion, LONGEST, LONGEST_TOLD_ONCE, MachineryObject, Manifest, ModuleRef, Reply, abi_services,
    cut, from_json, panic_text, text, to_json,
};
use crate::config::is_machine_name;
use crate::reload::ReloadRequest;
use crate::services::path_text;
use crate::{
    Capabilities, Deadline, Diagnosis, DumpFormat, Error, ErrorKind, HostServices, MachineInfo, Reloaded,
    Report, Result, Setup, State,
};

/// The version of the interface this host speaks, as `major.minor`.
pub fn interface_version() -> String {
    version_text(InterfaceVersion::OURS)
}

/// Why a file could not be opened as a plugin.
#[derive(Debug)]
pub enum OpenError {
    /// The dynamic linker refused it.
    NotALibrary(String),
    /// The file is fine, but it needs another library, and that is not installed here.
    LibraryMissing {
        /// What the dynamic linker looked for, such as `libvirt.so.0`. There may be more.
        library: String,
    },
    /// It is a library, but exports no machinery.
    NotAPlugin,
    /// It was built for another interface.
    InterfaceVersion {
        /// The plugin's, as `major.minor`.
        plugin: String,
        /// The host's, as `major.minor`.
        host: String,
    },
    /// The versions agree and yet the two do not fit.
    Layout {
        /// The plugin's, as `major.minor`.
        plugin: String,
        /// Precisely where.
        why: String,
    },
    /// It opened, and then could not say what it is.
    Manifest(Error),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::NotALibrary(why) => write!(
                f,
                "it cannot be loaded as a shared library ({why}). Check that the file is whole, built for this \
                 machine, and that the libraries it needs are new enough (ldd tells)"
            ),
            OpenError::LibraryMissing { library } => write!(
                f,
                "it needs the shared library {library}, which is not installed on this host. Install the package \
                 that has it (on Debian, `apt-file search {library}` finds it); `ldd` on this file lists all that \
                 are missing"
            ),
            OpenError::NotAPlugin => f.write_str(
                "it is a shared library, but not a machinery plugin: it does not export MACHINERY_INTERFACE. \
                 A plugin is built as a cdylib with `machinery::export_machinery!`",
            ),
            OpenError::InterfaceVersion { plugin, host } => write!(
                f,
                "it was built for machinery interface {plugin}, this host speaks {host}. Use a plugin built for \
                 {host}, or a host of the plugin's version"
            ),
            OpenError::Layout { plugin, why } => write!(
                f,
                "it says it is built for machinery interface {plugin}, which this host of {} understands, but it \
                 does not fit. Rebuild the plugin against the released interface crate. The mismatch: {why}",
                interface_version()
            ),
            OpenError::Manifest(why) => write!(f, "it opened, but cannot say what it is: {why}"),
        }
    }
}

impl std::error::Error for OpenError {}

/// An opened plugin file.
#[derive(Clone)]
pub struct Plugin {
    path: PathBuf,
    interface: InterfaceVersion,
    manifest: Manifest,
    module: ModuleRef,
}

impl Plugin {
    /// Opens a plugin file. This runs the library's initialisers, so only open what you trust.
    ///
    /// # Errors
    /// One for each step of the [module text](self).
    pub fn open(path: &Path) -> Result<Plugin, OpenError> {
        let interface = header::interface_of(path)?;
        let ours = InterfaceVersion::OURS;
        if interface.major != ours.major || interface.minor > ours.minor {
            return Err(OpenError::InterfaceVersion {
                plugin: version_text(interface),
                host: interface_version(),
            });
        }
        // SAFETY: loading a library runs its initialisers; the operator named this file to be run.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|error| refusal(path, linker_words(&error)))?;
        let module = module_of(&library, interface)?;
        // Never unloaded: threads, thread-locals and the hook of the plugin point into it.
        std::mem::forget(library);
        let manifest =
            answer((module.manifest())()).and_then(|json| from_json(json.as_bytes(), "plugin's manifest"));
        let manifest = manifest.map_err(OpenError::Manifest)?;
        Ok(Plugin { path: path.to_owned(), interface, manifest, module })
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The machinery's name.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// The plugin's own version.
    pub fn version(&self) -> &str {
        &self.manifest.version
    }

    /// The plugin's licence.
    pub fn license(&self) -> &str {
        &self.manifest.license
    }

    /// The interface it was built for, as `major.minor`.
    pub fn interface(&self) -> String {
        version_text(self.interface)
    }

    /// Why it cannot share a host with the machinery `other`, if it says so.
    pub fn conflict_with(&self, other: &str) -> Option<&str> {
        let conflict = self.manifest.conflicts.iter().find(|conflict| conflict.with == other)?;
        Some(&conflict.why)
    }

    /// Lets the plugin look at its configuration and environment.
    ///
    /// # Errors
    /// Only if the plugin itself fails to look; what it finds is in the report.
    pub fn check(&self, setup: &Setup, services: Arc<dyn HostServices>) -> Result<Report> {
        let setup = to_json(setup)?;
        let report = answer_once((self.module.check())(setup.as_rstr(), abi_services(services)))?;
        from_json(report.as_bytes(), "plugin's report")
    }

    /// Loads the machinery with its configuration.
    ///
    /// # Errors
    /// What the plugin says is wrong.
    pub fn load(&self, setup: &Setup, services: Arc<dyn HostServices>) -> Result<Instance> {
        let setup = to_json(setup)?;
        let object = answer_once((self.module.load())(setup.as_rstr(), abi_services(services)))?;
        Ok(Instance { object })
    }
}

/// What the dynamic linker said; the error's own text does not have it.
fn linker_words(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

/// What the dynamic linker's words about a plugin file mean.
fn refusal(plugin: &Path, words: String) -> OpenError {
    match missing_library(&words) {
        // The file itself can be gone since it was looked at.
        Some(library) if Path::new(library) != plugin => {
            OpenError::LibraryMissing { library: library.to_owned() }
        }
        _ => OpenError::NotALibrary(words),
    }
}

/// The file that the dynamic linker did not find, if that is what it says. It has only words for it;
/// these are glibc's, and stay English because nothing here sets a locale.
fn missing_library(words: &str) -> Option<&str> {
    words.strip_suffix(": cannot open shared object file: No such file or directory")
}

fn module_of(library: &Library, interface: InterfaceVersion) -> Result<ModuleRef, OpenError> {
    // SAFETY: `export_machinery!` defines this symbol as a `LibHeader`, which starts with the
    // `AbiHeader` that the reference stands for; `upgrade` checks it before looking further.
    let header = unsafe { library.get::<AbiHeaderRef>(b"MACHINERY_PLUGIN\0") };
    let header: AbiHeaderRef = *header.map_err(|_| OpenError::NotAPlugin)?;
    let mismatch = |why: String| OpenError::Layout { plugin: version_text(interface), why };
    let header = header.upgrade().map_err(|error| mismatch(error.to_string()))?;
    let Some(theirs) = header.layout() else {
        return Err(mismatch("the plugin was built without a description of its layout".to_owned()));
    };
    // In this direction: a plugin of an older minor has fewer methods than this host knows.
    check_layout_compatibility(theirs, ModuleRef::LAYOUT).map_err(|error| mismatch(error.to_string()))?;
    // SAFETY: the layout was checked just above.
    let module = unsafe { header.init_root_module_with_unchecked_layout::<ModuleRef>() };
    module.map_err(|error| mismatch(error.to_string()))
}

fn version_text(version: InterfaceVersion) -> String {
    format!("{}.{}", version.major, version.minor)
}

/// A loaded machinery. The methods are those of [`Machinery`](crate::Machinery); whatever a plugin
/// does, they return an error and never panic.
pub struct Instance {
    object: MachineryObject,
}

impl Instance {
    /// See [`Machinery::version`](crate::Machinery::version).
    ///
    /// # Errors
    /// The plugin's.
    pub fn version(&self, deadline: Deadline) -> Result<String> {
        let version = answer(self.object.version(ms(deadline)))?;
        Ok(cut(text(version.as_rstr(), "plugin's version")?.to_owned(), LONGEST))
    }

    /// See [`Machinery::capabilities`](crate::Machinery::capabilities).
    ///
    /// # Errors
    /// The plugin panicked or answered nonsense.
    pub fn capabilities(&self) -> Result<Capabilities> {
        from_json(answer(self.object.capabilities())?.as_bytes(), "plugin's capabilities")
    }

    /// See [`Machinery::machines`](crate::Machinery::machines).
    ///
    /// # Errors
    /// The plugin panicked or answered nonsense, such as a name that is none.
    pub fn machines(&self) -> Result<Vec<MachineInfo>> {
        let machines: Vec<MachineInfo> =
            from_json(answer(self.object.machines())?.as_bytes(), "plugin's list of machines")?;
        match machines.iter().find(|machine| !is_machine_name(&machine.name)) {
            None => Ok(machines),
            Some(MachineInfo { name, .. }) => {
                let name = cut(name.clone(), 100);
                Err(Error::misbehaved(format!(
                    "the plugin lists a machine whose name cannot be one: {name:?}"
                )))
            }
        }
    }

    /// See [`Machinery::state`](crate::Machinery::state).
    ///
    /// # Errors
    /// The plugin's, or a state that does not exist.
    pub fn state(&self, machine: &str, deadline: Deadline) -> Result<State> {
        let state = answer(self.object.state(machine.into(), ms(deadline)))?;
        text(state.as_rstr(), "state")?.parse().map_err(|why: String| {
            Error::unexpected_state(format!("the machine has an unknown state: {why}")).machine(machine)
        })
    }

    /// See [`Machinery::restore_start`](crate::Machinery::restore_start).
    ///
    /// # Errors
    /// The plugin's.
    pub fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        answer(self.object.restore_start(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::norestore_start`](crate::Machinery::norestore_start).
    ///
    /// # Errors
    /// The plugin's.
    pub fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        answer(self.object.norestore_start(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::stop`](crate::Machinery::stop).
    ///
    /// # Errors
    /// The plugin's.
    pub fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        answer(self.object.stop(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::acpi_stop`](crate::Machinery::acpi_stop).
    ///
    /// # Errors
    /// The plugin's.
    pub fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        answer(self.object.acpi_stop(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::dump_memory`](crate::Machinery::dump_memory).
    ///
    /// # Errors
    /// The plugin's, or a path that is not UTF-8.
    pub fn dump_memory(
        &self,
        machine: &str,
        path: &Path,
        format: DumpFormat,
        deadline: Deadline,
    ) -> Result<()> {
        let path = path_text(path)?.into();
        answer(self.object.dump_memory(machine.into(), path, format.as_str().into(), ms(deadline)))
    }

    /// See [`Machinery::screenshot`](crate::Machinery::screenshot).
    ///
    /// # Errors
    /// The plugin's, or a path that is not UTF-8.
    pub fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        answer(self.object.screenshot(machine.into(), path_text(path)?.into(), ms(deadline)))
    }

    /// See [`Machinery::prepare`](crate::Machinery::prepare).
    ///
    /// # Errors
    /// The plugin's.
    pub fn prepare(&self, machine: &str, deadline: Deadline) -> Result<()> {
        answer(self.object.prepare(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::prepare_automatically`](crate::Machinery::prepare_automatically).
    ///
    /// # Errors
    /// The plugin's.
    pub fn prepare_automatically(&self, machine: &str, deadline: Deadline) -> Result<()> {
        answer(self.object.prepare_automatically(machine.into(), ms(deadline)))
    }

    /// See [`Machinery::reload`](crate::Machinery::reload).
    ///
    /// # Errors
    /// The plugin's; a plugin of interface 1.0 does not support it.
    pub fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let request = ReloadRequest { setup: setup.clone(), in_use: in_use.to_vec() };
        let request = to_json(&request)?;
        from_json(answer(self.object.reload(request.as_rstr(), ms(deadline)))?.as_bytes(), "plugin's reload")
    }

    /// See [`Machinery::diagnose`](crate::Machinery::diagnose). A plugin of interface 1.0 returns no
    /// diagnoses.
    ///
    /// # Errors
    /// The plugin's, or a diagnosis of a machine that is not in `machines`.
    pub fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let request = to_json(&machines)?;
        let diagnoses = match answer(self.object.diagnose(request.as_rstr(), ms(deadline))) {
            Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(Vec::new()),
            answer => from_json::<Vec<Diagnosis>>(answer?.as_bytes(), "plugin's diagnosis")?,
        };
        expect_asked_for(&diagnoses, machines)?;
        Ok(diagnoses.into_iter().map(Diagnosis::cut).collect())
    }

    /// See [`Machinery::shutdown`](crate::Machinery::shutdown).
    ///
    /// # Errors
    /// The plugin's.
    pub fn shutdown(&self, deadline: Deadline) -> Result<()> {
        answer(self.object.shutdown(ms(deadline)))
    }
}

/// Expects at most one diagnosis of each machine in `machines`, and none of any other.
fn expect_asked_for(diagnoses: &[Diagnosis], machines: &[String]) -> Result<()> {
    let mut asked: HashSet<&str> = machines.iter().map(String::as_str).collect();
    match diagnoses.iter().find(|diagnosis| !asked.remove(diagnosis.machine.as_str())) {
        None => Ok(()),
        Some(Diagnosis { machine, .. }) => {
            let name = cut(machine.clone(), 100);
            Err(Error::misbehaved(format!(
                "the plugin diagnoses a machine it was not asked about, or twice: {name:?}"
            )))
        }
    }
}

/// The text of a caught panic of the host's own code.
pub fn panic_message(panic: Box<dyn std::any::Any + Send>) -> String {
    panic_text(panic)
}

fn ms(deadline: Deadline) -> u64 {
    u64::try_from(deadline.remaining().as_millis()).unwrap_or(u64::MAX)
}

fn answer<T>(reply: Reply<T>) -> Result<T> {
    answer_within(LONGEST, reply)
}

/// The same of a call whose error is told once, and may have a whole list in it.
fn answer_once<T>(reply: Reply<T>) -> Result<T> {
    answer_within(LONGEST_TOLD_ONCE, reply)
}

/// Here a plugin's errors come in, so here they are cut to what can be kept of them.
fn answer_within<T>(longest: usize, reply: Reply<T>) -> Result<T> {
    match reply {
        RResult::ROk(value) => Ok(value),
        RResult::RErr(json) => {
            let error = from_json::<Error>(json.as_bytes(), "plugin's error");
            Err(error.map_or_else(|misbehaved| misbehaved, |error| error.cut(longest)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_makes_no_sense_is_told_as_such() {
        let error = answer::<()>(RResult::RErr("not json at all".into())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginMisbehaved);
        assert!(error.to_string().contains("not json at all"), "{error}");
    }

    #[test]
    fn diagnosis_is_refused_when_it_is_of_another_machine() {
        let asked = ["a".to_owned(), "b".to_owned()];
        let of = |names: &[&str]| {
            let diagnoses: Vec<_> = names.iter().copied().map(Diagnosis::new).collect();
            expect_asked_for(&diagnoses, &asked).map_err(|error| error.kind())
        };
        assert_eq!((of(&[]), of(&["b", "a"])), (Ok(()), Ok(())));
        for wrong in [&["c"][..], &["a", "a"], &["a", ""]] {
            assert_eq!(of(wrong), Err(ErrorKind::PluginMisbehaved), "{wrong:?}");
        }
    }

    #[test]
    fn a_text_file_is_no_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libmachinery_x.so");
        std::fs::write(&path, "hello").unwrap();
        let error = Plugin::open(&path).err().unwrap();
        assert!(matches!(error, OpenError::NotALibrary(_)), "{error}");
        assert!(matches!(Plugin::open(&folder.path().join("none")), Err(OpenError::NotALibrary(_))));
    }

    #[test]
    fn a_library_that_is_missing_is_told_apart_from_all_else_that_the_linker_says() {
        let plugin = Path::new("/p/libmachinery_x.so");
        let missing = |words: &str| match refusal(plugin, words.to_owned()) {
            OpenError::LibraryMissing { library } => Some(library),
            OpenError::NotALibrary(why) if why == words => None,
            other => panic!("{other}"),
        };
        for library in ["libvirt.so.0", "/opt/lib/liba b.so"] {
            let words = format!("{library}: cannot open shared object file: No such file or directory");
            assert_eq!(missing(&words).as_deref(), Some(library));
        }
        for words in [
            "/p/libmachinery_x.so: cannot open shared object file: No such file or directory",
            "libvirt.so.0: cannot open shared object file: Permission denied",
            "libvirt.so.0: file too short",
            "/lib/libvirt.so.0: version `LIBVIRT_9.0.0' not found (required by /p/libmachinery_x.so)",
            "/p/libmachinery_x.so: undefined symbol: virConnectOpen",
        ] {
            assert_eq!(missing(words), None, "{words}");
        }
    }
}
