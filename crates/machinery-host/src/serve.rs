//! The life of the host.
//!
//! ```text
//! read configuration ─▶ lock the CWD ─▶ load plugins ─▶ socket ─▶ ready ─▶ serving
//!     SIGHUP ─▶ the configuration is read again (see `reload`)
//!     SIGTERM, SIGINT ─▶ no new action ─▶ running actions end ─▶ own runs end ─▶ plugins shut down
//!                                                                      ─▶ socket removed ─▶ exit 0
//! ```
//!
//! A plugin that calls `exit()` triggers the same shutdown, with exit code 1: see [`exit`].

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;

use crate::actions::context::ActionContext;
use crate::actions::diagnose::diagnose_all;
use crate::actions::metrics::Metrics;
use crate::actions::queues::Queues;
use crate::capture;
use crate::client_file::Folders;
use crate::config::Config;
use crate::cwd::{Cwd, make_folder, make_reachable_folder};
use crate::events::Events;
use crate::exit;
use crate::fleet::state_file::StateStore;
use crate::fleet::{Fleet, Machinery};
use crate::limits;
use crate::load;
use crate::manager::Manager;
use crate::plugin::call::{self, CallResult};
use crate::plugin::search::PluginSearch;
use crate::reload::Reloader;
use crate::server::listener;
use crate::server::peers::Peers;
use crate::watchdog;

/// The maximum number of calls into plugins at a time. In effect there is no limit: a thread starts only for a call,
/// and a machine has three calls at most, its action, a query of its state, and the cancellation of a preparation.
const MAX_CALLS: usize = 1 << 16;
/// The time that clients have to read their last replies when the host ends.
const LAST_REPLIES_TIMEOUT: Duration = Duration::from_secs(3);
/// The number of attempts to lock the CWD, and the pause between two of them.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The end of a host that has served.
pub enum Served {
    /// The host has shut everything down.
    Cleanly,
    /// The end had a fault.
    With(Error),
}

/// Serves until a signal or a plugin ends the host.
///
/// # Errors
/// The host cannot start: configuration, plugins, or socket.
pub fn run(cwd: &Cwd, search: &PluginSearch) -> Result<Served> {
    let config = Config::read(cwd)?;
    make_reachable_folder(&cwd.state())?;
    make_folder(&cwd.sockets())?;
    let _lock = lock(&cwd.state())?;
    Folders::of(cwd).prepare()?;
    // Before any plugin removes what it takes for the leftovers of a host that died.
    listener::expect_no_other(&cwd.manager_socket())?;
    limits::raise_file_limit();
    let events = Events::default();
    let peers = Arc::new(Peers::new(config.socket_group.as_deref())?);
    let fleet = load::load_all(cwd, &config, search, &events)?;
    exit::install_atexit_handler();
    let state = StateStore::open(&cwd.state(), Arc::clone(&fleet))?;
    // The captures of a host that was killed. The plugins have powered off its machines.
    capture::end_leftovers(&state.captures(), cwd.root());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(MAX_CALLS)
        .build()
        .map_err(|error| Error::environment(format!("cannot start the host's threads: {error}")))?;
    let result = runtime.block_on(async {
        let manager = Arc::new(manager(cwd, search, config, fleet, state, events).await?);
        serve(cwd, &peers, manager).await
    });
    // A plugin's call that never returns must not delay the end.
    runtime.shutdown_background();
    result
}

/// Locks the CWD for one host. The lock ends with the process.
fn lock(state: &Path) -> Result<File> {
    let path = state.join("lock");
    let file = File::create(&path).map_err(|error| Error::io("make the lock", &path, &error))?;
    let is_locked = || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
    // A command that only checks for a host has the lock for a moment.
    let attempt = (0..LOCK_ATTEMPTS).find(|_| {
        !is_locked() || {
            std::thread::sleep(LOCK_INTERVAL);
            false
        }
    });
    attempt.ok_or_else(|| {
        Error::environment(format!("another host already serves this CWD: it holds {}", path.display()))
            .advice("Stop it first, or use it: the other commands of cuckoo-machinery talk to it")
    })?;
    Ok(file)
}

