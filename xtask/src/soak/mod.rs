//! `cargo xtask soak`: faults in every phase of machines, and the proof that nothing is lost and nothing is left.
//!
//! ```text
//! plan ─▶ round: phase ─▶ fault within it ─▶ fault taken back ─▶ invariants ─┬─▶ next round
//!                                                                            └─▶ violation: evidence, a fresh site
//! ```
//!
//! | module | content |
//! | --- | --- |
//! | [`cells`] | the faults and phases, and the reasons why some do not go together |
//! | [`plan`] | the order of the cells, from a seed |
//! | [`site`], [`cgroups`], [`clock`], [`served`] | the lab, its cgroups and its clock, and the host that serves it |
//! | [`phase`], [`traffic`] | bring a phase about |
//! | [`fault`] | inject a fault |
//! | [`pulse`] | watch a guest while its host is away |
//! | [`round`] | one round from the phase to the invariants |
//! | [`check`] | the invariants |
//! | [`evidence`], [`matrix`], [`report`], [`chart`] | what was found |
//!
//! A machine is `plain`, `instant` or `standby`, by the readiness that it gets. The double is beside them, for the
//! faults of a plugin.

mod cells;
mod cgroups;
mod chart;
mod check;
mod clock;
mod evidence;
mod fault;
mod matrix;
mod phase;
mod plan;
mod pulse;
mod report;
mod round;
mod served;
mod site;
mod traffic;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use self::cells::Machinery;
use self::matrix::{Matrix, Violation};
use self::plan::Plan;
use self::round::Outcome;
use self::served::Served;
use self::site::Site;
use crate::run::{Context, Result, note};

/// The number of restores of all machines at once, if there were as many rounds.
const MAX_STORM: usize = 50;

/// The longest time in which a guest may not count while its host is away.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Options of `cargo xtask soak`.
#[derive(clap::Args)]
pub struct Options {
    /// The machinery to soak
    #[arg(long, value_enum, default_value = "qemu")]
    machinery: Machinery,
    /// Number of rounds [default: one for each cell of the matrix]
    #[arg(long)]
    rounds: Option<u64>,
    /// The seed of the order and of all choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Hit each fault once, in a phase that the seed chooses
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// Hit only cells whose name contains this text, such as "QEMU killed" or "dumping"
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Write the matrix to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the matrix into this file, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Soaks, and shows the matrix.
pub fn run(options: &Options) -> Result<()> {
    let mut soak = Soak::begin(options.machinery)?;
    let mut matrix = Matrix::new(options.machinery, options.seed, soak.site.missing.clone());
    let mut cells = matrix.possible();
    if let Some(text) = &options.only {
        cells.retain(|cell| cell.to_string().contains(text.as_str()));
    }
    if cells.is_empty() {
        return Err("no cell can be hit".to_owned().into());
    }
    let plan = Plan::new(cells, options.seed);
    let plan = if options.quick { plan.one_for_each_fault() } else { plan };
    let rounds = options.rounds.unwrap_or(plan.len() as u64);
    let begun = Instant::now();
    for step in plan {
        if step.round > rounds {
            break;
        }
        let at = Instant::now();
        let mut outcome = round::conduct(&soak.site, &mut soak.served, step);
        // A quick soak runs beside other tests, which hold guests up.
        if let Some(pause) = outcome.pause.filter(|pause| *pause > MAX_PAUSE && !options.quick) {
            outcome.found.push(format!("the guest did not count for {pause:?}"));
        }
        matrix.took = begun.elapsed();
        matrix.count(step, &outcome);
        let result = match (&outcome.found[..], outcome.is_hit) {
            ([], true) => "",
            ([], false) => "; the phase was over each time",
            _ => "; VIOLATION",
        };
        let (cell, seconds) = (step.cell, at.elapsed().as_secs_f32());
        note(&format!("round {}: {cell}, machine {}, {seconds:.1} s{result}", step.round, outcome.machine));
        if !outcome.found.is_empty() {
            soak = soak.report(options, step, outcome, &mut matrix)?;
        }
        write(options, &matrix)?;
    }
    if matrix.violations.is_empty() {
        soak.storm(usize::try_from(rounds).unwrap_or(MAX_STORM).min(MAX_STORM))?;
    }
    soak.end(&matrix)?;
    print!("{}", report::table(&matrix));
    match matrix.violations.len() {
        0 => Ok(()),
        count => Err(format!("{count} rounds had violations").into()),
    }
}

/// A site with its host, which ends first.
struct Soak {
    served: Served,
    site: Site,
}

impl Soak {
    fn begin(machinery: Machinery) -> Result<Self> {
        let site = Site::new(machinery)?;
        Ok(Soak { served: Served::start(&site)?, site })
    }

    /// Reports a round with violations, and begins anew.
    fn report(
        self,
        options: &Options,
        step: plan::Step,
        outcome: Outcome,
        matrix: &mut Matrix,
    ) -> Result<Self> {
        let evidence = evidence::keep(&self.site, &self.served, step, &outcome.found)?;
        note(&format!("seed {}, round {}, {}: {}", options.seed, step.round, step.cell, evidence.display()));
        outcome.found.iter().for_each(|found| note(&format!("  {found}")));
        let (machine, found) = (outcome.machine, outcome.found);
        matrix.violations.push(Violation { step, machine, found, evidence });
        drop(self.served);
        self.site.discard();
        Soak::begin(options.machinery)
    }

    /// Restores all machines at the same time, many times in one host, which must not grow.
    fn storm(&mut self, repeats: usize) -> Result<()> {
        let found = check::storm(&self.site, &mut self.served, repeats)?;
        if found.is_empty() {
            note(&format!("all machines restored and stopped {repeats} times at once: nothing is left"));
            return Ok(());
        }
        Err(format!("after {repeats} restores of all machines: {}", found.join("; ")).into())
    }

    /// Ends the host, which must leave nothing.
    fn end(mut self, matrix: &Matrix) -> Result<()> {
        let status = self.served.host.terminate()?;
        let left = self.site.leftovers()?;
        let (log, rounds) = (self.served.host.log(), matrix.rounds);
        drop(self.served);
        self.site.discard();
        if status.success() && left.is_empty() {
            return Ok(());
        }
        Err(format!("after {rounds} rounds, the host ended with {status} and left {left:?}; it said:\n{log}")
            .into())
    }
}

/// Writes the report of the rounds until now.
fn write(options: &Options, matrix: &Matrix) -> Result<()> {
    let write = |path: &Option<PathBuf>, text: &dyn Fn(&Matrix) -> String| match path {
        Some(path) => fs::write(path, text(matrix)).context(cannot_write(path)),
        None => Ok(()),
    };
    write(&options.json, &report::json)?;
    write(&options.svg, &chart::svg)
}

fn cannot_write(path: &Path) -> impl FnOnce() -> String {
    move || format!("cannot write {}", path.display())
}
