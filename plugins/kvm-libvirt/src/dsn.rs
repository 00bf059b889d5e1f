//! The dsn: the address of libvirt.
//!
//! Source: libvirt's docs/uri.rst: `driver[+transport]://[user@][host][:port]/path[?parameters]`.

/// The transport to libvirt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A socket on this computer, or no socket at all.
    Local,
    Ssh,
    Tls,
    Tcp,
    /// A program that the operator has chosen.
    Other,
}

/// Reports whether libvirt runs on this computer, so that its files and interfaces are accessible.
pub fn is_local(dsn: &str) -> bool {
    host(dsn).is_none()
}

/// Returns the name or address of the other computer, if libvirt is on another one.
pub fn host(dsn: &str) -> Option<&str> {
    let (_, rest) = dsn.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let end = if host.starts_with('[') { host.find(']').map(|at| at + 1) } else { host.find(':') };
    Some(&host[..end.unwrap_or(host.len())]).filter(|host| !matches!(*host, "" | "localhost"))
}

/// Returns the driver of libvirt, such as `qemu`.
pub fn driver(dsn: &str) -> &str {
    dsn.split([':', '+']).next().unwrap_or_default()
}

/// Reports whether libvirt is that of a user, and not that of the system.
pub fn is_session(dsn: &str) -> bool {
    let path = dsn.split_once("://").and_then(|(_, rest)| rest.split_once('/'));
    path.is_some_and(|(_, path)| path.split(['?', '#']).next() == Some("session"))
}

/// Returns the folder of the descriptions of running domains. Source: libvirt's src/qemu/qemu_conf.c.
pub fn status_folder(dsn: &str) -> &'static str {
    if is_session(dsn) { "$XDG_RUNTIME_DIR/libvirt/qemu/run" } else { "/run/libvirt/qemu" }
}

/// Returns the transport that libvirt uses. The default for another computer is TLS.
pub fn transport(dsn: &str) -> Transport {
    let scheme = dsn.split_once("://").map_or("", |(scheme, _)| scheme);
    match scheme.split_once('+').map(|(_, transport)| transport) {
        Some("ssh" | "libssh" | "libssh2") => Transport::Ssh,
        Some("tls") => Transport::Tls,
        Some("tcp") => Transport::Tcp,
        Some("ext") => Transport::Other,
        None if !is_local(dsn) => Transport::Tls,
        _ => Transport::Local,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dsn_is_local_when_it_names_no_other_host() {
        for dsn in [
            "qemu:///system",
            "qemu+unix:///system?socket=/a/b",
            "test:///default",
            "qemu:///session",
            "qemu+tcp://localhost/system",
        ] {
            assert!(is_local(dsn), "{dsn}");
        }
        for (dsn, name) in [
            ("qemu+ssh://root@lab/system", "lab"),
            ("qemu://10.0.0.1:77/system", "10.0.0.1"),
            ("qemu+tls://lab", "lab"),
            ("qemu+tcp://u@[fe80::1]:7/system", "[fe80::1]"),
        ] {
            assert_eq!(host(dsn), Some(name), "{dsn}");
        }
    }

    #[test]
    fn dsn_has_a_transport() {
        for (dsn, wanted) in [
            ("qemu:///system", Transport::Local),
            ("qemu+unix:///system", Transport::Local),
            ("qemu+ssh://lab/system", Transport::Ssh),
            ("qemu+libssh2://lab/system", Transport::Ssh),
            ("qemu://lab/system", Transport::Tls),
            ("qemu+tls://lab/system", Transport::Tls),
            ("qemu+tcp://lab/system", Transport::Tcp),
            ("qemu+ext://lab/system", Transport::Other),
        ] {
            assert_eq!(transport(dsn), wanted, "{dsn}");
        }
    }

    #[test]
    fn session_is_recognized_by_the_path() {
        for dsn in ["qemu:///session", "qemu:///session?socket=/x/system", "qemu+ssh://lab/session"] {
            assert!(is_session(dsn), "{dsn}");
        }
        for dsn in ["qemu:///system", "qemu:///system?socket=/x/session", "test:///default"] {
            assert!(!is_session(dsn), "{dsn}");
        }
        assert_eq!((driver("qemu+ssh://lab/system"), driver("test:///default")), ("qemu", "test"));
    }
}
