//! The permits of preparations, which therefore never delay a restore.
//!
//! Clones share what the first of them makes, such as a template, and the plugin has the others wait for it. A clone that may
//! wait has no permit that another machine needs:
//!
//! ```text
//! clone ─▶ permit ─┬─ a clone of its base is ready, or none is prepared now ─▶ prepared with the permit
//!                  └─ otherwise: the permit goes back ─▶ second place of its base ─▶ prepared
//!                                   ▲─────────────────── a clone of the base was prepared ─▶ permit
//! ```
//!
//! The second place keeps a clone that hangs from delaying the others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use machinery::Readiness;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::fleet::Machine;

/// The permits of preparations.
pub struct PreparePermits {
    permits: Arc<Semaphore>,
    bases: Mutex<HashMap<String, Arc<Base>>>,
}

/// A machine that has clones.
struct Base {
    /// The place of the clone that makes what all of them share.
    first: Arc<Semaphore>,
    second: Arc<Semaphore>,
    /// True if the last clone that was prepared is ready.
    is_ready: AtomicBool,
    /// Notified when a clone was prepared.
    prepared: Notify,
}

/// The permit to prepare a machine, until it is dropped.
pub struct PreparePermit {
    machine: Arc<Machine>,
    base: Option<Arc<Base>>,
    held: Vec<OwnedSemaphorePermit>,
}

impl PreparePermits {
    /// Returns that many permits.
    pub fn new(permits: usize) -> Self {
        PreparePermits { permits: Arc::new(Semaphore::new(permits)), bases: Mutex::default() }
    }

    /// Waits for a permit to prepare the machine. Returns `None` when the host ends.
    pub async fn acquire(&self, machine: &Arc<Machine>) -> Option<PreparePermit> {
        let base = machine.info().clone_of.as_deref().map(|base| self.base(base));
        let held = match &base {
            Some(base) => self.acquire_for_clone(base).await?,
            None => vec![self.permit().await?],
        };
        Some(PreparePermit { machine: Arc::clone(machine), base, held })
    }

    async fn acquire_for_clone(&self, base: &Base) -> Option<Vec<OwnedSemaphorePermit>> {
        loop {
            let prepared = base.prepared.notified();
            let permit = self.permit().await?;
            if base.is_ready.load(Ordering::SeqCst) {
                return Some(vec![permit]);
            }
            if let Ok(first) = Arc::clone(&base.first).try_acquire_owned() {
                return Some(vec![permit, first]);
            }
            drop(permit);
            tokio::select! {
                second = Arc::clone(&base.second).acquire_owned() => return Some(vec![second.ok()?]),
                () = prepared => {}
            }
        }
    }

    async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).acquire_owned().await.ok()
    }

    /// Refuses all permits from now on.
    pub fn close(&self) {
        self.permits.close();
        let bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        bases.values().for_each(|base| base.second.close());
    }

    fn base(&self, name: &str) -> Arc<Base> {
        let mut bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(bases.entry(name.to_owned()).or_insert_with(|| Arc::new(Base::new())))
    }
}

impl Base {
    fn new() -> Self {
        let place = || Arc::new(Semaphore::new(1));
        Base { first: place(), second: place(), is_ready: AtomicBool::new(false), prepared: Notify::new() }
    }
}

impl Drop for PreparePermit {
    fn drop(&mut self) {
        let Some(base) = &self.base else { return };
        let ready = self.machine.status().ready;
        base.is_ready.store(ready.is_some_and(|ready| ready.mode != Readiness::Plain), Ordering::SeqCst);
        // A clone that waits looks at the places next.
        self.held.clear();
        base.prepared.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;
    use crate::fleet::fake_plugin::{FakePlugin, info};
    use machinery::{MachineInfo, RestoreReadiness};
    use std::time::Duration;
    use tokio::time::timeout;

    fn machines<const COUNT: usize>(clone_of: Option<&str>) -> [Arc<Machine>; COUNT] {
        let plugin = FakePlugin::default();
        std::array::from_fn(|number| {
            let name = format!("{}-{number}", clone_of.unwrap_or("m"));
            let machine = plugin.machine(&name, &Events::default());
            machine.set_info(MachineInfo { clone_of: clone_of.map(str::to_owned), ..info(&name) });
            machine
        })
    }

    /// Returns the permit, unless the machine has to wait for it.
    async fn at_once(permits: &PreparePermits, machine: &Arc<Machine>) -> Option<PreparePermit> {
        timeout(Duration::from_secs(1), permits.acquire(machine)).await.ok().flatten()
    }

    fn is(mode: Readiness) -> RestoreReadiness {
        RestoreReadiness { mode, ..RestoreReadiness::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn other_machine_is_prepared_while_clones_wait_for_the_first_of_them() {
        let permits = PreparePermits::new(2);
        let [first, second, third] = machines(Some("base"));
        let [other, another] = machines(None);
        let building = at_once(&permits, &first).await.unwrap();
        let waiting = at_once(&permits, &second).await.unwrap();
        assert!(at_once(&permits, &third).await.is_none(), "both places are taken");
        let preparing = at_once(&permits, &other).await.unwrap();
        assert!(at_once(&permits, &another).await.is_none(), "both permits are taken");
        drop((waiting, preparing));
        // The first clone hangs.
        drop(at_once(&permits, &third).await.unwrap());
        drop(building);
        assert!(at_once(&permits, &third).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn clones_are_prepared_at_the_same_time_once_one_of_them_is_ready() {
        let permits = PreparePermits::new(2);
        let [first, second, third] = machines(Some("base"));
        let [other] = machines(None);
        let building = at_once(&permits, &first).await.unwrap();
        let waiting = at_once(&permits, &second).await.unwrap();
        let end = async {
            tokio::task::yield_now().await;
            first.set_ready(&is(Readiness::Instant));
            drop(building);
        };
        let (third, ()) = tokio::join!(permits.acquire(&third), end);
        assert!(third.is_some(), "it had waited for a place");
        let preparing = at_once(&permits, &first).await.unwrap();
        assert!(at_once(&permits, &other).await.is_none(), "both have a permit of all machines");
        drop((waiting, third, preparing));
    }

    #[tokio::test(start_paused = true)]
    async fn permit_is_refused_when_the_host_ends() {
        let permits = PreparePermits::new(2);
        let [first, second, third] = machines(Some("base"));
        let _building = at_once(&permits, &first).await.unwrap();
        let _waiting = at_once(&permits, &second).await.unwrap();
        let (refused, ()) = tokio::join!(permits.acquire(&third), async { permits.close() });
        assert!(refused.is_none() && permits.acquire(&first).await.is_none());
    }
}
