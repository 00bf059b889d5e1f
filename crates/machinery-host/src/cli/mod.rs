//! The command line: runs the command or sends the request behind each subcommand.
//!
//! `args` defines the arguments, `output` prints the results, `machines` the list of machines, whose `clones` are folded,
//! `machine` those that were made, `report` the findings of a check, `configured` checks a configuration that a command
//! changes, `console` and `wall` the way to a screen. `manual` writes the manual pages, `requests` sends requests to the host,
//! `progress` shows work under way, and `top` shows the machines.
//!
//! Exit codes: 0 success, 1 the action failed, 2 wrong usage or configuration.

mod args;
mod clones;
mod configured;
mod console;
mod file;
mod machine;
mod machines;
mod manual;
mod output;
mod progress;
mod report;
mod requests;
mod status;
mod top;
mod wall;

use std::panic::{AssertUnwindSafe, catch_unwind};

use clap::Parser;
use machinery::{Error, ErrorKind, Result};
use serde_json::json;

use crate::commands::conformance;
use crate::commands::import::Import;
use crate::commands::new_plugin::{self, Template};
use crate::commands::{check, clean, end_runs, export, import, shutdown, upgrade};
use crate::cwd::Cwd;
use crate::exit::{self, ExitCode};
use crate::logging;
use crate::plugin::open::open;
use crate::plugin::search;
use crate::serve::{self, Served};
use args::{Cli, Command, Export, Global};
use configured::{check_file, unlisted};
use file::NewFile;
use progress::Spinner;
use requests::{exit_code, prepare, request, run_action, send_request};

