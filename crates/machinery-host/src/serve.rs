//! The life of the host.
//!
//! ```text
//! read configuration ─▶ lock the CWD ─▶ load plugins ─▶ socket ─▶ ready ─▶ serving
//!     SIGHUP ─▶ the configuration is read anew (see `reload`)
//!     SIGTERM, SIGINT ─▶ no new action ─▶ running ones end ─▶ own runs end ─▶ plugins shut down
//!                                                                  ─▶ socket removed ─▶ exit 0
//! ```
//!
//! A plugin that ends the process has the same way gone, and the exit code 1: see [`exit`].

use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use rustix::fs::{FlockOperation, flock};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

use crate::actions::diagnose::diagnose_all;
use crate::actions::metrics::Metrics;
use crate::actions::rules::{House, Settings};
use crate::actions::worker::Workers;
use crate::capture;
use crate::config::Config;
use crate::cwd::{Cwd, make_folder};
use crate::events::Events;
use crate::exit;
use crate::fleet::books::Books;
use crate::limits;
use crate::loader::{self, Search};
use crate::reload::Reloader;
use crate::server::{self, Peers, Shared};

/// How long clients may take at the end to read their answers.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How often, and with what pauses between, a lock that is held is looked at once more.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How many restores are prepared at a time, at most. It is done for later, beside machines that run now.
const PREPARATIONS: usize = 2;
/// As good as no limit: a thread is only made for a call that is made, and a machine has three at most: its
/// action, a question about its state, and one to have it give up preparing.
const THREADS: usize = 1 << 16;

/// Serves until it is told to end; gives what went wrong with that end.
///
/// # Errors
/// The host cannot start: configuration, plugins, or socket.
pub fn run(cwd: &Cwd, search: &Search) -> Result<Result<()>> {
    let config = Config::read(cwd)?;
    make_folder(&cwd.state())?;
    make_folder(&cwd.sockets())?;
    let _lock = lock(&cwd.state())?;
    // Before any plugin clears away what it takes for the leftovers of a host that died.
    server::expect_no_other(&cwd.manager_socket())?;
    limits::raise_file_limit();
    let events = Events::default();
    let peers = Arc::new(Peers::new(config.socket_group.as_deref())?);
    let fleet = loader::load_all(cwd, &config, search, &events)?;
    exit::go_first();
    let books = Books::open(&cwd.state(), Arc::clone(&fleet))?;
    // Those of a host that was killed. Their machines are off now: the plugins have seen to that.
    capture::end_leftovers(&books.captures(), cwd.root());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .build()
        .map_err(|error| Error::environment(format!("cannot start the host's threads: {error}")))?;
    let result = runtime.block_on(async {
        let permits = config.max_parallel_restores.get().min(Semaphore::MAX_PERMITS);
        let metrics = Arc::new(Metrics::default());
        let settings = Settings { timeouts: config.timeouts, capture: config.capture.clone() };
        let house = House {
            settings: RwLock::new(settings),
            restores: Semaphore::new(permits),
            preparations: Arc::new(Semaphore::new(permits.min(PREPARATIONS))),
            metrics: Arc::clone(&metrics),
            books: Arc::clone(&books),
            outdated: Notify::new(),
        };
        let workers = Workers::new(Arc::new(house));
        diagnose_all(&fleet.roll(), workers.house().timeouts().load).await;
        fleet.roll().machines().iter().for_each(|machine| workers.start(machine));
        let reloader = Reloader::new(cwd.clone(), search.clone(), config, &fleet.roll())?;
        let shared = Arc::new(Shared {
            fleet,
            workers,
            reloader,
            books,
            metrics,
            events,
            enabled: AtomicBool::new(true),
            ending: watch::Sender::new(false),
        });
        serve(cwd, &peers, shared).await
    });
    // A plugin's call that never came back must not hold up the end.
    runtime.shutdown_background();
    result
}

