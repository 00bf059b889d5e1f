//! The matrix as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::cells::{Cell, Fault, Phase};
use super::matrix::Matrix;

/// Returns the matrix as a table, the reasons for its gaps, and the violations.
pub fn table(matrix: &Matrix) -> String {
    let mut text = format!(
        "machinery {}, seed {}: {} rounds in {} s, {} with violations\n",
        matrix.machinery.name(),
        matrix.seed,
        matrix.rounds,
        matrix.took.as_secs(),
        matrix.violations.len()
    );
    text += "Each number counts the rounds in which the fault hit the phase; ? the rounds in which the phase was over, \
             ! those with violations.\n\n";
    let head: String = Phase::ALL.map(|phase| format!("{:>12}", phase.name())).concat();
    line(&mut text, &format!("{:22}{head}", ""));
    for fault in Fault::ALL {
        let cells = Phase::ALL.map(|phase| format!("{:>12}", entry(matrix, Cell { fault, phase })));
        line(&mut text, &format!("{:22}{}", fault.name(), cells.concat()));
    }
    gaps(matrix, &mut text);
    line(&mut text, &format!("longest pause of a guest whose host was away: {:?}", matrix.longest_pause));
    for violation in &matrix.violations {
        let (step, folder) = (violation.step, violation.evidence.display());
        line(
            &mut text,
            &format!("\nround {} ({}, machine {}): {folder}", step.round, step.cell, violation.machine),
        );
        violation.found.iter().for_each(|found| line(&mut text, &format!("  {found}")));
    }
    text
}

/// Returns the text of a cell in the table and in the picture.
pub fn entry(matrix: &Matrix, cell: Cell) -> String {
    if matrix.impossible(cell).is_some() {
        return "-".to_owned();
    }
    let tally = matrix.tally(cell);
    let mark = |count: u32, mark: char| if count > 0 { format!(" {mark}{count}") } else { String::new() };
    format!("{}{}{}", tally.hits, mark(tally.misses, '?'), mark(tally.violations, '!'))
}

/// Adds the cells that do not exist, by reasons, and those that were not hit.
fn gaps(matrix: &Matrix, text: &mut String) {
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for cell in Cell::all() {
        let Some(reason) = matrix.impossible(cell) else { continue };
        match reasons.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, cells)) => cells.push(cell.to_string()),
            None => reasons.push((reason, vec![cell.to_string()])),
        }
    }
    line(text, "");
    for (reason, cells) in reasons {
        line(text, &format!("- {reason}: {}", cells.join("; ")));
    }
    let (possible, is_open) = (matrix.possible(), |cell: &&Cell| matrix.tally(**cell).hits == 0);
    let open = possible.iter().filter(is_open).count();
    line(text, &format!("\n{} of {} cells were hit", possible.len() - open, possible.len()));
}

/// Returns the matrix as JSON.
pub fn json(matrix: &Matrix) -> String {
    let cell = |cell: Cell| {
        let tally = matrix.tally(cell);
        json!({
            "fault": cell.fault.name(),
            "phase": cell.phase.name(),
            "impossible": matrix.impossible(cell),
            "hits": tally.hits,
            "misses": tally.misses,
            "violations": tally.violations,
        })
    };
    let violations: Vec<Value> = matrix
        .violations
        .iter()
        .map(|violation| {
            json!({
                "round": violation.step.round,
                "fault": violation.step.cell.fault.name(),
                "phase": violation.step.cell.phase.name(),
                "machine": violation.machine,
                "found": violation.found,
                "evidence": violation.evidence,
            })
        })
        .collect();
    let report = json!({
        "machinery": matrix.machinery.name(),
        "seed": matrix.seed,
        "rounds": matrix.rounds,
        "seconds": matrix.took.as_secs(),
        "longest_pause_ms": matrix.longest_pause.as_millis() as u64,
        "cells": Cell::all().map(cell).collect::<Vec<_>>(),
        "violations": violations,
    });
    format!("{report:#}\n")
}

fn line(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}", line.trim_end());
}

#[cfg(test)]
pub mod tests {
    use super::super::cells::{Machinery, Missing};
    use super::super::matrix::Violation;
    use super::super::plan::Step;
    use super::super::round::Outcome;
    use super::*;

    /// Returns a matrix with one hit and one violation.
    pub fn matrix() -> Matrix {
        let mut matrix = Matrix::new(Machinery::Qemu, 5, Missing::default());
        let cell = Cell { fault: Fault::HostKilled, phase: Phase::Running };
        let step = Step { round: 1, cell, seed: 9 };
        matrix.count(step, &Outcome { machine: "plain", is_hit: true, pause: None, found: Vec::new() });
        matrix.count(
            step,
            &Outcome {
                machine: "plain",
                is_hit: false,
                pause: None,
                found: vec!["a disk is left".to_owned()],
            },
        );
        let found = vec!["a disk is left".to_owned()];
        matrix.violations.push(Violation { step, machine: "plain", found, evidence: "/tmp/kept".into() });
        matrix
    }

    #[test]
    fn table_shows_hits_misses_violations_and_reasons() {
        let table = table(&matrix());
        for words in [
            "1 ?1 !1",
            "has no libvirtd: libvirtd killed, idle",
            "a disk is left",
            "/tmp/kept",
            "1 of 125 cells were hit",
        ] {
            assert!(table.contains(words), "no {words:?} in {table}");
        }
    }

    #[test]
    fn json_has_each_cell() {
        let json: Value = serde_json::from_str(&json(&matrix())).unwrap();
        assert_eq!(json["cells"].as_array().unwrap().len(), Fault::ALL.len() * Phase::ALL.len());
        assert_eq!(json["violations"][0]["found"][0], "a disk is left");
    }
}
