//! The machines of one host that claim the same resources, such as a port or a tap device.
//!
//! Only one QEMU at a time can use a resource. A start therefore discards the standbys of rivals, and a
//! preparation is put off while a rival has a QEMU.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use machinery::{Deadline, Result};
use machinery_backend::sync::lock;

use crate::resources::Resource;

/// A machine, as its rivals see it.
pub trait Peer: Send + Sync {
    fn name(&self) -> &str;

    /// Returns the resources that the machine claims; none while its arguments cannot be read.
    fn resources(&self) -> &[Resource];

    /// Reports whether the machine's next restore is prepared or being prepared.
    fn is_prepared(&self) -> bool;

    /// Reports whether the machine runs, has a standby, or is being prepared.
    fn has_qemu(&self) -> bool;

    /// Cancels a preparation and ends the standby.
    ///
    /// # Errors
    /// The preparation or QEMU does not end in time.
    fn discard_standby(&self, deadline: Deadline) -> Result<()>;

    /// Reports to the host why the machine has no standby any more.
    fn report_standby_lost(&self, why: String);
}

/// All machines of a host. The list does not keep them alive.
#[derive(Default)]
pub struct Peers {
    machines: Mutex<Vec<Weak<dyn Peer>>>,
    /// Locked while a machine decides whether it can be prepared.
    deciding: Mutex<()>,
}

/// Another machine, and the resource that both claim.
pub struct Rival {
    pub machine: Arc<dyn Peer>,
    pub resource: Resource,
}

impl Peers {
    /// Adds a machine.
    pub fn add(&self, machine: &Arc<dyn Peer>) {
        let mut machines = self.machines();
        machines.retain(|machine| machine.strong_count() > 0);
        machines.push(Arc::downgrade(machine));
    }

    /// Returns the other machines that claim a resource of this machine.
    fn rivals(&self, machine: &dyn Peer) -> Vec<Rival> {
        let claimed = machine.resources();
        if claimed.is_empty() {
            return Vec::new();
        }
        let others: Vec<Arc<dyn Peer>> = self.machines().iter().filter_map(Weak::upgrade).collect();
        let others = others.into_iter().filter(|other| !std::ptr::addr_eq(Arc::as_ptr(other), machine));
        let rival = |other: Arc<dyn Peer>| {
            let is_claimed = |resource: &&Resource| claimed.iter().any(|own| own.clashes(resource));
            let resource = other.resources().iter().find(is_claimed)?.clone();
            Some(Rival { machine: other, resource })
        };
        others.filter_map(rival).collect()
    }

    /// Returns a rival that has a QEMU.
    pub fn rival_with_qemu(&self, machine: &dyn Peer) -> Option<Rival> {
        self.rivals(machine).into_iter().find(|rival| rival.machine.has_qemu())
    }

    /// Discards the standbys and preparations of all rivals, so that the machine can start.
    ///
    /// # Errors
    /// A preparation or QEMU of a rival does not end in time.
    pub fn discard_rivals(&self, machine: &dyn Peer, deadline: Deadline) -> Result<()> {
        for Rival { machine: rival, resource } in self.rivals(machine) {
            if rival.is_prepared() {
                let (name, other) = (machine.name(), rival.name());
                tracing::info!(machine = name, other, %resource, "discarding the standby of another machine, which claims the same resource");
                let discarded = rival.discard_standby(deadline);
                discarded.map_err(|error| error.detail(&format!("machine '{other}' has {resource}, too")))?;
                rival.report_standby_lost(format!("machine '{name}' needed {resource}"));
            }
        }
        Ok(())
    }

    /// Locks the decision whether a machine can be prepared: one machine at a time decides.
    pub fn decide(&self) -> MutexGuard<'_, ()> {
        lock(&self.deciding)
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Weak<dyn Peer>>> {
        lock(&self.machines)
    }
}
