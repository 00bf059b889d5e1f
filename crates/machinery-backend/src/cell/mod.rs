//! The isolated network of one run: a cell.
//!
//! Clones of one snapshot have the same address inside, and often the same hardware address. Each run therefore lives in
//! a network namespace of its own, and is reached at an address of its own:
//!
//! ```text
//! host ── interface ══ veth ══ uplink ─[nftables: M ⇄ G, filter]─ bridge ── tap ── guest
//!  route M/32                default route      proxy ARP                     G
//! ```
//!
//! `M` is the machine's address, which Cuckoo knows. `G` is the address inside the snapshot. On the interface, packets
//! carry `M`: a capture there is in the machine's own address.
//!
//! **Life.** The namespace has no name. A thread of its own makes it, so no other thread of the host changes its network.
//! It lives as long as a descriptor or a process has it. A host that is killed leaves no interface once its hypervisor
//! has ended, and a hypervisor that a later host adopts keeps its network. [`Cell::open`] removes what an earlier run has left
//! under the same name of the interface. An error leaves nothing.
//!
//! **Addresses.** The links need no range of addresses: each side has the other as a permanent neighbour. The bridge
//! answers ARP for every address but the guest's, so the snapshot's gateway is any. A guest that remembers the hardware
//! address of another gateway reaches the bridge too, because the bridge takes frames for every hardware address.
//!
//! **Rules.** The table inside is made before the interface. The host has one table for the cells of a folder, which each
//! [`Cell::open`] writes anew in one step; so the next start mends it after somebody has flushed it. It stays until
//! [`remove_table`], which the plugin calls when the host ends.
//!
//! | from | to | verdict |
//! | --- | --- | --- |
//! | the host, and whom the host routes | `M` | to the guest |
//! | the guest, from `G` only | the result server | accepted |
//! | the guest | another port or address of the host, another cell, link-local, loopback, multicast | dropped |
//! | the guest | other addresses | the operator's routing and rules decide |
//! | the guest | IPv6 | dropped |
//!
//! Functions act on the namespace of the calling thread, which is the host's.
//!
//! | module | content |
//! | --- | --- |
//! | `links` | interfaces, routes and neighbours by netlink |
//! | `rules` | the rules of nftables |
//! | `spec` | [`CellSpec`], [`interface_name`]: the description of a cell, and its names |
//! | `support` | [`missing`], [`expect_supported`]: the needs of cells |

mod links;
mod rules;
mod spec;
mod support;

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::jail::taps;
use links::{Links, Mac, Route};
pub use spec::{CellSpec, interface_name};
use spec::{UPLINK, expect_bridge_name, prefix, prefix_of};
pub use support::{expect_supported, missing};

/// The host's address for the cell, which only the cell's own route uses. Source: RFC 3927.
const ROUTER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The hardware addresses of the host's interface, of the uplink, and of the bridge: locally administered ones, the same
/// in all cells, because no two cells share a link.
const HOST_MAC: Mac = [0x02, b'c', b'm', 0, 0, 1];
const UPLINK_MAC: Mac = [0x02, b'c', b'm', 0, 0, 2];
const BRIDGE_MAC: Mac = [0x02, b'c', b'm', 0, 0, 3];

/// The time for the removal of a folder's table.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);

/// The network of one run.
#[derive(Debug)]
pub struct Cell {
    /// Empty once the cell is closed.
    interface: String,
    bridge: String,
    namespace: OwnedFd,
}

impl Cell {
    /// Makes the cell. Removes an interface of that name first, which an earlier run has left.
    ///
    /// # Errors
    /// The host cannot make cells, the address is taken, or the deadline passes. Nothing is left then.
    pub fn open(spec: &CellSpec, deadline: Deadline) -> Result<Cell> {
        expect_supported()?;
        let prefix = prefix_of(&spec.interface)?;
        expect_bridge_name(&spec.bridge)?;
        let host = Links::open()?;
        host.remove(&spec.interface)?;
        if let Some(owner) = host.owner_of(spec.address)? {
            return Err(Error::environment(format!("the address {} is taken: {owner}", spec.address))
                .advice("Give the machine an address that nothing on this host uses"));
        }
        let addresses: Vec<Ipv4Addr> = host.addresses()?.into_iter().map(|(address, _)| address).collect();
        rules::write_on_host(prefix, spec.result_server, deadline)?;
        let namespace = in_a_thread(|| inside(spec, &addresses, deadline))?;
        let cell = Cell { interface: spec.interface.clone(), bridge: spec.bridge.clone(), namespace };
        deadline.check("the network of a run")?;
        host.add_veth((&spec.interface, HOST_MAC), (UPLINK, UPLINK_MAC), cell.namespace())?;
        cell.enter(connect_uplink)?;
        let server = spec.result_server.map(|server| *server.ip());
        let source = server.filter(|server| addresses.contains(server));
        connect_host(&host, spec, source)?;
        Ok(cell)
    }

    /// Adopts the cell of that description, whose namespace is that of a process that lives in it.
    pub fn adopt(spec: &CellSpec, namespace: OwnedFd) -> Cell {
        Cell { interface: spec.interface.clone(), bridge: spec.bridge.clone(), namespace }
    }

    /// Makes a tap and puts it into the bridge; with the header that virtio uses, if `has_header`. Without a name it gets a
    /// free one. The tap lives as long as its descriptor.
    ///
    /// # Errors
    /// The name is taken or too long.
    pub fn tap(&self, name: Option<&str>, has_header: bool) -> Result<OwnedFd> {
        self.enter(|| {
            let (tap, name) = taps::open_named(name.unwrap_or("tap%d"), has_header)?;
            Links::open()?.enable(&name, Some(&self.bridge))?;
            Ok(tap)
        })
    }

