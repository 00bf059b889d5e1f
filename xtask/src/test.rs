//! `cargo xtask test`: all checks of a change, quickest first.
//!
//! The tests run the program and load the plugins, so the workspace is built before them. The test runner
//! comes last, so that its summary ends the output, with the tests that were skipped.

use crate::backports::Backports;
use crate::deny;
use crate::leftovers::RunMarker;
use crate::prose;
use crate::run::{Result, cargo, step, succeeds};
use crate::skips::Skips;
use crate::{package, system_packages};

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Options {
    /// Test with QEMU 10.0 and libvirt 11.3 of Debian's bookworm-backports instead of the system's;
    /// they are unpacked into the user's cache folder, not installed
    #[arg(long)]
    backports: bool,
    /// For the test runner, `cargo nextest run` where it is installed, else `cargo test`. With a NAME or
    /// `-E FILTER` first, only the tests of that name run, without the other checks
    #[arg(last = true)]
    args: Vec<String>,
}

/// Runs all checks and tests.
pub fn run(options: &Options) -> Result<()> {
    system_packages::ensure()?;
    package::needs::ensure()?;
    let backports = if options.backports { Some(Backports::new()?) } else { None };
    if !selects_tests(&options.args) {
        check_source()?;
    }
    step(&mut cargo(["build", "--workspace"]))?;
    if backports.is_some() {
        // The tests are built with the system's files, before the others are mounted.
        step(&mut cargo(["test", "--workspace", "--all-targets", "--no-run"]))?;
    }
    let skips = Skips::new()?;
    let marker = RunMarker::new();
    let tests = test_commands(&options.args).into_iter().try_for_each(|args| {
        let mut tests = cargo(args);
        if let Some(backports) = &backports {
            tests = backports.inside(&tests);
        }
        marker.apply_to(&mut tests);
        skips.apply_to(&mut tests);
        step(&mut tests)
    });
    skips.print();
    // Failed tests may leave processes, which are reported too; the exit code is the tests'.
    let left = marker.check_none_left();
    match (tests, left) {
        (Err(failed), Err(left)) => {
            left.report();
            Err(failed)
        }
        (tests, left) => tests.and(left),
    }
}

/// Returns whether the arguments begin with the name of a test or a filter.
fn selects_tests(args: &[String]) -> bool {
    args.first().is_some_and(|first| !first.starts_with('-') || first.starts_with("-E"))
}

/// Runs the checks that need no test.
fn check_source() -> Result<()> {
    prose::check()?;
    step(&mut cargo(["fmt", "--all", "--check"]))?;
    step(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    deny::run_if_installed()?;
    let mut doc = cargo(["doc", "--no-deps", "--workspace", "--lib"]);
    step(doc.env("RUSTDOCFLAGS", "-D warnings"))
}

/// Returns the arguments of cargo for the test runs: the examples in the documentation, and all other tests.
fn test_commands(args: &[String]) -> Vec<Vec<&str>> {
    let mut tests = if succeeds(&mut cargo(["nextest", "--version"])) {
        vec!["nextest", "run", "--workspace"]
    } else {
        vec!["test", "--workspace", "--all-targets"]
    };
    tests.extend(args.iter().map(String::as_str));
    let documentation = vec!["test", "--workspace", "--doc"];
    if selects_tests(args) { vec![tests] } else { vec![documentation, tests] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_checks_are_skipped_when_the_arguments_name_a_test() {
        let selects =
            |args: &[&str]| selects_tests(&args.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert!(selects(&["host_refuses_plugin"]));
        assert!(selects(&["-E", "test(host)"]));
        assert!(!selects(&[]));
        assert!(!selects(&["--no-fail-fast"]));
        assert!(!selects(&["--profile", "ci"]));
    }
}
