//! Taps, and sockets that listen: the plugin opens them in QEMU's place. A jailed QEMU neither opens `/dev/net/tun`, nor
//! starts a helper, nor makes a socket.
//!
//! ```text
//! -netdev bridge,id=n,br=br0            ─▶ qemu-bridge-helper makes a tap in the bridge ─▶ -netdev tap,id=n,fd=5
//! -netdev tap,id=n,ifname=tap0          ─▶ the plugin opens tap0                        ─▶ -netdev tap,id=n,fd=5
//! -chardev socket,id=c,path=P,server=on ─▶ the plugin binds P                           ─▶ -chardev socket,id=c,fd=5,…
//! ```
//!
//! A script of a tap does not run. Sources: QEMU's net/tap.c (`net_init_tap`, `net_bridge_run_helper`),
//! chardev/char-socket.c.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use machinery::config::find_interface;
use machinery::{Deadline, Error, Result, SocketPath};
use machinery_backend::cell::Cell;
use machinery_backend::jail::taps;

use crate::options::Options;

/// The places of QEMU's helper for bridges, by distribution.
const HELPERS: [&str; 2] = ["/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper"];

/// The bridge that QEMU takes by default. Source: `DEFAULT_BRIDGE_INTERFACE` in QEMU's net/net.h.
pub const BRIDGE: &str = "br0";

/// Keys of a tap that have no meaning for one that is passed as a descriptor. QEMU refuses them beside `fd`.
const OPENING: [&str; 8] = ["ifname", "script", "downscript", "helper", "br", "vnet_hdr", "queues", "fd"];

/// Arguments with descriptors in place of taps and sockets.
pub struct Passed {
    pub args: Vec<String>,
    /// The descriptors, with their numbers in QEMU.
    pub descriptors: Vec<(OwnedFd, i32)>,
}

/// Returns the path of the socket that a character device listens on, if the plugin makes the socket. `options` has the
/// key `backend`.
pub fn socket_of(options: &Options) -> Option<&str> {
    let is_server = options.get("backend") == Some("socket") && options.is_on("server");
    options.get("path").filter(|path| is_server && !path.is_empty() && !options.has("fd"))
}

/// Opens the taps and makes the sockets that the arguments name, for a QEMU that runs in `folder`. The taps of an isolated
/// run are in its cell. The descriptors get the numbers from `first` on.
///
/// # Errors
/// A tap cannot be opened, or a socket cannot be made.
pub fn pass(
    args: Vec<String>,
    first: i32,
    folder: &Path,
    cell: Option<&Cell>,
    deadline: Deadline,
) -> Result<Passed> {
    let mut passed = Passed { args, descriptors: Vec::new() };
    let values: Vec<(usize, String)> =
        crate::options::walk(&passed.args).map(|(index, name, _)| (index, name.to_owned())).collect();
    for ((index, name), number) in values.into_iter().zip(first..) {
        let Some(value) = passed.args.get_mut(index) else { continue };
        let opened = match name.as_str() {
            "netdev" | "nic" | "net" => {
                let mut options = Options::parse(value, "type");
                open(&options, cell, deadline)?.map(|tap| {
                    OPENING.iter().for_each(|key| options.remove(key));
                    options.set("type", "tap");
                    (tap, options)
                })
            }
            "chardev" => {
                let mut options = Options::parse(value, "backend");
                let socket = socket_of(&options).map(|path| listen(&folder.join(path))).transpose()?;
                options.remove("path");
                socket.map(|socket| (socket, options))
            }
            _ => None,
        };
        if let Some((descriptor, mut options)) = opened {
            options.set("fd", &number.to_string());
            *value = options.to_string();
            passed.descriptors.push((descriptor, number));
        }
    }
    Ok(passed)
}

/// Makes a socket that listens.
fn listen(path: &Path) -> Result<OwnedFd> {
    let failed = |error: io::Error| Error::io("make a socket of the start_args,", path, &error);
    let address = SocketPath::new(path).map_err(failed)?;
    Ok(UnixListener::bind(address.address()).map_err(failed)?.into())
}

/// Returns the paths of the sockets that [`pass`] makes.
pub fn sockets<'a>(options: impl Iterator<Item = (&'a str, &'a str)>, folder: &Path) -> Vec<PathBuf> {
    let chardevs = options.filter(|(name, _)| *name == "chardev");
    let socket =
        |(_, value): (&str, &str)| socket_of(&Options::parse(value, "backend")).map(|path| folder.join(path));
    chardevs.filter_map(socket).collect()
}

/// Opens the tap of a network backend, if it has one that is not open.
fn open(options: &Options, cell: Option<&Cell>, deadline: Deadline) -> Result<Option<OwnedFd>> {
    let helper = options.get("helper");
    // QEMU's default.
    let has_header = options.switch("vnet_hdr") != Some(false);
    let kind = options.get("type");
    if let Some(cell) = cell.filter(|_| matches!(kind, Some("bridge" | "tap"))) {
        return cell.tap(options.get("ifname"), has_header).map(Some);
    }
    match kind {
        Some("bridge") => of_bridge(options, deadline).map(Some),
        Some("tap") if options.has("fd") || options.has("fds") => Ok(None),
        Some("tap") if helper.is_some() => of_bridge(options, deadline).map(Some),
        Some("tap") => match options.get("ifname") {
            Some(name) => {
                // A host that is root would make one that does not exist, which nobody has connected to anything.
                find_interface(name)?;
                taps::open(name, has_header).map(Some)
            }
            None => Err(Error::configuration("a tap in the start_args has no name")
                .advice("Write ifname=NAME of a tap that exists, or set jail: off for the machine")),
        },
        _ => Ok(None),
    }
}

fn of_bridge(options: &Options, deadline: Deadline) -> Result<OwnedFd> {
    let bridge = options.get("br").unwrap_or(BRIDGE);
    let found = HELPERS.into_iter().find(|helper| Path::new(helper).exists());
    let helper = found.ok_or_else(|| {
        Error::environment("QEMU's helper for bridges is not installed")
            .advice(format!("Install it ({})", HELPERS[0]))
    })?;
    // The host itself runs the helper, with the host's rights.
    if options.get("helper").is_some_and(|own| own != helper) {
        let reason = format!("a jailed machine has no helper for bridges but {helper}");
        return Err(Error::configuration(reason)
            .advice("Remove helper= from its start_args, or set jail: off for the machine"));
    }
    taps::in_bridge(Path::new(helper), bridge, deadline)
}
