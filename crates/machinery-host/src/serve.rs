//! The life of the host.
//!
//! ```text
//! read configuration ─▶ lock the CWD ─▶ load plugins ─▶ socket ─▶ ready ─▶ serving
//!     SIGHUP ─▶ the configuration is read again (see `reload`)
//!     SIGTERM, SIGINT ─▶ no new action ─▶ running actions end ─▶ own runs end ─▶ plugins shut down
//!                                                                      ─▶ socket removed ─▶ exit 0
//!     SIGUSR2 ─▶ no new action ─▶ running actions end ─▶ plugins hand over ─▶ the program is executed again
//! ```
//!
//! After SIGUSR2, the new program has the same process number and the same socket, and adopts the runs of the old one. With
//! `--handover`, SIGTERM leaves them in the same way, and ends the host: the next start adopts them.
//!
//! A plugin that calls `exit()` triggers the same shutdown, with exit code 1: see [`exit`].

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;

use crate::actions::Ending;
use crate::actions::capture::resume;
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

/// The maximum number of calls into plugins at a time. In effect there is no limit: a thread starts only for a call,
/// and a machine has three calls at most, its action, a query of its state, and the cancellation of a preparation.
const MAX_CALLS: usize = 1 << 16;
/// The time that clients have to read their last replies when the host ends.
const LAST_REPLIES_TIMEOUT: Duration = Duration::from_secs(3);
/// The number of attempts to lock the CWD, and the pause between two of them.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// The end of a host that has served.
#[derive(Debug)]
pub enum Served {
    /// The host has handed everything over. The socket still listens for the new program.
    Replaced(std::os::unix::net::UnixListener),
    /// The host has shut everything down.
    Cleanly,
    /// The end had a fault.
    With(Error),
}

/// Serves until a signal or a plugin ends the host.
///
/// # Errors
/// The host cannot start: configuration, plugins, or socket.
pub fn run(cwd: &Cwd, search: &PluginSearch, hands_over: bool) -> Result<Served> {
    // An upgrade replaces the file of this program.
    let program = std::env::current_exe()
        .map_err(|error| Error::environment(format!("cannot find the host's own program: {error}")))?;
    let inherited = listener::inherited(&cwd.manager_socket())?;
    let config = Config::read(cwd)?;
    make_reachable_folder(&cwd.state())?;
    make_folder(&cwd.sockets())?;
    let _lock = lock(&cwd.state())?;
    Folders::of(cwd).prepare()?;
    // Before any plugin removes what it takes for the leftovers of a host that died.
    if inherited.is_none() {
        listener::expect_no_other(&cwd.manager_socket())?;
    }
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
        serve(cwd, &peers, manager, inherited, hands_over).await
    });
    // A plugin's call that never returns must not delay the end.
    runtime.shutdown_background();
    match result {
        Ok(Served::Replaced(listener)) => Err(execute_again(&program, listener)),
        result => result,
    }
}

