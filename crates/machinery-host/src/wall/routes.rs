//! The requests of the page, and of programs.
//!
//! | request | reply |
//! | --- | --- |
//! | `GET /` and the files of the page | the page; a visitor without a cookie gets the one to log in |
//! | `POST /login` with the token | the cookie; `GET /login` reports whether there is one |
//! | `GET /events` | server-sent events: a snapshot, then batches |
//! | `GET /machines/M` | all values of a machine, and its latest events |
//! | `GET /machines/M/screen` | its screen |
//! | `GET /machines/M/console`, `GET /novnc/…` | its console as a WebSocket, and the viewer for it |
//! | `POST /machines/M/stop`, `restore`, `enable`, `disable` | the action, when it has ended |

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH, REFERRER_POLICY,
    SET_COOKIE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream::{Stream, unfold};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::console;
use super::feed::Update;
use super::guard::Refusal;
use super::shared::{Failed, Shared, Wall, answer, expect_actions, find};
use crate::actions::message::{NoScreen, Responder};
use crate::actions::{Action, ActionResult};
use crate::fleet::Machine;
use crate::http::Connection;
use crate::server::reply;

/// A file of the page: its path, its type, and its content.
type PageFile = (&'static str, &'static str, &'static str);

/// Returns a page with the head that all have.
macro_rules! page {
    ($file:literal) => {
        concat!(include_str!("page/head.html"), include_str!($file))
    };
}

const HTML: &str = "text/html; charset=utf-8";
const FILES: [PageFile; 8] = [
    ("/wall.css", "text/css; charset=utf-8", include_str!("page/wall.css")),
    ("/login.js", "text/javascript; charset=utf-8", include_str!("page/login.js")),
    ("/wall.js", "text/javascript; charset=utf-8", include_str!("page/wall.js")),
    ("/tiles.js", "text/javascript; charset=utf-8", include_str!("page/tiles.js")),
    ("/machine.js", "text/javascript; charset=utf-8", include_str!("page/machine.js")),
    ("/console", HTML, page!("page/console.html")),
    ("/console.js", "text/javascript; charset=utf-8", include_str!("page/console.js")),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];
const WALL: &str = page!("page/wall.html");
const LOGIN: &str = page!("page/login.html");

/// The rules for the page in a browser: its own files only, and no other page around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
                      connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'";
const HEADERS: [(HeaderName, &str); 7] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    // Without an origin in its requests, the page could change nothing.
    (REFERRER_POLICY, "same-origin"),
    (CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The size of a request's body.
const MAX_BODY: usize = 1 << 10;
/// The time of a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// The time between two signs of life on a stream, which find a page that has left.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// The reason for disabling a machine, if the page gives none.
const NO_REASON: &str = "disabled on the wall";

/// Returns the routes of the wall.
pub fn routes(shared: Arc<Shared>) -> Router {
    let private = Router::new()
        .route("/events", get(events))
        .route("/machines/{machine}", get(machine))
        .route("/machines/{machine}/screen", get(screen))
        .route("/machines/{machine}/console", get(console::console))
        .route("/novnc/{*file}", get(console::novnc))
        .route("/machines/{machine}/{action}", post(act))
        .route_layer(from_fn_with_state(Arc::clone(&shared), expect_allowed));
    let mut public = Router::new().route("/", get(page)).route("/login", get(is_logged_in).post(log_in));
    for (path, kind, content) in FILES {
        public = public.route(path, get(move || async move { ([(CONTENT_TYPE, kind)], content) }));
    }
    let all = public.merge(private).fallback(|| async { (StatusCode::NOT_FOUND, "there is no such page\n") });
    all.layer(from_fn_with_state(Arc::clone(&shared), expect_host)).with_state(shared)
}

/// Refuses a request for another host, keeps the connection of a client with a proof, and adds the rules for browsers to each reply.
async fn expect_host(State(wall): Wall, request: Request, next: Next) -> Response {
    let mut response = match wall.guard.expect_host(request.headers()) {
        Ok(()) => {
            if wall.guard.expect_allowed(&Method::GET, request.headers()).is_ok()
                && let Some(connection) = request.extensions().get::<Connection>()
            {
                connection.keep();
            }
            next.run(request).await
        }
        Err(refusal) => refused(refusal),
    };
    let headers = HEADERS.map(|(name, value)| (name, HeaderValue::from_static(value)));
    response.headers_mut().extend(headers);
    response
}

async fn expect_allowed(State(wall): Wall, request: Request, next: Next) -> Response {
    match wall.guard.expect_allowed(request.method(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refused(refusal),
    }
}

fn refused(refusal: Refusal) -> Response {
    refusal.into_response()
}

/// Returns the wall, or the page to log in.
async fn page(State(wall): Wall, headers: HeaderMap) -> Response {
    let (status, content) = match wall.guard.expect_allowed(&Method::GET, &headers) {
        Ok(()) => (StatusCode::OK, WALL),
        Err(_) => (StatusCode::UNAUTHORIZED, LOGIN),
    };
    (status, [(CONTENT_TYPE, HTML)], content).into_response()
}

async fn is_logged_in(State(wall): Wall, headers: HeaderMap) -> Response {
    wall.guard.expect_allowed(&Method::GET, &headers).map_or_else(refused, |()| no_content())
}

async fn log_in(State(wall): Wall, headers: HeaderMap) -> Response {
    match wall.guard.cookie(&headers) {
        Ok(cookie) => (StatusCode::NO_CONTENT, [(SET_COOKIE, cookie)]).into_response(),
        Err(refusal) => refused(refusal),
    }
}

fn no_content() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// Sends a snapshot, and then all changes.
async fn events(State(wall): Wall) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let updates = wall.feed.subscribe();
    let stream = unfold((wall, updates, Some(Update::Snapshot)), |(wall, mut updates, first)| async move {
        let update = match first {
            Some(first) => first,
            None => match updates.recv().await {
                Ok(update) => update,
                Err(RecvError::Lagged(_)) => Update::Snapshot,
                Err(RecvError::Closed) => return None,
            },
        };
        let event = match update {
            Update::Batch(batch) => Event::default().event("batch").data(batch),
            Update::Snapshot => Event::default().event("snapshot").data(wall.feed.snapshot(wall.actions)),
        };
        Some((Ok(event), (wall, updates, None)))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

async fn machine(State(wall): Wall, Path(name): Path<String>) -> Result<Response, Failed> {
    let machine = find(&wall, &name)?;
    let capabilities = machine.machinery.capabilities;
    let value = json!({
        "machine": reply::machine(&machine, wall.manager.consoles()),
        "events": wall.feed.recent_of(&name),
        "machinery_version": machine.machinery.version,
        "screen": capabilities.screenshot,
    });
    Ok(answer(StatusCode::OK, &value))
}

async fn screen(State(wall): Wall, Path(name): Path<String>, headers: HeaderMap) -> Result<Response, Failed> {
    let machine = find(&wall, &name)?;
    let picture = match wall.screens.of(&machine, &wall.manager).await {
        Ok(picture) => picture,
        Err(NoScreen::Busy) => return Ok(no_content()),
        Err(why) => {
            let status = match why {
                NoScreen::Failed(_) => StatusCode::BAD_GATEWAY,
                NoScreen::Unsupported => StatusCode::NOT_IMPLEMENTED,
                NoScreen::Off | NoScreen::Busy => StatusCode::CONFLICT,
            };
            return Err(Failed::new(status, why.to_string()));
        }
    };
    let is_known = headers.get(IF_NONE_MATCH).is_some_and(|etag| etag.as_bytes() == picture.etag.as_bytes());
    let etag = [(ETAG, picture.etag)];
    Ok(match is_known {
        true => (StatusCode::NOT_MODIFIED, etag).into_response(),
        false => (etag, [(CONTENT_TYPE, "image/png")], picture.png).into_response(),
    })
}

/// Acts on a machine, and replies when that has ended.
async fn act(
    State(wall): Wall,
    Path((name, action)): Path<(String, String)>,
    body: Body,
) -> Result<Response, Failed> {
    expect_actions(&wall)?;
    let machine = find(&wall, &name)?;
    let body = timeout(BODY_TIMEOUT, to_bytes(body, MAX_BODY)).await;
    let Ok(Ok(body)) = body else {
        return Err(Failed::new(StatusCode::PAYLOAD_TOO_LARGE, "the reason is too long, or too slow"));
    };
    // The manager accepts nothing else while it is disabled, as on the socket.
    if action != "stop" && !wall.manager.is_enabled() {
        return Err(Failed::new(StatusCode::CONFLICT, "Machinery manager is disabled"));
    }
    tracing::info!(machine = name, action, "asked for on the wall");
    let result = match action.as_str() {
        "stop" => submit(&wall, &machine, Action::Stop).await,
        "restore" => submit(&wall, &machine, Action::RestoreStart).await,
        "enable" => match wall.manager.enable_machine(machine).await {
            Ok(enabled) => enabled.save().await,
            Err(reason) => Err(reason),
        },
        "disable" => {
            let reason = String::from_utf8_lossy(&body);
            let reason = Some(reason.trim()).filter(|reason| !reason.is_empty()).unwrap_or(NO_REASON);
            wall.manager.disable_machine(machine, reason).save().await
        }
        _ => return Err(Failed::new(StatusCode::NOT_FOUND, "No such action")),
    };
    let status = if result.is_ok() { StatusCode::OK } else { StatusCode::CONFLICT };
    Ok(answer(status, &reply::result(result)))
}

async fn submit(wall: &Shared, machine: &Machine, action: Action) -> ActionResult {
    let (sender, result) = oneshot::channel();
    // The page may have left; the action runs to its end.
    let responder = Responder::new(move |result| drop(sender.send(result)));
    wall.manager.queues().submit(machine, action, responder);
    result.await.unwrap_or_else(|_| Err(crate::actions::CLOSING.to_owned()))
}
