//! The life of the host.
//!
//! ```text
//! read configuration ─▶ lock the CWD ─▶ load plugins ─▶ socket ─▶ ready ─▶ serving
//!     SIGHUP ─▶ the configuration is read again (see `reload`)
//!     SIGTERM, SIGINT ─▶ no new action ─▶ running actions end ─▶ own runs end ─▶ plugins shut down
//!                                                                      ─▶ socket removed ─▶ exit 0
//!     SIGUSR2 ─▶ the program is checked ─▶ no new action ─▶ running actions end ─▶ plugins hand over
//!                                                                      ─▶ the program is executed again
//! ```
//!
//! After SIGUSR2, the new program has the same process number and the same socket, and adopts the runs of the old one. With
//! `--handover`, SIGTERM leaves them in the same way, and ends the host: the next start adopts them. A host that is asked to
//! stop when its plugins have handed over already executes its program again, which adopts the machines and stops them.
//!
//! The request `shutdown` ends the host as SIGTERM does without `--handover`.
//!
//! A plugin that calls `exit()` triggers the same shutdown, with exit code 1: see [`exit`].

mod end;
mod signals;

use std::cell::Cell;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result};
use tokio::signal::unix::{Signal, SignalKind};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::actions::adoption::{leave_foreign_runs_alone, resume_runs};
use crate::actions::context::ActionContext;
use crate::actions::diagnose::diagnose_all;
use crate::actions::metrics::Metrics;
use crate::actions::queues::Queues;
use crate::capture;
use crate::client_file::Folders;
use crate::commands::machine;
use crate::config::Config;
use crate::cwd::{Cwd, make_folder, make_state_folder};
use crate::cwd_lock::lock;
use crate::events::Events;
use crate::exit;
use crate::exporter;
use crate::fleet::state_file::StateStore;
use crate::fleet::{Fleet, Roster};
use crate::limits;
use crate::load;
use crate::manager::Manager;
use crate::manager::replacement::Replacement;
use crate::plugin::search::PluginSearch;
use crate::reload::Reloader;
use crate::server::consoles::Consoles;
use crate::server::listener;
use crate::server::peers::Peers;
use crate::service_manager::{self, Loading};
use crate::{wall, watchdog};
use end::{NextProgram, drain, execute_again};
use signals::{Asked, EarlySignals, EndSignals, Hangup, listen};

/// The maximum number of calls into plugins at a time. In effect there is no limit: a thread starts only for a call,
/// and a machine has three calls at most, its action, a query of its state, and the cancellation of a preparation.
const MAX_CALLS: usize = 1 << 16;
/// The time in which the exporter, the consoles and the wall remove their files and sockets when the host ends.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(2);

/// The end of a host that has served.
#[derive(Debug)]
pub enum Served {
    /// The host has shut everything down.
    Cleanly,
    /// The end had a fault.
    With(Error),
}

/// The end of the work of a host.
enum Ended {
    /// The host ends.
    Finally(Served),
    /// The host has handed over, and executes its program again.
    Again(NextProgram),
}

