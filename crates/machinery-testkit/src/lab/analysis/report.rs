//! The results of an analysis.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::timeline::Timeline;
use crate::Result;
use crate::error::Context;

/// The results of an analysis with one task.
#[derive(Debug)]
pub struct Report {
    /// The name of the machine.
    pub machine: String,
    /// The names of the processes.
    pub processes: Vec<String>,
    /// The content of each dropped file, by its name.
    pub dropped: BTreeMap<String, Vec<u8>>,
    /// The names that the sample looked up.
    pub domains: Vec<String>,
    /// The URLs that the sample opened.
    pub urls: Vec<String>,
    /// The content of each screenshot, by its name.
    pub screenshots: BTreeMap<String, Vec<u8>>,
    /// The score.
    pub score: u64,
    /// The errors of the task's run and of its processing.
    pub errors: Vec<String>,
    /// The time line of the task.
    pub timeline: Timeline,
}

impl Report {
    /// Reads the results from the folder of an analysis. Lists that the report lacks are empty.
    pub(super) fn read(analysis: &Path, timeline: Timeline) -> Result<Self> {
        let task = analysis.join("task_1");
        let report = json(&task.join("report.json"))?;
        let network = &report["network"];
        Ok(Report {
            machine: text(&json(&task.join("machine.json"))?["name"]),
            processes: texts(&report["processes"]["process_list"], |process| &process["name"]),
            dropped: files(&task.join("dropped"))?,
            domains: texts(&network["domain"], |domain| domain),
            urls: texts(&network["http"], |exchange| &exchange["request"]["url"]),
            screenshots: files(&task.join("screenshots"))?,
            score: report["score"].as_u64().unwrap_or_default(),
            errors: errors(&task)?,
            timeline,
        })
    }
}

/// Returns the state of the task of an analysis, and its errors.
pub(super) fn failure(analysis: &Path) -> Result<(String, Vec<String>)> {
    let task = analysis.join("task_1");
    Ok((text(&json(&task.join("task.json"))?["state"]), errors(&task)?))
}

/// Returns the errors of a task. Cuckoo3 moves those of its run and of its processing to `task.json`.
fn errors(task: &Path) -> Result<Vec<String>> {
    let found = &json(&task.join("task.json"))?["errors"];
    let of = |kind: &str| found[kind].as_array().into_iter().flatten().map(ToString::to_string).collect();
    Ok([of("errors"), of("fatal")].into_iter().flat_map(|errors: Vec<String>| errors).collect())
}

fn json(path: &Path) -> Result<Value> {
    let what = || format!("reading {}", path.display());
    serde_json::from_slice(&fs::read(path).context(what)?).context(what)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(list: &Value, of: impl Fn(&Value) -> &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|value| text(of(value))).collect()
}

fn files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let what = || format!("reading {}", folder.display());
    let entries = fs::read_dir(folder).context(what)?;
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
    };
    entries.map(read).collect::<std::io::Result<_>>().context(what)
}
