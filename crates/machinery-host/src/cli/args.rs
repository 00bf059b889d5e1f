//! The arguments of the command line. The docs of each item are its help text.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::commands::conformance::Conformance;
use crate::commands::import::Import;
use crate::commands::machine::Machine;
use crate::cwd::Cwd;
use crate::logging;
use crate::plugin::search::{self, PluginSearch};

/// Restore, start and stop the analysis machines of a Cuckoo sandbox
#[derive(Parser)]
#[command(name = "cuckoo-machinery", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// The options of every command.
#[derive(Args)]
pub struct Global {
    /// Cuckoo's working directory [default: $CUCKOO_CWD, then ~/.cuckoocwd]
    #[arg(long, global = true, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Search this folder for plugins before all others; can be repeated
    #[arg(long = "plugin-dir", global = true, value_name = "DIR")]
    pub plugin_dirs: Vec<PathBuf>,
    /// Load plugins that other users could modify, with a warning
    #[arg(long, global = true)]
    pub allow_insecure_plugins: bool,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Log more; twice: everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Log less; twice: only errors
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub quiet: u8,
}

impl Global {
    /// Returns the arguments with which another execution of this program has the same CWD and plugins.
    pub fn arguments(&self, cwd: &Cwd) -> Vec<OsString> {
        let mut arguments = vec![OsString::from("--cwd"), cwd.root().into()];
        for folder in &self.plugin_dirs {
            arguments.extend(["--plugin-dir".into(), folder.into()]);
        }
        let flags = [(self.allow_insecure_plugins, "--allow-insecure-plugins"), (self.json, "--json")];
        arguments.extend(flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag.into()));
        arguments
    }

    /// Returns the search for plugins in this CWD.
    pub fn search(&self, cwd: &Cwd) -> PluginSearch {
        PluginSearch {
            folders: search::folders(&self.plugin_dirs, cwd),
            allow_insecure: self.allow_insecure_plugins,
        }
    }
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Load the machineries and serve Cuckoo's socket until SIGTERM or SIGINT
    Serve {
        /// Format of log lines
        #[arg(long, value_enum, default_value = "human")]
        log_format: logging::Format,
        /// At SIGTERM, leave running machines to the next start of the host instead of stopping them
        #[arg(long)]
        handover: bool,
    },
    /// Have the running host execute its program again, which may be a newer one: no running machine ends
    Upgrade,
    /// Show the running host: its process, who has started it, its machines, and the disk space of its templates
    Status,
    /// Show the address of the wall, the web page of the machines, with the token to log in
    Wall,
    /// End the running host, with all machines that it has started
    Shutdown,
    /// Remove the templates and the state of a host that is not to come back
    Clean,
    /// End the runs that a host has left, unless a host serves: it has adopted them
    EndRuns,
    /// Check configuration and environment, and report all problems
    Check,
    /// List all machines; the clones of one machine are one row
    List {
        /// The machines to list; the name of a machine with clones lists these too [default: all]
        machines: Vec<String>,
        /// Show each clone in a row of its own
        #[arg(long)]
        all: bool,
    },
    /// Show the machines in the terminal, as they change, and act on them
    Top,
    /// Show a machine's state
    State { machine: String },
    /// Restore a machine to its snapshot and resume it
    RestoreStart { machine: String },
    /// Start a machine without restoring its snapshot
    NorestoreStart { machine: String },
    /// Power a machine off at once
    Stop { machine: String },
    /// Shut a machine down by its power button (ACPI)
    AcpiStop { machine: String },
    /// Write the memory of a running machine to a file
    DumpMemory {
        machine: String,
        path: PathBuf,
        /// Format of the file
        #[arg(long, default_value = "elf", value_parser = ["elf", "kdump-zlib", "win-dmp"])]
        format: String,
    },
    /// Write the screen of a running machine to a PNG file
    Screenshot { machine: String, path: PathBuf },
    /// Show where viewers connect to the screen, keyboard and mouse of a running machine
    Console { machine: String },
    /// Prepare the next restore of machines ahead of time
    Prepare {
        /// The machines to prepare [default: all]
        machines: Vec<String>,
    },
    /// Show the number and the duration of each action and its steps
    Metrics,
    /// Reload the configuration of the running host
    Reload,
    /// Return a disabled machine to the pool
    EnableMachine { machine: String },
    /// Take a machine out of the pool
    DisableMachine {
        machine: String,
        /// Reason to show in the list of machines
        reason: Option<String>,
    },
    /// Force-release a machine's lock
    Unlock { machine: String },
    /// List configured and available plugins
    Plugins,
    /// Import machines from another tool
    Import(Box<Import>),
    /// Make machines, remove them, and carry them to another host
    #[command(subcommand)]
    Machine(Machine),
    /// Print the configuration of another sandbox for the machines of the running host
    #[command(subcommand)]
    Export(Export),
    /// Check a built plugin against each requirement of the interface
    Conformance(Box<Conformance>),
    /// Write the manual pages and the completions for shells below a folder, such as /usr/local/share
    Manual { folder: PathBuf },
    /// Create the crate of a new plugin
    NewPlugin {
        /// Name in the machineries list: lowercase letters, digits, '-' and '_'
        name: String,
        /// Folder in which the crate's folder is created
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// Write machines that are processes of a hypervisor, instead of machines in memory
        #[arg(long)]
        process: bool,
        /// Checkout or git repository of cuckoo-machinery to build against; of a repository, the revision of
        /// this program is used [default: the installed interface, or else the repository of this program]
        #[arg(long, value_name = "PATH-OR-GIT-URL")]
        interface: Option<String>,
    },
}

/// The sandboxes whose configuration can be printed.
#[derive(Subcommand)]
pub enum Export {
    /// Print CAPE's hosted.conf
    Cape,
}
