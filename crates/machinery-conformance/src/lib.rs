//! The promises of [`Machinery`](machinery::Machinery), as checks that any plugin can be put to.
//!
//! A plugin is opened as a host opens it, from its file, and called as a host calls it: from any
//! thread, several machines at a time, with deadlines. What it answers is not believed: a *probe*
//! looks at the machine itself, and what the machines leave behind is looked for on the host.
//!
//! ```text
//!   Subject: the backend's machines,       ┌─ load ─▶ one promise ─▶ stop all, shutdown ─┐
//!   how to look at them, how to break them │         (for each of them, in order)        │─▶ Report
//!                                          └──────────── nothing may be left ────────────┘
//! ```
//!
//! Each promise has a name, and a machinery loaded for it alone: one that is not kept spoils no
//! other. Every call runs in a thread of its own, so a call that never returns is found out too;
//! the promises behind it are then not tried, for the plugin may be called no more.
//!
//! # Testing a plugin
//!
//! In the plugin's `tests/conformance.rs`, one test for each promise:
//!
//! ```
//! use machinery_conformance::{Answer, Scene, Subject, artifacts};
//!
//! fn scene() -> Answer<Scene> {
//!     let config = "machines: {one: {ip: 10.0.0.1, platform: linux, os_version: 12}}";
//!     Ok(Scene::new(artifacts::plugin("mine")?, config, Subject::new(&["one"]))?)
//! }
//!
//! machinery_conformance::conformance_tests!(scene);
//! ```
//!
//! That needs no more than the names of machines, and so believes much. The more the [`Subject`]
//! tells of the backend, the less is believed: where a run [began](Subject::counts), whether a
//! machine [lives](Subject::alive), what is [left](Subject::leftovers) of it, how to
//! [spoil](Subject::breakage) a start and how to [end](Subject::death) a machine.
//!
//! For `cargo test` to build the library of the plugin, its types have to be
//! `crate-type = ["cdylib", "rlib"]`.
//!
//! Without any tests, `cuckoo-machinery conformance FILE --config YAML` puts a built plugin to the
//! promises, each in a process of its own.
//!
//! One promise needs a host that dies, and so a process of its own: that `load` clears away what
//! such a host has left. The tests of a plugin that leaves anything have to try it themselves.
//!
//! # Where things are
//!
//! | room | what it holds |
//! | --- | --- |
//! | `subject` | what an author tells of the backend |
//! | `scene` | a plugin, its configuration and folders, and the subject: all that a test needs |
//! | `named` | the promises as tests of cargo's |
//! | [`artifacts`] | where the build has put the plugin |
//! | `promises` | the promises, by theme; their one list |
//! | `session` | a loaded machinery and what can be asked or demanded of it |
//! | `call` | calls by name, and the bound on them |
//! | `ears` | what the plugin tells its host |
//! | `report` | what came of it |

#![warn(missing_docs)]

pub mod artifacts;
mod call;
mod ears;
mod named;
mod promises;
mod report;
mod scene;
mod session;
mod subject;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use machinery::Setup;
use machinery::host::{OpenError, Plugin};

pub use ears::Deaf;
pub use named::{Broken, keeps};
pub use report::{Check, Report, Unmet};
pub use scene::{Scene, setup_in};
pub use subject::{Answer, Subject};

use call::bounded;
use ears::Ears;
use promises::{PROMISES, Promise};
use report::Result;
use session::{GRACE, Session};

/// Puts the plugin file to every promise.
pub fn run(plugin: &Path, setup: &Setup, subject: &Subject) -> Report {
    run_some(plugin, setup, subject, &names())
}

/// Puts the plugin file to the promises of these names only; a name that is none fails.
pub fn run_some(plugin: &Path, setup: &Setup, subject: &Subject, names: &[&str]) -> Report {
    match open(plugin, subject) {
        Ok(plugin) => Suite::new(plugin, setup, subject).report(names),
        Err(why) => {
            let why = format!("opening {}: {why}", plugin.display());
            Report::new(vec![Check::new("open", Err(Unmet::Failed(why)))])
        }
    }
}

/// The names of all promises, in the order in which they are tried.
pub fn names() -> Vec<&'static str> {
    PROMISES.iter().map(|promise| promise.name).collect()
}

/// What the promise of that name says, if there is one.
pub fn meaning(name: &str) -> Option<&'static str> {
    PROMISES.iter().find(|promise| promise.name == name).map(|promise| promise.says)
}

/// Opens the file, which runs its initialisers: they may never end.
fn open(plugin: &Path, subject: &Subject) -> Result<Plugin, String> {
    let (path, limit) = (plugin.to_owned(), subject.patience + GRACE);
    let opened = bounded(limit, move || Plugin::open(&path));
    let opened = opened.map_err(|_| format!("it has not returned after {limit:?}"))?;
    opened.map_err(|error: OpenError| error.to_string())
}

/// One plugin, and all that its promises are tried with.
struct Suite<'a> {
    plugin: Plugin,
    setup: &'a Setup,
    subject: &'a Subject,
    ears: Arc<Ears>,
    /// The call that never returned.
    hung: OnceLock<String>,
}

impl<'a> Suite<'a> {
    fn new(plugin: Plugin, setup: &'a Setup, subject: &'a Subject) -> Self {
        Suite { plugin, setup, subject, ears: Arc::default(), hung: OnceLock::new() }
    }

    fn report(&self, names: &[&str]) -> Report {
        let known = PROMISES.iter().filter(|promise| names.contains(&promise.name));
        let mut checks: Vec<_> =
            known.map(|promise| Check::new(promise.name, self.try_one(promise))).collect();
        let left_out = self.subject.without.iter().map(|(name, _)| name.as_str());
        let unknown = names.iter().copied().chain(left_out).filter(|name| meaning(name).is_none());
        checks.extend(
            unknown.map(|name| Check::new(name, Err(Unmet::Failed("there is no such promise".into())))),
        );
        Report::new(checks)
    }

    fn try_one(&self, promise: &Promise) -> Result {
        if let Some(why) = self.subject.left_out(promise.name) {
            return Err(Unmet::NotTried(why.to_owned()));
        }
        if let Some(call) = self.hung.get() {
            return Err(Unmet::NotTried(format!("the plugin is still in {call}")));
        }
        let mut session = Session::load(self)?;
        let kept = session.meet().and_then(|()| (promise.check)(&session));
        let closed = session.close();
        // The first thing that went wrong is the cause of the rest.
        kept.and(closed)
    }
}
