//! The command line. Flags are documented where they are defined; what a person sees is made in
//! `output`.
//!
//! Exit codes: 0 done, 1 the action failed, 2 usage or configuration.

mod output;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, Parser, Subcommand};
use machinery::config::ConfigFile;
use machinery::{Error, ErrorKind, Report, Result};
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::conformance::{self, Conformance};
use crate::commands::{check, import, new_plugin};
use crate::cwd::Cwd;
use crate::exit::{self, ExitCode};
use crate::load;
use crate::logging;
use crate::plugin::open::open;
use crate::plugin::search::{self, PluginSearch};
use crate::serve::{self, Served};

/// Restores, starts and stops the analysis machines of a Cuckoo sandbox.
#[derive(Parser)]
#[command(name = "cuckoo-machinery", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Global {
    /// Cuckoo's working directory [default: $CUCKOO_CWD, then ~/.cuckoocwd]
    #[arg(long, global = true, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// A folder to look for plugins in, before all others; can be given several times
    #[arg(long = "plugin-dir", global = true, value_name = "DIR")]
    plugin_dirs: Vec<PathBuf>,
    /// Load plugins also from where others could have changed them, with a warning
    #[arg(long, global = true)]
    allow_insecure_plugins: bool,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Say more; twice: everything
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Say less; twice: only errors
    #[arg(short, long, global = true, action = ArgAction::Count)]
    quiet: u8,
}

impl Global {
    fn search(&self, cwd: &Cwd) -> PluginSearch {
        PluginSearch {
            folders: search::folders(&self.plugin_dirs, cwd),
            allow_insecure: self.allow_insecure_plugins,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Load the machineries and serve Cuckoo's socket until told to end
    Serve {
        /// What log lines look like
        #[arg(long, value_enum, default_value = "human")]
        log_format: logging::Format,
    },
    /// Look at configuration and environment, and say all that is wrong
    Check,
    /// Show all machines
    List,
    /// Show a machine's state
    State { machine: String },
    /// Bring a machine to its snapshot and let it run
    RestoreStart { machine: String },
    /// Start a machine without its snapshot
    NorestoreStart { machine: String },
    /// Pull a machine's plug
    Stop { machine: String },
    /// Press a machine's power button
    AcpiStop { machine: String },
    /// Write a running machine's memory to a file
    DumpMemory {
        machine: String,
        path: PathBuf,
        /// The file's format
        #[arg(long, default_value = "elf", value_parser = ["elf", "kdump-zlib", "win-dmp"])]
        format: String,
    },
    /// Write what a running machine's screen shows to a PNG file
    Screenshot { machine: String, path: PathBuf },
    /// Do ahead of time what the next restore of machines will need
    Prepare {
        /// Which machines; all if none is given
        machines: Vec<String>,
    },
    /// Show how often each action was done, and how long it and its steps took
    Metrics,
    /// Have the host read its configuration anew
    Reload,
    /// Put a disabled machine back into the pool
    EnableMachine { machine: String },
    /// Take a machine out of the pool
    DisableMachine {
        machine: String,
        /// Why, for those who look at the list
        reason: Option<String>,
    },
    /// Take a machine back from the task that has it, if that task will not give it back
    Unlock { machine: String },
    /// Show the plugins that are listed, and those that are there
    Plugins,
    /// Take machines over from another tool
    #[command(subcommand)]
    Import(Import),
    /// Put a built plugin to the requirements of the interface, each in a process of its own
    Conformance(Conformance),
    /// Write the crate of a new plugin, to begin with
    NewPlugin {
        /// The word for it in the machineries list: lowercase letters, digits, '-' and '_'
        name: String,
        /// The folder to make the crate's own folder in
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// A checkout of cuckoo-machinery, or the URL of its git repository, to build against
        /// [default: the repository this program is from]
        #[arg(long, value_name = "PATH-OR-GIT-URL")]
        interface: Option<String>,
    },
}

#[derive(Subcommand)]
enum Import {
    /// From folders that VMCloak made, into conf/machineries/qemu.yaml
    Vmcloak {
        /// A machine's folder, or a folder of such folders
        #[arg(required = true)]
        folders: Vec<PathBuf>,
    },
}

/// Runs the command line, says how it went, and ends the process.
pub fn main() -> ! {
    let cli = Cli::parse();
    let verbosity = i16::from(cli.global.verbose) - i16::from(cli.global.quiet);
    let (format, verbosity) = match &cli.command {
        Command::Serve { log_format } => (*log_format, verbosity),
        // A command speaks through its output; only what is odd is logged.
        _ => (logging::Format::Human, verbosity - 1),
    };
    logging::start(format, verbosity);
    exit::start_guard();
    // Output that nobody takes is a panic of the standard library, and must not look like a plugin's exit.
    let code = catch_unwind(AssertUnwindSafe(|| match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error, cli.global.json);
            match error.kind() {
                ErrorKind::Configuration => ExitCode::from(2),
                // Whatever keeps a host from starting is for its operator to put right.
                _ if matches!(cli.command, Command::Serve { .. }) => ExitCode::from(2),
                _ => ExitCode::from(1),
            }
        }
    }));
    exit::end(code.unwrap_or(ExitCode::from(1)))
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let global = &cli.global;
    match &cli.command {
        Command::NewPlugin { name, dir, interface } => {
            let new = new_plugin::new_plugin(name, dir, interface.as_deref())?;
            output::new_plugin(&new, global.json);
            Ok(ExitCode::SUCCESS)
        }
        Command::Conformance(asked) if asked.list => {
            output::requirements(global.json);
            Ok(ExitCode::SUCCESS)
        }
        Command::Conformance(asked) => {
            let tell = |check: &_| output::requirement(check, global.json);
            let report = conformance::run(asked, global.allow_insecure_plugins, tell)?;
            output::conformance(&report, global.json);
            Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        command => run_in(&Cwd::find(global.cwd.as_deref())?, command, global),
    }
}

