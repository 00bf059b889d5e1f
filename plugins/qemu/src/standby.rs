//! A standby: a run that is loaded and paused, so that a restore only has to resume it.
//!
//! A standby belongs to the [`Identity`] that it was loaded from, and to the RAM file that it maps. A restore
//! checks both and discards a standby that is stale. A dropped standby ends its run.

use std::sync::Arc;

use machinery::{Deadline, Error, Result};
use machinery_images::FileId;
use serde::{Deserialize, Serialize};

use crate::prepare::Identity;
use crate::run::Run;
use crate::run::start_error::StartError;

/// The origin of a standby, for the next host.
#[derive(Debug, Serialize, Deserialize)]
pub struct StandbyRecord {
    pub identity: Identity,
    pub ram: Option<FileId>,
    /// The checksum of the machine's keys and of its jail, which are no part of the identity.
    pub keys: u64,
    /// The memory that the standby holds, in bytes.
    pub memory: u64,
}

/// A run that is loaded and paused. The run has the standby's share of the memory budget.
pub struct Standby {
    run: Arc<Run>,
    /// The identity of the machine when the run was loaded.
    identity: Identity,
    /// The RAM file of the template, if the run maps one.
    ram: Option<FileId>,
    /// The memory that the standby holds, in bytes.
    memory: u64,
    /// True if the run was taken or ended. Otherwise it is ended with the value.
    taken: bool,
}

impl Drop for Standby {
    fn drop(&mut self) {
        if !self.taken {
            self.run.discard();
        }
    }
}

impl Standby {
    /// Makes a standby of a loaded run.
    pub fn new(run: Arc<Run>, identity: Identity, ram: Option<FileId>, memory: u64) -> Self {
        Standby { run, identity, ram, memory, taken: false }
    }

    /// Returns the memory that the standby holds, in bytes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Asks QEMU to end, without waiting for it.
    pub fn terminate(&self) {
        self.run.terminate();
    }

    pub fn has_ended(&self) -> bool {
        self.run.has_ended()
    }

    /// Returns the reason why the standby is stale; none if a restore can use it.
    pub fn stale_reason(&self, identity: &Identity) -> Option<String> {
        if self.run.has_ended() {
            return Some("it has ended by itself".to_owned());
        }
        if self.ram.as_ref().is_some_and(|ram| !ram.is_unchanged()) {
            return Some("the RAM file of its template was changed".to_owned());
        }
        identity.change_since(&self.identity)
    }

    /// Leaves the run to the next host.
    pub fn leave(mut self) {
        self.taken = true;
    }

    /// Returns the run for a restore.
    ///
    /// # Errors
    /// The standby is stale; it is ended then.
    pub fn take(mut self, identity: &Identity, deadline: Deadline) -> Result<Arc<Run>, StartError> {
        match self.stale_reason(identity) {
            None => {
                self.taken = true;
                Ok(Arc::clone(&self.run))
            }
            Some(why) => {
                self.end(deadline)?;
                Err(Error::failed(why).into())
            }
        }
    }

    /// Ends the run.
    ///
    /// # Errors
    /// QEMU does not end.
    pub fn end(mut self, deadline: Deadline) -> Result<(), StartError> {
        self.taken = true;
        self.run.end(deadline)
    }
}
