//! Runs the commands that make machines, and prints their results.

use std::sync::Mutex;

use machinery::{Readiness, Result, format_bytes};
use serde::Serialize;
use serde_json::json;

use super::args::Global;
use super::configured::unlisted;
use super::output::{self, plain_lines};
use super::progress::Spinner;
use crate::commands::import::Import;
use crate::commands::machine::{self, Context, Exported, Machine, Made, Outcome, Removed};
use crate::config::Config;
use crate::cwd::Cwd;
use crate::exit::ExitCode;

/// Runs the command, and prints its result.
///
/// # Errors
/// The command's.
pub fn run(cwd: &Cwd, command: &Machine, global: &Global) -> Result<ExitCode> {
    command.confirm(cwd)?;
    let machinery = command.machinery(cwd)?;
    let outcome = with_context(cwd, machinery, global, |context| machine::run(context, command));
    match outcome? {
        Outcome::Made(done, mut made) => {
            made.notes.extend(unlisted(cwd, machinery));
            print_made(done, &made, global.json);
        }
        Outcome::Removed(removed) => print_removed(&removed, global.json),
        Outcome::Exported(exported) => print_exported(&exported, global.json),
        Outcome::Cleared(names) if global.json => {
            println!("{}", json!({"success": true, "cleared": names}));
        }
        Outcome::Cleared(names) => names.iter().for_each(|name| println!("{name}: cleared")),
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes machines of `qemu` of domains, and prints their names.
///
/// # Errors
/// The command's.
pub fn copy_domains(cwd: &Cwd, import: &Import, global: &Global) -> Result<ExitCode> {
    let machinery = import.machinery();
    let copied = with_context(cwd, machinery, global, |context| machine::copy_domains(context, import));
    let mut copied = copied.map_err(|error| error.action("import"))?;
    copied.notes.extend(unlisted(cwd, machinery));
    output::imported(&copied, global.json);
    Ok(ExitCode::SUCCESS)
}

/// Calls a command with everything that it needs, and shows its steps.
fn with_context<T>(
    cwd: &Cwd,
    machinery: &'static str,
    global: &Global,
    command: impl FnOnce(&Context<'_>) -> Result<T>,
) -> Result<T> {
    let (config, search) = (Config::read(cwd)?, global.search(cwd));
    let (spinner, shown) = (Spinner::start("machine", global.json), Mutex::new(String::new()));
    let step = |step: &str| {
        spinner.step(step);
        // The log has each step once, without its progress.
        let step = step.split([':', ';']).next().unwrap_or_default();
        let mut shown = shown.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *shown != step {
            tracing::info!("{step}");
            step.clone_into(&mut shown);
        }
    };
    let context = Context {
        cwd,
        config: &config,
        machinery,
        search: &search,
        step: &step,
        globals: global.arguments(cwd),
    };
    let outcome = command(&context);
    drop(spinner);
    outcome
}

/// Prints a machine that was made.
fn print_made(done: &str, made: &Made, json: bool) {
    if json {
        return print_json(made);
    }
    let Made { machine, folder, ready, notes } = made;
    println!("{machine}: {done} in {}", folder.display());
    let reason = if ready.mode == Readiness::Plain { format!(" ({})", ready.reason) } else { String::new() };
    println!("  restored once; its restores are {}{}", ready.mode, plain_lines(&reason));
    notes.iter().for_each(|note| println!("  note: {}", plain_lines(note)));
}

fn print_removed(removed: &Removed, json: bool) {
    if json {
        return print_json(removed);
    }
    println!("{}: removed", removed.machine);
    removed.removed.iter().for_each(|path| println!("  {}", path.display()));
    removed.notes.iter().for_each(|note| println!("  note: {}", plain_lines(note)));
}

fn print_exported(exported: &Exported, json: bool) {
    if json {
        return print_json(exported);
    }
    let Exported { machine, file, bytes } = exported;
    println!("{machine}: exported to {} ({})", file.display(), format_bytes(*bytes));
}

fn print_json(result: &impl Serialize) {
    let mut value = json!(result);
    value["success"] = json!(true);
    println!("{value}");
}