/// Serves until a signal or a plugin ends the host.
///
/// # Errors
/// The host cannot start: configuration, plugins, or socket.
pub fn run(cwd: &Cwd, search: &PluginSearch, hands_over: bool) -> Result<Served> {
    let signals = EarlySignals::record()?;
    // An upgrade replaces the file of this program.
    let program = std::env::current_exe()
        .map_err(|error| Error::environment(format!("cannot find the host's own program: {error}")))?;
    let inherited = listener::inherited(&cwd.manager_socket())?;
    let config = Config::read(cwd)?;
    make_state_folder(cwd)?;
    make_folder(&cwd.sockets())?;
    let loading = Loading::begin(config.loading_limit())?;
    let _lock = lock(&cwd.state(), config.timeouts.load)?;
    Folders::of(cwd).prepare()?;
    // Before any plugin removes what it takes for the leftovers of a host that died.
    if inherited.is_none() {
        listener::expect_no_other(&cwd.manager_socket())?;
    }
    limits::raise();
    let events = Events::default();
    let peers = Arc::new(Peers::new(config.socket_group.as_deref())?);
    let fleet = load::load_all(cwd, &config, search, &events)?;
    exit::install_atexit_handler();
    let state = StateStore::open(&cwd.state(), Arc::clone(&fleet))?;
    // The captures of a host that was killed. Those of adopted runs begin again.
    capture::end_leftovers(&state.captures(), cwd.root());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(MAX_CALLS)
        .build()
        .map_err(|error| Error::environment(format!("cannot start the host's threads: {error}")))?;
    let result = runtime.block_on(async {
        let replacement = Replacement::new(&program, cwd, search);
        let manager = Arc::new(manager(cwd, search, config, fleet, state, events, replacement).await?);
        let (end, hangup) = signals.while_serving(hands_over)?;
        work_in_background(&manager, hangup)?;
        let exporter = tokio::spawn(exporter::run(Arc::clone(&manager)));
        let consoles = tokio::spawn(Consoles::open(&manager, &peers).serve());
        let wall = tokio::spawn(wall::run(Arc::clone(&manager), cwd.clone()));
        let ended = serve(cwd, &peers, manager, loading, inherited, end).await;
        // A file or a socket on a disk that hangs is left.
        let _ = timeout(REMOVAL_TIMEOUT, async { tokio::join!(exporter, consoles, wall) }).await;
        ended
    });
    // A plugin's call that never returns must not delay the end.
    runtime.shutdown_background();
    match result {
        Ok(Ended::Again(next)) => Err(execute_again(&program, next)),
        Ok(Ended::Finally(served)) => Ok(served),
        Err(error) => Err(error),
    }
}

/// Builds the shared state, and starts the workers of all machines.
async fn manager(
    cwd: &Cwd,
    search: &PluginSearch,
    config: Config,
    fleet: Arc<Fleet>,
    state: Arc<StateStore>,
    events: Events,
    replacement: Replacement,
) -> Result<Manager> {
    let metrics = Arc::new(Metrics::default());
    let context =
        Arc::new(ActionContext::new(&config, Folders::of(cwd), Arc::clone(&metrics), Arc::clone(&state)));
    let queues = Arc::new(Queues::new(context));
    diagnose_all(&fleet.roster(), config.timeouts.load).await;
    resume_runs(&fleet, queues.context()).await;
    leave_foreign_runs_alone(&fleet);
    queues.context().disable_quarantined(&fleet.roster()).await;
    hold_machines(cwd, &fleet.roster());
    fleet.roster().machines().iter().for_each(|machine| queues.add(machine));
    let reloader = Reloader::new(
        cwd.clone(),
        search.clone(),
        config,
        Arc::clone(&fleet),
        Arc::clone(&queues),
        Arc::clone(&state),
        events.clone(),
    )?;
    Ok(Manager::new(fleet, queues, reloader, metrics, state, events, replacement))
}

/// Holds the machines whose files a command replaces at present.
fn hold_machines(cwd: &Cwd, roster: &Roster) {
    let held = machine::held_entries(cwd);
    for machine in roster.machines() {
        let info = machine.info();
        if held.contains(info.clone_of.as_ref().unwrap_or(&info.name)) {
            machine.hold(machine::HELD);
        }
    }
}

