//! Turns of the contestants.
//!
//! The rounds of all contestants are distributed over a few turns, each of which starts with another
//! contestant. Each share begins with a round that does not count, because a new host or cold files would
//! affect it.

use std::time::{Duration, Instant};

use crate::run::{Result, note};

/// More turns would mostly measure the start of hosts.
const TURNS: usize = 5;

/// Calls `play` with each contestant's share of rounds in each turn.
pub fn take<C: Copy>(
    mut contestants: Vec<C>,
    rounds: impl Fn(C) -> usize,
    mut play: impl FnMut(C, usize) -> Result<()>,
) -> Result<()> {
    for turn in 0..TURNS {
        note(&format!("turn {} of {TURNS}", turn + 1));
        for contestant in &contestants {
            let share = share(rounds(*contestant), turn);
            if share > 0 {
                // Unwritten data of one contestant would slow the next.
                rustix::fs::sync();
                play(*contestant, share)?;
            }
        }
        if !contestants.is_empty() {
            contestants.rotate_left(1);
        }
    }
    Ok(())
}

/// Returns the number of rounds in that turn; the first turn has some of every contestant.
fn share(rounds: usize, turn: usize) -> usize {
    (rounds * (turn + 1)).div_ceil(TURNS) - (rounds * turn).div_ceil(TURNS)
}

/// Runs an action, and returns its milliseconds.
pub fn timed<T>(action: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let begun = Instant::now();
    let done = action()?;
    Ok((done, ms(begun.elapsed())))
}

/// Returns a duration in milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contestants_get_all_rounds_and_rotate() {
        let mut played = Vec::new();
        let rounds = |contestant| if contestant == 'a' { 7 } else { 5 };
        take(vec!['a', 'b'], rounds, |contestant, share| {
            played.push((contestant, share));
            Ok(())
        })
        .unwrap();
        let sum = |wanted| played.iter().filter(|(who, _)| *who == wanted).map(|(_, share)| share).sum();
        let sums: [usize; 2] = [sum('a'), sum('b')];
        assert_eq!(sums, [7, 5]);
        let first: String = played.iter().step_by(2).map(|(who, _)| who).collect();
        assert_eq!(first, "ababa");
        assert_eq!([share(1, 0), share(1, 4)], [1, 0]);
    }
}
