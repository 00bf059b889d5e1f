//! Where a libvirt is, by its dsn.
//!
//! Source: libvirt's docs/uri.rst: `driver[+transport]://[user@][host][:port]/path[?parameters]`.

/// How libvirt is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A socket of this very host, or no socket at all.
    Local,
    Ssh,
    Tls,
    Tcp,
    /// A program of the operator's.
    Other,
}

/// Whether libvirt runs on this very host, so that its files and interfaces are ours.
pub fn is_local(dsn: &str) -> bool {
    host(dsn).is_none()
}

/// The name or address of the other host, if it is another one.
pub fn host(dsn: &str) -> Option<&str> {
    let (_, rest) = dsn.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let end = if host.starts_with('[') { host.find(']').map(|at| at + 1) } else { host.find(':') };
    Some(&host[..end.unwrap_or(host.len())]).filter(|host| !matches!(*host, "" | "localhost"))
}

/// The transport that libvirt takes for it. Without one in the dsn, that is TLS for another host.
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
    fn dsn_tells_its_transport() {
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
}
