//! The taps of a machine: the plugin opens them in QEMU's place, because a jailed QEMU neither opens `/dev/net/tun` nor
//! starts a helper.
//!
//! ```text
//! -netdev bridge,id=n,br=br0      ─▶ qemu-bridge-helper makes a tap in the bridge ─▶ -netdev tap,id=n,fd=5
//! -netdev tap,id=n,ifname=tap0    ─▶ the plugin opens tap0                        ─▶ -netdev tap,id=n,fd=5
//! ```
//!
//! A script of a tap does not run. Sources: QEMU's net/tap.c (`net_init_tap`, `net_bridge_run_helper`).

use std::os::fd::OwnedFd;
use std::path::Path;

use machinery::{Deadline, Error, Result};
use machinery_backend::jail::taps;

use crate::options::Options;

/// The places of QEMU's helper for bridges, by distribution.
const HELPERS: [&str; 2] = ["/usr/lib/qemu/qemu-bridge-helper", "/usr/libexec/qemu-bridge-helper"];

/// The bridge that QEMU takes by default. Source: `DEFAULT_BRIDGE_INTERFACE` in QEMU's net/net.h.
const BRIDGE: &str = "br0";

/// Keys of a tap that have no meaning for one that is passed as a descriptor. QEMU refuses them beside `fd`.
const OPENING: [&str; 8] = ["ifname", "script", "downscript", "helper", "br", "vnet_hdr", "queues", "fd"];

/// Arguments with descriptors in place of taps.
pub struct Passed {
    pub args: Vec<String>,
    /// The descriptors, with their numbers in QEMU.
    pub descriptors: Vec<(OwnedFd, i32)>,
}

/// Opens the taps that the arguments name. The descriptors get the numbers from `first` on.
///
/// # Errors
/// A tap cannot be opened.
pub fn pass_taps(mut args: Vec<String>, first: i32, deadline: Deadline) -> Result<Passed> {
    let mut descriptors = Vec::new();
    let values: Vec<usize> = crate::options::walk(&args)
        .filter(|(_, name, _)| matches!(*name, "netdev" | "nic" | "net"))
        .map(|(index, ..)| index)
        .collect();
    for (index, number) in values.into_iter().zip(first..) {
        let Some(value) = args.get_mut(index) else { continue };
        let mut options = Options::parse(value, "type");
        if let Some(tap) = open(&options, deadline)? {
            OPENING.iter().for_each(|key| options.remove(key));
            options.set("type", "tap");
            options.set("fd", &number.to_string());
            *value = options.to_string();
            descriptors.push((tap, number));
        }
    }
    Ok(Passed { args, descriptors })
}

/// Opens the tap of a network backend, if it has one that is not open.
fn open(options: &Options, deadline: Deadline) -> Result<Option<OwnedFd>> {
    let helper = options.get("helper");
    match options.get("type") {
        Some("bridge") => of_bridge(options, deadline).map(Some),
        Some("tap") if options.has("fd") || options.has("fds") => Ok(None),
        Some("tap") if helper.is_some() => of_bridge(options, deadline).map(Some),
        Some("tap") => match options.get("ifname") {
            Some(name) => taps::open(name).map(Some),
            None => Err(Error::configuration("a tap in the start_args has no name")
                .advice("Write ifname=NAME of a tap that exists, or set jail: off for the machine")),
        },
        _ => Ok(None),
    }
}

fn of_bridge(options: &Options, deadline: Deadline) -> Result<OwnedFd> {
    let bridge = options.get("br").unwrap_or(BRIDGE);
    let found = HELPERS.into_iter().find(|helper| Path::new(helper).exists());
    let helper = options.get("helper").or(found).ok_or_else(|| {
        Error::environment("QEMU's helper for bridges is not installed")
            .advice(format!("Install it ({})", HELPERS[0]))
    })?;
    taps::in_bridge(Path::new(helper), bridge, deadline)
}