/// One host for one CWD; the lock goes with the process.
fn lock(state: &Path) -> Result<File> {
    let path = state.join("lock");
    let file = File::create(&path).map_err(|error| Error::io("make the lock", &path, &error))?;
    let held = || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
    // Who only looks whether there is a host holds it for a moment.
    let tries = (0..LOCK_TRIES).find(|_| {
        !held() || {
            std::thread::sleep(LOCK_PAUSE);
            false
        }
    });
    tries.ok_or_else(|| {
        Error::environment(format!("another host already serves this CWD: it holds {}", path.display()))
            .advice("Stop it first, or use it: the other commands of cuckoo-machinery talk to it")
    })?;
    Ok(file)
}

async fn serve(cwd: &Cwd, peers: &Arc<Peers>, shared: Arc<Shared>) -> Result<Result<()>> {
    let mut exit = exit::asked();
    let mut end = End::new()?;
    tokio::spawn(reload_when_asked(Arc::clone(&shared), listen(SignalKind::hangup())?));
    tokio::spawn(follow(Arc::clone(&shared)));
    let socket = cwd.manager_socket();
    let listener = server::bind(&socket, peers)?;
    tracing::info!(socket = %socket.display(), "ready");
    notify(NotifyState::Ready);
    let mut connections = JoinSet::new();
    tokio::select! {
        () = server::serve(&listener, peers, &shared, &mut connections) => {}
        which = end.asked() => tracing::info!(signal = which, "asked to end: machines are stopped"),
        // The sender is there for as long as the process is.
        _ = exit.wait_for(|asked| *asked) => tracing::info!("machines are stopped"),
    }
    // First, so that nobody who knows that the host ends has an action accepted.
    let workers = shared.workers.close();
    notify(NotifyState::Stopping);
    server::remove(&socket);
    Ok(tokio::select! {
        () = let_go(&shared, workers, connections) => {
            tracing::info!("ended");
            if *exit.borrow() { Err(Error::failed("a plugin called exit(): see the log for which")) } else { Ok(()) }
        }
        which = end.asked() => Err(Error::failed(format!("asked to end once more by {which}: machines may be left"))
            .advice("The next start of the host clears them away")),
    })
}

async fn let_go(shared: &Arc<Shared>, mut workers: JoinSet<()>, mut connections: JoinSet<()>) {
    // No plugin is told to let go while it takes over a configuration.
    shared.reloader.is_done().await;
    while workers.join_next().await.is_some() {}
    shared.ending.send_replace(true);
    let last_words = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WORDS, last_words).await.is_err() {
        tracing::warn!("some clients do not read their last answers");
    }
    let limit = shared.workers.house().timeouts().shutdown;
    for machinery in shared.fleet.roll().machineries() {
        let machinery = Arc::clone(machinery);
        let name = machinery.name.clone();
        let call = tokio::task::spawn_blocking(move || {
            let _call = exit::Call::begin(&format!("'{}' in shutdown", machinery.name));
            machinery.instance.shutdown(Deadline::after(limit))
        });
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::error!(machinery = name, %error, "did not let go cleanly"),
            Ok(Err(error)) => tracing::error!(machinery = name, %error, "did not let go cleanly"),
            Err(_) => tracing::error!(machinery = name, "did not let go in time"),
        }
    }
}

fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot tell systemd");
    }
}

fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Error::environment(format!("cannot listen to signals: {error}")))
}

/// Reads the configuration anew at each SIGHUP; for ever.
async fn reload_when_asked(shared: Arc<Shared>, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        // What came of it is in the log.
        let _ = shared.reloader.reload(&shared).await;
    }
}

/// Takes over what is new for machines that were in use, as they become free; for ever.
async fn follow(shared: Arc<Shared>) {
    loop {
        shared.workers.house().outdated.notified().await;
        shared.reloader.catch_up(&shared).await;
    }
}

/// The signals that ask to end.
struct End {
    terminate: Signal,
    interrupt: Signal,
}

impl End {
    fn new() -> Result<Self> {
        Ok(End { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
