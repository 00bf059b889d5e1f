//! The wall: a web page with the screen and the state of each machine. It is off by default.
//!
//! ```text
//! events ─▶ feed ─▶ one batch for all pages ─▶ GET /events (server-sent events)
//! page ─▶ guard ─▶ routes ─▶ screens ─▶ the machine's worker, when it is idle
//!            │        └─▶ POST: an action, only with `web_actions`
//!            └─▶ wrong name, token or origin: refused
//! ```
//!
//! A page shows a snapshot first, and then changes. It asks for the screens of the tiles in view. So a wall that nobody
//! looks at asks no machine. A wall that fails is an error in the log; the host serves on.
//!
//! | file | content |
//! | --- | --- |
//! | `check` | the checks that need no running host |
//! | `token` | the secret of those who may look, and their cookie |
//! | `guard` | the rules for each request |
//! | `routes` | the requests |
//! | `shared` | the state that all requests share, and their failures |
//! | `feed` | the changes for all pages, and the latest events of each machine |
//! | `console` | the console of a machine: noVNC, and the WebSocket for it |
//! | `screens` | the screens, each taken once for all pages |
//! | `view` | a machine as the page reads it |
//! | `page/` | the page itself |

mod check;
mod console;
mod feed;
mod guard;
mod routes;
mod screens;
mod shared;
mod token;
mod view;

pub use check::check;
pub use token::{login_url, token_file};

use std::future::pending;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use machinery::{Error, Result};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;
use tokio::task::block_in_place;

use crate::config::{Listen, Wall};
use crate::cwd::Cwd;
use crate::http::{self, Limits};
use crate::manager::Manager;
use crate::server::listener;
use crate::server::peers::Peers;
use feed::Feed;
use guard::Guard;
use screens::Screens;
use shared::Shared;
use token::Token;

const LIMITS: Limits = Limits { connections: 128, connection_timeout: None };

/// Serves the wall until the host ends.
pub async fn run(manager: Arc<Manager>, cwd: Cwd) {
    let mut reloads = manager.queues().context().reloads();
    let mut ended = manager.ended().subscribe();
    loop {
        let wall = reloads.settings().wall;
        let file = token_file(&wall, &cwd);
        let token = match &wall.listen {
            Some(Listen::Address(_)) => block_in_place(|| Token::open(&file)).map(Some),
            _ => Ok(None),
        };
        let cookie = cookie_of(&token);
        // A reload that changes nothing here closes no page. It is another try where the wall is not served.
        let is_same = |new: &Wall| {
            let is_served = manager.wall_address().borrow().is_some() == wall.listen.is_some();
            let is_same_token =
                cookie.is_none() || cookie == block_in_place(|| cookie_of(&Token::read(&file).map(Some)));
            *new == wall && is_served && is_same_token
        };
        let goes_on = tokio::select! {
            () = serve(&manager, &wall, token) => true,
            () = reloads.next(|settings| !is_same(&settings.wall)) => true,
            // The sender lives as long as the manager.
            _ = ended.wait_for(|ended| *ended) => false,
        };
        let was_served = manager.wall_address().send_replace(None).is_some();
        if let Some(Listen::Socket(path)) = wall.listen.as_ref().filter(|_| was_served) {
            block_in_place(|| listener::remove(path));
        }
        if !goes_on {
            return;
        }
    }
}

fn cookie_of(token: &Result<Option<Token>>) -> Option<String> {
    Some(token.as_ref().ok()?.as_ref()?.cookie().to_owned())
}

/// Serves the wall as configured until it is dropped.
async fn serve(manager: &Arc<Manager>, wall: &Wall, token: Result<Option<Token>>) {
    let Some(listen) = &wall.listen else { return pending().await };
    let served = match token {
        Ok(token) => try_serve(manager, wall, listen, token).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!(%listen, %error, "the wall is not served");
    }
    pending().await
}

async fn try_serve(manager: &Arc<Manager>, wall: &Wall, listen: &Listen, token: Option<Token>) -> Result<()> {
    let (routes, feed, _life) = routes(manager, wall, token);
    match listen {
        Listen::Address(address) => {
            let listener = TcpListener::bind(address).await.map_err(|error| {
                Error::environment(format!("cannot listen at {address}: {error}"))
                    .advice("Correct `web_listen`, or end the program that uses the port, and reload")
            })?;
            let address = listener.local_addr().unwrap_or(*address);
            if !address.ip().is_loopback() {
                tracing::warn!(%address, "the wall is served without encryption, and other computers can reach it");
            }
            announce(manager, &Listen::Address(address));
            tokio::join!(http::serve(listener, &routes, LIMITS), feed.follow());
        }
        Listen::Socket(path) => {
            expect_no_other(path).await?;
            let listener = block_in_place(|| {
                let peers = Peers::of("web_socket_group", wall.socket_group.as_deref())?;
                listener::warn_of_closed_folders(path, &peers);
                listener::bind(path, &peers)
            })?;
            announce(manager, listen);
            tokio::join!(http::serve(listener, &routes, LIMITS), feed.follow());
        }
    }
    Ok(())
}

/// Expects that nobody else serves this socket, and that no other file is in its place.
async fn expect_no_other(path: &Path) -> Result<()> {
    let taken = || Error::environment(format!("{} is in use", path.display()));
    if UnixStream::connect(path).await.is_ok() {
        return Err(taken().advice("End the program that serves it, or correct `web_listen`"));
    }
    listener::expect_replaceable(path)
}

/// Returns the routes of the wall, the feed of its pages, and the life of its consoles.
fn routes(
    manager: &Arc<Manager>,
    wall: &Wall,
    token: Option<Token>,
) -> (Router, Arc<Feed>, watch::Sender<()>) {
    let feed = Arc::new(Feed::new(Arc::clone(manager)));
    let (life, lives) = watch::channel(());
    let shared = Shared {
        manager: Arc::clone(manager),
        feed: Arc::clone(&feed),
        screens: Screens::default(),
        guard: Guard::new(token, wall.origins.clone()),
        actions: wall.actions,
        novnc: console::novnc_folder(wall),
        lives,
    };
    (routes::routes(Arc::new(shared)), feed, life)
}

fn announce(manager: &Manager, address: &Listen) {
    let address = address.to_string();
    tracing::info!(%address, "the wall is served: `cuckoo-machinery wall` prints the address to log in");
    manager.wall_address().send_replace(Some(address));
}
