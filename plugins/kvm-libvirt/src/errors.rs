//! The meaning of libvirt's errors, and the advice for each.
//!
//! libvirt reports a code, the part of it that failed, and a text. The text is for people and may be translated,
//! so it is passed on. The code decides about the advice. Source: libvirt's include/libvirt/virterror.h.

use machinery::Error;
use rustix::io::Errno;
use virt::error::{ErrorDomain, ErrorNumber};

use crate::dsn::{self, Transport};
use crate::errno::last_errno;

/// Converts libvirt's error to one of the interface; `operation` is a phrase such as `look up the domain`.
pub fn explain(operation: &str, error: &virt::error::Error) -> Error {
    let reason = format!("libvirt cannot {operation}: {}", error.message());
    if is_connection_error(error) {
        return Error::environment(reason)
            .advice("libvirtd has gone away or does not answer. Once it does, start the machine again");
    }
    match error.code().known() {
        Some(ErrorNumber::NoDomain) => {
            Error::environment(reason).advice("Define the domain again, or correct its label")
        }
        Some(ErrorNumber::AccessDenied | ErrorNumber::AuthFailed) => {
            Error::environment(reason).advice("Give this user the permission in libvirt's access control")
        }
        Some(ErrorNumber::OperationTimeout) => Error::failed(reason)
            .advice("Another job of the domain is under way: look at it with `virsh domjobinfo`"),
        _ => Error::failed(reason),
    }
}

/// Reports whether the connection itself failed. Source: libvirt's src/rpc, whose errors are all about that.
pub fn is_connection_error(error: &virt::error::Error) -> bool {
    error.domain().is(ErrorDomain::Rpc)
}

/// Reports whether there is no such domain.
pub fn is_no_domain(error: &virt::error::Error) -> bool {
    error.code().is(ErrorNumber::NoDomain)
}

/// Reports whether the domain is off, and the operation is one of a running domain.
pub fn is_off(error: &virt::error::Error) -> bool {
    error.code().is(ErrorNumber::OperationInvalid)
}

/// Reports whether libvirt's QEMU driver refuses a definition, or an operation on it. One case is an overlay whose
/// file exists already. Source: libvirt's src/qemu/qemu_snapshot.c.
pub fn is_refused(error: &virt::error::Error) -> bool {
    error.code().is(ErrorNumber::ConfigUnsupported)
}

/// Reports whether this libvirt, or this QEMU, does not support the operation.
pub fn is_unsupported(error: &virt::error::Error) -> bool {
    const UNSUPPORTED: [ErrorNumber; 4] = [
        ErrorNumber::ConfigUnsupported,
        ErrorNumber::OperationUnsupported,
        ErrorNumber::ArgumentUnsupported,
        ErrorNumber::NoSupport,
    ];
    error.code().is_known_and(|code| UNSUPPORTED.contains(&code))
}

/// Reports whether libvirt or QEMU refuses to load a snapshot, which is not as they need it. libvirt passes on QEMU's
/// message. Sources: libvirt's src/qemu/qemu_monitor_text.c and qemu_process.c, QEMU's migration/savevm.c.
pub fn is_unloadable(error: &virt::error::Error) -> bool {
    let says = ["while loading VM state", "load of migration failed", "does not have the requested snapshot"];
    is_unsupported(error) || says.iter().any(|said| error.message().contains(said))
}

/// Returns the system's error, if there was one. Must be called in the thread in which libvirt has failed.
fn errno_of(error: &virt::error::Error) -> Option<Errno> {
    error.code().is(ErrorNumber::SystemError).then(last_errno).flatten()
}

/// Reports whether no process listens at libvirtd's socket. Must be called in the thread in which libvirt has failed.
pub fn is_gone(error: &virt::error::Error) -> bool {
    matches!(errno_of(error), Some(Errno::CONNREFUSED | Errno::NOENT | Errno::CONNRESET | Errno::PIPE))
}

/// Explains a failed connection. Must be called in the thread in which libvirt has failed.
pub fn connection_error(dsn: &str, error: &virt::error::Error) -> Error {
    let failed = Error::environment(format!("cannot connect to libvirt at {dsn}: {}", error.message()));
    failed.advice(connection_advice(dsn, error, errno_of(error)))
}

fn connection_advice(dsn: &str, error: &virt::error::Error, errno: Option<Errno>) -> String {
    const UNKNOWN: [ErrorNumber; 3] =
        [ErrorNumber::InvalidArg, ErrorNumber::NoConnect, ErrorNumber::NoSupport];
    if error.code().is_known_and(|code| UNKNOWN.contains(&code)) {
        return "Correct the dsn in kvm.yaml: libvirt of this computer is qemu:///system".to_owned();
    }
    let host = dsn::host(dsn).unwrap_or("this computer");
    match dsn::transport(dsn) {
        Transport::Local => local_advice(error, errno),
        Transport::Ssh => ssh_advice(host, error.message()),
        Transport::Tls if !errno.is_some_and(is_of_network) => format!(
            "TLS needs certificates: those of this computer in /etc/pki/libvirt and /etc/pki/CA, and one of {host} \
             for just that name. Try `virt-pki-query-dn` and `virsh -c '{dsn}' version`"
        ),
        Transport::Tls | Transport::Tcp => network_advice(host, dsn::transport(dsn), error, errno),
        Transport::Other => "Try the command of the dsn by hand, as the user that runs this host".to_owned(),
    }
}

