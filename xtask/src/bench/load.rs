//! The host's own costs: actions on machines in memory, which take no time.

use machinery_testkit::host::RunningHost;
use machinery_testkit::scratch::ScratchCwd;
use serde_json::json;

use super::figures::{Figures, Kind, Place, Unit};
use super::host::succeeded;
use super::plan::Plan;
use super::turns::timed;
use crate::run::{Result, note};

const MACHINES: usize = 1000;

/// The number of actions per second.
pub const ACTIONS: Kind = Kind {
    by: "",
    name: "actions",
    what: "the host with machines in memory: restore_start and stop in turn, over one connection, all sent at once",
    unit: Unit::PerSecond,
};

/// Measures the host; the first round does not count.
pub fn measure(plan: &Plan, figures: &mut Figures) -> Result<()> {
    note(&format!("{MACHINES} machines in memory"));
    let names: Vec<String> = (0..MACHINES).map(|number| format!("m{number}")).collect();
    let cwd = ScratchCwd::double(&names.iter().map(|name| (name.as_str(), "")).collect::<Vec<_>>())?;
    let mut host = RunningHost::start(&cwd)?;
    let mut client = host.client()?;
    let requests = requests(plan.actions);
    for round in 0..=plan.rounds {
        let ((), took) = timed(|| {
            client.send_bytes(requests.as_bytes())?;
            (0..plan.actions).try_for_each(|_| succeeded("an action", &client.next_message()?))
        })?;
        if round > 0 {
            figures.add(Place::Double(MACHINES), ACTIONS, plan.actions as f64 * 1000.0 / took);
        }
    }
    host.terminate()?;
    Ok(())
}

/// Returns the requests: all machines are started, then stopped, then started again.
fn requests(count: usize) -> String {
    let request = |number: usize| {
        let action = if (number / MACHINES).is_multiple_of(2) { "restore_start" } else { "stop" };
        let machine = format!("m{}", number % MACHINES);
        format!("{}\n", json!({"action": action, "machine": machine, "id": number}))
    };
    (0..count).map(request).collect()
}
