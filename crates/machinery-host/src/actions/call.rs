//! A call into a plugin: blocking code, on a thread of its own, that may not come back.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::panic_message;
use machinery::{Deadline, Error, Result};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::sleep;

use crate::exit;
use crate::fleet::{Machine, Machinery};

/// A plugin returns by its deadline; one that is later than this is taken for lost.
const GRACE: Duration = Duration::from_secs(2);

/// What became of a call.
pub enum Called<T> {
    /// It came back.
    Returned(Result<T>),
    /// It did not, and still runs; the handle tells when it ends after all.
    Lost(JoinHandle<()>),
}

impl<T: Send + 'static> Called<T> {
    fn lost(running: JoinHandle<Result<T>>) -> Self {
        Called::Lost(tokio::spawn(async move { drop(running.await) }))
    }
}

/// Calls into the machine's plugin, with `limit` as the deadline.
pub async fn call<T, F>(machine: &Arc<Machine>, limit: Duration, work: F) -> Called<T>
where
    T: Send + 'static,
    F: FnOnce(&Machine, Deadline) -> Result<T> + Send + 'static,
{
    call_unless(pending(), machine, limit, work).await
}

/// The same, but taken for lost as soon as `given_up` is over.
pub async fn call_unless<T, F>(
    given_up: impl Future<Output = ()>,
    machine: &Arc<Machine>,
    limit: Duration,
    work: F,
) -> Called<T>
where
    T: Send + 'static,
    F: FnOnce(&Machine, Deadline) -> Result<T> + Send + 'static,
{
    let at = format!("'{}' in a call for the machine '{}'", machine.machinery.name, machine.name());
    let machine = Arc::clone(machine);
    bounded(given_up, at, limit, move |deadline| work(&machine, deadline)).await
}

/// Calls into the plugin of that machinery, with `limit` as the deadline.
pub async fn ask<T, F>(machinery: &Arc<Machinery>, method: &str, limit: Duration, work: F) -> Called<T>
where
    T: Send + 'static,
    F: FnOnce(&Machinery, Deadline) -> Result<T> + Send + 'static,
{
    let at = format!("'{}' in {method}", machinery.name);
    let machinery = Arc::clone(machinery);
    bounded(pending(), at, limit, move |deadline| work(&machinery, deadline)).await
}

async fn bounded<T, F>(given_up: impl Future<Output = ()>, at: String, limit: Duration, work: F) -> Called<T>
where
    T: Send + 'static,
    F: FnOnce(Deadline) -> Result<T> + Send + 'static,
{
    // From now on, so that a call that is given up before a thread was free for it never begins.
    let deadline = Deadline::after(limit);
    let mut running = tokio::task::spawn_blocking(move || {
        deadline.check("a free thread")?;
        let _call = exit::Call::begin(&at);
        work(deadline)
    });
    tokio::select! {
        returned = &mut running => Called::Returned(returned.unwrap_or_else(|error| Err(failed(error)))),
        () = sleep(limit + GRACE) => Called::lost(running),
        () = given_up => Called::lost(running),
    }
}

/// The guard in the plugin turns its panics into errors, so this one is the host's own.
fn failed(error: JoinError) -> Error {
    match error.try_into_panic() {
        Ok(panic) => Error::failed(format!("the host panicked: {}", panic_message(panic))),
        Err(_) => Error::failed("the host is ending"),
    }
}
