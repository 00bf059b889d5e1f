//! The requirements as tests of cargo's, each with the requirement's name.
//!
//! ```text
//! conformance_tests!(fixture) ─▶ mod requirements { #[test] fn identity … #[test] fn reports }
//!       each of them: wait for the others ─▶ fixture() ─▶ its requirement ─▶ the fixture goes
//! ```
//!
//! A backend has machines, files and addresses that two tests would fight over, and a test runner
//! starts as many tests as there are processors, some of them (nextest) in processes of their own.
//! So they wait for each other by locks on files: on the test program, so that not even two fixtures
//! are there together, and on the plugin, for other programs that test it.

use std::env;
use std::fmt;
use std::fs::File;
use std::path::Path;

use crate::{Answer, Fixture};

/// One test for each requirement, in a module `requirements`. `fixture` is a function that takes nothing and
/// gives an [`Answer`] with a [`Fixture`]; each test has its own.
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
            use super::$($fixture)::+ as the_scene;
            $crate::with_requirements! { $crate::requirement_tests, the_scene }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! requirement_tests {
    ($fixture:ident: $($room:ident::$name:ident $says:literal;)*) => {
        $(
            #[doc = $says]
            #[test]
            fn $name() -> Result<(), $crate::Violation> {
                $crate::check($fixture, stringify!($name))
            }
        )*
    };
}

/// A requirement that was not kept: the report. A test that returns it fails with just that text.
pub struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a test runner shows.
impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Violation {}

/// What each test of [`conformance_tests!`](crate::conformance_tests) does: puts the plugin of the
/// fixture to one requirement, alone of all tests of that plugin. One that is not tried is fine, and the
/// output says why.
///
/// # Errors
/// It is broken, or the fixture cannot be made.
pub fn check(fixture: impl FnOnce() -> Answer<Fixture>, requirement: &str) -> Result<(), Violation> {
    let program = env::current_exe().map_err(|error| Violation(format!("looking for this test: {error}")))?;
    let _alone_here = lock(&program)?;
    let fixture = fixture().map_err(|error| Violation(format!("making the fixture: {error}")))?;
    let _alone_with_the_plugin = lock(fixture.plugin())?;
    let report = fixture.run_some(&[requirement]);
    // What it keeps may be shared with those who wait.
    drop(fixture);
    if !report.passed() {
        return Err(Violation(report.to_string()));
    }
    print!("{report}");
    Ok(())
}

/// Waits until nobody else has the file; the lock ends with what is returned.
fn lock(path: &Path) -> Result<File, Violation> {
    let locked = File::open(path).and_then(|file| file.lock().map(|()| file));
    locked.map_err(|error| Violation(format!("waiting for {} to be free: {error}", path.display())))
}
