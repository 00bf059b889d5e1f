//! A run that stands by: loaded, and paused, until a restore lets it go.

use std::sync::Arc;

use machinery::{Deadline, Error, Result, Share};

use crate::files::FileId;
use crate::run::{NotStarted, Run};
use crate::template::Identity;

/// A run that is loaded, and paused.
pub struct Standby {
    pub run: Arc<Run>,
    /// What it was made from.
    pub identity: Identity,
    /// The file of its RAM, if that is mapped.
    pub ram: Option<FileId>,
    /// What it holds of the memory for machines that stand by.
    pub share: Share,
}

impl Standby {
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
    pub fn take(self, identity: &Identity, deadline: Deadline) -> Result<Arc<Run>, NotStarted> {
        match self.fault(identity) {
            None => Ok(self.run),
            Some(why) => {
                self.let_go(deadline)?;
                Err(Error::failed(why).into())
            }
        }
    }

    /// Ends it.
    pub fn let_go(self, deadline: Deadline) -> Result<(), NotStarted> {
        self.run.end(deadline)
    }
}
