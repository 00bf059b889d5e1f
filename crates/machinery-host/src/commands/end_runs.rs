//! Ends the runs that a host has left, when no host is to adopt them.
//!
//! ```text
//! lock the CWD ─┬─ a host serves: its runs are its own
//!               └─ load plugins without adoption: each ends the runs of the earlier host ─▶ captures end ─▶ shut down
//! ```

use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, Result, State};

use crate::capture;
use crate::client_file::Folders;
use crate::config::Config;
use crate::cwd::{Cwd, make_folder, make_state_folder};
use crate::cwd_lock::lock_without_host;
use crate::events::Events;
use crate::fleet::state_file::StateStore;
use crate::fleet::{Machinery, Roster};
use crate::limits;
use crate::load::{load_all, shutdown_plugin};
use crate::plugin::call::call_blocking;
use crate::plugin::search::PluginSearch;
use crate::server::listener;
use crate::service_manager::Loading;

/// Ends the runs that a host has left, and returns the machines that are on nevertheless. Returns `None` if a host serves
/// the CWD: it has adopted them.
///
/// # Errors
/// The configuration cannot be read, a plugin cannot be loaded, or Cuckoo's own manager serves the CWD.
pub fn end_runs(cwd: &Cwd, search: &PluginSearch) -> Result<Option<Vec<String>>> {
    let config = Config { adopts: false, ..Config::read(cwd)? };
    make_state_folder(cwd)?;
    make_folder(&cwd.sockets())?;
    let Some(_lock) = lock_without_host(&cwd.state())? else { return Ok(None) };
    let _loading = Loading::begin(config.loading_limit())?;
    listener::expect_no_other(&cwd.manager_socket())?;
    Folders::of(cwd).prepare()?;
    limits::raise();
    let fleet = load_all(cwd, &config, search, &Events::default())?;
    let state = StateStore::open(&cwd.state(), Arc::clone(&fleet))?;
    capture::end_leftovers(&state.captures(), cwd.root());
    let roster = fleet.roster();
    let on = roster.machines().iter().filter(|machine| machine.status().state != State::Poweroff);
    let on = on.map(|machine| machine.name().to_owned()).collect();
    for machinery in roster.machineries() {
        warn_of_what_remains(machinery, &roster, config.timeouts.load);
        shutdown_plugin(&machinery.name, Arc::clone(&machinery.instance), config.timeouts.shutdown);
    }
    let is_loaded = |name: &String| roster.machineries().iter().any(|machinery| machinery.name == *name);
    match config.machineries.iter().find(|name| !is_loaded(name)) {
        None => Ok(Some(on)),
        Some(name) => {
            Err(Error::environment(format!("the machinery '{name}' cannot be loaded: its runs may remain"))
                .advice("Install the library that the log names, and repeat the command"))
        }
    }
}

/// Logs which machines are on nevertheless, and which ones their plugin cannot use.
fn warn_of_what_remains(machinery: &Arc<Machinery>, roster: &Roster, limit: Duration) {
    let of_machinery = roster.machines().iter().filter(|machine| machine.machinery.name == machinery.name);
    let names: Vec<String> = of_machinery.clone().map(|machine| machine.name().to_owned()).collect();
    for machine in of_machinery.filter(|machine| machine.status().state != State::Poweroff) {
        let state = machine.status().state;
        tracing::warn!(machine = machine.name(), %state, "is on: somebody else has started it, or it does not end");
    }
    let instance = Arc::clone(&machinery.instance);
    let diagnose = move || instance.diagnose(&names, Deadline::after(limit));
    match call_blocking(limit, "looking for leftovers", diagnose) {
        Ok(found) => {
            found.into_iter().filter_map(|found| found.unusable).for_each(|why| tracing::warn!("{why}"))
        }
        Err(error) => tracing::warn!(machinery = machinery.name, %error, "leftovers are unknown"),
    }
}
