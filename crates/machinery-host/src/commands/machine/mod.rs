//! `machine`: makes machines of the machineries `qemu` and `kvm`, takes their snapshots anew, removes them, and carries
//! those of `qemu` to another host.
//!
//! The command loads the plugin in its own process, for the machine alone. The plugin boots and saves the guest in the
//! jail in which it runs later. A machine of `kvm` is a domain, which `virsh` makes and saves. A machine is added to the
//! configuration once it was restored.
//!
//! | module | content |
//! | --- | --- |
//! | `options` | the arguments |
//! | `create`, `arguments` | a machine of an installed disk; QEMU's arguments |
//! | `isolation` | the addresses of an isolated machine, and its section of `machinery-host.yaml` |
//! | `kvm`, `domain`, `description` | the same for a machine of `kvm`; its domain, and libvirt's description of it |
//! | `snapshot`, `remove` | the snapshot anew; a machine and its files are removed |
//! | `copy_domain`, `copied_files` | machines of `qemu` that are copies of domains; their files |
//! | `replaced` | the entry of such a domain in `kvm.yaml`, which its copy replaces |
//! | `export`, `import_archive`, `archive`, `flatten` | a machine in one file |
//! | `make`, `ready` | boot, save and restore; the moment at which a guest is saved |
//! | `session` | the plugin with one machine |
//! | `context` | everything that the commands share |
//! | `info` | the description of a machine in its folder |
//! | `publish`, `host` | the entry in the configuration; the running host |
//! | `section` | the section in `machinery-host.yaml`; the lock of the configuration |
//! | `base`, `changed` | the installed disk, which has to stay as it was; those that have not |
//! | `dependents` | the machines that need the files of another one |
//! | `unfinished`, `record`, `locks`, `interrupt` | the record of an unfinished machine; signals |
//! | `leftovers` | the end of runs and domains that a command has left |
//! | `folder` | the mark in a machine's folder, and the users who can replace it |

mod archive;
mod arguments;
mod base;
mod changed;
mod context;
mod copied_files;
mod copy_domain;
mod create;
mod dependents;
mod description;
mod domain;
mod export;
mod flatten;
mod folder;
mod host;
mod import_archive;
mod info;
mod interrupt;
mod isolation;
mod kvm;
mod leftovers;
mod locks;
mod make;
mod options;
mod publish;
mod ready;
mod record;
mod remove;
mod replaced;
mod section;
mod session;
mod snapshot;
mod unfinished;

use std::fs;

use clap::Subcommand;
use machinery::{Error, Result};

use crate::config::Config;
use crate::cwd::Cwd;
use crate::plugin::search::PluginSearch;
pub use changed::check_installed_disks;
pub use context::{Context, KVM, MACHINERY};
pub use copy_domain::copy_domains;
use export::Export;
pub use export::Exported;
pub use host::HELD;
use import_archive::ImportArchive;
use info::machinery_of;
pub use locks::expect_no_command;
use options::Create;
pub use publish::Made;
use remove::Remove;
pub use remove::Removed;
pub use section::lock_configuration;
use snapshot::Snapshot;
use unfinished::clear_abandoned;
pub use unfinished::held_entries;

/// The commands.
#[derive(Debug, Clone, Subcommand)]
pub enum Machine {
    /// Make a machine of an installed disk: boot it, save it once its agent answers, and add it to the configuration
    Create(Box<Create>),
    /// Take the snapshot of a machine anew, from a cold boot of the disk that it was made of
    Snapshot(Snapshot),
    /// Remove a machine from the configuration, and its files
    Remove(Remove),
    /// Write a machine into a single file, for another host
    Export(Export),
    /// Add the machine of an exported file
    Import(ImportArchive),
    /// Remove what an interrupted command has left of unfinished machines
    Clear {
        /// The machine [default: all]
        name: Option<String>,
        /// Fail, because a command was interrupted
        #[arg(long, hide = true)]
        interrupted: bool,
    },
}

