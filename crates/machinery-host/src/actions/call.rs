//! A call into a plugin: blocking code, on a thread of its own, that may not come back.

use std::sync::Arc;
use std::time::Duration;

use machinery::host::panic_message;
use machinery::{Deadline, Error, Result};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::timeout;

use crate::fleet::Machine;

/// A plugin returns by its deadline; one that is later than this is taken for lost.
const GRACE: Duration = Duration::from_secs(2);

/// What became of a call.
pub enum Called<T> {
    /// It came back.
    Returned(Result<T>),
    /// It did not, and still runs; the handle tells when it ends after all.
    Lost(JoinHandle<()>),
}

/// Calls into the machine's plugin, with `limit` as the deadline.
pub async fn call<T, F>(machine: &Arc<Machine>, limit: Duration, work: F) -> Called<T>
where
    T: Send + 'static,
    F: FnOnce(&Machine, Deadline) -> Result<T> + Send + 'static,
{
    let machine = Arc::clone(machine);
    bounded(limit, move |deadline| work(&machine, deadline)).await
}

/// Calls into a plugin, with `limit` as the deadline.
pub async fn bounded<T, F>(limit: Duration, work: F) -> Called<T>
where
    T: Send + 'static,
    F: FnOnce(Deadline) -> Result<T> + Send + 'static,
{
    // From now on, so that a call that is given up before a thread was free for it never begins.
    let deadline = Deadline::after(limit);
    let mut running = tokio::task::spawn_blocking(move || {
        deadline.check("a free thread")?;
        work(deadline)
    });
    match timeout(limit + GRACE, &mut running).await {
        Ok(Ok(result)) => Called::Returned(result),
        Ok(Err(error)) => Called::Returned(Err(failed(error))),
        Err(_) => Called::Lost(tokio::spawn(async move { drop(running.await) })),
    }
}

/// The guard in the plugin turns its panics into errors, so this one is the host's own.
fn failed(error: JoinError) -> Error {
    match error.try_into_panic() {
        Ok(panic) => Error::failed(format!("the host panicked: {}", panic_message(panic))),
        Err(_) => Error::failed("the host is ending"),
    }
}
