//! The machines of all machineries, and the state of each.
//!
//! | file | content |
//! | --- | --- |
//! | [`roster`] | the fleet: all machineries and machines |
//! | [`machinery`] | a loaded machinery |
//! | [`machine`] | one machine: its description, state and readiness |
//! | [`assignment`] | locks, reservations, disabling: who may use a machine |
//! | [`status`] | the part of a machine that changes |
//! | [`quarantine`] | the rules by which a machine heals by itself |
//! | [`healing`] | a machine's way into its quarantine and out of it |
//! | [`availability`] | the rules by which a machine is available to a task |
//! | [`pool`] | allocates machines to tasks |
//! | [`state_file`] | the availability of all machines, on disk |
//! | [`call`] | calls into a machine's plugin |
//! | [`run_errors`] | the errors of a task's run |
//! | [`run_marks`] | the runs of tasks, on disk |
//! | [`services`] | the host services that a plugin calls |

pub mod assignment;
pub mod availability;
pub mod call;
#[cfg(test)]
pub mod fake_plugin;
pub mod healing;
pub mod machine;
pub mod machinery;
pub mod pool;
pub mod quarantine;
pub mod roster;
pub mod run_errors;
pub mod run_marks;
pub mod services;
pub mod state_file;
pub mod status;

pub use machine::Machine;
pub use machinery::{Diagnosing, Losses, Machinery};
pub use roster::{Fleet, Roster};
