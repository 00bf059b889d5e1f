//! The requirements of [`Machinery`](machinery::Machinery), as checks that any plugin can be put to.
//!
//! A plugin is opened as a host opens it, from its file, and called as a host calls it: from any
//! thread, several machines at a time, with deadlines. What it answers is not believed: a *probe*
//! looks at the machine itself, and what the machines leave behind is looked for on the host.
//!
//! ```text
//!   BackendSpec: the backend's machines,       ┌─ load ─▶ one requirement ─▶ stop all, shutdown ─┐
//!   how to look at them, how to break them │         (for each of them, in order)        │─▶ Report
//!                                          └──────────── nothing may be left ────────────┘
//! ```
//!
//! Each requirement has a name, and a machinery loaded for it alone: one that is not kept spoils no
//! other. Every call runs in a thread of its own, so a call that never returns is found out too;
//! the requirements behind it are then not tried, for the plugin may be called no more.
//!
//! # Testing a plugin
//!
//! In the plugin's `tests/conformance.rs`, one test for each requirement:
//!
//! ```
//! use machinery_conformance::{Answer, Fixture, BackendSpec, artifacts};
//!
//! fn fixture() -> Answer<Fixture> {
//!     let config = "machines: {one: {ip: 10.0.0.1, platform: linux, os_version: 12}}";
//!     Ok(Fixture::new(artifacts::plugin("mine")?, config, BackendSpec::new(&["one"]))?)
//! }
//!
//! machinery_conformance::conformance_tests!(fixture);
//! ```
//!
//! That needs no more than the names of machines, and so believes much. The more the [`BackendSpec`]
//! tells of the backend, the less is believed: where a run [began](BackendSpec::counts), whether a
//! machine [lives](BackendSpec::alive), what is [left](BackendSpec::leftovers) of it, how to
//! [spoil](BackendSpec::breakage) a start and how to [end](BackendSpec::death) a machine.
//!
//! For `cargo test` to build the library of the plugin, its types have to be
//! `crate-type = ["cdylib", "rlib"]`.
//!
//! Without any tests, `cuckoo-machinery conformance FILE --config YAML` puts a built plugin to the
//! requirements, each in a process of its own.
//!
//! One requirement needs a host that dies, and so a process of its own: that `load` clears away what
//! such a host has left. The tests of a plugin that leaves anything have to try it themselves.
//!
//! # Where things are
//!
//! | room | what it holds |
//! | --- | --- |
//! | `spec` | what an author tells of the backend |
//! | `fixture` | a plugin, its configuration and folders, and the spec: all that a test needs |
//! | `named` | the requirements as tests of cargo's |
//! | [`artifacts`] | where the build has put the plugin |
//! | `requirements` | the requirements, by theme; their one list |
//! | `session` | a loaded machinery and what can be asked or demanded of it |
//! | `call` | calls by name, and the bound on them |
//! | `recorder` | what the plugin tells its host |
//! | `report` | what came of it |

#![warn(missing_docs)]

pub mod artifacts;
mod call;
mod fixture;
mod named;
mod recorder;
mod report;
mod requirements;
mod session;
mod spec;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use machinery::Setup;
use machinery::host::{OpenError, Plugin};

pub use fixture::{Fixture, setup_in};
pub use named::{Violation, check};
pub use recorder::NullHost;
pub use report::{Check, CheckFailure, Report};
pub use spec::{Answer, BackendSpec};

use call::bounded;
use recorder::EventRecorder;
use report::Result;
use requirements::{REQUIREMENTS, Requirement};
use session::{GRACE, Session};

/// Puts the plugin file to every requirement.
pub fn run(plugin: &Path, setup: &Setup, spec: &BackendSpec) -> Report {
    run_some(plugin, setup, spec, &names())
}

/// Puts the plugin file to the requirements of these names only; a name that is none fails.
pub fn run_some(plugin: &Path, setup: &Setup, spec: &BackendSpec, names: &[&str]) -> Report {
    match open(plugin, spec) {
        Ok(plugin) => Suite::new(plugin, setup, spec).report(names),
        Err(why) => {
            let why = format!("opening {}: {why}", plugin.display());
            Report::new(vec![Check::new("open", Err(CheckFailure::Failed(why)))])
        }
    }
}

/// The names of all requirements, in the order in which they are tried.
pub fn names() -> Vec<&'static str> {
    REQUIREMENTS.iter().map(|requirement| requirement.name).collect()
}

/// What the requirement of that name says, if there is one.
pub fn meaning(name: &str) -> Option<&'static str> {
    REQUIREMENTS.iter().find(|requirement| requirement.name == name).map(|requirement| requirement.says)
}

/// Opens the file, which runs its initialisers: they may never end.
fn open(plugin: &Path, spec: &BackendSpec) -> Result<Plugin, String> {
    let (path, limit) = (plugin.to_owned(), spec.timeout + GRACE);
    let opened = bounded(limit, move || Plugin::open(&path));
    let opened = opened.map_err(|_| format!("it has not returned after {limit:?}"))?;
    opened.map_err(|error: OpenError| error.to_string())
}

/// One plugin, and all that its requirements are tried with.
struct Suite<'a> {
    plugin: Plugin,
    setup: &'a Setup,
    spec: &'a BackendSpec,
    recorder: Arc<EventRecorder>,
    /// The call that never returned.
    hung: OnceLock<String>,
}

impl<'a> Suite<'a> {
    fn new(plugin: Plugin, setup: &'a Setup, spec: &'a BackendSpec) -> Self {
        Suite { plugin, setup, spec, recorder: Arc::default(), hung: OnceLock::new() }
    }

    fn report(&self, names: &[&str]) -> Report {
        let known = REQUIREMENTS.iter().filter(|requirement| names.contains(&requirement.name));
        let mut checks: Vec<_> =
            known.map(|requirement| Check::new(requirement.name, self.try_one(requirement))).collect();
        let left_out = self.spec.skip.iter().map(|(name, _)| name.as_str());
        let unknown = names.iter().copied().chain(left_out).filter(|name| meaning(name).is_none());
        checks.extend(
            unknown.map(|name| {
                Check::new(name, Err(CheckFailure::Failed("there is no such requirement".into())))
            }),
        );
        Report::new(checks)
    }

    fn try_one(&self, requirement: &Requirement) -> Result {
        if let Some(why) = self.spec.left_out(requirement.name) {
            return Err(CheckFailure::Skipped(why.to_owned()));
        }
        if let Some(call) = self.hung.get() {
            return Err(CheckFailure::Skipped(format!("the plugin is still in {call}")));
        }
        let mut session = Session::load(self)?;
        let kept = session.meet().and_then(|()| (requirement.check)(&session));
        let closed = session.close();
        // The first thing that went wrong is the cause of the rest.
        kept.and(closed)
    }
}
