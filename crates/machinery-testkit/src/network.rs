//! A network of the host and one machine.
//!
//! It is a network namespace without a name. Concurrent tests can therefore use the same addresses and the
//! same tap. The namespace ends with its last user.

use std::ffi::CString;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Seek, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::error::{Context, Error};
use crate::{Result, command};

/// A network of the host and one machine, connected by a tap.
#[derive(Debug, Clone)]
pub struct TestNetwork {
    namespace: Arc<OwnedFd>,
}

impl TestNetwork {
    /// The host's interface. A QEMU opens the other end.
    pub const TAP: &str = "tap0";
    /// The host's address.
    pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 1);
    /// The machine's address.
    pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 66, 0, 2);
    /// The bridge of [several machines](TestNetwork::add_machines).
    pub const BRIDGE: &str = "br0";
    /// The host's hardware address, which the machine has as a static entry.
    pub const HOST_MAC: &str = "52:54:00:42:00:01";

    /// Makes a network; `None` for a user who may not make one, or not capture on it.
    pub fn new() -> Result<Option<Self>> {
        // Root of a user namespace lacks some privileges.
        let groups = fs::read_to_string("/proc/self/setgroups").unwrap_or_default();
        if !rustix::process::geteuid().is_root() || groups.trim() == "deny" {
            return Ok(None);
        }
        let namespace = in_a_thread(make)??;
        Ok(Some(TestNetwork { namespace: Arc::new(namespace) }))
    }

    /// Makes a network that has the loopback interface only.
    pub fn empty() -> Result<Self> {
        let namespace = in_a_thread(make_empty)??;
        Ok(TestNetwork { namespace: Arc::new(namespace) })
    }

    /// Moves the calling thread into the network, with each process that it starts from then on.
    pub fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .context(|| "entering a network".to_owned())
    }

    /// Returns the path of the namespace, for a program such as `ip`.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd())
    }

    /// Runs the lines of a script of `ip`.
    pub fn ip_batch(&self, script: &str) -> Result<()> {
        self.inside(|| run_script(Command::new("ip").args(["-batch", "-"]), script))?
    }

    /// Runs a script of `nft`.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.inside(|| run_script(Command::new("nft").args(["-f", "-"]), script))?
    }

    /// Has the network route packets of others, and answer on the bridge for every address that it routes.
    pub fn route_for_others(&self, bridge: &str) -> Result<()> {
        let what = || "routing in a network".to_owned();
        self.inside(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").context(what)?;
            fs::write(format!("/proc/sys/net/ipv4/conf/{bridge}/proxy_arp"), "1").context(what)
        })?
    }

    /// Makes the command run in the network: it sees the network's interfaces only.
    pub fn attach(&self, command: &mut Command) {
        let namespace = Arc::clone(&self.namespace);
        let enter = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            see_its_interfaces()
        };
        // SAFETY: between fork and exec only what is async-signal-safe is allowed; these are system
        // calls, without allocation or lock.
        unsafe { command.pre_exec(enter) };
    }

    /// Runs a task in the network. A socket that it opens belongs to the network from then on.
    pub fn inside<T: Send>(&self, task: impl FnOnce() -> T + Send) -> Result<T> {
        in_a_thread(|| {
            self.enter()?;
            Ok(task())
        })?
    }

    /// Makes the host's interface a bridge of `count` machines, each with [a tap](TestNetwork::tap_of).
    pub fn add_machines(&self, count: u8) -> Result<()> {
        self.remove_tap()?;
        self.add_bridge(Self::BRIDGE)?;
        self.inside(|| {
            ip(&["link", "set", "dev", Self::BRIDGE, "address", Self::HOST_MAC])?;
            ip(&["address", "add", &format!("{}/24", Self::HOST), "dev", Self::BRIDGE])?;
            for tap in (1..=count).map(Self::tap_of) {
                ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
                ip(&["link", "set", "dev", &tap, "master", Self::BRIDGE, "up"])?;
            }
            Ok(())
        })?
    }

    /// Returns the name of a machine's tap; numbers begin at 1.
    pub fn tap_of(number: u8) -> String {
        format!("tap{number}")
    }

    /// Returns the address of the machine with that number.
    pub fn machine(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 66, 0, 10 + number)
    }

    /// Makes a bridge.
    pub fn add_bridge(&self, name: &str) -> Result<()> {
        self.inside(|| {
            ip(&["link", "add", name, "type", "bridge"])?;
            ip(&["link", "set", "dev", name, "up"])
        })?
    }

    /// Returns the interfaces of a bridge, as `ip` lists them.
    pub fn members(&self, bridge: &str) -> Result<String> {
        self.inside(|| command::output(Command::new("ip").args(["-o", "link", "show", "master", bridge])))?
    }

    /// Lets QEMU's helper use the bridge, for a command that [runs in the network](TestNetwork::attach). Nobody else sees
    /// the permission: it is in a copy of `/etc`, which this makes in the folder `scratch`.
    pub fn allow_bridge(&self, command: &mut Command, name: &str, scratch: &Path) -> Result<()> {
        let etc = scratch.join("etc");
        command::output(Command::new("cp").args(["-a", "/etc"]).arg(&etc))?;
        let what = || format!("allowing the bridge {name}");
        fs::create_dir_all(etc.join("qemu")).context(what)?;
        fs::write(etc.join("qemu/bridge.conf"), format!("allow {name}\n")).context(what)?;
        let etc = CString::new(etc.into_os_string().into_encoded_bytes()).context(what)?;
        let see = move || Ok(mount_bind(etc.as_c_str(), c"/etc")?);
        // SAFETY: as in `attach`; the path was allocated before.
        unsafe { command.pre_exec(see) };
        Ok(())
    }

    /// Removes the tap; only the loopback interface is left.
    pub fn remove_tap(&self) -> Result<()> {
        self.inside(|| ip(&["link", "delete", Self::TAP]))?
    }
}

