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
    let index = domain::described(&domain)?.vnc.ok_or_else(|| no_server(label))?;
    let opened = domain.open_graphics_fd(index, sys::VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH);
    let number = opened.map_err(|error| explain("open the console", &error))?;
    let number = i32::try_from(number).map_err(|_| Error::failed("libvirt's console is no descriptor"))?;
    // SAFETY: libvirt has opened the descriptor for this call, and leaves it to the caller.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&descriptor, FdFlags::CLOEXEC)
        .map_err(|error| Error::failed(format!("libvirt's console is no descriptor: {error}")))?;
    Ok(descriptor)
}

fn no_server(label: &str) -> Error {
    Error::environment(format!("the domain '{label}' has no VNC server for its console")).advice(
        "Add <graphics type='vnc' sharePolicy='ignore'><listen type='none'/></graphics> to its devices (virsh \
         edit), and take its snapshot again",
    )
}
