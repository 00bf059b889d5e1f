//! Prints the results of commands, as text or as JSON.

use std::borrow::Cow;
use std::panic;
use std::path::{Path, PathBuf};

use machinery::{Error, Result, format_bytes};
use machinery_conformance::{Check, CheckFailure, meaning};
use serde_json::{Value, json};

use crate::commands::clean::Cleaned;
use crate::commands::import::Imported;
use crate::commands::new_plugin::NewPlugin;
use crate::logging::on_one_line;
use crate::plugin::open::OpenedPlugin;

/// Keeps the panic of a print quiet whose reader has closed the pipe, such as `head`: it has read enough.
pub fn be_quiet_on_closed_pipes() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if !message.starts_with("failed printing to stdout: Broken pipe") {
            report(panic);
        }
    }));
}

/// Prints an error.
pub fn error(error: &Error, json: bool) {
    if json {
        println!("{}", json!({"success": false, "reason": error.to_string()}));
    } else {
        eprintln!("error: {}", plain_lines(&error.to_string()));
    }
}

/// Escapes the control characters of each line.
pub fn plain_lines(text: &str) -> String {
    text.lines().map(on_one_line).collect::<Vec<_>>().join("\n")
}

/// Prints the folder of a new plugin and the next steps.
pub fn new_plugin(new: &NewPlugin, json: bool) {
    let NewPlugin { folder, library } = new;
    if json {
        println!("{}", json!({"success": true, "folder": folder, "library": library}));
        return;
    }
    println!(
        "created {folder}, a working plugin. Test it, build it and install it into a CWD:\n\n\
         cd {folder} && cargo test\n\
         cargo build --release\n\
         install -D target/release/{library} ~/.cuckoocwd/machineries/{library}\n\n\
         Its README.md describes the next steps.",
        folder = folder.display()
    );
}

/// Prints the folder of the manual.
pub fn manual(folder: &Path, json: bool) {
    if json {
        println!("{}", json!({"success": true, "folder": folder}));
    }
}

/// Prints the requirements of the interface.
pub fn requirements(json: bool) {
    let all: Vec<(&str, &str)> = machinery_conformance::names()
        .into_iter()
        .map(|name| (name, meaning(name).unwrap_or_default()))
        .collect();
    if json {
        let all: Vec<Value> = all.iter().map(|(name, says)| json!({"name": name, "says": says})).collect();
        return println!("{}", json!({"requirements": all}));
    }
    let rows: Vec<[String; 2]> =
        all.iter().map(|(name, says)| [(*name).to_owned(), (*says).to_owned()]).collect();
    println!("{}", table(&rows));
}

/// Prints the result of a requirement.
pub fn requirement(check: &Check, json: bool) {
    if !json {
        println!("{}", plain_lines(&check.to_string()));
    }
}

/// Prints the summary of a conformance run.
pub fn conformance(report: &machinery_conformance::Report, json: bool) {
    if json {
        let requirements: Vec<Value> = report.checks().iter().map(as_json).collect();
        return println!("{}", json!({"success": report.passed(), "requirements": requirements}));
    }
    println!("\n{}", plain_lines(&report.summary()));
}

fn as_json(check: &Check) -> Value {
    let (result, why) = match &check.result {
        Ok(()) => ("pass", ""),
        Err(CheckFailure::Failed(how)) => ("fail", how.as_str()),
        Err(CheckFailure::Skipped(why)) => ("skip", why.as_str()),
    };
    json!({"name": check.name, "result": result, "why": why, "notes": check.notes})
}

/// Formats rows as columns, each as wide as its widest cell. The last column is not padded.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let rows: Vec<_> = rows.iter().map(|row| row.each_ref().map(|cell| on_one_line(cell))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[Cow<'_, str>; N]| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Prints the metrics as a table.
pub fn metrics(answer: &Value, json: bool) {
    if json || answer["success"] != json!(true) {
        return reply(answer, json);
    }
    let heads = ["MACHINERY", "ACTION", "MODE", "STEP", "COUNT", "FAILED", "MEAN", "P50", "P99", "LONGEST"];
    let mut rows = vec![heads.map(str::to_owned)];
    for tally in answer["metrics"].as_array().unwrap_or(&Vec::new()) {
        let text = |key: &str| tally[key].as_str().unwrap_or("").to_owned();
        let number = |key: &str| tally[key].as_f64().unwrap_or(0.0);
        let milliseconds = |time: f64| format!("{time:.1} ms");
        let mean = number("total_ms") / number("count").max(1.0);
        rows.push([
            text("machinery"),
            text("action"),
            text("mode"),
            text("step"),
            number("count").to_string(),
            number("failed").to_string(),
            milliseconds(mean),
            milliseconds(number("p50_ms")),
            milliseconds(number("p99_ms")),
            milliseconds(number("max_ms")),
        ]);
    }
    println!("{}", table(&rows));
    let quarantine = &answer["quarantine"];
    let number = |key: &str| quarantine[key].as_u64().unwrap_or(0);
    if number("machines") > 0 || number("tries") > 0 {
        let [machines, tries, healed] = ["machines", "tries", "healed"].map(number);
        println!("\nin quarantine: {machines}; tries: {tries}; healed: {healed}");
    }
}

/// Prints the state of a machine.
pub fn state(answer: &Value, json: bool) {
    match answer["state"].as_str() {
        Some(state) if !json => println!("{state}"),
        _ => reply(answer, json),
    }
}

/// Prints the result of an upgrade.
pub fn upgraded(answer: &Value, json: bool) {
    match answer["version"].as_str().filter(|_| !json) {
        Some(version) => println!("the host is cuckoo-machinery {version} now"),
        None => reply(answer, json),
    }
}

