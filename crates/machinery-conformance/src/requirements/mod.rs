//! The requirements, by name and in the order in which they are checked. Simple ones come first, so that the first
//! failure shows the cause.

mod adoption;
mod console;
mod files;
mod identity;
mod life;
mod own_host;
mod preparation;
mod reload;
mod runs;
mod trouble;

use crate::report::Result;
use crate::session::Session;

/// One requirement.
pub struct Requirement {
    pub name: &'static str,
    /// The requirement as one sentence.
    pub meaning: &'static str,
    pub check: fn(&Session) -> Result,
    /// Interface 1.0 did not have the requirement.
    pub since_1_1: bool,
}

macro_rules! table {
    ($($module:ident::$name:ident $meaning:literal $(since $version:literal)?;)*) => {
        pub const REQUIREMENTS: &[Requirement] = &[$(Requirement {
            name: stringify!($name),
            meaning: $meaning,
            check: $module::$name,
            since_1_1: matches!(concat!($($version)?).as_bytes(), b"1.1"),
        }),*];
    };
}

table! {
    identity::identity "The file is named after the machinery; plugin and hypervisor have a version.";
    identity::machines "The machines are those of the configuration, in its order, and unique.";
    identity::capabilities "The capabilities do not change; a call without its capability is refused as unsupported.";
    identity::unknown_machine "Every method refuses an unknown machine.";
    identity::bad_configuration "`load` refuses an invalid configuration, and the error names the file.";
    identity::check "`check` reports no problem with a configuration that works, and changes nothing.";
    life::off_after_load "All machines are powered off after `load`.";
    runs::restore_start "The call returns when the machine runs from its snapshot, and refuses a running machine.";
    runs::stop "The call returns when the run has no leftovers, and reports a machine that is off already.";
    runs::clean_every_time "Every run begins at the snapshot, whatever the previous run has done.";
    runs::norestore_start "A cold start does not use the snapshot, and does not affect the next restore.";
    runs::acpi_stop "The guest powers itself off, and the call returns when it has.";
    runs::prepare "A prepared machine is reported as powered off, and starts like any other.";
    runs::in_parallel "Actions on different machines do not affect each other.";
    runs::state_at_any_time "`state` does not wait for a start of the machine.";
    files::dump_memory "The dump is a file that belongs to the caller; the machine still runs.";
    files::screenshot "The screenshot is a PNG that belongs to the caller; the machine still runs.";
    console::console "A console greets as an RFB server, has several viewers, and closes at the end of the run." since 1.1;
    trouble::failed_start "A failed start returns a reason and has no leftovers; the machine starts again after a repair.";
    trouble::death "The plugin reports a machine that died at once, and the machine can be started again.";
    trouble::live_state "`state` asks the hypervisor: it does not report a paused machine as running." since 1.1;
    trouble::start_deadlines "A start that exceeds its deadline returns a timeout in time, and has no leftovers.";
    trouble::deadlines "Every other call returns by its deadline too, and the machine can be used again.";
    reload::reload "A new configuration applies at once, except to machines in use; an invalid one changes nothing.";
    preparation::reload_standby "A reload with `standby: off` discards the standbys." since 1.1;
    preparation::reload_names "Machines with similar names have separate preparations, and a new machine gets its own." since 1.1;
    trouble::diagnose "`diagnose` never reports a working machine as unusable, whether it runs or not.";
    own_host::no_leaks "Runs leave no process, thread, descriptor or file." since 1.1;
    own_host::killed_host "`load` removes all leftovers of a host that was killed during a run." since 1.1;
    adoption::adoption "`adopt` continues the run that an earlier host has left, and returns an error if it was lost." since 1.1;
    life::shutdown "`shutdown` leaves nothing behind, and later calls do no harm.";
    life::reports "All events belong to the machinery's own machines.";
}