/// Executes the host's program, which may be a newer one, with the same arguments and the same socket. Returns only if that
/// fails.
fn execute_again(program: &Path, listener: std::os::unix::net::UnixListener) -> Error {
    let failed = |error: &dyn std::fmt::Display| {
        Error::failed(format!("cannot execute {}: {error}", program.display()))
            .advice("Start the host again: it adopts the runs")
    };
    let mut command = machinery::command(program);
    command.args(std::env::args_os().skip(1));
    // The protocol of sd_listen_fds(3). The process keeps its number.
    command.env("LISTEN_PID", std::process::id().to_string()).env("LISTEN_FDS", "1");
    let mapping = FdMapping { parent_fd: listener.into(), child_fd: listener::FIRST_INHERITED };
    match command.fd_mappings(vec![mapping]) {
        Ok(command) => failed(&command.exec()),
        Err(error) => failed(&error),
    }
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
    resume_adopted_runs(&fleet, queues.context()).await;
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

/// Continues what an earlier host did for the runs that this one has adopted.
async fn resume_adopted_runs(fleet: &Fleet, context: &ActionContext) {
    let settings = context.settings();
    for machine in fleet.roster().machines().iter().filter(|machine| machine.status().own_run) {
        if let Some(capture) = &settings.capture {
            resume(machine, capture, &context.folders, &context.captures).await;
        }
        // A report that came before the machine was known is lost.
        let limit = settings.timeouts.state;
        let (reports, called) = (
            machine.status().reports,
            machine
                .call(limit, |machine, deadline| machine.machinery.instance.state(machine.name(), deadline)),
        );
        if let CallResult::Returned(Ok(state)) = called.await {
            machine.set_answered(state, reports);
        }
    }
}

async fn serve(
    cwd: &Cwd,
    peers: &Arc<Peers>,
    manager: Arc<Manager>,
    inherited: Option<std::os::unix::net::UnixListener>,
    hands_over: bool,
) -> Result<Served> {
    let mut exit = exit::exit_requested();
    let mut end = EndSignals::new(hands_over)?;
    tokio::spawn(reload_at_signal(Arc::clone(&manager), listen(SignalKind::hangup())?));
    tokio::spawn(apply_pending_changes(Arc::clone(&manager)));
    let socket = cwd.manager_socket();
    let listener = match inherited {
        Some(inherited) => listener::of(inherited, &socket)?,
        None => listener::bind(&socket, peers)?,
    };
    tracing::info!(socket = %socket.display(), "ready");
    notify(NotifyState::Ready);
    let mut connections = JoinSet::new();
    let asked = tokio::select! {
        () = listener::serve(&listener, peers, &manager, &mut connections) => Asked::Stop,
        asked = end.received() => asked,
        () = manager.replacement() => Asked::Replace,
        // The sender lives as long as the process.
        _ = exit.wait_for(|exit| *exit) => Asked::Stop,
    };
    let ending = if asked == Asked::Stop { Ending::Stop } else { Ending::HandOver };
    // First, so that no action is accepted from a client that knows of the end.
    let mut workers = manager.queues().close(ending);
    if asked != Asked::Replace {
        notify(NotifyState::Stopping);
        listener::remove(&socket);
    }
    let drained = async {
        // A plugin must not be shut down while it applies a configuration.
        let finished = async {
            manager.reloader().idle().await;
            while workers.join_next().await.is_some() {}
        };
        match asked {
            // Clients hear that they have to ask again.
            Asked::Replace => tokio::select! {
                () = listener::serve(&listener, peers, &manager, &mut connections) => {}
                () = finished => {}
            },
            Asked::Stop | Asked::HandOver => finished.await,
        }
        drain(&manager, ending, connections).await;
    };
    tokio::select! {
        () = drained => {}
        _ = end.received() => {
            let error = Error::failed("asked to end once more: machines may be left");
            return Ok(Served::With(error.advice("The next start of the host adopts them, or clears them away")));
        }
    }
    tracing::info!("ended");
    if *exit.borrow() {
        return Ok(Served::With(Error::failed("a plugin called exit(): see the log for which")));
    }
    if asked != Asked::Replace {
        return Ok(Served::Cleanly);
    }
    let listener = listener.into_std();
    listener.map(Served::Replaced).map_err(|error| Error::io("keep the socket", &socket, &error))
}

/// Waits for last replies, and shuts the plugins down, or has them hand over.
async fn drain(manager: &Manager, ending: Ending, mut connections: JoinSet<()>) {
    manager.ended().send_replace(true);
    let last_replies = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_REPLIES_TIMEOUT, last_replies).await.is_err() {
        tracing::warn!("some clients do not read their last replies");
    }
    let limit = manager.queues().context().timeouts().shutdown;
    for machinery in manager.roster().machineries() {
        let hands_over = ending == Ending::HandOver && machinery.adopts();
        end_plugin(machinery, hands_over, limit).await;
    }
}

async fn end_plugin(machinery: &Arc<Machinery>, hands_over: bool, limit: Duration) {
    let (name, what) = (&machinery.name, if hands_over { "hand_over" } else { "shutdown" });
    let called = machinery.call(what, limit, move |machinery, deadline| match hands_over {
        true => machinery.instance.hand_over(deadline),
        false => machinery.instance.shutdown(deadline),
    });
    let error = match called.await {
        CallResult::Returned(Ok(())) => return,
        CallResult::Returned(Err(error)) => error,
        CallResult::Abandoned(_) => call::timed_out(what, limit),
    };
    tracing::error!(machinery = name, %error, "{what} failed");
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

/// The request in a signal, or of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// To end with all of its machines.
    Stop,
    /// To end, and to leave its machines to the next host.
    HandOver,
    /// To execute its program again, which adopts its machines.
    Replace,
}

/// The signals that end the host.
struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
    replace: Signal,
    hands_over: bool,
}

impl EndSignals {
    fn new(hands_over: bool) -> Result<Self> {
        Ok(EndSignals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            replace: listen(SignalKind::user_defined2())?,
            hands_over,
        })
    }

    async fn received(&mut self) -> Asked {
        let (signal, asked) = tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", if self.hands_over { Asked::HandOver } else { Asked::Stop }),
            _ = self.interrupt.recv() => ("SIGINT", Asked::Stop),
            _ = self.replace.recv() => ("SIGUSR2", Asked::Replace),
        };
        match asked {
            Asked::Stop => tracing::info!(signal, "asked to end: machines are stopped"),
            Asked::HandOver | Asked::Replace => tracing::info!(signal, "machines are left to the next host"),
        }
        asked
    }
}
