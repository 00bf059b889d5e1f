//! Whole analyses by Cuckoo3 and by CAPE, each on the host and on its own manager.
//!
//! Both managers of a sandbox get the same machines and samples, one after the other. All samples are submitted at once. A
//! sandbox whose variables are not set is not measured.
//!
//! | module | sandbox | guests |
//! | --- | --- | --- |
//! | [`cuckoo`] | Cuckoo3, from the submission to the report | Linux with Cuckoo's agent |
//! | [`agent`] | none: the first answers of that agent after a restore | the same |
//! | [`cape`] | CAPE, from its scheduler to its machinery module | Linux; CAPE's guest manager is replaced |

mod agent;
mod cape;
mod cuckoo;
mod steps;

use std::path::Path;

use self::cape::Cape;
use crate::bench::cuckoo3;
use crate::bench::figures::Figures;
use crate::bench::plan::Plan;
use crate::run::{Result, note};

pub use self::steps::pairs;

const NO_CUCKOO3: &str = "CUCKOO3_PYTHON names no Python with Cuckoo3";
const NO_CAPE: &str =
    "CAPE_SOURCE and CAPE_PYTHON do not name a checkout of CAPE and a Python with its packages";

/// Measures the sandboxes whose variables are set.
pub fn measure(plan: &Plan, figures: &mut Figures) -> Result<()> {
    let (python, cape) = (cuckoo3::python(), Cape::given());
    if python.is_none() && cape.is_none() {
        return Err(format!("{NO_CUCKOO3}, and {NO_CAPE}").into());
    }
    match python {
        Some(python) => cuckoo::measure(Path::new(&python), plan, figures)?,
        None => note(&format!("Cuckoo3 is not measured: {NO_CUCKOO3}")),
    }
    match cape {
        Some(cape) => cape.measure(plan, figures)?,
        None => note(&format!("CAPE is not measured: {NO_CAPE}")),
    }
    Ok(())
}
