//! A host with an isolated network, and guests in cells: all in network namespaces of the test's own.
//!
//! A guest is a namespace whose only interface is a tap. A thread copies frames between this tap and the cell's.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use machinery::{Deadline, Result};
use machinery_backend::cell::{Cell, CellSpec, interface_name};
use machinery_backend::jail::taps;
use machinery_testkit::guest::{self, Qemu, Vm};
use machinery_testkit::lab::TestNetwork;
use machinery_testkit::requirement::NETWORK;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

/// The addresses of the host. The result server has the first.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
pub const OTHER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
/// An address beyond the host.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
/// The address inside all guests.
pub const GUEST: Ipv4Addr = TestNetwork::HOST;
/// The gateway that the guests were saved with. Nobody has its address.
const GATEWAY: &str = "10.66.0.254";

/// The time in which a packet that is dropped does not arrive.
const NO_ANSWER: Duration = Duration::from_millis(700);
const ANSWER: Duration = Duration::from_secs(20);

pub fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// A host with a network, and a computer beside it.
pub struct Host {
    pub network: TestNetwork,
    pub outside: TestNetwork,
}

impl Host {
    /// Makes a host; `None` if the user may not, and the test may skip that.
    pub fn new() -> Option<Host> {
        let network = NETWORK.or_skip(TestNetwork::new().unwrap())?;
        let outside = TestNetwork::new().unwrap()?;
        network.remove_tap().unwrap();
        outside.remove_tap().unwrap();
        let far = outside.inside(own_namespace).unwrap();
        network
            .inside(|| {
                run(&format!("ip link add lan0 type veth peer name lan0 netns {}", path_of(&far)));
                run("ip address add 10.9.0.1/24 dev lan0; ip address add 10.9.0.2/24 dev lan0");
                run("ip link set lan0 up; echo 1 > /proc/sys/net/ipv4/ip_forward");
                // The metadata of a cloud.
                run("ip route add 169.254.169.254 dev lan0");
            })
            .unwrap();
        outside
            .inside(|| {
                run("ip address add 10.9.0.3/24 dev lan0; ip address add 169.254.169.254/32 dev lan0");
                run("ip link set lan0 up; ip route add default via 10.9.0.1");
            })
            .unwrap();
        Some(Host { network, outside })
    }

    pub fn inside<T: Send>(&self, task: impl FnOnce() -> T + Send) -> T {
        self.network.inside(task).unwrap()
    }

    pub fn listen(&self, address: Ipv4Addr) -> Server {
        Server::new(&self.network, address)
    }

    pub fn open(&self, spec: &CellSpec) -> Result<Cell> {
        self.inside(|| Cell::open(spec, deadline()))
    }

    pub fn reaches(&self, address: SocketAddrV4) -> bool {
        self.inside(|| connect(address, ANSWER))
    }

    /// Returns everything that a cell could leave: interfaces, routes, neighbours, tables.
    pub fn state(&self) -> String {
        // The kernel notices a moment later that a peer is up.
        let links = "ip -o link | cut -d: -f2; ip route | sed 's/ linkdown//'";
        self.inside(|| run(&format!("{links}; ip neigh show nud permanent; nft list ruleset")))
    }
}

/// Runs a task in a cell.
pub fn inside<T: Send>(cell: &Cell, task: impl FnOnce() -> T + Send) -> T {
    let enter = || move_into_link_name_space(cell.namespace(), Some(LinkNameSpaceType::Network));
    thread::scope(|scope| scope.spawn(|| enter().map(|()| task())).join()).unwrap().unwrap()
}

/// Describes the cell of a machine.
pub fn spec(machine: &str, address: [u8; 4], server: &Server) -> CellSpec {
    CellSpec {
        interface: interface_name(Path::new("/cwd"), machine),
        address: address.into(),
        guest: GUEST,
        bridge: "br-guest".to_owned(),
        result_server: Some(server.address),
    }
}

/// A server that reports who connects.
pub struct Server {
    pub address: SocketAddrV4,
    listener: TcpListener,
}

impl Server {
    pub fn new(network: &TestNetwork, address: Ipv4Addr) -> Server {
        Server::at(network, address, 0)
    }

