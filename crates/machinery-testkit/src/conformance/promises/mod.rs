//! The promises, each by its name and in the order in which they are tried: the plain ones first,
//! so that the first one broken is the one to look at.

mod files;
mod identity;
mod life;
mod runs;
mod trouble;

use super::report::Result;
use super::session::Session;

type Promise = fn(&Session) -> Result;

pub const PROMISES: &[(&str, Promise)] = &[
    ("identity", identity::identity),
    ("machines", identity::machines),
    ("capabilities", identity::capabilities),
    ("unknown_machine", identity::unknown_machine),
    ("bad_configuration", identity::bad_configuration),
    ("check", identity::check),
    ("off_after_load", life::off_after_load),
    ("restore_start", runs::restore_start),
    ("stop", runs::stop),
    ("clean_every_time", runs::clean_every_time),
    ("norestore_start", runs::norestore_start),
    ("acpi_stop", runs::acpi_stop),
    ("prepare", runs::prepare),
    ("in_parallel", runs::in_parallel),
    ("state_at_any_time", runs::state_at_any_time),
    ("dump_memory", files::dump_memory),
    ("screenshot", files::screenshot),
    ("failed_start", trouble::failed_start),
    ("death", trouble::death),
    ("start_deadlines", trouble::start_deadlines),
    ("deadlines", trouble::deadlines),
    ("shutdown", life::shutdown),
    ("reports", life::reports),
];
