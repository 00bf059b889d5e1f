//! The requirements as tests of cargo's, each with the requirement's name.
//!
//! ```text
//! conformance_main!(fixture) ─▶ main ─▶ for each chosen requirement:
//!     wait for the locks ─▶ fixture() ─▶ check the requirement ─▶ drop the fixture ─▶ summary of all
//! ```
//!
//! Two tests cannot share the machines, files and addresses of a backend. The tests of one program run one after the
//! other. A test runner may start each in its own process, so they wait for two locks on files. The lock on the test
//! program keeps two fixtures from existing at once. The lock on the plugin excludes other programs that test it.

use std::env;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::fixture::Fixture;
use crate::host_process::run_host_process;
use crate::keep;
use crate::report::{Check, CheckFailure, Report};
use crate::spec::{Answer, Program};
use crate::suite::{meaning, names};

/// The argument by which the test program becomes a host process.
const HOST_PROCESS: &str = "--host-process";

/// Defines the `main` of a test program with one test for each requirement. `fixture` is a function without parameters
/// that returns an [`Answer`] with a [`Fixture`]; each test calls it. The test needs `harness = false` in `Cargo.toml`.
///
/// ```
/// use machinery_conformance::{Answer, Fixture, BackendSpec, artifacts};
///
/// fn fixture() -> Answer<Fixture> {
///     let config = "machines: {one: {ip: 10.0.0.1, platform: linux, os_version: 12}}";
///     Ok(Fixture::new(artifacts::plugin("mine")?, config, BackendSpec::new(&["one"]))?)
/// }
///
/// machinery_conformance::conformance_main!(fixture);
/// ```
#[macro_export]
macro_rules! conformance_main {
    ($($fixture:ident)::+) => {
        fn main() -> ::std::process::ExitCode {
            $crate::main($($fixture)::+)
        }

        // Exists only with the usual harness, which would not call `main`.
        #[test]
        fn harness_is_false() -> Result<(), &'static str> {
            Err("set `harness = false` in the section `[[test]]` of Cargo.toml")
        }
    };
}

/// Runs the tests that the arguments choose, prints a summary, and returns the exit code. The name of a requirement
/// chooses only that requirement; any other text chooses the requirements whose names contain it.
pub fn main(fixture: fn() -> Answer<Fixture>) -> ExitCode {
    let mut given = env::args_os().skip(1);
    if let (Some(HOST_PROCESS), Some(request)) =
        (given.next().as_deref().and_then(|first| first.to_str()), given.next())
    {
        return ExitCode::from(u8::from(!run_host_process(Path::new(&request))));
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    arguments.exact |= arguments.filter.as_deref().is_some_and(|name| meaning(name).is_some());
    let done = Arc::<Mutex<Vec<Check>>>::default();
    let trial = |name| {
        let done = Arc::clone(&done);
        Trial::ignorable_test(name, move || test(fixture, name, &done))
    };
    let conclusion = libtest_mimic::run(&arguments, names().into_iter().map(trial).collect());
    let checks = std::mem::take(&mut *done.lock().unwrap_or_else(PoisonError::into_inner));
    if !checks.is_empty() {
        println!("{}\n", Report::new(checks).summary());
    }
    conclusion.exit_code()
}

/// Checks a requirement as a test.
fn test(
    fixture: fn() -> Answer<Fixture>,
    name: &'static str,
    done: &Mutex<Vec<Check>>,
) -> Result<Completion, Failed> {
    let check = check(fixture, name).unwrap_or_else(|why| Check::new(name, Err(CheckFailure::Failed(why))));
    check.notes.iter().for_each(|note| println!("note  {name}: {note}"));
    let result = check.result.clone();
    done.lock().unwrap_or_else(PoisonError::into_inner).push(check);
    match result {
        Ok(()) => Ok(Completion::Completed),
        Err(CheckFailure::Skipped(why)) => Ok(Completion::ignored_with(why)),
        Err(CheckFailure::Failed(how)) => Err(how.into()),
    }
}

/// Checks the plugin of the fixture against one requirement, while no other test of that plugin runs.
fn check(fixture: fn() -> Answer<Fixture>, name: &str) -> Result<Check, String> {
    let program =
        env::current_exe().map_err(|error| format!("finding the path of this test program: {error}"))?;
    let _program_lock = lock(&program)?;
    let mut fixture = fixture().map_err(|error| format!("creating the fixture: {error}"))?;
    fixture.set_host_program(Program { path: program, arguments: vec![HOST_PROCESS.into()] });
    let _plugin_lock = lock(fixture.plugin())?;
    let report = fixture.run_some(&[name]);
    let check = report.checks().first().cloned().ok_or("the suite has no result")?;
    match check.result {
        Err(CheckFailure::Failed(how)) if keep::is_requested() => {
            let how = format!("{how}\n      kept {}", fixture.keep_folders().display());
            Ok(Check { result: Err(CheckFailure::Failed(how)), ..check })
        }
        result => Ok(Check { result, ..check }),
    }
}

/// Waits for the lock on the file. Dropping the result releases it.
fn lock(path: &Path) -> Result<File, String> {
    let locked = File::open(path).and_then(|file| file.lock().map(|()| file));
    locked.map_err(|error| format!("waiting for the lock on {}: {error}", path.display()))
}
