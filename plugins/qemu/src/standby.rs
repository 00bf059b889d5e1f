//! A run that stands by: loaded, and paused, until a restore lets it go.

use std::sync::Arc;

use machinery::{Deadline, Error, Result, Share};

use crate::run::{Run, StartError};
use crate::template::Identity;
use machinery_images::FileId;

/// A run that is loaded, and paused.
pub struct Standby {
    run: Arc<Run>,
    /// What it was made from.
    identity: Identity,
    /// The file of its RAM, if that is mapped.
    ram: Option<FileId>,
    /// What it holds of the memory for machines that stand by.
    share: Share,
    /// Whether somebody has seen to the run. One that nobody has is ended with the value.
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
    /// A run that was made from this, with the file of its RAM if that is mapped.
    pub fn new(run: Arc<Run>, identity: Identity, ram: Option<FileId>, share: Share) -> Self {
        Standby { run, identity, ram, share, taken: false }
    }

    /// What it holds of this computer's memory, in bytes.
    pub fn memory(&self) -> u64 {
        self.share.bytes()
    }

    /// Asks QEMU to end, without waiting for its end.
    pub fn terminate(&self) {
        self.run.terminate();
    }

    pub fn has_ended(&self) -> bool {
        self.run.has_ended()
    }

    /// Why it is of no use, if it is not.
    pub fn fault(&self, identity: &Identity) -> Option<String> {
        if self.run.has_ended() {
            return Some("it has ended by itself".to_owned());
        }
        if self.ram.as_ref().is_some_and(|ram| !ram.is_still_so()) {
            return Some("the RAM file of its template was changed".to_owned());
        }
        identity.change_since(&self.identity)
    }

    /// The run, if it is what a restore would make now. If not, it is let go.
    pub fn take(mut self, identity: &Identity, deadline: Deadline) -> Result<Arc<Run>, StartError> {
        match self.fault(identity) {
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

    /// Returns the run, which stays the standby's.
    pub fn run(&self) -> Arc<Run> {
        Arc::clone(&self.run)
    }

    /// Ends it.
    pub fn end(mut self, deadline: Deadline) -> Result<(), StartError> {
        self.taken = true;
        self.run.end(deadline)
    }
}