/// All other commands are about a CWD.
fn run_in(cwd: &Cwd, command: &Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Serve { .. } => Ok(match serve::run(cwd, &global.search(cwd))? {
            Served::Cleanly => ExitCode::SUCCESS,
            Served::With(error) => {
                output::error(&error, global.json);
                ExitCode::from(1)
            }
        }),
        Command::Check => {
            let report = check::check(cwd, &global.search(cwd));
            output::report(&report, global.json);
            Ok(if report.has_problems() { ExitCode::from(2) } else { ExitCode::SUCCESS })
        }
        Command::Plugins => plugins(cwd, global),
        Command::Import(Import::Vmcloak { folders }) => {
            let check = |file| check_qemu(cwd, file, &global.search(cwd));
            let imported = import::vmcloak(&cwd.machinery_yaml("qemu"), folders, &check)?;
            output::imported(&imported, global.json);
            Ok(ExitCode::SUCCESS)
        }
        Command::List => {
            let answer = ask(cwd, json!({"action": "list"}))?;
            output::machines(&answer, global.json);
            Ok(code(&answer))
        }
        Command::State { machine } => {
            let answer = ask(cwd, json!({"action": "state", "machine": machine}))?;
            output::state(&answer, global.json);
            Ok(code(&answer))
        }
        Command::Prepare { machines } => prepare(cwd, machines, global.json),
        Command::Metrics => {
            let answer = ask(cwd, json!({"action": "metrics"}))?;
            output::metrics(&answer, global.json);
            Ok(code(&answer))
        }
        Command::Reload => {
            let answer = ask(cwd, json!({"action": "reload"}))?;
            output::reloaded(&answer, global.json);
            Ok(code(&answer))
        }
        other => act(cwd, &request(other)?, global.json),
    }
}

/// Asks the plugin `qemu` to check this content before it is written to `qemu.yaml`.
fn check_qemu(cwd: &Cwd, qemu_yaml: ConfigFile, search: &PluginSearch) -> Result<Report> {
    let config = crate::config::Config::read(cwd)?;
    let opened =
        open("qemu", search, config.plugin_hashes.as_ref(), config.timeouts.load).map_err(Error::from)?;
    check::check_with_plugin(&opened.plugin, load::setup_with(qemu_yaml, "qemu", cwd, &config), &config)
}

