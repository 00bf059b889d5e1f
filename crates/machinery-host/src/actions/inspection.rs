//! A memory dump or a screenshot, from the plugin to the client.
//!
//! ```text
//! stage a private folder ─▶ the plugin writes into it ─▶ check the file ─▶ hand it over
//! ```
//!
//! Each step has the action's timeout. Only the plugin's step can disable the machine: a client's file that does not
//! take the data is no fault of the machine.

use std::future::pending;
use std::time::Duration;

use machinery::{Error, Result};

use super::Action;
use super::plugin_calls::PluginCalls;
use crate::client_file::Folders;
use crate::plugin::call::{CallResult, call};

/// Runs an action that writes the file of a client. On failure, nothing is left of the file.
///
/// # Errors
/// The file may not be written, the plugin fails, or the file is not what the action writes.
pub async fn run(calls: &mut PluginCalls, action: &Action, folders: &Folders) -> Result<()> {
    let Some((file, content)) = action.output() else { return calls.run(action).await };
    let (file, folders, limit) = (file.clone(), folders.clone(), calls.limit_of(action));
    let staged = within(limit, "make the file", move || file.stage(&folders)).await;
    let staged = match staged {
        // The more useful reason.
        Err(_) if calls.is_off() => return Err(off()),
        staged => staged?,
    };
    calls.run_into(action, staged.path()).await?;
    within(limit, "write the file", move || {
        staged.check(content)?;
        staged.hand_over(limit)
    })
    .await
}

fn off() -> Error {
    Error::unexpected_state("the machine is powered off").advice("Start it first")
}

/// Calls `work` on a thread of its own. A call that does not return in time is abandoned.
///
/// # Errors
/// `work` fails, or does not return within `limit`.
pub async fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match call(what, limit, pending(), move |_| work()).await {
        CallResult::Returned(result) => result,
        CallResult::Abandoned(_) => Err(Error::timeout(format!("cannot {what} within {limit:?}"))
            .advice("Read the passed pipe until its end, or check the file system of the file")),
    }
}
