//! The time from a restore until the agent in the guest answers: for an analysis, the machine is ready then, and not before.
//!
//! The agent of the Linux guest answers `GET /`. The request is sent when the restore is answered.

use std::time::Duration;

use machinery_testkit::guest::GuestProbe;

use super::figures::{Kind, Unit};
use super::turns::timed;
use crate::run::Result;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Returns the kind of such a time.
pub const fn kind(name: &'static str) -> Kind {
    let what = "the begin of that restore, until the agent in the guest has answered its first GET";
    Kind { by: "", name, what, unit: Unit::Ms }
}

/// Waits for the agent's first answer after a restore of so many milliseconds, and returns the milliseconds of both.
pub fn after(restored: f64, guest: &GuestProbe) -> Result<f64> {
    let ((status, body), took) = timed(|| Ok(guest.get("/", TIMEOUT)?))?;
    if status == 200 {
        Ok(restored + took)
    } else {
        Err(format!("the agent has answered {status}: {body}").into())
    }
}
