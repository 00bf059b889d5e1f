//! Taps that are opened for a hypervisor which may not open them.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use machinery::{Deadline, Error, Result};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::geteuid;

use crate::process;

/// The number of the helper's socket.
const SOCKET: i32 = 3;
/// The maximum length of an interface's name, with its end. Source: `IFNAMSIZ` in netdevice(7).
const NAME_SIZE: usize = 16;

/// The request of `TUNSETIFF`. Source: netdevice(7), linux/if_tun.h.
#[repr(C)]
struct Request {
    name: [u8; NAME_SIZE],
    flags: libc::c_short,
    padding: [u8; 22],
}

/// Opens the tap of that name, which has to exist for a user who is not root; with the header that virtio uses, if
/// `has_header`. Source: `tap_open` in QEMU's net/tap-linux.c.
///
/// # Errors
/// The tap cannot be opened, for example because another process has it.
pub fn open(name: &str, has_header: bool) -> Result<OwnedFd> {
    open_named(name, has_header).map(|(tap, _)| tap)
}

/// Opens the tap like [`open`], and returns its name too: the kernel replaces `%d` in the name by a free number.
pub(crate) fn open_named(name: &str, has_header: bool) -> Result<(OwnedFd, String)> {
    let failed = |error: &io::Error| {
        Error::environment(format!("cannot open the tap {name}: {error}"))
            .advice("Create it (ip tuntap add), and check that no other machine uses it")
    };
    let device = Path::new("/dev/net/tun");
    let tun = File::options().read(true).write(true).open(device);
    let tun = tun.map_err(|error| Error::io("open", device, &error))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | if has_header { libc::IFF_VNET_HDR } else { 0 };
    let flags = libc::c_short::try_from(flags).unwrap_or_default();
    let mut request = Request { name: [0; NAME_SIZE], flags, padding: [0; 22] };
    match request.name.get_mut(..name.len()).filter(|_| name.len() < NAME_SIZE) {
        Some(place) => place.copy_from_slice(name.as_bytes()),
        None => return Err(failed(&io::Error::other("the name is too long"))),
    }
    // SAFETY: the request has the layout and the size of `struct ifreq`, which the kernel reads and writes during the call.
    let set = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if set != 0 {
        return Err(failed(&io::Error::last_os_error()));
    }
    rustix::io::ioctl_fionbio(&tun, true).map_err(|error| failed(&error.into()))?;
    let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((tun.into(), String::from_utf8_lossy(name).into_owned()))
}

/// Has QEMU's bridge helper make a tap in the bridge, and returns the tap. Source: QEMU's qemu-bridge-helper.c.
///
/// # Errors
/// The helper refuses or fails; the error has its message.
pub fn in_bridge(helper: &Path, bridge: &str, deadline: Deadline) -> Result<OwnedFd> {
    let failed = |why: &str| {
        let program = helper.display();
        let rights = match geteuid().is_root() {
            true => String::new(),
            false => format!(". Without root, the helper needs its rights: chmod u+s {program}"),
        };
        Error::environment(format!("{program} makes no tap in the bridge {bridge}: {why}"))
            .advice(format!("Create the bridge, and allow it in /etc/qemu/bridge.conf{rights}"))
    };
    let (own, its) = UnixStream::pair().map_err(|error| failed(&error.to_string()))?;
    let mut command = machinery::command(helper);
    command.args(["--use-vnet", &format!("--br={bridge}"), &format!("--fd={SOCKET}")]);
    let mapping = FdMapping { parent_fd: its.into(), child_fd: SOCKET };
    command.fd_mappings(vec![mapping]).map_err(|error| failed(&error.to_string()))?;
    let output = process::output(command, deadline)?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim()));
    }
    received(&own).map_err(|error| failed(&error.to_string()))
}

/// Returns the descriptor that has come through the socket.
fn received(socket: &UnixStream) -> io::Result<OwnedFd> {
    // The helper has ended, so nothing more will come.
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    descriptors
        .next()
        .and_then(|mut all| all.next())
        .ok_or_else(|| io::Error::other("it sends no descriptor"))
}