async fn serve(
    cwd: &Cwd,
    peers: &Arc<Peers>,
    manager: Arc<Manager>,
    loading: Loading,
    inherited: Option<std::os::unix::net::UnixListener>,
    mut end: EndSignals,
) -> Result<Ended> {
    let mut exit = exit::exit_requested();
    let socket = cwd.manager_socket();
    let listener = listener::open(inherited, &socket, peers)?;
    tracing::info!(socket = %socket.display(), "ready");
    service_manager::report_ready(loading);
    let mut connections = JoinSet::new();
    let asked = tokio::select! {
        () = listener::serve(&listener, peers, &manager, &mut connections) => Asked::Stop,
        asked = end.next() => asked,
        () = manager.replacement().asked() => Asked::Replace,
        () = manager.end_asked() => Asked::Stop,
        // The sender lives as long as the process.
        _ = exit.wait_for(|exit| *exit) => Asked::Stop,
    };
    // First, so that no action is accepted from a client that knows of the end.
    let workers = manager.queues().close(asked.ending());
    if asked == Asked::Replace {
        service_manager::report_replacement();
    } else {
        service_manager::report_stopping();
        listener::remove(&socket);
    }
    let latest = Cell::new(asked);
    let drained = async {
        let finished = finish(&manager, workers);
        match asked {
            // Clients hear that they have to ask again.
            Asked::Replace => tokio::select! {
                () = listener::serve(&listener, peers, &manager, &mut connections) => {}
                () = finished => {}
            },
            Asked::Stop | Asked::HandOver => finished.await,
        }
        drain(&manager, || latest.get().ending(), connections).await
    };
    let Some(handed_over) = until_drained(drained, &mut end, &latest, &manager).await else {
        let error = Error::failed("asked to end once more: machines may be left");
        let error = error.advice("The next start adopts them, or clears them away");
        return Ok(Ended::Finally(Served::With(error)));
    };
    if *exit.borrow() {
        let by_plugin = Error::failed("a plugin called exit(): see the log for which");
        return Ok(Ended::Finally(Served::With(by_plugin)));
    }
    let stop = latest.get() == Asked::Stop;
    if latest.get() == Asked::Replace || (stop && handed_over) {
        let (listener, signals) = (listener::kept(listener, &socket)?, end.into_late()?);
        return Ok(Ended::Again(NextProgram { listener, stop, signals }));
    }
    listener::remove(&socket);
    Ok(Ended::Finally(Served::Cleanly))
}

/// Waits for the end of the drain, and returns its output; none if the host has to end at once.
async fn until_drained<T>(
    drained: impl Future<Output = T>,
    end: &mut EndSignals,
    latest: &Cell<Asked>,
    manager: &Manager,
) -> Option<T> {
    let mut drained = pin!(drained);
    loop {
        tokio::select! {
            drained = &mut drained => return Some(drained),
            next = end.next() => latest.set(latest.get().followed_by(next)?),
            // Another client than the first one is no reason to end at once.
            () = manager.end_asked() => latest.set(Asked::Stop),
        }
    }
}

/// Starts what goes on beside the requests of clients.
fn work_in_background(manager: &Arc<Manager>, hangup: Hangup) -> Result<()> {
    tokio::spawn(reload_at_signal(Arc::clone(manager), hangup));
    tokio::spawn(replace_at_signal(Arc::clone(manager), listen(SignalKind::user_defined2())?));
    tokio::spawn(apply_pending_changes(Arc::clone(manager)));
    if let Some(interval) = service_manager::watchdog_interval() {
        tokio::spawn(watch(interval, Arc::clone(manager)));
    }
    Ok(())
}

/// Waits until no reload and no action is under way. A plugin must not be shut down while it applies a configuration.
async fn finish(manager: &Manager, mut workers: JoinSet<()>) {
    manager.reloader().idle().await;
    while workers.join_next().await.is_some() {}
}

/// Reports to systemd that the host answers, also while it ends.
async fn watch(interval: Duration, manager: Arc<Manager>) {
    let prove = || watchdog::prove(Arc::clone(&manager));
    let error = watchdog::run(interval, prove, service_manager::report_alive).await;
    tracing::error!(%error, "systemd's watchdog gets no more reports");
}

/// Reloads the configuration at each SIGHUP, until the host ends.
async fn reload_at_signal(manager: Arc<Manager>, mut hangup: Hangup) {
    while hangup.received().await {
        // The result is in the log.
        let _ = manager.reload().await;
    }
}

/// Replaces the host at SIGUSR2, if the program is fit for it.
async fn replace_at_signal(manager: Arc<Manager>, mut replace: Signal) {
    while replace.recv().await.is_some() {
        tracing::info!(signal = "SIGUSR2", "asked for a replacement: machines are left to the next host");
        if let Err(error) = manager.replacement().request().await {
            tracing::error!(%error, "the host is not replaced");
        }
    }
}

/// Applies the pending changes of machines as they become free, until the host ends.
async fn apply_pending_changes(manager: Arc<Manager>) {
    loop {
        manager.queues().context().pending_change.notified().await;
        manager.reloader().apply_pending_changes().await;
    }
}
