//! The requirements, each by its name and in the order in which they are tried: the plain ones first,
//! so that the first one broken is the one to look at.

mod files;
mod identity;
mod life;
mod reload;
mod runs;
mod trouble;

use super::report::Result;
use super::session::Session;

/// Hands the one list of all requirements to a macro, behind what is given to be handed on with it.
#[doc(hidden)]
#[macro_export]
macro_rules! with_requirements {
    ($then:path, $($with:tt)*) => {
        $then! { $($with)*:
            identity::identity "The file is named after the machinery, and both know their versions.";
            identity::machines "The machines are those of the configuration, in its order, each unlike the others.";
            identity::capabilities "What the machinery can do does not change, and what it cannot do it says so.";
            identity::unknown_machine "A name that no machine has is known for one in every method.";
            identity::bad_configuration "A configuration that is none is refused, and the error names the file.";
            identity::check "`check` finds nothing wrong with a configuration that works, and disturbs nobody.";
            life::off_after_load "No machine runs because a machinery was loaded.";
            runs::restore_start "It returns when the machine runs from its snapshot, and leaves a running one alone.";
            runs::stop "It returns when nothing of the run is left, and says so when there was none.";
            runs::clean_every_time "Every run begins at the snapshot, whatever the one before has done.";
            runs::norestore_start "A cold start runs, not from the snapshot, and leaves no trace for the next restore.";
            runs::acpi_stop "The guest goes off by itself, and the call returns when it has.";
            runs::prepare "To the outside a prepared machine is off, and it starts like any other.";
            runs::in_parallel "Different machines know nothing of each other.";
            runs::state_at_any_time "`state` has an answer while the machine is being started, and does not wait for it.";
            files::dump_memory "The memory is in the file, which is the caller's; the machine runs on.";
            files::screenshot "The file is a picture; the machine runs on.";
            trouble::failed_start "A start that fails says why and leaves nothing behind; mended, all is as before.";
            trouble::death "A machine that ends by itself is told of at once, and can be started again.";
            trouble::start_deadlines "A start that does not make it in time says so by then and leaves nothing behind.";
            trouble::deadlines "Every other call comes back in time too, and the machine can be had again.";
            reload::reload "A new configuration holds at once, but for machines in use; a bad one changes nothing.";
            trouble::diagnose "A machine that works is never reported as unusable, whether it runs or not.";
            life::shutdown "After shutdown nothing is left, and whoever calls all the same does no harm.";
            life::reports "Whatever is told to the host is about the machinery's own machines.";
        }
    };
}

/// One requirement.
pub struct Requirement {
    pub name: &'static str,
    /// What is required, in a sentence.
    pub says: &'static str,
    pub check: fn(&Session) -> Result,
}

macro_rules! table {
    (all: $($room:ident::$name:ident $says:literal;)*) => {
        pub const REQUIREMENTS: &[Requirement] =
            &[$(Requirement { name: stringify!($name), says: $says, check: $room::$name }),*];
    };
}

with_requirements! { table, all }
