//! The isolated network of a run, with real packets through real taps.

#![allow(clippy::unwrap_used, clippy::panic)]

mod network;

use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use machinery::{Deadline, ErrorKind};
use machinery_backend::cell::{Cell, CellSpec, missing, remove, remove_table, renew_rules};

use machinery_testkit::guest::linux::COUNTED_PORT;
use machinery_testkit::lab::TestNetwork;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities, unshare_unsafe,
};

use network::{GUEST, Guest, Host, Linux, OTHER, OUTSIDE, SERVER, Server, deadline, inside, run, spec};

const FIRST: [u8; 4] = [10, 7, 0, 1];
const SECOND: [u8; 4] = [10, 7, 0, 2];

#[test]
fn cell_carries_connections_both_ways_in_the_machines_own_address() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    // The address inside may be the machine's own.
    for address in [FIRST, GUEST.octets()] {
        let spec = spec("a", address, &server);
        let cell = host.open(&spec).unwrap();
        let guest = Guest::new(&cell);
        let agent = guest.listen();
        assert!(host.reaches(SocketAddrV4::new(spec.address, agent.address.port())));
        assert_eq!(agent.client(), SERVER, "the host's address for the guest is the result server's");
        assert!(guest.reaches(server.address));
        assert_eq!(server.client(), spec.address);
        drop(guest);
        host.inside(|| cell.close()).unwrap();
    }
}

#[test]
fn guest_with_an_outdated_gateway_is_reached_and_reaches_the_result_server() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let spec = spec("a", FIRST, &server);
    let cell = host.open(&spec).unwrap();
    let guest = Guest::new(&cell);
    guest.remember_gateway();
    let agent = guest.listen();
    assert!(host.reaches(SocketAddrV4::new(spec.address, agent.address.port())));
    assert!(guest.reaches(server.address));
}

#[test]
fn two_guests_with_one_address_are_two_clients_and_never_meet() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let specs = [spec("a", FIRST, &server), spec("b", SECOND, &server)];
    let cells = specs.each_ref().map(|spec| host.open(spec).unwrap());
    let guests = cells.each_ref().map(Guest::new);
    let agents = guests.each_ref().map(Guest::listen);
    for (spec, guest) in specs.iter().zip(&guests) {
        assert!(guest.reaches(server.address));
        assert_eq!(server.client(), spec.address);
    }
    for (index, other) in [(0, 1), (1, 0)] {
        let address = SocketAddrV4::new(specs[other].address, agents[other].address.port());
        assert!(host.reaches(address));
        assert!(guests[index].never_reaches(address));
    }
}

#[test]
fn guest_reaches_nothing_of_the_host_but_the_result_server() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let cell = host.open(&spec("a", FIRST, &server)).unwrap();
    let guest = Guest::new(&cell);
    for closed in [host.listen(SERVER), host.listen(OTHER)] {
        assert!(host.reaches(closed.address));
        assert!(guest.never_reaches(closed.address));
    }
    let other_address = SocketAddrV4::new(OTHER, server.address.port());
    assert!(guest.never_reaches(other_address));
    let metadata = Server::new(&host.outside, [169, 254, 169, 254].into());
    assert!(host.reaches(metadata.address));
    assert!(guest.never_reaches(metadata.address));
    let outside = Server::new(&host.outside, OUTSIDE);
    assert!(guest.reaches(outside.address), "the operator's routing decides about others");
    assert_eq!(outside.client(), spec("a", FIRST, &server).address);
}