/// Runs a task in a thread of its own, whose namespace ends with it.
fn in_a_thread<T: Send>(task: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(task).join())
        .map_err(|_| Error::new("a thread in another network panicked"))
}

/// Makes a namespace in the calling thread.
fn make_empty() -> Result<OwnedFd> {
    let what = || "making a network for a test".to_owned();
    // SAFETY: unsharing the table of files would be dangerous; it stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.context(what)?;
    ip(&["link", "set", "lo", "up"])?;
    File::open("/proc/thread-self/ns/net").map(OwnedFd::from).context(what)
}

fn make() -> Result<OwnedFd> {
    let namespace = make_empty()?;
    ip(&["tuntap", "add", "dev", TestNetwork::TAP, "mode", "tap"])?;
    ip(&["link", "set", "dev", TestNetwork::TAP, "address", TestNetwork::HOST_MAC])?;
    ip(&["address", "add", &format!("{}/24", TestNetwork::HOST), "dev", TestNetwork::TAP])?;
    ip(&["link", "set", "dev", TestNetwork::TAP, "up"])?;
    Ok(namespace)
}

/// Runs a program that reads a script from its standard input.
fn run_script(command: &mut Command, script: &str) -> Result<()> {
    let what = || "running a script".to_owned();
    let mut file = tempfile::tempfile().context(what)?;
    file.write_all(script.as_bytes()).and_then(|()| file.rewind()).context(what)?;
    command::output(command.stdin(file)).map(drop)
}

fn ip(arguments: &[&str]) -> Result<()> {
    command::output(Command::new("ip").args(arguments)).map(drop)
}

/// Mounts `/sys` anew, which shows the interfaces of the network in which it was mounted.
fn see_its_interfaces() -> io::Result<()> {
    // SAFETY: unsharing the table of files would be dangerous; it stays shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount(c"sysfs", c"/sys", c"sysfs", MountFlags::empty(), c"")?;
    Ok(())
}

/// Returns a random loopback address outside of 127.0, which has the fixed addresses of tests.
pub fn loopback_address() -> Ipv4Addr {
    let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_be_bytes();
    Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254))
}
