//! The promises as tests of cargo's, each with the promise's name.
//!
//! ```text
//! conformance_tests!(scene) ─▶ mod promises { #[test] fn identity … #[test] fn reports }
//!       each of them: wait for the others ─▶ scene() ─▶ its promise ─▶ the scene goes
//! ```
//!
//! A backend has machines, files and addresses that two tests would fight over, and a test runner
//! starts as many tests as there are processors, some of them (nextest) in processes of their own.
//! So they wait for each other by locks on files: on the test program, so that not even two scenes
//! are there together, and on the plugin, for other programs that test it.

use std::env;
use std::fmt;
use std::fs::File;
use std::path::Path;

use crate::{Answer, Scene};

/// One test for each promise, in a module `promises`. `scene` is a function that takes nothing and
/// gives an [`Answer`] with a [`Scene`]; each test has its own.
///
/// ```
/// use machinery_conformance::{Answer, Scene, Subject, artifacts};
///
/// fn scene() -> Answer<Scene> {
///     let config = "machines: {one: {ip: 10.0.0.1, platform: linux, os_version: 12}}";
///     Ok(Scene::new(artifacts::plugin("mine")?, config, Subject::new(&["one"]))?)
/// }
///
/// machinery_conformance::conformance_tests!(scene);
/// ```
#[macro_export]
macro_rules! conformance_tests {
    ($($scene:ident)::+) => {
        #[cfg(test)]
        mod promises {
            use super::$($scene)::+ as the_scene;
            $crate::with_promises! { $crate::promise_tests, the_scene }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! promise_tests {
    ($scene:ident: $($room:ident::$name:ident $says:literal;)*) => {
        $(
            #[doc = $says]
            #[test]
            fn $name() -> Result<(), $crate::Broken> {
                $crate::keeps($scene, stringify!($name))
            }
        )*
    };
}

/// A promise that was not kept: the report. A test that returns it fails with just that text.
pub struct Broken(String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a test runner shows.
impl fmt::Debug for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Broken {}

/// What each test of [`conformance_tests!`](crate::conformance_tests) does: puts the plugin of the
/// scene to one promise, alone of all tests of that plugin. One that is not tried is fine, and the
/// output says why.
///
/// # Errors
/// It is broken, or the scene cannot be made.
pub fn keeps(scene: impl FnOnce() -> Answer<Scene>, promise: &str) -> Result<(), Broken> {
    let program = env::current_exe().map_err(|error| Broken(format!("looking for this test: {error}")))?;
    let _alone_here = lock(&program)?;
    let scene = scene().map_err(|error| Broken(format!("making the scene: {error}")))?;
    let _alone_with_the_plugin = lock(scene.plugin())?;
    let report = scene.run_some(&[promise]);
    // What it keeps may be shared with those who wait.
    drop(scene);
    print!("{report}");
    if report.all_kept() { Ok(()) } else { Err(Broken(report.to_string())) }
}

/// Waits until nobody else has the file; the lock ends with what is returned.
fn lock(path: &Path) -> Result<File, Broken> {
    let locked = File::open(path).and_then(|file| file.lock().map(|()| file));
    locked.map_err(|error| Broken(format!("waiting for {} to be free: {error}", path.display())))
}