#[test]
fn packets_with_a_source_of_their_own_never_leave_the_cell() {
    let Some(host) = Host::new() else { return };
    let spec = spec("a", FIRST, &host.listen(SERVER));
    let cell = host.open(&spec).unwrap();
    // The host would drop them as well.
    let filters = ["all", &spec.interface].map(|name| format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
    host.inside(|| run(&format!("echo 0 | tee {}", filters.join(" "))));
    let outside = host.outside.inside(|| UdpSocket::bind((OUTSIDE, 0)).unwrap()).unwrap();
    let guest = Guest::new(&cell);
    let send = |source: Ipv4Addr, text: &str| {
        let socket = UdpSocket::bind((source, 0)).unwrap();
        socket.send_to(text.as_bytes(), outside.local_addr().unwrap()).unwrap();
    };
    let send_both = || {
        run("ip address add 10.66.0.77/24 dev tap0");
        send([10, 66, 0, 77].into(), "spoofed");
        send(GUEST, "own");
    };
    guest.network.inside(send_both).unwrap();
    let mut text = [0; 16];
    let (length, sender) = outside.recv_from(&mut text).unwrap();
    assert_eq!((&text[..length], sender.ip()), (&b"own"[..], spec.address.into()));
}

#[test]
fn packets_of_no_connection_never_leave_the_cell() {
    let Some(host) = Host::new() else { return };
    let spec = spec("a", FIRST, &host.listen(SERVER));
    let cell = host.open(&spec).unwrap();
    // The host would drop them as well.
    let filters = ["all", &spec.interface].map(|name| format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
    host.inside(|| run(&format!("echo 0 | tee {}", filters.join(" "))));
    let raw = || socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::TCP)).unwrap();
    let outside = host.outside.inside(raw).unwrap();
    let guest = Guest::new(&cell);
    let send_both = || {
        // A segment with a wrong checksum, which is not translated, and then the first one of a connection.
        let segment = [0, 7, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x04, 0, 0, 0, 1, 0, 0];
        sendto(raw(), &segment, SendFlags::empty(), &SocketAddrV4::new(OUTSIDE, 0)).unwrap();
        drop(TcpStream::connect_timeout(&(OUTSIDE, 7).into(), Duration::from_secs(10)));
    };
    guest.network.inside(send_both).unwrap();
    let mut packet = [0; 64];
    recv(&outside, &mut packet[..], RecvFlags::empty()).unwrap();
    // The source in the header of IPv4.
    assert_eq!(packet[12..16], spec.address.octets());
}

#[test]
fn restored_linux_reaches_the_result_server_and_its_agent_answers() {
    let Some(host) = Host::new() else { return };
    // The guest was saved beside a host of this address, whose hardware address it has as a static entry.
    let at_save = TestNetwork::HOST;
    host.inside(|| run(&format!("ip address add {at_save}/32 dev lan0")));
    let server = Server::at(&host.network, at_save, 2042);
    let syslog = host.inside(|| UdpSocket::bind((at_save, COUNTED_PORT)).unwrap());
    let spec = CellSpec { guest: TestNetwork::GUEST, ..spec("a", FIRST, &server) };
    let cell = host.open(&spec).unwrap();
    let _linux = Linux::restore(&cell);
    assert_eq!(server.client(), spec.address);
    let answer = host.inside(|| {
        let mut agent = TcpStream::connect((spec.address, 8000)).unwrap();
        agent.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        io::read_to_string(agent).unwrap()
    });
    assert!(answer.contains("Test guest agent"), "{answer}");
    // The guest has sent to it all the time.
    syslog.set_nonblocking(true).unwrap();
    assert_eq!(syslog.recv(&mut [0; 64]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn rules_of_cell_and_host_hold_alone_and_the_next_cell_mends_those_of_the_host() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let cell = host.open(&spec("a", FIRST, &server)).unwrap();
    let guest = Guest::new(&cell);
    // The host gets an address after the cell was made, which its rules inside do not have.
    host.inside(|| run("ip address add 10.9.0.9/24 dev lan0"));
    let late = host.listen([10, 9, 0, 9].into());
    assert!(guest.never_reaches(late.address));
    host.inside(|| run("nft flush ruleset"));
    assert!(guest.reaches(late.address));
    let closed = host.listen(SERVER);
    assert!(
        host.reaches(closed.address) && guest.never_reaches(closed.address),
        "the rules inside hold alone"
    );
    let second = host.open(&spec("b", SECOND, &server)).unwrap();
    assert!(guest.never_reaches(late.address));
    assert!(guest.reaches(server.address));
    drop(second);
    // A run whose cell is older has them written anew, if somebody has changed a rule.
    let renew = || host.inside(|| renew_rules(&spec("a", FIRST, &server), deadline())).unwrap();
    host.inside(|| run("nft flush ruleset"));
    renew();
    assert!(guest.never_reaches(late.address));
    // Rules that are written anew have other handles.
    let handles = || host.inside(|| run("nft -a list ruleset"));
    let before = handles();
    renew();
    assert_eq!(handles(), before);
}

#[test]
fn cell_leaves_nothing_when_it_is_closed_or_cannot_be_opened() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let before = host.state();
    let spec = spec("a", FIRST, &server);
    let cell = host.open(&spec).unwrap();
    assert!(host.state().contains(&spec.interface) && host.state().contains("10.7.0.1"));
    host.inside(|| cell.close()).unwrap();
    let late = host.inside(|| Cell::open(&spec, Deadline::after(Duration::ZERO))).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Timeout, "{late}");
    // The name is free, and the address of the host's own interface is not.
    let taken = CellSpec { address: OTHER, ..spec.clone() };
    assert!(host.open(&taken).is_err());
    for bridge in ["sixteen-letters-", "", "a\"b", "br*", "uplink"] {
        let refused = host.open(&CellSpec { bridge: bridge.into(), ..spec.clone() }).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Configuration, "{refused}");
        assert!(refused.to_string().contains(&format!("cannot have the name '{bridge}'")), "{refused}");
    }
    host.inside(|| remove_table(Path::new("/cwd"))).unwrap();
    host.inside(|| remove_table(Path::new("/cwd"))).unwrap();
    assert_eq!(host.state(), before);
}

