//! Asks plugins to diagnose their machines, and records the results.
//!
//! The host keeps a machine whose plugin cannot use it out of the pool until the plugin can use it again. The
//! host records this apart from machines that an operator or a failed action has disabled. Only an operator
//! enables those again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use machinery::{Diagnosis, Error, Result};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::fleet::{Machine, Machinery, Roster};
use crate::plugin::call::CallResult;

/// The longest that a machinery may take to diagnose all its machines. The host's start, or a reload, waits.
const MAX_DIAGNOSIS: Duration = Duration::from_secs(30);

/// Diagnoses all machines; each hypervisor of a machinery has `limit` for its answer, and at most 30 seconds.
pub async fn diagnose_all(roster: &Roster, limit: Duration) {
    let limit = limit.min(MAX_DIAGNOSIS);
    for machinery in roster.machineries() {
        let of_it = |machine: &&Arc<Machine>| Arc::ptr_eq(&machine.machinery, machinery);
        let mut hypervisors = BTreeMap::<_, Vec<_>>::new();
        for machine in roster.machines().iter().filter(of_it) {
            hypervisors.entry(machine.info().hypervisor.clone()).or_default().push(Arc::clone(machine));
        }
        let mut diagnoses = JoinSet::new();
        for machines in hypervisors.into_values() {
            let machinery = Arc::clone(machinery);
            diagnoses.spawn(async move { diagnose(&machinery, &machines, limit).await });
        }
        diagnoses.join_all().await;
    }
}

/// Diagnoses one machine.
///
/// # Errors
/// The plugin cannot use the machine: the reason.
pub async fn diagnose_one(machine: &Arc<Machine>, limit: Duration) -> Result<(), String> {
    diagnose(&machine.machinery, std::slice::from_ref(machine), limit).await;
    machine.status().availability.unusable.map_or(Ok(()), Err)
}

/// Diagnoses machines of one hypervisor. If that fails, the host logs the failure and keeps the earlier
/// results.
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
            tracing::warn!(machinery = machinery.name, %error, "the earlier diagnosis of its machines may be outdated");
        }
    }
}

async fn ask(
    machinery: &Arc<Machinery>,
    machines: &[Arc<Machine>],
    limit: Duration,
) -> Result<Vec<Diagnosis>> {
    let names: Vec<String> = machines.iter().map(|machine| machine.name().to_owned()).collect();
    // Only one diagnosis of a hypervisor runs at a time, so a plugin that hangs blocks a single thread.
    let hypervisor = machines.first().and_then(|machine| machine.info().hypervisor.clone());
    let permit = timeout(limit, machinery.diagnosing(hypervisor.as_ref()).lock_owned()).await;
    let permit =
        permit.map_err(|_| Error::timeout("an earlier diagnosis has not returned from its plugin"))?;
    let called = machinery.call("diagnose", limit, move |machinery, deadline| {
        let _permit = permit;
        machinery.instance.diagnose(&names, deadline)
    });
    match called.await {
        CallResult::Returned(diagnoses) => diagnoses,
        CallResult::Abandoned(_) => {
            Err(Error::timeout(format!("it did not return from the plugin within {limit:?}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::*;
    use machinery::{Error, MachineInfo};

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn machine_is_out_of_the_pool_while_its_plugin_cannot_use_it() {
        let lab = Lab::new("");
        lab.plugin.set_unusable("m", Some("no disk"));
        diagnose_all(&lab.fleet.roster(), LIMIT).await;
        assert!(lab.disabled_reason().unwrap().contains("no disk"));
        lab.plugin.fail("diagnose", Error::failed("no answer"));
        lab.plugin.set_unusable("m", None);
        assert!(diagnose_one(&lab.machine, LIMIT).await.is_err(), "the earlier result is kept");
        diagnose_one(&lab.machine, LIMIT).await.unwrap();
        assert_eq!(lab.disabled_reason(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn machine_is_diagnosed_while_another_hypervisor_hangs() {
        let lab = Lab::new("");
        let (machine, hypervisor) = (&lab.machine, Some("elsewhere".to_owned()));
        let _hangs = machine.machinery.diagnosing(hypervisor.as_ref()).lock_owned().await;
        lab.plugin.set_unusable("m", Some("no disk"));
        assert!(diagnose_one(machine, LIMIT).await.unwrap_err().contains("no disk"));
        lab.plugin.set_unusable("m", None);
        machine.set_info(MachineInfo { hypervisor, ..MachineInfo::clone(&machine.info()) });
        assert!(diagnose_one(machine, LIMIT).await.is_err(), "the earlier result is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn diagnosis_has_half_a_minute_at_most() {
        let lab = Lab::new("");
        let _release = lab.plugin.block("diagnose");
        let roster = lab.fleet.roster();
        let advance = async {
            lab.plugin.called("diagnose").await;
            tokio::time::advance(Duration::from_secs(33)).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = diagnose_all(&roster, 10 * LIMIT) => {}
            () = advance => unreachable!(),
        }
        assert_eq!(lab.disabled_reason(), None);
    }
}
