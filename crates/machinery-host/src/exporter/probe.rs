//! Reports whether each hypervisor answers: the host asks for the state of one idle machine of each machinery.
//!
//! A reader of the metrics causes the question, and gets the answer to the one before. So a hypervisor that hangs delays no
//! reader, and an idle host without readers asks nothing. The answer has no consequence for the machine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::fleet::{Machine, Machinery};
use crate::manager::Manager;
use crate::plugin::call::CallResult;

/// The time between two questions to one hypervisor.
const INTERVAL: Duration = Duration::from_secs(10);

/// The latest answers.
#[derive(Default)]
pub struct Probe(Mutex<HashMap<String, Answer>>);

/// The latest answer of a hypervisor, and the time of the latest question.
struct Answer {
    is_up: bool,
    asked: Instant,
}

impl Probe {
    /// Reports whether the hypervisor has answered the latest question. It has answered the load of its plugin.
    pub fn is_up(&self, machinery: &Machinery) -> bool {
        self.answers().get(&machinery.name).is_none_or(|answer| answer.is_up)
    }

    /// Asks each hypervisor that was not asked for a while.
    pub fn ask_all(self: &Arc<Self>, manager: &Arc<Manager>) {
        let roster = manager.roster();
        for machinery in roster.machineries() {
            let idle = |machine: &&Arc<Machine>| {
                Arc::ptr_eq(&machine.machinery, machinery) && !machine.status().busy
            };
            if let Some(machine) = roster.machines().iter().find(idle)
                && self.is_due(machinery)
            {
                Handle::current().spawn(ask(Arc::clone(self), Arc::clone(manager), Arc::clone(machine)));
            }
        }
    }

    fn is_due(&self, machinery: &Machinery) -> bool {
        let now = Instant::now();
        let mut answers = self.answers();
        match answers.get_mut(&machinery.name) {
            Some(answer) if now - answer.asked < INTERVAL => false,
            Some(answer) => {
                answer.asked = now;
                true
            }
            None => answers.insert(machinery.name.clone(), Answer { is_up: true, asked: now }).is_none(),
        }
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<String, Answer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn ask(probe: Arc<Probe>, manager: Arc<Manager>, machine: Arc<Machine>) {
    // A question that hangs keeps the guard, so that no second one follows it.
    let Some(query) = machine.start_state_query() else { return };
    let context = manager.queues().context();
    let called = machine.call(context.timeouts().state, move |machine, deadline| {
        let _query = query;
        machine.machinery.instance.state(machine.name(), deadline)
    });
    let is_up = matches!(called.await, CallResult::Returned(Ok(_)));
    let changed = probe
        .answers()
        .get_mut(&machine.machinery.name)
        .is_some_and(|answer| std::mem::replace(&mut answer.is_up, is_up) != is_up);
    if changed {
        tracing::debug!(machinery = machine.machinery.name, is_up, "the hypervisor was asked");
        manager.metrics().set_changed();
    }
}