/// Prints the result of the end of a host.
pub fn shut_down(answer: &Value, json: bool) {
    if json || answer["success"] != json!(true) {
        return reply(answer, json);
    }
    println!("the host has ended, with its machines");
}

/// Prints what was removed of a host's state, and what remains.
pub fn cleaned(cleaned: &Cleaned, json: bool) {
    let Cleaned { folder, freed, remaining } = cleaned;
    if json {
        println!("{}", json!({"success": true, "folder": folder, "freed": freed, "remaining": remaining}));
        return;
    }
    println!("removed    {} ({})", folder.display(), format_bytes(*freed));
    for folder in remaining {
        println!("remaining  {}: remove it if nothing else uses it", folder.display());
    }
}

/// Prints whether the runs of an earlier host were ended.
pub fn ended_runs(ended: bool, json: bool) {
    match (json, ended) {
        (true, _) => println!("{}", json!({"success": true, "ended": ended})),
        (false, true) => println!("the runs of an earlier host are ended"),
        (false, false) => println!("a host serves: it has adopted the runs of the earlier one"),
    }
}

/// Prints the changes of a reload.
pub fn reloaded(answer: &Value, json: bool) {
    if json || answer["success"] != json!(true) {
        return reply(answer, json);
    }
    let texts = |key: &str| {
        answer[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>()
    };
    let kinds =
        [("added", ""), ("changed", ""), ("removed", ""), ("deferred", " (in use: applies once it is idle)")];
    for key in texts("settings") {
        let is_at_once = key.starts_with("web_") || key.starts_with("metrics_");
        println!("changed   {key}: {}", if is_at_once { "applied" } else { "the next actions use it" });
    }
    let mut nothing = texts("settings").is_empty();
    for (kind, when) in kinds {
        let machines = texts(kind);
        for machine in &machines {
            println!("{kind:8}  {machine}{when}");
        }
        nothing &= machines.is_empty();
    }
    if nothing {
        println!("nothing has changed");
    }
    for note in texts("restart_required") {
        println!("note      {note}");
    }
}

/// Prints a reply without a text form: the reason of a failure, or all of it as JSON.
pub fn reply(answer: &Value, json: bool) {
    if json {
        let mut answer = answer.clone();
        if let Some(object) = answer.as_object_mut() {
            object.remove("id");
        }
        println!("{answer}");
    } else if answer["success"] != json!(true) {
        eprintln!("error: {}", plain_lines(answer["reason"].as_str().unwrap_or("the host gave no reason")));
    }
}

/// Prints the outcome of an import.
pub fn imported(imported: &Imported, json: bool) {
    if json {
        let mut answer = json!(imported);
        answer["success"] = json!(true);
        println!("{answer}");
        return;
    }
    let added = if imported.dry_run.is_some() { "would add" } else { "added" };
    for name in &imported.added {
        println!("{added:9}  {name}");
    }
    for skipped in &imported.skipped {
        println!("skipped    {}: {}", skipped.name, skipped.reason);
    }
    for note in &imported.notes {
        println!("note       {note}");
    }
    if let Some(entries) = imported.dry_run.as_ref().filter(|_| !imported.added.is_empty()) {
        print!("\n{entries}");
    }
}

/// Prints the configuration of another sandbox.
pub fn exported(conf: &str, json: bool) {
    match json {
        true => println!("{}", json!({"success": true, "conf": conf})),
        false => print!("{conf}"),
    }
}

/// Prints the configured plugins and the other plugins in the folders.
pub fn plugins(listed: &[(String, Result<OpenedPlugin>)], others: &[(String, PathBuf)], json: bool) {
    if json {
        return plugins_as_json(listed, others);
    }
    let mut rows = vec![["NAME", "VERSION", "INTERFACE", "LICENCE", "SHA256", "FILE"].map(str::to_owned)];
    for (name, opened) in listed {
        match opened {
            Ok(OpenedPlugin { plugin, sha256 }) => rows.push([
                name.clone(),
                plugin.version().to_owned(),
                plugin.interface(),
                plugin.license().to_owned(),
                sha256.to_string(),
                plugin.path().display().to_string(),
            ]),
            Err(error) => eprintln!("error: {}", plain_lines(&error.to_string())),
        }
    }
    for (name, path) in others {
        let unopened = || "-".to_owned();
        let path = format!("{} (not listed, not opened)", path.display());
        rows.push([name.clone(), unopened(), unopened(), unopened(), unopened(), path]);
    }
    println!("{}", table(&rows));
}

fn plugins_as_json(listed: &[(String, Result<OpenedPlugin>)], others: &[(String, PathBuf)]) {
    let listed: Vec<Value> = listed
        .iter()
        .map(|(name, opened)| match opened {
            Ok(OpenedPlugin { plugin, sha256 }) => json!({
                "name": name,
                "version": plugin.version(),
                "interface": plugin.interface(),
                "license": plugin.license(),
                "sha256": sha256.to_string(),
                "path": plugin.path().display().to_string(),
            }),
            Err(error) => json!({"name": name, "error": error.to_string()}),
        })
        .collect();
    let others: Vec<Value> =
        others.iter().map(|(name, path)| json!({"name": name, "path": path.display().to_string()})).collect();
    println!("{}", json!({"listed": listed, "not_listed": others}));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_aligns_columns_and_escapes_cells() {
        let rows = [["A", "BB"], ["ccc", "d"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A    BB\nccc  d");
        let rows = [["a\u{1b}[2J\nb".to_owned()]];
        assert_eq!(table(&rows), "a\\u{1b}[2J\\nb");
    }
}
