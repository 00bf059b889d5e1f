//! Calls into the plugin of a machine or of a machinery. Each runs on a thread of its own and is bounded: see
//! [`plugin::call`](crate::plugin::call).

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Result, State};

use super::{Machine, Machinery};
use crate::plugin::call::{CallResult, call};

impl Machine {
    /// Calls into the machine's plugin, with `limit` as the deadline.
    pub async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        limit: Duration,
        work: impl FnOnce(&Machine, Deadline) -> Result<T> + Send + 'static,
    ) -> CallResult<T> {
        let machine = Arc::clone(self);
        call(&self.call_name(), limit, pending(), move |deadline| work(&machine, deadline)).await
    }

    /// Asks the machine's plugin for the state.
    pub async fn query_state(self: &Arc<Self>, limit: Duration) -> CallResult<State> {
        self.call(limit, |machine, deadline| machine.machinery.instance.state(machine.name(), deadline)).await
    }

    /// Returns the name of a call for this machine, for the log.
    pub fn call_name(&self) -> String {
        format!("'{}' in a call for the machine '{}'", self.machinery.name, self.name())
    }
}

impl Machinery {
    /// Calls `method` of the machinery's plugin, with `limit` as the deadline.
    pub async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        method: &str,
        limit: Duration,
        work: impl FnOnce(&Machinery, Deadline) -> Result<T> + Send + 'static,
    ) -> CallResult<T> {
        let what = format!("'{}' in {method}", self.name);
        let machinery = Arc::clone(self);
        call(&what, limit, pending(), move |deadline| work(&machinery, deadline)).await
    }
}
