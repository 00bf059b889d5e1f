//! Ends the runs that a host has left, when no host is to adopt them.
//!
//! ```text
//! lock the CWD ─┬─ a host serves: its runs are its own
//!               └─ load plugins without adoption: each ends the runs of the earlier host ─▶ captures end ─▶ shut down
//! ```

use std::sync::Arc;

use machinery::Result;

use crate::capture;
use crate::client_file::Folders;
use crate::config::Config;
use crate::cwd::{Cwd, make_folder, make_reachable_folder};
use crate::cwd_lock::lock_without_host;
use crate::events::Events;
use crate::fleet::state_file::StateStore;
use crate::limits;
use crate::load::{load_all, shutdown_plugin};
use crate::plugin::search::PluginSearch;
use crate::server::listener;
use crate::service_manager::Loading;

/// Ends the runs that a host has left. Returns false if a host serves the CWD: it has adopted them.
///
/// # Errors
/// The configuration cannot be read, a plugin cannot be loaded, or Cuckoo's own manager serves the CWD.
pub fn end_runs(cwd: &Cwd, search: &PluginSearch) -> Result<bool> {
    let config = Config { adopts: false, ..Config::read(cwd)? };
    make_reachable_folder(&cwd.state())?;
    make_folder(&cwd.sockets())?;
    let Some(_lock) = lock_without_host(&cwd.state())? else { return Ok(false) };
    let _loading = Loading::begin(config.loading_limit())?;
    listener::expect_no_other(&cwd.manager_socket())?;
    Folders::of(cwd).prepare()?;
    limits::raise_file_limit();
    let fleet = load_all(cwd, &config, search, &Events::default())?;
    let state = StateStore::open(&cwd.state(), Arc::clone(&fleet))?;
    capture::end_leftovers(&state.captures(), cwd.root());
    for machinery in fleet.roster().machineries() {
        shutdown_plugin(&machinery.name, Arc::clone(&machinery.instance), config.timeouts.shutdown);
    }
    Ok(true)
}
