//! The console of a running domain: a connection to its VNC server, which libvirtd opens.
//!
//! libvirtd makes a pair of sockets, has QEMU serve one of them, and passes the other one. So the server needs to listen
//! nowhere: `<listen type='none'/>`. Source: `qemuDomainOpenGraphicsFD` in libvirt's src/qemu/qemu_driver.c.

use std::os::fd::{FromRawFd, OwnedFd};

use machinery::{Deadline, Error, Result};
use rustix::io::{FdFlags, fcntl_setfd};
use virt::connect::Connect;
use virt_sys as sys;

use crate::connection::Connection;
use crate::description::Description;
use crate::domain;
use crate::dsn::is_local;
use crate::errors::explain;

/// Connects a viewer to the domain's VNC server, without authentication.
///
/// # Errors
/// The domain is off or has no VNC server; libvirt is on another computer.
pub fn connect(connection: &Connection, label: &str, deadline: Deadline) -> Result<OwnedFd> {
    if !is_local(connection.dsn()) {
        let what = format!("a console over {}, which cannot pass a connection", connection.dsn());
        return Err(Error::unsupported(&what));
    }
    let label = label.to_owned();
    connection.ask(deadline, "libvirt to open the console", move |connect| open(connect, &label))
}

fn open(connect: &Connect, label: &str) -> Result<OwnedFd> {
    let domain = domain::running(connect, label)?;
    let index = domain::described(&domain)?.vnc.ok_or_else(|| no_server(&format!("'{label}'")))?;
    let opened = domain.open_graphics_fd(index, sys::VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH);
    let number = opened.map_err(|error| explain("open the console", &error))?;
    let number = i32::try_from(number).map_err(|_| Error::failed("libvirt's console is no descriptor"))?;
    // SAFETY: libvirt has opened the descriptor for this call, and leaves it to the caller.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&descriptor, FdFlags::CLOEXEC)
        .map_err(|error| Error::failed(format!("libvirt's console is no descriptor: {error}")))?;
    Ok(descriptor)
}

/// Returns the warning about a domain without a console: it, or its snapshot, has no VNC server.
pub fn warning(label: &str, domain: &Description, snapshot: Option<&Description>) -> Option<String> {
    let lacks = [Some(domain), snapshot].iter().flatten().any(|one| one.vnc.is_none());
    lacks.then(|| no_server(&format!("'{label}', or its snapshot,")).to_string())
}

fn no_server(domain: &str) -> Error {
    Error::environment(format!("the domain {domain} has no VNC server for its console")).advice(
        "Add <graphics type='vnc' sharePolicy='ignore'><listen type='none'/></graphics> to its devices (virsh edit), \
         and take its snapshot again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_has_a_warning_when_it_or_its_snapshot_has_no_server() {
        let described = |graphics: &str| {
            Description::read(&format!("<domain><devices>{graphics}</devices></domain>")).unwrap()
        };
        let spice = described("<graphics type='spice'/>");
        let both = described("<graphics type='spice'/><graphics type='vnc'><listen type='none'/></graphics>");
        assert_eq!((spice.vnc, both.vnc), (None, Some(1)));
        assert_eq!(warning("win", &both, None), None);
        assert_eq!(warning("win", &both, Some(&both)), None);
        for (domain, snapshot) in [(&spice, None), (&both, Some(&spice)), (&spice, Some(&both))] {
            let warning = warning("win", domain, snapshot).unwrap();
            assert!(warning.contains("domain 'win'") && warning.contains("type='vnc'"), "{warning}");
        }
    }
}