/// The request of a command that acts on a machine.
fn request(command: &Command) -> Result<Value> {
    let simple = |action: &str, machine: &str| json!({"action": action, "machine": machine});
    Ok(match command {
        Command::RestoreStart { machine } => simple("restore_start", machine),
        Command::NorestoreStart { machine } => simple("norestore_start", machine),
        Command::Stop { machine } => simple("stop", machine),
        Command::AcpiStop { machine } => simple("acpi_stop", machine),
        Command::EnableMachine { machine } => simple("enable_machine", machine),
        Command::DisableMachine { machine, reason } => {
            json!({"action": "disable_machine", "machine": machine, "reason": reason})
        }
        Command::Unlock { machine } => simple("unlock", machine),
        Command::DumpMemory { machine, path, format } => {
            json!({"action": "dump_memory", "machine": machine, "path": absolute(path)?, "format": format})
        }
        Command::Screenshot { machine, path } => {
            json!({"action": "screenshot", "machine": machine, "path": absolute(path)?})
        }
        _ => return Err(Error::failed("this command does not act on a machine: a bug of the command line")),
    })
}

/// The host has another folder, and takes only text.
fn absolute(path: &Path) -> Result<String> {
    let absolute =
        std::path::absolute(path).map_err(|error| Error::io("find the folder of", path, &error))?;
    absolute.into_os_string().into_string().map_err(|path| {
        Error::configuration(format!("the path {} is not valid UTF-8", path.display()))
            .advice("Name another file")
    })
}

fn ask(cwd: &Cwd, request: Value) -> Result<Value> {
    Client::connect(&cwd.manager_socket())?.ask(request, |_| ())
}

fn act(cwd: &Cwd, request: &Value, json: bool) -> Result<ExitCode> {
    let mut client = Client::connect(&cwd.manager_socket())?;
    let mut progress = output::Progress::new(request, json);
    let mut answer = client.ask(json!({"action": "subscribe"}), |_| ())?;
    if answer["success"] == json!(true) {
        answer = client.ask(request.clone(), |event| progress.heard(event))?;
    }
    progress.done(&answer);
    Ok(code(&answer))
}

/// One after the other, so that each has its progress; a failure does not keep the others from it.
fn prepare(cwd: &Cwd, machines: &[String], json: bool) -> Result<ExitCode> {
    let mut machines = machines.to_vec();
    if machines.is_empty() {
        let answer = ask(cwd, json!({"action": "list"}))?;
        let all = answer["machines"].as_array().into_iter().flatten();
        machines = all.filter_map(|machine| machine["name"].as_str().map(str::to_owned)).collect();
    }
    let mut worst = ExitCode::SUCCESS;
    for machine in machines {
        let code = act(cwd, &json!({"action": "prepare", "machine": machine}), json)?;
        if code != ExitCode::SUCCESS {
            worst = code;
        }
    }
    Ok(worst)
}

fn code(answer: &Value) -> ExitCode {
    if answer["success"] == json!(true) { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

/// Listed plugins are opened and told about; others are only named, because opening runs their code.
fn plugins(cwd: &Cwd, global: &Global) -> Result<ExitCode> {
    let config = crate::config::Config::read(cwd)?;
    let search = global.search(cwd);
    let opened = |name: &String| {
        let opened = open(name, &search, config.plugin_hashes.as_ref(), config.timeouts.load);
        (name.clone(), opened.map_err(Error::from))
    };
    let listed: Vec<_> = config.machineries.iter().map(opened).collect();
    let others: Vec<_> = search::available(&search.folders)
        .into_iter()
        .filter(|(name, _)| !search::is_listed(name, &config.machineries))
        .collect();
    output::plugins(&listed, &others, global.json);
    let all_open = listed.iter().all(|(_, plugin)| plugin.is_ok());
    Ok(if all_open { ExitCode::SUCCESS } else { ExitCode::from(2) })
}