    pub fn at(network: &TestNetwork, address: Ipv4Addr, port: u16) -> Server {
        let listener = network.inside(|| TcpListener::bind((address, port))).unwrap().unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!("IPv4") };
        Server { address, listener }
    }

    /// Returns the address of the next client, which has connected already.
    pub fn client(&self) -> Ipv4Addr {
        let (_, SocketAddr::V4(client)) = self.listener.accept().unwrap() else { unreachable!("IPv4") };
        *client.ip()
    }
}

fn connect(address: SocketAddrV4, timeout: Duration) -> bool {
    TcpStream::connect_timeout(&address.into(), timeout).is_ok()
}

fn own_namespace() -> OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/net").unwrap().into()
}

fn path_of(descriptor: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), descriptor.as_raw_fd())
}

/// A guest in a cell. It ends when it is dropped.
pub struct Guest {
    pub network: TestNetwork,
    pump: Option<JoinHandle<()>>,
    stop: Option<OwnedFd>,
}

impl Guest {
    pub fn new(cell: &Cell) -> Guest {
        let network = TestNetwork::new().unwrap().unwrap();
        let own = network
            .inside(|| {
                run(&format!("ip route add default via {GATEWAY}"));
                taps::open(TestNetwork::TAP, false).unwrap()
            })
            .unwrap();
        let tap = cell.tap(Some("tap-guest"), false).unwrap();
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let pump = thread::spawn(move || copy(&own, &tap, &stopped));
        Guest { network, pump: Some(pump), stop: Some(stop) }
    }

    /// Remembers a hardware address of the gateway that nobody has any more.
    pub fn remember_gateway(&self) {
        let command = format!("ip neigh replace {GATEWAY} lladdr 52:54:00:99:99:99 dev tap0 nud permanent");
        self.network.inside(|| run(&command)).unwrap();
    }

    pub fn listen(&self) -> Server {
        Server::new(&self.network, GUEST)
    }

    pub fn reaches(&self, address: SocketAddrV4) -> bool {
        self.network.inside(|| connect(address, ANSWER)).unwrap()
    }

    pub fn never_reaches(&self, address: SocketAddrV4) -> bool {
        self.network.inside(|| !connect(address, NO_ANSWER)).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.pump.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

/// A real Linux in a cell, restored by QEMU from its snapshot.
pub struct Linux {
    _vm: Vm,
    _folder: TempDir,
}

impl Linux {
    /// Restores it in the cell's namespace. This thread stays there, because QEMU ends with the thread that started it.
    pub fn restore(cell: &Cell) -> Linux {
        let (qemu, folder) = (Qemu::find().unwrap(), tempfile::tempdir().unwrap());
        let master = guest::master(&qemu, guest::Guest::TrafficSource).unwrap();
        let address = TestNetwork::GUEST.to_string();
        let mut machine =
            master.machine(&folder.path().join("m"), "m", &address, SnapshotFormat::Lz4).unwrap();
        let tap = cell.tap(None, false).unwrap();
        fcntl_setfd(&tap, FdFlags::empty()).unwrap();
        let netdev =
            machine.start_args.iter_mut().find(|argument| argument.starts_with("tap,id=net0")).unwrap();
        *netdev = format!("tap,id=net0,fd={}", tap.as_raw_fd());
        let overlay = folder.path().join("overlay");
        qemu.overlay(&machine.disk, &overlay).unwrap();
        move_into_link_name_space(cell.namespace(), Some(LinkNameSpaceType::Network)).unwrap();
        let mut vm = machine.restore(&qemu, &overlay).unwrap();
        vm.cont().unwrap();
        Linux { _vm: vm, _folder: folder }
    }
}

/// Copies frames between two taps until the pipe closes.
fn copy(one: &OwnedFd, other: &OwnedFd, stopped: &OwnedFd) {
    loop {
        let mut ready = [
            PollFd::new(one, PollFlags::IN),
            PollFd::new(other, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        poll(&mut ready, None).unwrap();
        if !ready[2].revents().is_empty() {
            return;
        }
        for (from, to) in [(one, other), (other, one)] {
            let mut frame = [0; 1 << 16];
            while let Ok(length) = rustix::io::read(from.as_fd(), &mut frame) {
                match rustix::io::write(to, &frame[..length]).map_err(io::Error::from) {
                    // A tap drops frames while its interface is down.
                    Ok(_) | Err(_) => {}
                }
            }
        }
    }
}
