//! The order of the cells: all of them, shuffled by the seed, again and again.

use machinery_testkit::random::Rng;

use super::cells::{Cell, Fault};

/// One round of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The number of the round, from 1.
    pub round: u64,
    /// The cell to hit.
    pub cell: Cell,
    /// The seed of all choices within the round.
    pub seed: u64,
}

/// An endless sequence of rounds. The same seed makes the same sequence.
#[derive(Debug)]
pub struct Plan {
    cells: Vec<Cell>,
    /// The cells that are left of this walk, the next one last.
    left: Vec<Cell>,
    rng: Rng,
    round: u64,
}

impl Plan {
    /// Makes a plan for these cells.
    pub fn new(cells: Vec<Cell>, seed: u64) -> Self {
        Plan { cells, left: Vec::new(), rng: rng(seed), round: 0 }
    }

    /// Keeps one cell of each fault, chosen by the seed.
    pub fn one_for_each_fault(mut self) -> Self {
        let (rng, cells) = (&mut self.rng, &self.cells);
        let one = |fault: Fault| {
            let of_fault: Vec<Cell> = cells.iter().copied().filter(|cell| cell.fault == fault).collect();
            (!of_fault.is_empty()).then(|| of_fault[rng.index(of_fault.len())])
        };
        self.cells = Fault::ALL.into_iter().filter_map(one).collect();
        self
    }

    /// Returns the number of different cells.
    pub fn len(&self) -> usize {
        self.cells.len()
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if self.left.is_empty() {
            self.left = self.cells.clone();
            shuffle(&mut self.left, &mut self.rng);
        }
        let cell = self.left.pop()?;
        self.round += 1;
        let seed = self.rng.below(u64::MAX);
        Some(Step { round: self.round, cell, seed })
    }
}

/// Returns a generator with that seed. Its own seed must not be 0, and small ones begin with small numbers.
pub fn rng(seed: u64) -> Rng {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    for _ in 0..8 {
        rng.below(2);
    }
    rng
}

/// Shuffles a list. Source: Fisher and Yates.
fn shuffle<T>(list: &mut [T], rng: &mut Rng) {
    for end in (1..list.len()).rev() {
        list.swap(end, rng.index(end + 1));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::cells::{Machinery, Missing};
    use super::*;

    fn cells() -> Vec<Cell> {
        let missing = Missing::default();
        Cell::all().filter(|cell| cell.impossible(Machinery::Qemu, &missing).is_none()).collect()
    }

    #[test]
    fn plan_is_the_same_when_the_seed_is_the_same() {
        let steps = |seed| Plan::new(cells(), seed).take(300).collect::<Vec<_>>();
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
    }

    #[test]
    fn cells_are_hit_equally_often() {
        let (cells, mut hits) = (cells(), HashMap::new());
        let rounds = cells.len() * 3 + 1;
        for step in Plan::new(cells, 1).take(rounds) {
            *hits.entry(step.cell).or_insert(0) += 1;
        }
        assert!(hits.values().all(|count| [3, 4].contains(count)), "{hits:?}");
    }

    #[test]
    fn short_plan_has_each_fault_once() {
        let plan = Plan::new(cells(), 3).one_for_each_fault();
        let count = plan.len();
        let mut faults: Vec<_> = plan.take(count).map(|step| step.cell.fault.name()).collect();
        faults.sort_unstable();
        faults.dedup();
        assert_eq!(faults.len(), count);
        // The machinery qemu has no libvirtd.
        assert_eq!(count, Fault::ALL.len() - 1);
    }
}