    /// Returns the namespace, for the process that lives in it.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Removes the interface, and with it the machine's address. The namespace ends with its last process.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn close(mut self) -> Result<()> {
        remove(&std::mem::take(&mut self.interface))
    }

    /// Runs the task in the namespace.
    fn enter<T: Send>(&self, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        in_a_thread(|| {
            let entered = move_into_link_name_space(self.namespace(), Some(LinkNameSpaceType::Network));
            entered.map_err(|error| failed("enter the network of a run", &error.into()))?;
            task()
        })
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        if self.interface.is_empty() {
            return;
        }
        if let Err(error) = remove(&self.interface) {
            tracing::warn!(%error, interface = self.interface, "cannot close the network of a run");
        }
    }
}

/// Renews the host's rules for a run whose cell is older, because somebody may have flushed them meanwhile. Runs that begin
/// within a second have them renewed once.
///
/// # Errors
/// There is no program `nft`, or it refuses.
pub fn renew_rules(spec: &CellSpec, deadline: Deadline) -> Result<()> {
    rules::renew_on_host(prefix_of(&spec.interface)?, spec.result_server, deadline)
}

/// Returns the IPv4 addresses of this host, each with the length of its network's prefix.
///
/// # Errors
/// The kernel does not list them.
pub fn host_addresses() -> Result<Vec<(Ipv4Addr, u8)>> {
    Links::open()?.addresses()
}

/// Removes the interface of an earlier run, if it exists.
///
/// # Errors
/// The kernel refuses it.
pub fn remove(interface: &str) -> Result<()> {
    prefix_of(interface)?;
    Links::open()?.remove(interface)
}

/// Removes the host's table of the cells of that folder, if it exists. No cell of the folder may be open.
///
/// # Errors
/// There is no program `nft`, or it refuses.
pub fn remove_table(folder: &Path) -> Result<()> {
    rules::remove_from_host(&prefix(folder), Deadline::after(REMOVAL_TIMEOUT))
}

/// Makes the namespace with its bridge and its rules, and returns it.
fn inside(spec: &CellSpec, host: &[Ipv4Addr], deadline: Deadline) -> Result<OwnedFd> {
    // SAFETY: unsharing the table of files would be dangerous; it stays shared.
    let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
    unshared.map_err(|error| failed("make a network namespace", &error.into()))?;
    let path = Path::new("/proc/thread-self/ns/net");
    let namespace = File::open(path).map_err(|error| Error::io("open", path, &error))?;
    for interfaces in ["all", "default"] {
        set_if_present(&format!("ipv6/conf/{interfaces}/disable_ipv6"), "1")?;
    }
    // The rules of bridged frames are the bridge's own, although Docker has loaded br_netfilter.
    set_if_present("bridge/bridge-nf-call-iptables", "0")?;
    set("ipv4/ip_forward", "1")?;
    rules::apply(&rules::inside(spec, host, BRIDGE_MAC), deadline)?;
    let links = Links::open()?;
    links.enable("lo", None)?;
    links.add_bridge(&spec.bridge, BRIDGE_MAC)?;
    set(&format!("ipv4/conf/{}/proxy_arp", spec.bridge), "1")?;
    // The kernel otherwise answers for others only after a random delay of up to 0.8 s.
    set(&format!("ipv4/neigh/{}/proxy_delay", spec.bridge), "0")?;
    links.enable(&spec.bridge, None)?;
    links.add_route(&spec.bridge, &Route { to: Some(spec.guest), gateway: None, source: None })?;
    Ok(namespace.into())
}

/// Connects the cell to the host.
fn connect_uplink() -> Result<()> {
    let links = Links::open()?;
    links.enable(UPLINK, None)?;
    links.add_neighbour(UPLINK, ROUTER, HOST_MAC)?;
    links.add_route(UPLINK, &Route { to: None, gateway: Some(ROUTER), source: None })
}

/// Connects the host to the cell.
fn connect_host(host: &Links, spec: &CellSpec, source: Option<Ipv4Addr>) -> Result<()> {
    let interface = &spec.interface;
    set_if_present(&format!("ipv6/conf/{interface}/disable_ipv6"), "1")?;
    set(&format!("ipv4/conf/{interface}/rp_filter"), "1")?;
    host.enable(interface, None)?;
    host.add_neighbour(interface, spec.address, UPLINK_MAC)?;
    host.add_route(interface, &Route { to: Some(spec.address), gateway: None, source })
}

/// Sets a parameter of this thread's network.
fn set(name: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    fs::write(&path, value).map_err(|error| Error::io("write", &path, &error))
}

/// Sets a parameter that a kernel without that part does not have.
fn set_if_present(name: &str, value: &str) -> Result<()> {
    if Path::new("/proc/sys/net").join(name).exists() { set(name, value) } else { Ok(()) }
}

/// Runs the task in a thread of its own, whose namespace may change.
fn in_a_thread<T: Send>(task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let ended = thread::scope(|scope| {
        let thread = thread::Builder::new().name("cell".to_owned()).spawn_scoped(scope, task)?;
        io::Result::Ok(thread.join())
    });
    match ended {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::failed("the thread that makes the network of a run has panicked")),
        Err(error) => Err(failed("start a thread", &error)),
    }
}

fn failed(action: &str, error: &io::Error) -> Error {
    Error::environment(format!("cannot {action}: {error}"))
}
