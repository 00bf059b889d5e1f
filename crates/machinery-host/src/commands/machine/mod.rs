//! `machine`: makes machines of the machinery `qemu`, takes their snapshots anew, removes them, and carries them to
//! another host.
//!
//! The command loads the plugin in its own process, for the machine alone. The plugin boots and saves the guest in the
//! jail in which it runs later. A machine is added to the configuration once it was restored.
//!
//! | module | content |
//! | --- | --- |
//! | `options` | the arguments |
//! | `create`, `arguments` | a machine of an installed disk; QEMU's arguments |
//! | `snapshot`, `remove` | the snapshot anew; a machine and its files are removed |
//! | `export`, `import_archive`, `archive` | a machine in one file |
//! | `make`, `ready` | boot, save and restore; the moment at which a guest is saved |
//! | `session` | the plugin with one machine |
//! | `info` | the description of a machine in its folder |
//! | `publish` | the entry in the configuration, and the running host |
//! | `unfinished`, `interrupt` | the record of an unfinished machine; signals |

mod archive;
mod arguments;
mod create;
mod export;
mod import_archive;
mod info;
mod interrupt;
mod make;
mod options;
mod publish;
mod ready;
mod remove;
mod session;
mod snapshot;
mod unfinished;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use clap::Subcommand;
use machinery::host::Plugin;
use machinery::{Error, Report, Result};

use crate::commands::import::Check;
use crate::config::Config;
use crate::cwd::Cwd;
use crate::plugin::open::open;
use crate::plugin::search::PluginSearch;
use export::Export;
pub use export::Exported;
use import_archive::ImportArchive;
use options::Create;
pub use publish::Made;
use remove::Remove;
pub use remove::Removed;
use session::Session;
use snapshot::Snapshot;
use unfinished::{Unfinished, clear_abandoned};

/// The machinery of the machines.
pub const MACHINERY: &str = "qemu";
/// The interval at which the progress of an action is shown.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// The commands.
#[derive(Debug, Clone, Subcommand)]
pub enum Machine {
    /// Make a machine of an installed disk: boot it, save it once its agent answers, and add it to qemu.yaml
    Create(Box<Create>),
    /// Take the snapshot of a machine anew, from a cold boot of the disk that it was made of
    Snapshot(Snapshot),
    /// Remove a machine from qemu.yaml, and its files
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

/// Everything that the commands share.
pub struct Context<'a> {
    pub cwd: &'a Cwd,
    pub config: &'a Config,
    pub plugin: &'a Plugin,
    /// Asks the plugin to check a configuration.
    pub check: Check<'a>,
    /// Shows the present step.
    pub step: &'a (dyn Fn(&str) + Sync),
    /// The arguments of this process that select CWD and plugins.
    pub globals: Vec<OsString>,
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
    let opened = open(MACHINERY, search, config.plugin_hashes.as_ref(), config.timeouts.load)?;
    let (check, step) = (|_| Ok(Report::default()), |_: &str| ());
    let (plugin, globals) = (&opened.plugin, Vec::new());
    clear_abandoned(&Context { cwd, config, plugin, check: &check, step: &step, globals }, None).map(drop)
}

/// Runs the command.
///
/// # Errors
/// See each command. Nothing of an unfinished machine remains.
pub fn run(context: &Context<'_>, command: &Machine) -> Result<Outcome> {
    if let Machine::Clear { name, interrupted } = command {
        let cleared = clear_abandoned(context, name.as_deref())?;
        return match interrupted {
            true => Err(Error::interrupted("the command was interrupted; unfinished machines are removed")),
            false => Ok(Outcome::Cleared(cleared)),
        };
    }
    for name in clear_abandoned(context, None)? {
        tracing::warn!(machine = name, "removed what an interrupted command has left");
    }
    match command {
        Machine::Create(arguments) => {
            interrupt::clear_when_interrupted(&arguments.name, context.globals.clone())?;
            create::create(context, arguments).map(|made| Outcome::Made("created", made))
        }
        Machine::Snapshot(arguments) => {
            interrupt::clear_when_interrupted(&arguments.name, context.globals.clone())?;
            snapshot::snapshot(context, arguments).map(|made| Outcome::Made("taken anew", made))
        }
        Machine::Remove(arguments) => remove::remove(context, arguments).map(Outcome::Removed),
        Machine::Export(arguments) => {
            interrupt::clear_when_interrupted(&arguments.name, context.globals.clone())?;
            export::export(context, arguments).map(Outcome::Exported)
        }
        Machine::Import(arguments) => {
            import_archive::import(context, arguments).map(|made| Outcome::Made("imported", made))
        }
        Machine::Clear { .. } => Ok(Outcome::Cleared(Vec::new())),
    }
}

impl Context<'_> {
    /// Does the work, and shows the progress that the plugin reports meanwhile.
    fn during<T>(&self, what: &str, session: &Session, work: impl FnOnce() -> T) -> T {
        let step = self.step;
        step(what);
        let (done, ended) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                while ended.recv_timeout(PROGRESS_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    let progress = session.progress();
                    progress.iter().for_each(|progress| step(&format!("{what}: {progress}")));
                }
            });
            let result = work();
            drop(done);
            result
        })
    }
}

/// Ends the record of a machine that was made, whose folder is at `folder`, or clears one that was not.
fn finish_or_clear<T>(
    context: &Context<'_>,
    unfinished: Unfinished,
    folder: &Path,
    made: Result<T>,
) -> Result<T> {
    match made {
        Ok(made) => unfinished.finish(context.cwd, folder).map(|()| made),
        Err(error) => match unfinished.clear(context) {
            Ok(()) => Err(error),
            Err(remains) => Err(error.detail(&format!("and something remains of it: {remains}"))),
        },
    }
}