/// Runs the command, prints its result, and ends the process.
pub fn main() -> ! {
    let cli = Cli::try_parse().unwrap_or_else(|error| refuse(&error));
    let verbosity = i16::from(cli.global.verbose) - i16::from(cli.global.quiet);
    let (format, verbosity) = match &cli.command {
        Command::Serve { .. } if cli.global.json => (logging::Format::Json, verbosity),
        Command::Serve { log_format, .. } => (*log_format, verbosity),
        // A command prints its result, so it logs only warnings and errors.
        _ => (logging::Format::Human, verbosity - 1),
    };
    logging::start(format, verbosity);
    output::be_quiet_on_closed_pipes();
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

/// Prints the help, or a wrong usage, and ends the process.
fn refuse(error: &clap::Error) -> ! {
    if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
        let text = error.to_string();
        output::error(&Error::configuration(text.strip_prefix("error: ").unwrap_or(&text)), true);
        exit::end(ExitCode::from(2));
    }
    error.exit()
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
            output::manual(folder, global.json);
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
            let spinner = Spinner::start("conformance", global.json);
            let on_check = |check: &_| spinner.print(|| output::requirement(check, global.json));
            let report = conformance::run(
                options,
                global.allow_insecure_plugins,
                |requirement| spinner.step(requirement),
                on_check,
            )?;
            drop(spinner);
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
        Command::Check => Ok(run_check(cwd, global)),
        Command::Plugins => plugins(cwd, global),
        Command::Import(arguments) if arguments.makes_machines() => {
            machine::copy_domains(cwd, arguments, global)
        }
        Command::Import(arguments) => run_import(cwd, arguments, global),
        Command::Machine(command) => machine::run(cwd, command, global),
        Command::Export(Export::Cape) => export_cape(cwd, global.json),
        Command::List { machines: names, all } => {
            let answer = machines::named(send_request(cwd, json!({"action": "list"}), global.json)?, names);
            machines::machines(&answer, *all || !names.is_empty(), global.json);
            Ok(exit_code(&answer))
        }
        Command::Top => run_top(cwd, global.json),
        Command::State { machine } => {
            let answer = send_request(cwd, json!({"action": "state", "machine": machine}), global.json)?;
            output::state(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Console { machine } => run_console(cwd, machine, global.json),
        Command::Prepare { machines } => prepare(cwd, machines, global.json),
        Command::Metrics => {
            let answer = send_request(cwd, json!({"action": "metrics"}), global.json)?;
            output::metrics(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Reload => {
            let answer = send_request(cwd, json!({"action": "reload"}), global.json)?;
            output::reloaded(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Upgrade => run_upgrade(cwd, global),
        Command::Status | Command::Wall | Command::Shutdown | Command::Clean | Command::EndRuns => {
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

/// Imports machines of another tool.
fn run_import(cwd: &Cwd, arguments: &Import, global: &Global) -> Result<ExitCode> {
    let machinery = arguments.machinery();
    let check = |file| check_file(cwd, machinery, file, &global.search(cwd));
    let spinner = Spinner::start("import", global.json);
    // Without a state, or with that of another user, there is only the comparison before the file is replaced.
    let _lock = crate::commands::machine::lock_configuration(cwd).ok();
    let mut imported = import::import(arguments, &cwd.machinery_yaml(machinery), &check)?;
    drop(spinner);
    imported.notes.extend(unlisted(cwd, machinery));
    output::imported(&imported, global.json);
    Ok(ExitCode::SUCCESS)
}

/// Checks the configuration and the environment.
fn run_check(cwd: &Cwd, global: &Global) -> ExitCode {
    let spinner = Spinner::start("check", global.json);
    let report = check::check(cwd, &global.search(cwd), |step| spinner.step(step));
    drop(spinner);
    report::report(&report, global.json, global.verbose > 0);
    if report.has_problems() { ExitCode::from(2) } else { ExitCode::SUCCESS }
}

/// Runs a command for a running host, or for what an earlier one has left.
fn run_for_host(cwd: &Cwd, command: &Command, global: &Global) -> Result<ExitCode> {
    match command {
        Command::Status => {
            let [version, list] =
                ["version", "list"].map(|action| send_request(cwd, json!({"action": action}), global.json));
            let (version, list) = (version?, list?);
            status::status(&version, &list, global.json);
            Ok(exit_code(&list))
        }
        Command::Wall => {
            let version = send_request(cwd, json!({"action": "version"}), global.json)?;
            wall::wall(cwd, &version, global.json)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Shutdown => {
            let spinner = Spinner::start("shutdown", global.json);
            let answer = shutdown::shutdown(cwd)?;
            drop(spinner);
            output::shut_down(&answer, global.json);
            Ok(exit_code(&answer))
        }
        Command::Clean => {
            let spinner = Spinner::start("clean", global.json);
            let cleaned = clean::clean(cwd, &global.search(cwd))?;
            drop(spinner);
            output::cleaned(&cleaned, global.json);
            Ok(ExitCode::SUCCESS)
        }
        Command::EndRuns => {
            let spinner = Spinner::start("end-runs", global.json);
            let ended = end_runs::end_runs(cwd, &global.search(cwd))?.is_some();
            drop(spinner);
            output::ended_runs(ended, global.json);
            Ok(ExitCode::SUCCESS)
        }
        _ => Err(Error::failed("this command is not about the host: a bug of the command line")),
    }
}

/// Shows the machines in the terminal, or prints them once as JSON.
fn run_top(cwd: &Cwd, json: bool) -> Result<ExitCode> {
    if !json {
        return top::run(cwd).map(|()| ExitCode::SUCCESS);
    }
    let [mut list, metrics] =
        ["list", "metrics"].map(|action| send_request(cwd, json!({"action": action}), json));
    if let (Ok(list), Ok(metrics)) = (&mut list, metrics) {
        list["metrics"] = metrics["metrics"].clone();
    }
    let answer = list?;
    output::reply(&answer, true);
    Ok(exit_code(&answer))
}

/// Prints CAPE's configuration for the machines of the running host.
fn export_cape(cwd: &Cwd, json: bool) -> Result<ExitCode> {
    let answer = send_request(cwd, json!({"action": "list"}), json)?;
    if answer["success"] != json!(true) {
        output::reply(&answer, json);
        return Ok(exit_code(&answer));
    }
    let conf = export::cape(cwd, answer["machines"].as_array().map_or(&[], Vec::as_slice))?;
    output::exported(&conf, json);
    Ok(ExitCode::SUCCESS)
}

/// Prints where viewers connect to the machine's console.
fn run_console(cwd: &Cwd, machine: &str, json: bool) -> Result<ExitCode> {
    let answer = send_request(cwd, json!({"action": "console", "machine": machine}), json)?;
    console::console(&answer, json);
    Ok(exit_code(&answer))
}

/// Has the running host replace itself.
fn run_upgrade(cwd: &Cwd, global: &Global) -> Result<ExitCode> {
    let spinner = Spinner::start("upgrade", global.json);
    let answer = upgrade::upgrade(&cwd.manager_socket())?;
    drop(spinner);
    output::upgraded(&answer, global.json);
    Ok(exit_code(&answer))
}

/// Lists the plugins. Only configured plugins are opened, because opening a plugin runs its code.
fn plugins(cwd: &Cwd, global: &Global) -> Result<ExitCode> {
    let config = crate::config::Config::read(cwd)?;
    let search = global.search(cwd);
    let opened = |name: &String| {
        let opened = open(name, &search, config.plugin_hashes.as_ref(), config.timeouts.load);
        (name.clone(), opened.map_err(Error::from))
    };
    let spinner = Spinner::start("plugins", global.json);
    let listed: Vec<_> = config.machineries.iter().map(opened).collect();
    let others: Vec<_> = search::available(&search.folders)
        .into_iter()
        .filter(|(name, _)| !search::is_listed(name, &config.machineries))
        .collect();
    drop(spinner);
    output::plugins(&listed, &others, global.json);
    let all_open = listed.iter().all(|(_, plugin)| plugin.is_ok());
    Ok(if all_open { ExitCode::SUCCESS } else { ExitCode::from(2) })
}