fn local_advice(error: &virt::error::Error, errno: Option<Errno>) -> String {
    let is_refused = is_forbidden(error) || matches!(errno, Some(Errno::ACCESS | Errno::PERM));
    if is_refused {
        return "Add the user that runs this host to the group `libvirt` (usermod -aG libvirt USER), and restart the \
                host"
            .to_owned();
    }
    "Start libvirtd (systemctl start libvirtd), or install it (libvirt-daemon-system), or correct the dsn in \
     kvm.yaml"
        .to_owned()
}

/// Returns the advice for an error of ssh, whose message libvirt passes on. OpenSSH translates no messages.
fn ssh_advice(host: &str, message: &str) -> String {
    let by_hand = format!("Try `ssh {host} true` by hand, as the user that runs this host");
    let causes = [
        ("Host key verification failed", "ssh does not know that computer's host key, or it has changed"),
        (
            "Permission denied",
            "ssh needs a key of that user which the other computer accepts without a password",
        ),
        ("Could not resolve hostname", "The name has no address: correct it in the dsn, or look at DNS"),
        ("Connection refused", "No ssh server answers there"),
        ("No route to host", "The network does not lead there"),
        ("Network is unreachable", "The network does not lead there"),
        ("timed out", "The network does not lead there, or a firewall drops the packets"),
        ("command not found", "The other computer lacks libvirt, or `virt-ssh-helper` and `nc`"),
    ];
    match causes.into_iter().find(|(words, _)| message.contains(words)) {
        Some((_, cause)) => format!("{cause}. {by_hand}"),
        None => by_hand,
    }
}

fn network_advice(
    host: &str,
    transport: Transport,
    error: &virt::error::Error,
    errno: Option<Errno>,
) -> String {
    let socket = if transport == Transport::Tls { "libvirtd-tls.socket" } else { "libvirtd-tcp.socket" };
    match errno {
        _ if is_forbidden(error) => {
            format!("Look at the authentication (auth_tcp, auth_tls) in libvirtd.conf of {host}")
        }
        Some(Errno::CONNREFUSED) => {
            format!("libvirtd does not listen there: start it on {host} (systemctl start {socket})")
        }
        Some(errno) if is_of_network(errno) => {
            format!("The network does not lead to {host}: look at its address, the routes and firewalls")
        }
        // libvirt gives no errno if a name has no address.
        None => {
            format!("Check whether the name {host} has an address (getent hosts {host}), or correct the dsn")
        }
        Some(_) => format!("Look at libvirtd and its log on {host}"),
    }
}

fn is_of_network(errno: Errno) -> bool {
    matches!(errno, Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::TIMEDOUT)
}

fn is_forbidden(error: &virt::error::Error) -> bool {
    const FORBIDDEN: [ErrorNumber; 4] = [
        ErrorNumber::AuthFailed,
        ErrorNumber::AuthCancelled,
        ErrorNumber::AuthUnavailable,
        ErrorNumber::AccessDenied,
    ];
    error.code().is_known_and(|code| FORBIDDEN.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use virt::connect::Connect;

    fn message(dsn: &str) -> String {
        virt::error::clear_error_callback();
        let error = Connect::open(Some(dsn)).unwrap_err();
        let text = connection_error(dsn, &error).to_string();
        println!("{text}");
        text
    }

    #[test]
    fn failed_connection_has_the_advice_for_its_transport() {
        for (dsn, words) in [
            ("qemu:///system?socket=/none/libvirt-sock", "Start libvirtd (systemctl start libvirtd)"),
            ("qemu+tcp://127.0.0.1:1/system", "start it on 127.0.0.1 (systemctl start libvirtd-tcp.socket)"),
            ("qemu+tls://127.0.0.1:1/system", "TLS needs certificates"),
            ("qemu+tcp://no-such-name.invalid/system", "the name no-such-name.invalid has an address"),
        ] {
            let text = message(dsn);
            assert!(text.contains(words), "no {words:?} in {text}");
        }
    }

    /// Only the program differs from a real connection: its messages are those of OpenSSH.
    #[test]
    fn failed_ssh_connection_has_the_advice_for_the_message_of_ssh() {
        let folder = tempfile::tempdir().unwrap();
        let ssh = folder.path().join("ssh");
        for (words, advice) in [
            ("Host key verification failed.", "does not know that computer's host key"),
            ("user@lab: Permission denied (publickey).", "ssh needs a key"),
            ("ssh: Could not resolve hostname lab: Name or service not known", "The name has no address"),
            ("ssh: connect to host lab port 22: Connection refused", "No ssh server answers"),
            ("ssh: connect to host lab port 22: No route to host", "The network does not lead there"),
        ] {
            fs::write(&ssh, format!("#!/bin/sh\ncat >/dev/null &\necho '{words}' >&2\nexit 255\n")).unwrap();
            fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
            let text = message(&format!("qemu+ssh://lab/system?command={}", ssh.display()));
            assert!(text.contains(advice), "no {advice:?} in {text}");
            assert!(!text.contains("usermod") && text.contains("ssh lab true"), "{text}");
        }
    }
}
