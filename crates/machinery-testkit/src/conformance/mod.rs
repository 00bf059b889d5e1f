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
//! ```no_run
//! # fn main() -> machinery_testkit::Result<()> {
//! use machinery_testkit::artifacts;
//! use machinery_testkit::conformance::{self, Subject};
//! # let setup: machinery::Setup = unimplemented!();
//! # fn first_count(machine: &str) -> u32 { 0 }
//! let plugin = artifacts::plugin("xen")?;
//! let subject = Subject::new(&["xen1", "xen2"], 1001..=1001, |_, machine| Ok(first_count(machine)));
//! let report = conformance::run(&plugin, &setup, &subject);
//! assert!(report.all_kept(), "{report}");
//! # Ok(()) }
//! ```
//!
//! One promise needs a host that dies, and so a process of its own: that `load` clears away what
//! such a host has left. The tests of a plugin that leaves anything have to try it themselves.
//!
//! | room | what it holds |
//! | --- | --- |
//! | `subject` | what an author tells of the backend |
//! | `promises` | the promises, by theme |
//! | `session` | a loaded machinery and what can be asked or demanded of it |
//! | `call` | calls by name, and the bound on them |
//! | `ears` | what the plugin tells its host |
//! | `report` | what came of it |

mod call;
mod ears;
mod promises;
mod report;
mod session;
mod subject;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use machinery::Setup;
use machinery::host::Plugin;

pub use ears::Deaf;
pub use report::{Check, Report, Unmet};
pub use subject::{Answer, Subject};

use ears::Ears;
use promises::PROMISES;
use report::Result;
use session::Session;

/// Puts the plugin file to every promise.
pub fn run(plugin: &Path, setup: &Setup, subject: &Subject) -> Report {
    run_some(plugin, setup, subject, &names())
}

/// Puts the plugin file to the promises of these names only; a name that is none fails.
pub fn run_some(plugin: &Path, setup: &Setup, subject: &Subject, names: &[&str]) -> Report {
    match Plugin::open(plugin) {
        Ok(plugin) => Suite::new(plugin, setup, subject).report(names),
        Err(error) => {
            let why = format!("opening {}: {error}", plugin.display());
            Report::new(vec![Check::new("open", Err(Unmet::Failed(why)))])
        }
    }
}

/// The names of all promises, in the order in which they are tried.
pub fn names() -> Vec<&'static str> {
    PROMISES.iter().map(|(name, _)| *name).collect()
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
        let known = PROMISES.iter().filter(|(name, _)| names.contains(name));
        let mut checks: Vec<_> =
            known.map(|(name, promise)| Check::new(name, self.try_one(*promise))).collect();
        let unknown = names.iter().filter(|name| !self::names().contains(name));
        checks.extend(
            unknown.map(|name| Check::new(name, Err(Unmet::Failed("there is no such promise".into())))),
        );
        Report::new(checks)
    }

    fn try_one(&self, promise: fn(&Session) -> Result) -> Result {
        if let Some(call) = self.hung.get() {
            return Err(Unmet::NotTried(format!("the plugin is still in {call}")));
        }
        let session = Session::load(self)?;
        let kept = promise(&session);
        let closed = session.close();
        // The first thing that went wrong is the cause of the rest.
        kept.and(closed)
    }
}
