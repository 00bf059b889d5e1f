//! Follows the host: a thread that receives its messages, and connects again when the connection is lost.
//!
//! ```text
//! connect ─▶ subscribe, version ─▶ Input::Connected ─▶ Input::Message for each answer and event
//!    ▲                                                     │ the host ends, or is replaced
//!    └─────────── a second ◀── Input::Lost ◀───────────────┘
//! ```
//!
//! The socket of a host that is replaced listens all the time, so that the new host answers at the first try.

use std::path::Path;
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::Duration;

use machinery::{Error, Result};
use serde_json::{Value, json};

use super::input::Input;
use crate::client::{Client, Messages, Requests};

/// The time between two tries to connect.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A subscribed connection.
pub struct Followed {
    /// For requests.
    pub requests: Requests,
    /// The host's answer to `version`.
    pub version: Value,
    messages: Messages,
}

/// Connects to the host, and subscribes to its events.
///
/// # Errors
/// No host answers, or it refuses.
pub fn connect(socket: &Path) -> Result<Followed> {
    let mut client = Client::connect(socket)?;
    let [subscribed, version] =
        ["subscribe", "version"].map(|action| client.request(json!({"action": action}), |_| ()));
    let (subscribed, version) = (subscribed?, version?);
    for answer in [subscribed, version.clone()] {
        if answer["success"] != json!(true) {
            return Err(Error::failed(answer["reason"].as_str().unwrap_or("the host gave no reason")));
        }
    }
    let (requests, messages) = client.split();
    Ok(Followed { requests, version, messages })
}

/// Sends the host's messages, until nobody receives them.
pub fn follow(socket: &Path, first: Followed, inputs: &SyncSender<Input>) {
    let mut followed = Ok(first);
    while let Err(error) = followed.and_then(|followed| pass_messages(followed, inputs)) {
        if inputs.send(Input::Lost(error.reason().to_owned())).is_err() {
            return;
        }
        thread::sleep(RETRY_INTERVAL);
        followed = connect(socket);
    }
}

/// Sends all messages of a connection, until nobody receives them.
///
/// # Errors
/// The connection was lost.
fn pass_messages(followed: Followed, inputs: &SyncSender<Input>) -> Result<()> {
    let Followed { requests, version, mut messages } = followed;
    let mut sent = inputs.send(Input::Connected(requests, version));
    while sent.is_ok() {
        sent = inputs.send(Input::Message(messages.receive()?));
    }
    Ok(())
}