/// Builds the shared state, and starts the workers of all machines.
async fn manager(
    cwd: &Cwd,
    search: &PluginSearch,
    config: Config,
    fleet: Arc<Fleet>,
    state: Arc<StateStore>,
    events: Events,
) -> Result<Manager> {
    let metrics = Arc::new(Metrics::default());
    let context =
        Arc::new(ActionContext::new(&config, Folders::of(cwd), Arc::clone(&metrics), Arc::clone(&state)));
    let queues = Arc::new(Queues::new(context));
    diagnose_all(&fleet.roster(), config.timeouts.load).await;
    queues.context().disable_quarantined(&fleet.roster()).await;
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
    Ok(Manager::new(fleet, queues, reloader, metrics, state, events))
}

async fn serve(cwd: &Cwd, peers: &Arc<Peers>, manager: Arc<Manager>) -> Result<Served> {
    let mut exit = exit::exit_requested();
    let mut end = EndSignals::new()?;
    tokio::spawn(reload_at_signal(Arc::clone(&manager), listen(SignalKind::hangup())?));
    tokio::spawn(apply_pending_changes(Arc::clone(&manager)));
    let socket = cwd.manager_socket();
    let listener: UnixListener = listener::bind(&socket, peers)?;
    tracing::info!(socket = %socket.display(), "ready");
    notify(NotifyState::Ready);
    if let Some(interval) = sd_notify::watchdog_enabled() {
        tokio::spawn(watch(interval, Arc::clone(&manager)));
    }
    let mut connections = JoinSet::new();
    tokio::select! {
        () = listener::serve(&listener, peers, &manager, &mut connections) => {}
        which = end.received() => tracing::info!(signal = which, "asked to end: machines are stopped"),
        // The sender lives as long as the process.
        _ = exit.wait_for(|exit| *exit) => tracing::info!("machines are stopped"),
    }
    // First, so that no action is accepted from a client that knows of the end.
    let workers = manager.queues().close();
    notify(NotifyState::Stopping);
    listener::remove(&socket);
    Ok(tokio::select! {
        () = drain(&manager, workers, connections) => {
            tracing::info!("ended");
            if *exit.borrow() {
                Served::With(Error::failed("a plugin called exit(): see the log for which"))
            } else {
                Served::Cleanly
            }
        }
        which = end.received() => {
            let error = Error::failed(format!("asked to end once more by {which}: machines may be left"));
            Served::With(error.advice("The next start of the host clears them away"))
        }
    })
}

/// Waits for running actions and last replies, and shuts the plugins down.
async fn drain(manager: &Manager, mut workers: JoinSet<()>, mut connections: JoinSet<()>) {
    // A plugin must not be shut down while it applies a configuration.
    manager.reloader().idle().await;
    while workers.join_next().await.is_some() {}
    manager.ended().send_replace(true);
    let last_replies = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_REPLIES_TIMEOUT, last_replies).await.is_err() {
        tracing::warn!("some clients do not read their last replies");
    }
    let limit = manager.queues().context().timeouts().shutdown;
    for machinery in manager.roster().machineries() {
        shut_down(machinery, limit).await;
    }
}

async fn shut_down(machinery: &Arc<Machinery>, limit: Duration) {
    let name = &machinery.name;
    let called =
        machinery.call("shutdown", limit, |machinery, deadline| machinery.instance.shutdown(deadline));
    match called.await {
        CallResult::Returned(Ok(())) => {}
        CallResult::Returned(Err(error)) => tracing::error!(machinery = name, %error, "did not shut down"),
        CallResult::Abandoned(_) => {
            let error = call::timed_out("shutdown", limit);
            tracing::error!(machinery = name, %error, "did not shut down");
        }
    }
}

/// Reports to systemd that the host answers, also while it ends.
async fn watch(interval: Duration, manager: Arc<Manager>) {
    let ping = || notify(NotifyState::Watchdog);
    let error = watchdog::run(interval, || watchdog::prove(Arc::clone(&manager)), ping).await;
    tracing::error!(%error, "systemd's watchdog gets no more reports");
}

fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Error::environment(format!("cannot listen to signals: {error}")))
}

/// Reloads the configuration at each SIGHUP, until the host ends.
async fn reload_at_signal(manager: Arc<Manager>, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        // The result is in the log.
        let _ = manager.reload().await;
    }
}

/// Applies the pending changes of machines as they become free, until the host ends.
async fn apply_pending_changes(manager: Arc<Manager>) {
    loop {
        manager.queues().context().pending_change.notified().await;
        manager.reloader().apply_pending_changes().await;
    }
}

/// The signals that end the host.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    fn new() -> Result<Self> {
        Ok(EndSignals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
