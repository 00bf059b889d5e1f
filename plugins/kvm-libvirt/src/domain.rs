//! A domain of libvirt: its lookup, its state, and the basic actions on it.

use machinery::{Error, Result, State};
use machinery_backend::refuse;
use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, DomainState, DomainStateReason};
use virt::enumutil::Enum;
use virt_sys as sys;

use crate::description::Description;
use crate::errors::{explain, is_no_domain, is_off};
use crate::states::{StateReport, state_of_domain};

/// The state that the `virt` crate returns, in place of an error, when libvirt reports none. Source: its
/// src/domain.rs, 0.5.0.
const STATE_UNKNOWN: u32 = u32::MAX;

/// Looks the domain of that name up.
///
/// # Errors
/// There is no such domain; libvirt does not answer.
pub fn domain(connect: &Connect, label: &str) -> Result<Domain> {
    connect.lookup_domain_by_name(label).map_err(|error| match is_no_domain(&error) {
        true => no_domain(connect, label),
        false => explain(&format!("look up the domain '{label}'"), &error),
    })
}

/// Looks the domain of that name up, and expects that it is on.
///
/// # Errors
/// The domain is off; as [`domain`].
pub fn running(connect: &Connect, label: &str) -> Result<Domain> {
    let domain = domain(connect, label)?;
    match domain.is_active().map_err(|error| explain("report whether the domain runs", &error))? {
        true => Ok(domain),
        false => Err(refuse::off()),
    }
}

fn no_domain(connect: &Connect, label: &str) -> Error {
    let domains = connect.list_all_domains(0).unwrap_or_default();
    let mut names: Vec<String> = domains.iter().filter_map(|domain| domain.name().ok()).collect();
    names.sort();
    let there = if names.is_empty() { "no domain at all".to_owned() } else { names.join(", ") };
    Error::environment(format!("libvirt has no domain '{label}'; there is {there}"))
        .advice("Correct the label, or define the domain; `virsh list --all` shows what there is")
}

/// Returns the domain's uuid.
///
/// # Errors
/// libvirt does not answer.
pub fn uuid(domain: &Domain) -> Result<String> {
    domain.uuid_string().map_err(|error| explain("return the domain's uuid", &error))
}

/// Returns the domain's current description.
///
/// # Errors
/// libvirt does not answer.
pub fn described(domain: &Domain) -> Result<Description> {
    Description::read(&xml(domain, 0)?)
}

/// Returns the domain's description without changes of a run, such as overlays, whose headers a run can rewrite.
///
/// # Errors
/// libvirt does not answer.
pub fn defined(domain: &Domain) -> Result<Description> {
    Description::read(&xml(domain, sys::VIR_DOMAIN_XML_INACTIVE)?)
}

/// Returns the domain's description as text.
///
/// # Errors
/// libvirt does not answer.
pub fn xml(domain: &Domain, flags: sys::virDomainXMLFlags) -> Result<String> {
    domain.xml_desc(flags).map_err(|error| explain("describe the domain", &error))
}

/// Returns the domain's state, with a reason where the state needs one.
///
/// # Errors
/// libvirt does not answer; the state is unknown to this plugin.
pub fn state(domain: &Domain) -> Result<StateReport> {
    let failed = |error| explain("report the domain's state", &error);
    let (state, reason) = domain.state().map_err(failed)?;
    if state.to_raw() == STATE_UNKNOWN {
        return Err(failed(virt::error::Error::last_error()));
    }
    state_of_domain(state, reason)
}

/// Returns the maximum memory of the domain, in bytes.
///
/// # Errors
/// libvirt does not answer.
pub fn max_memory(domain: &Domain) -> Result<u64> {
    let kib = domain.max_memory().map_err(|error| explain("report the domain's memory", &error))?;
    Ok(kib.saturating_mul(1024))
}

/// Expects a domain that can be started.
///
/// # Errors
/// The domain is not off; libvirt does not answer.
pub fn ensure_off(domain: &Domain) -> Result<()> {
    match state(domain)? {
        (State::Poweroff, _) => Ok(()),
        (state, _) => {
            let reason = format!("the machine is not powered off: the domain is {state}");
            Err(Error::unexpected_state(reason).advice("Stop it first"))
        }
    }
}

/// Resumes a domain that was just started, if it does not run already.
///
/// # Errors
/// The domain does not run, or libvirt does not answer.
pub fn ensure_running(domain: &Domain) -> Result<()> {
    let resumed = resume(domain);
    expect_running(domain).map_err(|error| resumed.err().unwrap_or(error))
}

fn expect_running(domain: &Domain) -> Result<()> {
    match state(domain)? {
        (State::Running, _) => Ok(()),
        (state, why) => {
            let why = if why.is_empty() { why } else { format!(" ({why})") };
            Err(Error::unexpected_state(format!("the domain was started, and is {state}{why}"))
                .advice("The domain's log in /var/log/libvirt/qemu may say why"))
        }
    }
}

/// Resumes a paused domain.
///
/// # Errors
/// libvirt cannot resume it.
pub fn resume(domain: &Domain) -> Result<()> {
    domain.resume().map_err(|error| explain("resume the domain", &error))
}

/// Destroys the domain; returns `false` if it was off already.
///
/// # Errors
/// libvirt cannot end it.
pub fn destroy(domain: &Domain) -> Result<bool> {
    match domain.destroy() {
        Ok(()) => Ok(true),
        // A domain without a definition is gone once it is off.
        Err(error) if is_off(&error) || is_no_domain(&error) => Ok(false),
        Err(error) => Err(explain("stop the domain", &error)),
    }
}

/// Reports whether the domain is paused for that reason, and for no other.
///
/// # Errors
/// libvirt does not answer.
pub fn is_paused(domain: &Domain, because: DomainPausedReason) -> Result<bool> {
    // If libvirt does not answer, the state is unknown, and so not paused.
    let (state, reason) = domain.state().map_err(|error| explain("report the domain's state", &error))?;
    let wanted = DomainStateReason::Paused(Enum::Known(because));
    Ok(state == Enum::Known(DomainState::Paused) && reason == Enum::Known(wanted))
}

/// Waits until a libvirtd that has just started has reconnected to the domain. A domain that is stopped
/// meanwhile can stay locked, seen with libvirt 9.0 and 11.3. No event reports the end of that, but a
/// request to the domain's QEMU waits for it.
pub fn settle(domain: &Domain) {
    // The answer does not matter.
    let _ = domain.memory_stats(0);
}