#[test]
fn cell_has_no_ipv6() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let spec = spec("a", FIRST, &server);
    let cell = host.open(&spec).unwrap();
    let addresses = "ip -6 -o address show";
    assert_eq!(host.inside(|| run(&format!("{addresses} dev {}", spec.interface))), "");
    assert_eq!(inside(&cell, || run(addresses)), "");
    // The same command shows addresses where there are some.
    assert!(host.inside(|| run(addresses)).contains("lan0"));
}

#[test]
fn cell_is_refused_with_advice_when_a_capability_is_missing() {
    let Some(host) = Host::new() else { return };
    let spec = spec("a", FIRST, &host.listen(SERVER));
    let before = host.state();
    let refused = host.inside(|| {
        let all = capabilities(None).unwrap();
        assert_eq!(missing(), None);
        set_capabilities(None, CapabilitySets { effective: all.effective - CapabilitySet::NET_ADMIN, ..all })
            .unwrap();
        assert!(missing().unwrap().contains("CAP_NET_ADMIN"));
        // A user who has made no cell has none to remove.
        remove(&spec.interface).unwrap();
        Cell::open(&spec, deadline()).unwrap_err()
    });
    assert!(refused.to_string().contains("Run the host as root"), "{refused}");
    assert_eq!(host.state(), before);
}

#[test]
fn cell_is_refused_with_advice_when_nft_is_missing() {
    let Some(host) = Host::new() else { return };
    let spec = spec("a", FIRST, &host.listen(SERVER));
    let before = host.state();
    let refused = host.inside(|| {
        // SAFETY: unsharing the table of files would be dangerous; it stays shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        run("mount --make-rprivate /; mount --bind /dev/null $(readlink -f $(command -v nft))");
        assert!(missing().unwrap().contains("the program nft"));
        Cell::open(&spec, deadline()).unwrap_err()
    });
    assert!(refused.to_string().contains("Install nftables"), "{refused}");
    assert_eq!(host.state(), before);
}

#[test]
fn interface_of_an_earlier_run_is_removed() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let spec = spec("a", FIRST, &server);
    std::mem::forget(host.open(&spec).unwrap());
    let cell = host.open(&spec).unwrap();
    let guest = Guest::new(&cell);
    assert!(guest.reaches(server.address));
    std::mem::forget(cell);
    host.inside(|| remove(&spec.interface)).unwrap();
    host.inside(|| remove(&spec.interface)).unwrap();
    assert!(!host.state().contains(&spec.interface));
}

#[test]
fn address_is_refused_with_the_name_of_its_owner_when_it_is_taken() {
    let Some(host) = Host::new() else { return };
    let server = host.listen(SERVER);
    let first = spec("a", FIRST, &server);
    let _cell = host.open(&first).unwrap();
    let refused = |address| host.open(&spec("b", address, &server)).unwrap_err().to_string();
    let routed = refused(FIRST);
    let expected = format!("the address 10.7.0.1 is taken: {} has a route to it", first.interface);
    assert!(routed.contains(&expected), "{routed}");
    let own = refused(OTHER.octets());
    assert!(own.contains("10.9.0.2 is taken: lan0 of this host has it"), "{own}");
    let broadcast = refused([10, 9, 0, 255]);
    assert!(broadcast.contains("10.9.0.255 is taken") && broadcast.contains("Broadcast"), "{broadcast}");
}
