//! The state that all requests share, and their failures.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::watch;

use super::feed::Feed;
use super::guard::{Guard, Refusal};
use super::screens::Screens;
use crate::fleet::Machine;
use crate::manager::Manager;
use crate::server::reply;

/// The state of each request.
pub type Wall = State<Arc<Shared>>;

/// The wall of a host, as all of its requests share it.
pub struct Shared {
    pub manager: Arc<Manager>,
    pub feed: Arc<Feed>,
    pub screens: Screens,
    pub guard: Guard,
    /// True if the page can act on machines.
    pub actions: bool,
    /// The folder of noVNC.
    pub novnc: PathBuf,
    /// Closed when the wall ends, which ends its consoles.
    pub lives: watch::Receiver<()>,
}

/// A request that has failed, with the reason as JSON.
pub struct Failed(StatusCode, String);

impl Failed {
    /// Returns a failure with this reason.
    pub fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Failed(status, reason.into())
    }
}

impl From<Refusal> for Failed {
    fn from((status, reason): Refusal) -> Self {
        Failed::new(status, reason.trim_end())
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        answer(self.0, &reply::failure(&self.1))
    }
}

/// Returns the machine of that name.
///
/// # Errors
/// There is none.
pub fn find(wall: &Shared, name: &str) -> Result<Arc<Machine>, Failed> {
    wall.manager.find(name).ok_or_else(|| Failed::new(StatusCode::NOT_FOUND, "there is no such machine"))
}

/// Returns a reply of that value.
pub fn answer(status: StatusCode, value: &Value) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

/// Expects that the page can act on machines.
///
/// # Errors
/// It cannot.
pub fn expect_actions(wall: &Shared) -> Result<(), Failed> {
    let off = "this wall only shows machines: `web_actions: true` allows actions";
    if wall.actions { Ok(()) } else { Err(Failed::new(StatusCode::FORBIDDEN, off)) }
}
