//! Upgrades the running host: it executes its program again, which a package may have replaced.
//!
//! ```text
//! old host: no new action ─▶ actions under way end ─▶ runs are left ─▶ closes its connections ─▶ new program ─▶ adopts
//! this:     asks ──────────────────────────────────────▶ sees its connection closed ─▶ asks for the version
//! ```
//!
//! The socket listens all the time, so a client that connects meanwhile waits for the new host.

use std::path::Path;

use machinery::{Error, Result};
use serde_json::{Value, json};

use crate::client::Client;

/// Has the host replace itself, and returns the answer of the new one to `version`.
///
/// # Errors
/// No host answers; it refuses; no new host answers after it.
pub fn upgrade(socket: &Path) -> Result<Value> {
    let mut client = Client::connect(socket)?;
    let before = client.request(json!({"action": "version"}), |_| ())?;
    let asked = client.request(json!({"action": "upgrade"}), |_| ())?;
    if asked["success"] != json!(true) {
        return Ok(asked);
    }
    client.wait_for_close();
    let advice = "Look at its log, and start it: it adopts the running machines";
    let after = Client::connect(socket).and_then(|mut new| new.request(json!({"action": "version"}), |_| ()));
    let after = after.map_err(|error| error.advice(advice))?;
    if after["started"] == before["started"] {
        return Err(Error::failed("the host was not replaced").advice("Look at its log"));
    }
    Ok(after)
}
