//! Has plugins look anew at their machines, and notes what they find.
//!
//! A machine whose plugin cannot use it is out of the pool for as long as that is so. That is kept apart from
//! what an operator or a failed action has disabled, which only an operator enables again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Diagnosis, Error, Result};
use tokio::time::timeout;

use super::call::{self, Called};
use crate::fleet::{Machine, Machinery, Roll};

/// Looks at all machines, for each machinery within `limit`.
pub async fn diagnose_all(roll: &Roll, limit: Duration) {
    for machinery in roll.machineries() {
        let of_it = |machine: &&Arc<Machine>| Arc::ptr_eq(&machine.machinery, machinery);
        let machines: Vec<_> = roll.machines().iter().filter(of_it).cloned().collect();
        diagnose(machinery, &machines, limit).await;
    }
}

/// Looks at one machine.
///
/// # Errors
/// It cannot be used: the reason.
pub async fn diagnose_one(machine: &Arc<Machine>, limit: Duration) -> Result<(), String> {
    diagnose(&machine.machinery, std::slice::from_ref(machine), limit).await;
    machine.status().standing.unusable.map_or(Ok(()), Err)
}

/// A machinery that cannot look is reported, and what is known of its machines stays.
async fn diagnose(machinery: &Arc<Machinery>, machines: &[Arc<Machine>], limit: Duration) {
    match ask(machinery, machines, limit).await {
        Ok(diagnoses) => {
            let mut by_name: HashMap<_, _> =
                diagnoses.into_iter().map(|diagnosis| (diagnosis.machine.clone(), diagnosis)).collect();
            for machine in machines {
                let found = by_name.remove(machine.name()).unwrap_or_default();
                machine.set_diagnosis(found.unusable.as_ref(), found.warnings);
            }
        }
        Err(error) => {
            let error = error.action(format!("diagnosing the machines of '{}'", machinery.name));
            tracing::warn!(machinery = machinery.name, %error, "what is known of its machines may be old");
        }
    }
}

async fn ask(
    machinery: &Arc<Machinery>,
    machines: &[Arc<Machine>],
    limit: Duration,
) -> Result<Vec<Diagnosis>> {
    let names: Vec<String> = machines.iter().map(|machine| machine.name().to_owned()).collect();
    // A plugin that does not come back costs one thread, however often somebody asks.
    let turn = timeout(limit, Arc::clone(&machinery.diagnosing).lock_owned()).await;
    let turn = turn.map_err(|_| Error::timeout("an earlier diagnosis has not come back from its plugin"))?;
    let called = call::ask(machinery, "diagnose", limit, move |machinery, deadline| {
        let _turn = turn;
        machinery.instance.diagnose(&names, deadline)
    });
    match called.await {
        Called::Returned(diagnoses) => diagnoses,
        Called::Lost(_) => {
            Err(Error::timeout(format!("it did not come back from the plugin within {limit:?}")))
        }
    }
}
