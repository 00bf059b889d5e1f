//! The matrix of a soak: what each cell has shown.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use super::cells::{Cell, Fault, Machinery, Missing, Phase};
use super::plan::Step;
use super::round::Outcome;

/// The rounds of one cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rounds in which the fault occurred within the phase.
    pub hits: u32,
    /// Rounds in which the phase was over each time.
    pub misses: u32,
    /// Rounds with a violation.
    pub violations: u32,
}

/// A round with violations.
#[derive(Debug)]
pub struct Violation {
    pub step: Step,
    pub machine: &'static str,
    pub found: Vec<String>,
    /// The folder with the host's log and state.
    pub evidence: PathBuf,
}

/// The result of a soak.
#[derive(Debug)]
pub struct Matrix {
    pub machinery: Machinery,
    pub seed: u64,
    pub rounds: u64,
    pub took: Duration,
    pub violations: Vec<Violation>,
    /// The longest pause of a guest whose host was away.
    pub longest_pause: Duration,
    missing: Missing,
    tallies: HashMap<Cell, Tally>,
}

impl Matrix {
    /// Makes an empty matrix.
    pub fn new(machinery: Machinery, seed: u64, missing: Missing) -> Self {
        let (violations, tallies) = (Vec::new(), HashMap::new());
        let (took, longest_pause) = (Duration::ZERO, Duration::ZERO);
        Matrix { machinery, seed, rounds: 0, took, violations, longest_pause, missing, tallies }
    }

    /// Returns the cells that can be hit.
    pub fn possible(&self) -> Vec<Cell> {
        Cell::all().filter(|cell| self.impossible(*cell).is_none()).collect()
    }

    /// Returns the reason why a cell cannot be hit.
    pub fn impossible(&self, cell: Cell) -> Option<&'static str> {
        cell.impossible(self.machinery, &self.missing)
    }

    /// Returns the rounds of a cell.
    pub fn tally(&self, cell: Cell) -> Tally {
        self.tallies.get(&cell).copied().unwrap_or_default()
    }

    /// Counts a round.
    pub fn count(&mut self, step: Step, outcome: &Outcome) {
        let tally = self.tallies.entry(step.cell).or_default();
        if outcome.is_hit {
            tally.hits += 1;
        } else {
            tally.misses += 1;
        }
        tally.violations += u32::from(!outcome.found.is_empty());
        self.longest_pause = self.longest_pause.max(outcome.pause.unwrap_or_default());
        self.rounds += 1;
    }

    /// Returns the faults that can be hit in some phase.
    pub fn faults(&self) -> impl Iterator<Item = Fault> {
        let can = |fault: &Fault| {
            Phase::ALL.into_iter().any(|phase| self.impossible(Cell { fault: *fault, phase }).is_none())
        };
        Fault::ALL.into_iter().filter(can)
    }
}
