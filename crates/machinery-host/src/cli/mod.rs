//! The command line: runs the command or sends the request behind each subcommand.
//!
//! `args` defines the arguments, `output` prints the results, `machines` prints the list of machines, `manual` writes the manual pages, and `progress` shows an action under way.
//!
//! Exit codes: 0 success, 1 the action failed, 2 wrong usage or configuration.

mod args;
mod file;
mod machines;
mod manual;
mod output;
mod progress;
mod status;
mod top;

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use clap::Parser;
use machinery::config::ConfigFile;
use machinery::{Error, ErrorKind, Report, Result};
use serde_json::{Value, json};

use crate::client::Client;
use crate::commands::conformance;
use crate::commands::new_plugin::{self, Template};
use crate::commands::{check, clean, end_runs, export, import, shutdown, upgrade};
use crate::cwd::Cwd;
use crate::exit::{self, ExitCode};
use crate::load;
use crate::logging;
use crate::plugin::open::open;
use crate::plugin::search::{self, PluginSearch};
use crate::serve::{self, Served};
use args::{Cli, Command, Export, Global, Import};
use file::NewFile;
use progress::Progress;

/// Runs the command, prints its result, and ends the process.
pub fn main() -> ! {
    let cli = Cli::parse();
    let verbosity = i16::from(cli.global.verbose) - i16::from(cli.global.quiet);
    let (format, verbosity) = match &cli.command {
        Command::Serve { log_format, .. } => (*log_format, verbosity),
        // A command prints its result, so it logs only warnings and errors.
        _ => (logging::Format::Human, verbosity - 1),
    };
    logging::start(format, verbosity);
    exit::start_guard();
    // Printing to a closed pipe panics. The panic must not look like a plugin's exit.
    let code = catch_unwind(AssertUnwindSafe(|| match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error, cli.global.json);
            match error.kind() {
                ErrorKind::Configuration => ExitCode::from(2),
                // The operator has to correct every error that keeps the host from starting.
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
        Command::NewPlugin { name, dir, process, interface } => {
            let template = if *process { Template::PROCESS } else { Template::MEMORY };
            let new = new_plugin::new_plugin(&template, name, dir, interface.as_deref())?;
            output::new_plugin(&new, global.json);
            Ok(ExitCode::SUCCESS)
        }
        Command::Manual { folder } => {
            manual::write(folder)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Conformance(options) if options.list => {
            output::requirements(global.json);
            Ok(ExitCode::SUCCESS)
        }
        Command::Conformance(options) => {
            if let Some(request) = &options.host_process {
                return Ok(ExitCode::from(u8::from(!machinery_conformance::run_host_process(request))));
            }
            let on_check = |check: &_| output::requirement(check, global.json);
            let report = conformance::run(options, global.allow_insecure_plugins, on_check)?;
            output::conformance(&report, global.json);
            Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        command => run_in(&Cwd::find(global.cwd.as_deref())?, command, global),
    }
}

/// Runs a command that needs a CWD.
fn run_in(cwd: &Cwd, command: &Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Serve { handover, .. } => Ok(match serve::run(cwd, &global.search(cwd), *handover)? {
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
        Command::Export(Export::Cape) => export_cape(cwd, global.json),
        Command::List => {
            let answer = send_request(cwd, json!({"action": "list"}))?;
            machines::machines(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Top => run_top(cwd, global.json),
        Command::State { machine } => {
            let answer = send_request(cwd, json!({"action": "state", "machine": machine}))?;
            output::state(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Prepare { machines } => prepare(cwd, machines, global.json),
        Command::Metrics => {
            let answer = send_request(cwd, json!({"action": "metrics"}))?;
            output::metrics(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Reload => {
            let answer = send_request(cwd, json!({"action": "reload"}))?;
            output::reloaded(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Upgrade => run_upgrade(cwd, global),
        Command::Status | Command::Shutdown | Command::Clean | Command::EndRuns => {
            run_for_host(cwd, command, global)
        }
        Command::DumpMemory { path, .. } | Command::Screenshot { path, .. } => {
            let new = NewFile::at(path)?;
            let code = run_action(cwd, &request(command)?, Some(new.file()), global.json)?;
            if code == ExitCode::SUCCESS {
                new.finish()?;
            }
            Ok(code)
        }
        other => run_action(cwd, &request(other)?, None, global.json),
    }
}

/// Runs a command for a running host, or for what an earlier one has left.
fn run_for_host(cwd: &Cwd, command: &Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Status => {
            let [version, list] =
                ["version", "list"].map(|action| send_request(cwd, json!({"action": action})));
            let (version, list) = (version?, list?);
            status::status(&version, &list, global.json);
            Ok(exit_code(&list))
        }
        Command::Shutdown => {
            let answer = shutdown::shutdown(cwd)?;
            output::shut_down(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Clean => {
            output::cleaned(&clean::clean(cwd, &global.search(cwd))?, global.json);
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            output::ended_runs(end_runs::end_runs(cwd, &global.search(cwd))?, global.json);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Asks the plugin `qemu` to check this content before it is written to `qemu.yaml`.
fn check_qemu(cwd: &Cwd, qemu_yaml: ConfigFile, search: &PluginSearch) -> Result<Report> {
    let config = crate::config::Config::read(cwd)?;
    let opened =
        open("qemu", search, config.plugin_hashes.as_ref(), config.timeouts.load).map_err(Error::from)?;
    check::check_with_plugin(&opened.plugin, load::setup_with(qemu_yaml, "qemu", cwd, &config), &config)
}

/// Returns the request of a command that acts on one machine.
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
        Command::DumpMemory { machine, format, .. } => {
            json!({"action": "dump_memory", "machine": machine, "fd": true, "format": format})
        }
        Command::Screenshot { machine, .. } => {
            json!({"action": "screenshot", "machine": machine, "fd": true})
        }
        _ => return Err(Error::failed("this command does not act on a machine: a bug of the command line")),
    })
}

fn send_request(cwd: &Cwd, request: Value) -> Result<Value> {
    Client::connect(&cwd.manager_socket())?.request(request, |_| ())
}

/// Runs an action, which may write the file, and shows its progress.
fn run_action(cwd: &Cwd, request: &Value, file: Option<&File>, json: bool) -> Result<ExitCode> {
    let mut client = Client::connect(&cwd.manager_socket())?;
    let mut progress = Progress::new(request, json);
    let mut answer = client.request(json!({"action": "subscribe"}), |_| ())?;
    if answer["success"] == json!(true) {
        answer = client.request_with(request.clone(), file, |event| progress.on_event(event))?;
    }
    progress.done(&answer);
    Ok(exit_code(&answer))
}

/// Shows the machines in the terminal, or prints them once as JSON.
fn run_top(cwd: &Cwd, json: bool) -> Result<ExitCode> {
    if !json {
        return top::run(cwd).map(|()| ExitCode::SUCCESS);
    }
    let [mut list, metrics] = ["list", "metrics"].map(|action| send_request(cwd, json!({"action": action})));
    if let (Ok(list), Ok(metrics)) = (&mut list, metrics) {
        list["metrics"] = metrics["metrics"].clone();
    }
    let answer = list?;
    output::reply(&answer, true);
    Ok(exit_code(&answer))
}

/// Prints CAPE's configuration for the machines of the running host.
fn export_cape(cwd: &Cwd, json: bool) -> Result<ExitCode> {
    let answer = send_request(cwd, json!({"action": "list"}))?;
    if answer["success"] != json!(true) {
        output::reply(&answer, json);
        return Ok(exit_code(&answer));
    }
    let conf = export::cape(cwd, answer["machines"].as_array().map_or(&[], Vec::as_slice))?;
    output::exported(&conf, json);
    Ok(ExitCode::SUCCESS)
}

/// Has the running host replace itself.
fn run_upgrade(cwd: &Cwd, global: &Global) -> Result<ExitCode> {
    let answer = upgrade::upgrade(&cwd.manager_socket())?;
    output::upgraded(&answer, global.json);
    Ok(exit_code(&answer))
}

/// Prepares the machines one by one, so that each shows its progress. A failure does not stop the others.
fn prepare(cwd: &Cwd, machines: &[String], json: bool) -> Result<ExitCode> {
    let mut machines = machines.to_vec();
    if machines.is_empty() {
        let answer = send_request(cwd, json!({"action": "list"}))?;
        let all = answer["machines"].as_array().into_iter().flatten();
        machines = all.filter_map(|machine| machine["name"].as_str().map(str::to_owned)).collect();
    }
    let mut worst = ExitCode::SUCCESS;
    for machine in machines {
        let code = run_action(cwd, &json!({"action": "prepare", "machine": machine}), None, json)?;
        if code != ExitCode::SUCCESS {
            worst = code;
        }
    }
    Ok(worst)
}

fn exit_code(answer: &Value) -> ExitCode {
    if answer["success"] == json!(true) { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

/// Lists the plugins. Only configured plugins are opened, because opening a plugin runs its code.
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