/// The result of a command.
#[derive(Debug)]
pub enum Outcome {
    /// A machine was made or changed. The text says which.
    Made(&'static str, Made),
    /// A machine was removed.
    Removed(Removed),
    /// A machine was exported.
    Exported(Exported),
    /// The unfinished machines that were cleared.
    Cleared(Vec<String>),
}

impl Machine {
    /// Asks the operator, if the command removes something.
    ///
    /// # Errors
    /// The operator refuses, or cannot be asked.
    pub fn confirm(&self, cwd: &Cwd) -> Result<()> {
        if let Machine::Remove(remove) = self { remove.confirm(cwd) } else { Ok(()) }
    }

    /// Returns the machinery of the machine.
    ///
    /// # Errors
    /// The configuration cannot be read.
    pub fn machinery(&self, cwd: &Cwd) -> Result<&'static str> {
        match self {
            Machine::Create(create) => Ok(create.machinery.as_str()),
            Machine::Snapshot(Snapshot { name, .. })
            | Machine::Remove(Remove { name, .. })
            | Machine::Export(Export { name, .. }) => machinery_of(cwd, name),
            Machine::Import(_) | Machine::Clear { .. } => Ok(MACHINERY),
        }
    }
}

/// Clears what interrupted commands have left, before the state of a host is removed.
///
/// # Errors
/// The plugin cannot be opened, or a process or a file remains.
pub fn clear_all(cwd: &Cwd, config: &Config, search: &PluginSearch) -> Result<()> {
    let has_any =
        || fs::read_dir(cwd.unfinished_machines()).is_ok_and(|mut entries| entries.next().is_some());
    if !has_any() {
        return Ok(());
    }
    let (machinery, step, globals) = (MACHINERY, |_: &str| (), Vec::new());
    let context = Context { cwd, config, machinery, search, step: &step, globals };
    clear_abandoned(&context, None).map(drop)
}

/// Runs the command.
///
/// # Errors
/// See each command. Nothing of an unfinished machine remains.
pub fn run(context: &Context<'_>, command: &Machine) -> Result<Outcome> {
    if let Machine::Clear { name, interrupted } = command {
        let cleared = clear_abandoned(context, name.as_deref())?;
        return match interrupted {
            true => Err(interrupted_after(cleared.iter().any(|cleared| cleared.is_configured))),
            false => Ok(Outcome::Cleared(cleared.into_iter().map(|cleared| cleared.name).collect())),
        };
    }
    match clear_abandoned(context, None) {
        Ok(cleared) => cleared.iter().for_each(|cleared| {
            tracing::warn!(machine = cleared.name, "removed what an interrupted command has left");
        }),
        // A command for the same machine is refused later.
        Err(error) => tracing::warn!(%error, "something of an interrupted command remains"),
    }
    match command {
        Machine::Create(arguments) => {
            interrupt::clear_when_interrupted(Some(&arguments.name), context.globals.clone())?;
            create::create(context, arguments).map(|made| Outcome::Made("created", made))
        }
        Machine::Snapshot(arguments) => {
            interrupt::clear_when_interrupted(Some(&arguments.name), context.globals.clone())?;
            snapshot::snapshot(context, arguments).map(|made| Outcome::Made("taken anew", made))
        }
        Machine::Remove(arguments) => {
            interrupt::clear_when_interrupted(Some(&arguments.name), context.globals.clone())?;
            remove::remove(context, arguments).map(Outcome::Removed)
        }
        Machine::Export(arguments) => {
            interrupt::clear_when_interrupted(Some(&arguments.name), context.globals.clone())?;
            export::export(context, arguments).map(Outcome::Exported)
        }
        Machine::Import(arguments) => {
            import_archive::import(context, arguments).map(|made| Outcome::Made("imported", made))
        }
        Machine::Clear { .. } => Ok(Outcome::Cleared(Vec::new())),
    }
}

/// Returns the error of a command that was interrupted. A machine that is in the configuration already stays.
fn interrupted_after(is_configured: bool) -> Error {
    Error::interrupted(match is_configured {
        true => {
            "the command was interrupted in its last step; the machine is in the configuration, and stays"
        }
        false => "the command was interrupted; unfinished machines are removed",
    })
}
