//! The requirements as tests of cargo's, each with the requirement's name.
//!
//! ```text
//! conformance_tests!(fixture) ─▶ mod requirements { #[test] fn identity … #[test] fn reports }
//!       each of them: wait for the locks ─▶ fixture() ─▶ its requirement ─▶ drop the fixture
//! ```
//!
//! Two tests cannot share the machines, files and addresses of a backend. A test runner starts as many tests as the
//! computer has processors, and nextest starts each in its own process. The tests therefore wait for two locks on
//! files. The lock on the test program keeps two fixtures from existing at once. The lock on the plugin excludes
//! other programs that test it.

use std::env;
use std::fmt;
use std::fs::File;
use std::path::Path;

use crate::fixture::Fixture;
use crate::spec::Answer;

/// Defines one test for each requirement, in a module `requirements`. `fixture` is a function without parameters
/// that returns an [`Answer`] with a [`Fixture`]; each test calls it.
///
/// ```
/// use machinery_conformance::{Answer, Fixture, BackendSpec, artifacts};
///
/// fn fixture() -> Answer<Fixture> {
///     let config = "machines: {one: {ip: 10.0.0.1, platform: linux, os_version: 12}}";
///     Ok(Fixture::new(artifacts::plugin("mine")?, config, BackendSpec::new(&["one"]))?)
/// }
///
/// machinery_conformance::conformance_tests!(fixture);
/// ```
#[macro_export]
macro_rules! conformance_tests {
    ($($fixture:ident)::+) => {
        #[cfg(test)]
        mod requirements {
            use super::$($fixture)::+ as the_fixture;
            $crate::with_requirements! { $crate::requirement_tests, the_fixture }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! requirement_tests {
    ($fixture:ident: $($module:ident::$name:ident $meaning:literal;)*) => {
        $(
            #[doc = $meaning]
            #[test]
            fn $name() -> Result<(), $crate::Violation> {
                $crate::check($fixture, stringify!($name))
            }
        )*
    };
}

/// A violation of a requirement, with the report. A test that returns it fails with only this text.
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A test runner displays this text.
impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Violation {}

/// Checks the plugin of the fixture against one requirement, while no other test of that plugin runs. Each test of
/// [`conformance_tests!`](crate::conformance_tests) calls it. A skipped requirement is no error; the output
/// contains the reason.
///
/// # Errors
/// The plugin violates the requirement, or the fixture cannot be created.
pub fn check(fixture: impl FnOnce() -> Answer<Fixture>, requirement: &str) -> Result<(), Violation> {
    let program = env::current_exe()
        .map_err(|error| Violation(format!("finding the path of this test program: {error}")))?;
    let _program_lock = lock(&program)?;
    let fixture = fixture().map_err(|error| Violation(format!("creating the fixture: {error}")))?;
    let _plugin_lock = lock(fixture.plugin())?;
    let report = fixture.run_some(&[requirement]);
    // The fixture may keep resources that waiting tests need.
    drop(fixture);
    if !report.passed() {
        return Err(Violation(report.to_string()));
    }
    print!("{report}");
    Ok(())
}

/// Waits for the lock on the file. Dropping the result releases it.
fn lock(path: &Path) -> Result<File, Violation> {
    let locked = File::open(path).and_then(|file| file.lock().map(|()| file));
    locked.map_err(|error| Violation(format!("waiting for the lock on {}: {error}", path.display())))
}
