//! The resources that a machine's arguments claim: only one QEMU at a time can use each of them.
//!
//! Two machines that claim the same resource can never run at the same time, and the standby of one keeps the
//! other from starting. Sources: QEMU's qemu-options.hx, qapi/net.json, qapi/char.json, ui/vnc.c,
//! chardev/char.c (`qemu_chr_parse_compat`), net/slirp.c (`slirp_hostfwd`).

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::MachineFiles;
use crate::options::Options;

/// The port of the first VNC display.
const VNC: u16 = 5900;
/// The port of `-s`.
const GDB: u16 = 1234;

/// A resource that only one QEMU at a time can use, and the argument that claims it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    kind: ResourceKind,
    argument: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ResourceKind {
    /// A port on an address of this computer; on all addresses if `address` is empty.
    Port {
        protocol: &'static str,
        address: String,
        port: u16,
    },
    /// A file that QEMU writes.
    File(PathBuf),
    /// A socket that QEMU makes.
    Socket(PathBuf),
    Tap(String),
    /// A device of this computer.
    Device(String),
    /// The guest's number on vsock.
    Cid(String),
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ResourceKind::Port { protocol, address, port } if address.is_empty() => {
                write!(f, "the {protocol} port {port}")
            }
            ResourceKind::Port { protocol, address, port } => {
                write!(f, "the {protocol} port {address}:{port}")
            }
            ResourceKind::File(path) | ResourceKind::Socket(path) => path.display().fmt(f),
            ResourceKind::Tap(name) => write!(f, "the tap {name}"),
            ResourceKind::Device(name) => write!(f, "the device {name}"),
            ResourceKind::Cid(number) => write!(f, "the vsock address {number}"),
        }?;
        write!(f, " ({})", self.argument)
    }
}

impl Resource {
    /// Returns all resources that the machine claims.
    pub fn of(files: &MachineFiles) -> Vec<Resource> {
        let mut found = ResourceFinder { files, argument: String::new(), resources: Vec::new() };
        files.start_args.options().for_each(|(name, value)| found.option(name, value));
        found.resources
    }

    /// Returns the resources that other machines may claim. The ports and taps of an isolated machine are in the network of
    /// its run.
    pub fn contested(files: &MachineFiles) -> Vec<Resource> {
        let mut resources = Resource::of(files);
        if files.isolation.is_some() {
            resources.retain(|resource| {
                !matches!(resource.kind, ResourceKind::Port { .. } | ResourceKind::Tap(_))
            });
        }
        resources
    }

    /// Returns a key that two resources share if they may clash: a cheap way to find such pairs.
    pub fn key(&self) -> String {
        match &self.kind {
            ResourceKind::Port { protocol, port, .. } => format!("{protocol} {port}"),
            ResourceKind::File(path) | ResourceKind::Socket(path) => path.display().to_string(),
            ResourceKind::Tap(name) => format!("tap {name}"),
            ResourceKind::Device(name) => format!("device {name}"),
            ResourceKind::Cid(number) => format!("vsock {number}"),
        }
    }

    /// Reports whether only one of the two resources can be used at a time.
    pub fn clashes(&self, other: &Resource) -> bool {
        match (&self.kind, &other.kind) {
            (ResourceKind::Port { address: one, .. }, ResourceKind::Port { address: other_one, .. }) => {
                let overlap = one.is_empty() || other_one.is_empty() || one == other_one;
                overlap && self.key() == other.key()
            }
            (one, other) => one == other,
        }
    }

    /// Returns the path of a file that QEMU writes.
    pub fn file(&self) -> Option<&Path> {
        if let ResourceKind::File(path) = &self.kind {
            Some(path.as_path()).filter(|path| !is_device(path))
        } else {
            None
        }
    }

    /// Returns the path of a device that QEMU writes to, such as a serial port.
    pub fn device(&self) -> Option<&Path> {
        if let ResourceKind::File(path) = &self.kind {
            Some(path.as_path()).filter(|path| is_device(path))
        } else {
            None
        }
    }

    /// Returns the path of a socket that QEMU makes.
    pub fn socket(&self) -> Option<&Path> {
        if let ResourceKind::Socket(path) = &self.kind { Some(path) } else { None }
    }

    /// Returns the protocol, in capitals, and the number of a port that QEMU listens on.
    pub fn port(&self) -> Option<(&'static str, u16)> {
        if let ResourceKind::Port { protocol, port, .. } = &self.kind {
            Some((protocol, *port))
        } else {
            None
        }
    }
}

