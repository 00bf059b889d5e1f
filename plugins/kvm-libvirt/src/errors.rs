//! What libvirt's errors mean, and what to do about them.
//!
//! libvirt tells a code, which part of it found the error, and a text. The text is for people and is
//! kept; the code decides about the advice. Source: libvirt's include/libvirt/virterror.h.

use machinery::Error;
use virt::error::{ErrorDomain, ErrorNumber};

/// libvirt's error as one of the interface; `doing` is a phrase such as `look up the domain`.
pub fn explain(doing: &str, error: &virt::error::Error) -> Error {
    let said = format!("libvirt cannot {doing}: {}", error.message());
    if is_lost_link(error) {
        return Error::environment(said)
            .advice("libvirtd has gone away or does not answer. Once it does, start the machine anew");
    }
    match error.code().known() {
        Some(ErrorNumber::NoDomain) => {
            Error::environment(said).advice("Define the domain again, or correct its label")
        }
        Some(ErrorNumber::AccessDenied | ErrorNumber::AuthFailed) => {
            Error::environment(said).advice("Give this user the right to it in libvirt's access control")
        }
        Some(ErrorNumber::OperationTimeout) => {
            Error::failed(said).advice("Something else holds the domain: look at it with `virsh domjobinfo`")
        }
        _ => Error::failed(said),
    }
}

/// Whether the connection itself failed. Source: errors of libvirt's src/rpc, all of which are about
/// that.
pub fn is_lost_link(error: &virt::error::Error) -> bool {
    error.domain().is(ErrorDomain::Rpc)
}

/// A domain that is not there, or is there no more.
pub fn is_no_domain(error: &virt::error::Error) -> bool {
    error.code().is(ErrorNumber::NoDomain)
}

/// A domain that is not running, asked for what only a running one can do.
pub fn is_off(error: &virt::error::Error) -> bool {
    error.code().is(ErrorNumber::OperationInvalid)
}

/// What this libvirt, or this QEMU, has no way to do.
pub fn is_unsupported(error: &virt::error::Error) -> bool {
    const UNSUPPORTED: [ErrorNumber; 4] = [
        ErrorNumber::ConfigUnsupported,
        ErrorNumber::OperationUnsupported,
        ErrorNumber::ArgumentUnsupported,
        ErrorNumber::NoSupport,
    ];
    error.code().is_known_and(|code| UNSUPPORTED.contains(&code))
}

/// A connection that does not come about.
pub fn not_connected(dsn: &str, error: &virt::error::Error) -> Error {
    let said = error.message();
    let failed = Error::environment(format!("cannot connect to libvirt at {dsn}: {said}"));
    let forbidden = [
        ErrorNumber::AuthFailed,
        ErrorNumber::AuthCancelled,
        ErrorNumber::AuthUnavailable,
        ErrorNumber::AccessDenied,
    ];
    let unknown = [ErrorNumber::InvalidArg, ErrorNumber::NoConnect, ErrorNumber::NoSupport];
    match error.code().known() {
        Some(code) if forbidden.contains(&code) || said.contains("Permission denied") => failed.advice(
            "Add the user that runs this host to the group `libvirt` (usermod -aG libvirt USER), and start the \
             host anew",
        ),
        Some(code) if unknown.contains(&code) => {
            failed.advice("Correct the dsn in kvm.yaml: libvirt of this machine is qemu:///system")
        }
        _ => failed.advice(
            "Start libvirtd (systemctl start libvirtd), or install it (libvirt-daemon-system), or correct the \
             dsn in kvm.yaml",
        ),
    }
}
