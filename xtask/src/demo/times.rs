//! The demo's table of times: a row for each action, a column for each round.

use std::fmt;
use std::time::{Duration, Instant};

use crate::run::Result;

/// Measured times.
pub struct Times {
    rounds: usize,
    rows: Vec<(&'static str, Vec<Option<Duration>>)>,
}

impl Times {
    /// Makes an empty table.
    pub fn new(rounds: usize) -> Self {
        Self { rounds, rows: Vec::new() }
    }

    /// Adds the duration of `action` in `round`, counted from 1.
    pub fn add(&mut self, action: &'static str, round: usize, took: Duration) {
        let known = self.rows.iter().position(|(name, _)| *name == action);
        let row = known.unwrap_or_else(|| {
            self.rows.push((action, vec![None; self.rounds]));
            self.rows.len() - 1
        });
        self.rows[row].1[round - 1] = Some(took);
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:14}", "")?;
        for round in 1..=self.rounds {
            write!(f, "{:>10}", format!("round {round}"))?;
        }
        for (action, times) in &self.rows {
            write!(f, "\n{action:14}")?;
            for time in times {
                write!(f, "{:>10}", time.map_or("-".to_owned(), shown))?;
            }
        }
        Ok(())
    }
}

/// Runs an action, and returns its duration.
pub fn timed<T>(action: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let result = action()?;
    Ok((result, start.elapsed()))
}

/// Returns a time with about three digits.
pub fn shown(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds < 1.0 => format!("{:.0} ms", seconds * 1000.0),
        seconds => format!("{seconds:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_a_row_per_action_and_a_column_per_round() {
        let mut times = Times::new(2);
        times.add("restore-start", 1, Duration::from_millis(2340));
        times.add("stop", 1, Duration::from_millis(12));
        times.add("restore-start", 2, Duration::from_millis(98));
        let expected = "                 round 1   round 2\n\
                        restore-start     2.34 s     98 ms\n\
                        stop               12 ms         -";
        assert_eq!(times.to_string(), expected);
    }
}
