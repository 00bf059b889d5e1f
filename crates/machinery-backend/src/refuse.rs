//! The errors of actions that a machine's state does not allow. All machineries use the same words.

use machinery::Error;

/// The machine is powered off, and the action needs a running one.
pub fn off() -> Error {
    Error::unexpected_state("the machine is powered off").advice("Start it first")
}

/// The machine is powered off already, which is what the action wants.
pub fn off_already() -> Error {
    Error::state_reached("the machine is powered off already")
}

/// The machine is on, and the action needs one that is off.
pub fn not_off() -> Error {
    Error::unexpected_state("the machine is not powered off").advice("Stop it first")
}

/// The machine is on, so that a reload cannot change or remove it.
pub fn on_in_reload(machine: &str) -> Error {
    let on = Error::unexpected_state("the machine is on, so it cannot be changed or removed");
    on.machine(machine).advice("Stop it, and reload again")
}
