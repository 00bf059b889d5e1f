//! Interfaces, routes and neighbours of one network namespace, by netlink.
//!
//! A [`Links`] belongs to the namespace of the thread that has opened it, also when another thread uses it. The kernel
//! answers each request at once, so no request has a deadline. Sources: netlink(7), rtnetlink(7).

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use machinery::{Error, Result};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkHeader, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Request};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::io::Errno;
use rustix::net::netdevice::{index_to_name, name_to_index};

/// A hardware address.
pub type Mac = [u8; 6];

/// The alignment of the messages in one datagram. Source: netlink(3).
const ALIGNMENT: usize = 4;

/// The interfaces, routes and neighbours of a namespace.
pub struct Links(Socket);

/// A route to one address, or the default route.
pub struct Route {
    /// The destination; `None` for the default route.
    pub to: Option<Ipv4Addr>,
    /// The router, which needs no address of its own network on the interface.
    pub gateway: Option<Ipv4Addr>,
    /// The source address of the host's own packets.
    pub source: Option<Ipv4Addr>,
}

impl Links {
    /// Opens the interfaces of this thread's namespace.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open() -> Result<Links> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            io::Result::Ok(socket)
        };
        open().map(Links).map_err(|error| failed("open a netlink socket", &error))
    }

    /// Sends the request, and returns the answers that precede its acknowledgement.
    fn ask(&self, request: Request, flags: u16) -> io::Result<Vec<Request>> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<Request>::deserialize(rest).map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                    _ => {}
                }
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
                rest = rest.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
            }
        }
    }

    fn index(&self, name: &str) -> Result<u32> {
        name_to_index(&self.0, name)
            .map_err(|error| failed(&format!("find the interface {name}"), &error.into()))
    }

    /// Makes a pair of interfaces: one here with that name and hardware address, and its peer in another namespace.
    ///
    /// # Errors
    /// The name is taken, or the kernel refuses it.
    pub fn add_veth(&self, near: (&str, Mac), far: (&str, Mac), namespace: BorrowedFd<'_>) -> Result<()> {
        let mut peer = named(far.0, far.1);
        peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
        let mut link = named(near.0, near.1);
        let data = InfoData::Veth(InfoVeth::Peer(peer));
        link.attributes
            .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(data)]));
        self.change(Request::NewLink(link), &format!("make the interface {}", near.0))
    }

    /// Makes a bridge.
    ///
    /// # Errors
    /// The name is taken, or the kernel refuses it.
    pub fn add_bridge(&self, name: &str, mac: Mac) -> Result<()> {
        let mut link = named(name, mac);
        link.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
        self.change(Request::NewLink(link), &format!("make the bridge {name}"))
    }

    /// Removes the interface with its peer, routes and neighbours, if it exists.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn remove(&self, name: &str) -> Result<()> {
        // The removal of an interface that does not exist needs the same capability.
        if name_to_index(&self.0, name) == Err(Errno::NODEV) {
            return Ok(());
        }
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.ask(Request::DelLink(link), 0) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => Ok(()),
            removed => {
                removed.map(drop).map_err(|error| failed(&format!("remove the interface {name}"), &error))
            }
        }
    }

    /// Enables the interface; as a port of that bridge, if one is given.
    ///
    /// # Errors
    /// An interface does not exist, or the kernel refuses it.
    pub fn enable(&self, name: &str, bridge: Option<&str>) -> Result<()> {
        let mut link = LinkMessage::default();
        let up = LinkFlags::Up;
        link.header = LinkHeader { index: self.index(name)?, flags: up, change_mask: up, ..link.header };
        if let Some(bridge) = bridge {
            link.attributes.push(LinkAttribute::Controller(self.index(bridge)?));
        }
        let asked = self.ask(Request::SetLink(link), 0);
        asked.map(drop).map_err(|error| failed(&format!("enable the interface {name}"), &error))
    }

    /// Adds a neighbour that never expires, so that nobody asks for its hardware address.
    ///
    /// # Errors
    /// The interface does not exist, or the kernel refuses it.
    pub fn add_neighbour(&self, interface: &str, address: Ipv4Addr, mac: Mac) -> Result<()> {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = AddressFamily::Inet;
        neighbour.header.ifindex = self.index(interface)?;
        neighbour.header.state = NeighbourState::Permanent;
        neighbour.header.kind = RouteType::Unicast;
        neighbour.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        self.change(Request::NewNeighbour(neighbour), &format!("add the neighbour {address} of {interface}"))
    }

    /// Adds a route through the interface.
    ///
    /// # Errors
    /// The interface does not exist, or the destination has a route.
    pub fn add_route(&self, interface: &str, route: &Route) -> Result<()> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: AddressFamily::Inet,
            destination_prefix_length: if route.to.is_some() { Ipv4Addr::BITS as u8 } else { 0 },
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link },
            kind: RouteType::Unicast,
            flags: if route.gateway.is_some() { RouteFlags::Onlink } else { RouteFlags::empty() },
            ..RouteHeader::default()
        };
        let address = RouteAddress::Inet;
        message.attributes.push(RouteAttribute::Oif(self.index(interface)?));
        message.attributes.extend(route.to.map(|to| RouteAttribute::Destination(address(to))));
        message.attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(address(gateway))));
        message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(address(source))));
        let to = route.to.map_or("every address".to_owned(), |to| to.to_string());
        self.change(Request::NewRoute(message), &format!("add a route to {to} through {interface}"))
    }

    /// Returns the IPv4 addresses of the namespace, each with the length of its network's prefix.
    ///
    /// # Errors
    /// The kernel does not list them.
    pub fn addresses(&self) -> Result<Vec<(Ipv4Addr, u8)>> {
        let mut all = AddressMessage::default();
        all.header.family = AddressFamily::Inet;
        let answers = self.ask(Request::GetAddress(all), NLM_F_DUMP);
        let answers = answers.map_err(|error| failed("list the addresses of this host", &error))?;
        let local = |answer| match answer {
            Request::NewAddress(address) => {
                let length = address.header.prefix_len;
                address.attributes.into_iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(IpAddr::V4(local)) => Some((local, length)),
                    _ => None,
                })
            }
            _ => None,
        };
        Ok(answers.into_iter().filter_map(local).collect())
    }

    /// Returns what has the address already: an interface that it is routed through, or this host itself.
    ///
    /// # Errors
    /// The kernel refuses to look it up.
    pub fn owner_of(&self, address: Ipv4Addr) -> Result<Option<String>> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = Ipv4Addr::BITS as u8;
        // The answer is the entry of the table that matches, and not the way of a packet.
        message.header.flags = RouteFlags::FibMatch;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(address)));
        let found = match self.ask(Request::GetRoute(message), 0) {
            Err(error) if is_unrouted(&error) => return Ok(None),
            found => found.map_err(|error| failed(&format!("look up the route to {address}"), &error))?,
        };
        let Some(Request::NewRoute(route)) = found.into_iter().next() else { return Ok(None) };
        let interface = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => index_to_name(&self.0, *index).ok(),
            _ => None,
        });
        let interface = interface.unwrap_or_else(|| "another interface".to_owned());
        let is_single = u32::from(route.header.destination_prefix_length) == Ipv4Addr::BITS;
        Ok(match route.header.kind {
            RouteType::Unicast if is_single => Some(format!("{interface} has a route to it")),
            RouteType::Unicast => None,
            RouteType::Local => Some(format!("{interface} of this host has it")),
            kind => Some(format!("its route through {interface} is of the kind {kind:?}")),
        })
    }

    /// Makes something that must not exist yet.
    fn change(&self, request: Request, action: &str) -> Result<()> {
        let asked = self.ask(request, NLM_F_CREATE | NLM_F_EXCL);
        asked.map(drop).map_err(|error| failed(action, &error))
    }
}

fn named(name: &str, mac: Mac) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::Address(mac.to_vec())];
    link
}

/// Reports whether the kernel has no route, or one that says so.
fn is_unrouted(error: &io::Error) -> bool {
    let none = [Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::ACCESS, Errno::INVAL];
    Errno::from_io_error(error).is_some_and(|error| none.contains(&error))
}

fn failed(action: &str, error: &io::Error) -> Error {
    Error::environment(format!("cannot {action}: {error}"))
}