fn is_device(path: &Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// A search through a machine's arguments.
struct ResourceFinder<'a> {
    files: &'a MachineFiles,
    /// The current argument.
    argument: String,
    resources: Vec<Resource>,
}

impl ResourceFinder<'_> {
    fn option(&mut self, name: &str, value: &str) {
        self.argument = format!("-{name} {value}");
        match name {
            "vnc" => self.vnc(&Options::parse(value, "vnc")),
            "display" => {
                let options = Options::parse(value, "type");
                options.get("vnc").into_iter().for_each(|vnc| self.vnc(&Options::parse(vnc, "vnc")));
            }
            "spice" => self.spice(&Options::parse(value, "")),
            "netdev" | "nic" | "net" => self.network(&Options::parse(value, "type")),
            "chardev" => self.chardev(&Options::parse(value, "backend")),
            "serial" | "parallel" | "debugcon" => self.character(value, false),
            "gdb" => self.character(value, true),
            "s" => {
                "-s".clone_into(&mut self.argument);
                self.port("TCP", "", Some(GDB));
            }
            "device" => self.device(&Options::parse(value, "driver")),
            "object" => {
                let options = Options::parse(value, "qom-type");
                if options.get("qom-type") == Some("filter-dump") {
                    self.path(options.get("file"));
                }
            }
            "pidfile" | "D" => self.path(Some(value)),
            _ => {}
        }
    }

    fn add(&mut self, kind: ResourceKind) {
        self.resources.push(Resource { kind, argument: self.argument.clone() });
    }

    /// Adds a port. Port 0 claims nothing: the kernel chooses a free port.
    fn port(&mut self, protocol: &'static str, address: &str, port: Option<u16>) {
        let Some(port) = port.filter(|port| *port != 0) else { return };
        let address = match address.trim_start_matches('[').trim_end_matches(']') {
            "0.0.0.0" | "::" | "*" => "",
            "localhost" => "127.0.0.1",
            other => other,
        };
        self.add(ResourceKind::Port { protocol, address: address.to_owned(), port });
    }

    /// Adds the port of `address:port`.
    fn endpoint(&mut self, protocol: &'static str, endpoint: &str) {
        let (address, port) = endpoint.rsplit_once(':').unwrap_or(("", endpoint));
        self.port(protocol, address, port.parse().ok());
    }

    fn path(&mut self, path: Option<&str>) {
        let Some(path) = path.filter(|path| !path.is_empty()) else { return };
        // QEMUs can share these, or each gets its own.
        let harmless = ["/dev/null", "/dev/zero", "/dev/std", "/dev/fd", "/dev/pts", "/proc/self"];
        if !harmless.iter().any(|start| path.starts_with(start)) {
            self.add(ResourceKind::File(self.files.folder().join(path)));
        }
    }

    fn socket(&mut self, path: Option<&str>) {
        let Some(path) = path.filter(|path| !path.is_empty()) else { return };
        self.add(ResourceKind::Socket(self.files.folder().join(path)));
    }

    fn vnc(&mut self, options: &Options) {
        let Some(display) = options.get("vnc").filter(|display| *display != "none") else { return };
        if let Some(path) = display.strip_prefix("unix:") {
            return self.socket(Some(path));
        }
        // A server with `to` looks for any free port, and a reverse connection to a viewer opens none.
        if options.has("to") || options.is_on("reverse") {
            return;
        }
        let (address, display) = display.rsplit_once(':').unwrap_or(("", display));
        let Ok(display) = display.parse::<u16>() else { return };
        self.port("TCP", address, VNC.checked_add(display));
        let own = options.get("websocket").and_then(|port| port.parse().ok());
        if own.is_some() {
            self.port("TCP", address, own);
        } else if options.is_on("websocket") {
            self.port("TCP", address, 5700_u16.checked_add(display));
        }
    }

    fn spice(&mut self, options: &Options) {
        let address = options.get("addr").unwrap_or_default();
        if options.is_on("unix") {
            return self.socket(Some(address));
        }
        for key in ["port", "tls-port"] {
            self.port("TCP", address, options.get(key).and_then(|port| port.parse().ok()));
        }
    }

    fn network(&mut self, options: &Options) {
        if let Some(tap) = options.get("ifname").filter(|_| options.get("type") == Some("tap")) {
            self.add(ResourceKind::Tap(tap.to_owned()));
        }
        options.all("hostfwd").into_iter().for_each(|rule| self.forward(rule));
        match options.get("type") {
            Some("socket") => {
                options.get("listen").into_iter().for_each(|endpoint| self.endpoint("TCP", endpoint));
                options.get("localaddr").into_iter().for_each(|endpoint| self.endpoint("UDP", endpoint));
            }
            Some("stream") if options.is_on("server") => {
                self.socket(options.get("addr.path"));
                let address = options.get("addr.host").unwrap_or_default();
                self.port("TCP", address, options.get("addr.port").and_then(|port| port.parse().ok()));
            }
            _ => {}
        }
    }

    /// Adds the port of a rule `[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport`.
    fn forward(&mut self, rule: &str) {
        let Some((host, _)) = rule.split_once('-') else { return };
        let (protocol, endpoint) = host.split_once(':').unwrap_or(("tcp", host));
        self.endpoint(if protocol == "udp" { "UDP" } else { "TCP" }, endpoint);
    }

    fn chardev(&mut self, options: &Options) {
        self.path(options.get("logfile"));
        match options.get("backend") {
            Some("socket") if options.is_on("server") => {
                let port = options.get("port").and_then(|port| port.parse().ok());
                self.port("TCP", options.get("host").unwrap_or_default(), port);
                self.socket(options.get("path"));
            }
            Some("udp") => {
                let port = options.get("localport").and_then(|port| port.parse().ok());
                self.port("UDP", options.get("localaddr").unwrap_or_default(), port);
            }
            Some("file" | "pipe" | "serial" | "tty" | "parallel" | "parport") => {
                self.path(options.get("path"));
            }
            _ => {}
        }
    }

    /// Reads the old spelling, as of `-serial`. `is_server` is set for a debugger's device, which always
    /// listens.
    fn character(&mut self, value: &str, is_server: bool) {
        let options = Options::parse(value.strip_prefix("mon:").unwrap_or(value), "backend");
        let backend = options.get("backend").unwrap_or_default();
        let is_server = is_server || options.is_on("server");
        match backend.split_once(':') {
            Some(("tcp" | "telnet" | "tn3270" | "websocket", endpoint)) if is_server => {
                self.endpoint("TCP", endpoint);
            }
            Some(("unix", path)) if is_server => self.socket(Some(path)),
            Some(("file" | "pipe", path)) => self.path(Some(path)),
            _ if backend.starts_with("/dev/") => self.path(Some(backend)),
            _ => {}
        }
    }

    fn device(&mut self, options: &Options) {
        let driver = options.get("driver").unwrap_or_default();
        let keys: &[&str] = match driver {
            _ if driver.starts_with("vfio-pci") => &["host", "sysfsdev"],
            "usb-host" => &["hostbus", "hostaddr", "hostport", "vendorid", "productid"],
            _ => &[],
        };
        let named = keys.iter().filter_map(|key| Some(format!("{key}={}", options.get(key)?)));
        let named: Vec<String> = named.collect();
        if !named.is_empty() {
            self.add(ResourceKind::Device(named.join(",")));
        }
        if driver.starts_with("vhost-vsock") {
            options.get("guest-cid").into_iter().for_each(|cid| self.add(ResourceKind::Cid(cid.to_owned())));
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::tests::{isolated_machine_in, machine_in};
    use crate::machineinfo::StartArgs;

    /// Returns the claims of these arguments.
    pub fn claimed(args: &[&str]) -> Vec<Resource> {
        let folder = tempfile::tempdir().unwrap();
        let start_args = StartArgs::from_args(args.iter().map(|&arg| arg.to_owned()));
        let files = machine_in(folder.path());
        Resource::of(&MachineFiles { start_args, machineinfo: "/vms/m/machineinfo.json".into(), ..files })
    }

    fn keys(args: &[&str]) -> Vec<String> {
        claimed(args).iter().map(Resource::key).collect()
    }

    #[test]
    fn resources_are_found_in_each_spelling() {
        for (args, expected) in [
            (&["-vnc", "127.0.0.1:1"][..], &["TCP 5901"][..]),
            (&["-vnc", ":2,websocket=5800,password=on"], &["TCP 5902", "TCP 5800"]),
            (&["-vnc", "unix:/run/vnc"], &["/run/vnc"]),
            (&["-display", "vnc=:3"], &["TCP 5903"]),
            (&["-spice", "port=5930,tls-port=5931,addr=127.0.0.1"], &["TCP 5930", "TCP 5931"]),
            (&["-spice", "unix=on,addr=/run/spice"], &["/run/spice"]),
            (&["-netdev", "tap,id=n,ifname=tap0,script=no"], &["tap tap0"]),
            (
                &["-nic", "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-10.0.2.15:53"],
                &["TCP 2222", "UDP 53"],
            ),
            (&["-netdev", r#"{"type":"user","id":"n","hostfwd":[{"str":"tcp::80-:80"}]}"#], &["TCP 80"]),
            (&["-netdev", "socket,id=n,listen=:4000"], &["TCP 4000"]),
            (&["-chardev", "socket,id=c,port=4001,host=0.0.0.0,server=on,wait=off"], &["TCP 4001"]),
            (&["-chardev", "socket,id=c,path=/run/c,server,nowait"], &["/run/c"]),
            (&["-chardev", "file,id=c,path=serial.log"], &["/vms/m/serial.log"]),
            (&["-serial", "tcp:127.0.0.1:4002,server,nowait"], &["TCP 4002"]),
            (&["-serial", "mon:unix:/run/s,server=on"], &["/run/s"]),
            (&["-serial", "file:/var/log/s.log"], &["/var/log/s.log"]),
            (&["-gdb", "tcp::1235"], &["TCP 1235"]),
            (&["-s"], &["TCP 1234"]),
            (&["-device", "vfio-pci,host=01:00.0"], &["device host=01:00.0"]),
            (&["-device", "vhost-vsock-pci,guest-cid=3"], &["vsock 3"]),
            (&["-object", "filter-dump,id=d,netdev=n,file=/d/x.pcap"], &["/d/x.pcap"]),
            (&["-pidfile", "/run/q.pid"], &["/run/q.pid"]),
        ] {
            assert_eq!(keys(args), expected, "{args:?}");
        }
    }

    #[test]
    fn ports_and_taps_of_an_isolated_machine_are_contested_by_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let args = ["-vnc", ":1", "-netdev", "tap,id=n,ifname=tap0", "-serial", "file:/d/serial.log"];
        let start_args = StartArgs::from_args(args.map(str::to_owned));
        let isolated =
            MachineFiles { start_args: start_args.clone(), ..isolated_machine_in(folder.path(), "m") };
        let contested =
            |files: &MachineFiles| Resource::contested(files).iter().map(Resource::key).collect::<Vec<_>>();
        assert_eq!(contested(&isolated), ["/d/serial.log"]);
        let operator = MachineFiles { isolation: None, ..isolated };
        assert_eq!(contested(&operator), ["TCP 5901", "tap tap0", "/d/serial.log"]);
    }

    #[test]
    fn resources_are_none_when_each_qemu_gets_its_own() {
        for args in [
            ["-vnc", "none"],
            ["-vnc", ":1,to=9"],
            ["-vnc", "viewer:5500,reverse=on"],
            ["-netdev", "user,id=n,hostfwd=tcp::0-:22"],
            ["-netdev", "tap,id=n"],
            ["-netdev", "bridge,id=n,br=br0"],
            ["-chardev", "socket,id=c,port=1,host=h"],
            ["-chardev", "pty,id=c"],
            ["-serial", "file:/dev/null"],
            ["-serial", "tcp:h:1"],
            ["-serial", "stdio"],
            ["-device", "rtl8139,netdev=n"],
        ] {
            assert_eq!(keys(&args), Vec::<String>::new(), "{args:?}");
        }
    }

    #[test]
    fn ports_clash_when_their_addresses_overlap() {
        let clash =
            |one: &str, other: &str| claimed(&["-vnc", one])[0].clashes(&claimed(&["-vnc", other])[0]);
        assert!(clash("127.0.0.1:1", "localhost:1"));
        assert!(clash(":1", "127.0.0.1:1"));
        assert!(clash("0.0.0.0:1", "10.0.0.1:1"));
        assert!(!clash("127.0.0.1:1", "127.0.0.2:1"));
        assert!(!clash("127.0.0.1:1", "127.0.0.1:2"));
        let forward = claimed(&["-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:5901-:80"]);
        assert!(forward[0].clashes(&claimed(&["-vnc", ":1"])[0]));
        assert_eq!(forward[0].to_string().split(" (").next(), Some("the TCP port 127.0.0.1:5901"));
    }
}
