//! Tests what machines need of this computer, before the first run needs it.
//!
//! QEMU itself tests KVM and bridges, without a guest: it knows the path of its bridge helper and the
//! helper's rights, and it reports why the helper fails. A tap is only searched for, because QEMU runs a
//! script for it and a machine may be using it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use machinery::config::find_interface;
use machinery::{Error, Report, Result};
use rustix::fs::{Access, access};
use rustix::process::geteuid;

use crate::config::MachineFiles;
use crate::options::{Options, escaped};
use crate::tpm;
use crate::version::run;

/// The script that QEMU runs for a tap by default. Source: `DEFAULT_NETWORK_SCRIPT` in QEMU's net/net.h.
const SCRIPT: &str = "/etc/qemu-ifup";

/// Something on this computer that the arguments need.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Kvm,
    /// The value of a `-netdev` that asks QEMU's bridge helper for a tap.
    Bridge(String),
    Tap(String),
    Script(PathBuf),
    Device(&'static str),
    /// The program of a TPM.
    Swtpm,
    /// A device that QEMU can do without, but more slowly.
    OptionalDevice(&'static str),
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Need::Kvm => f.write_str("KVM"),
            Need::Swtpm => f.write_str("swtpm"),
            Need::Bridge(netdev) => write!(f, "-netdev {netdev}"),
            Need::Tap(name) => write!(f, "the tap {name}"),
            Need::Script(path) => write!(f, "the script {} for a tap", path.display()),
            Need::Device(path) | Need::OptionalDevice(path) => f.write_str(path),
        }
    }
}

/// Tests the needs of all machines, each need once.
pub fn check_all<'a>(machines: impl Iterator<Item = &'a MachineFiles>, qemu: &Path, report: &mut Report) {
    let mut needs: BTreeMap<Need, Vec<&str>> = BTreeMap::new();
    for machine in machines {
        for need in of(machine) {
            needs.entry(need).or_default().push(&machine.info.name);
        }
    }
    for (need, machines) in needs {
        let needed_by = machines_that_need(&machines);
        match (need.attempt(qemu), &need) {
            (Ok(()), _) => report.good(format!("qemu: {need} can be used, which {needed_by}")),
            (Err(error), Need::OptionalDevice(_)) => {
                report.warning(format!("qemu: {need} cannot be used, which {needed_by}: {error}"));
            }
            (Err(error), _) => {
                let reason = format!("qemu: {need} cannot be used, which {needed_by}: {error}");
                report.problem(&Error::environment(reason));
            }
        }
    }
}

fn machines_that_need(machines: &[&str]) -> String {
    let shown = machines.iter().take(3).map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
    match machines.len() {
        1 => format!("machine {shown} needs"),
        2 | 3 => format!("machines {shown} need"),
        more => format!("machines {shown} and {} more need", more - 3),
    }
}

/// Returns the needs of the machine.
fn of(machine: &MachineFiles) -> Vec<Need> {
    let mut needs = Vec::new();
    if machine.start_args.wants_kvm() {
        needs.push(Need::Kvm);
    }
    if tpm::socket(machine.start_args.named()).is_some() {
        needs.push(Need::Swtpm);
    }
    for (name, value) in machine.start_args.options() {
        match name {
            "netdev" | "nic" | "net" => needs.extend(of_network(&Options::parse(value, "type"), machine)),
            "device" => needs.extend(of_device(value)),
            _ => {}
        }
    }
    needs
}

fn of_network(options: &Options, machine: &MachineFiles) -> Vec<Need> {
    let kind = options.get("type").unwrap_or_default();
    if machine.isolation.is_some() {
        // The taps are made for each run.
        return vec![Need::Device("/dev/net/tun")];
    }
    let helper = options.get("helper");
    if kind == "bridge" || kind == "tap" && helper.is_some() {
        let keys = ["br", "helper"].map(|key| options.get(key).map(|value| (key, value)));
        let keys = keys.into_iter().flatten().map(|(key, value)| format!(",{key}={}", escaped(value)));
        let netdev = format!("{kind},id=cuckoo-check{}", keys.collect::<String>());
        return vec![Need::Device("/dev/net/tun"), Need::Bridge(netdev)];
    }
    // QEMU does not create a tap that it gets as a descriptor.
    if kind != "tap" || ["fd", "fds"].iter().any(|key| options.has(key)) {
        return Vec::new();
    }
    let mut needs = vec![Need::Device("/dev/net/tun")];
    needs.extend(options.get("ifname").map(|name| Need::Tap(name.to_owned())));
    match options.get("script").unwrap_or(SCRIPT) {
        "no" | "" => {}
        script => needs.push(Need::Script(machine.folder().join(script))),
    }
    if options.is_on("vhost") {
        needs.push(Need::OptionalDevice("/dev/vhost-net"));
    }
    needs
}

fn of_device(value: &str) -> Option<Need> {
    let options = Options::parse(value, "driver");
    let driver = options.get("driver")?;
    let path = match driver {
        _ if driver.starts_with("vhost-vsock") => "/dev/vhost-vsock",
        _ if driver.starts_with("vfio-pci") => "/dev/vfio/vfio",
        _ => return None,
    };
    Some(Need::Device(path))
}

impl Need {
    fn attempt(&self, qemu: &Path) -> Result<()> {
        match self {
            Need::Kvm => {
                let advice = "Enable virtualisation in the firmware, load the module kvm_intel or kvm_amd, and add this \
                              user to the group `kvm`; or remove KVM from start_args";
                try_with_qemu(qemu, &["-accel", "kvm"]).map_err(|error| error.advice(advice))
            }
            Need::Bridge(netdev) => {
                let advice = "Create the bridge, allow it in /etc/qemu/bridge.conf (`allow br0`), and give \
                              qemu-bridge-helper the set-user-ID bit (chmod u+s) where the host does not run as root";
                try_with_qemu(qemu, &["-netdev", netdev]).map_err(|error| error.advice(advice))
            }
            Need::Swtpm => tpm::program().map(drop),
            Need::Tap(_) if geteuid().is_root() => Ok(()),
            Need::Tap(name) => find_interface(name),
            Need::Script(path) => access(path, Access::EXEC_OK).map_err(|error| {
                Error::io("run", path, &error.into()).advice("Write script=no, or put the script there")
            }),
            Need::Device(path) | Need::OptionalDevice(path) => try_open(Path::new(path)),
        }
    }
}

/// Opens a device: its file can exist without a driver behind it.
fn try_open(device: &Path) -> Result<()> {
    let opened = File::options().read(true).write(true).open(device);
    opened.map(drop).map_err(|error: io::Error| {
        Error::io("open", device, &error)
            .advice("Load its kernel module, and check the permissions of the file")
    })
}

/// Starts QEMU with only these arguments. QEMU ends once its machine is set up and described.
fn try_with_qemu(qemu: &Path, args: &[&str]) -> Result<()> {
    let empty = ["-M", "none", "-nodefaults", "-display", "none", "-dump-vmstate", "/dev/null"];
    let output = run(qemu, empty.iter().chain(args))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    Err(Error::environment(if message.is_empty() {
        format!("QEMU ends with {}", output.status)
    } else {
        message
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{isolated_machine_in, machine_in};
    use crate::machineinfo::StartArgs;
    use std::os::unix::net::UnixListener;

    fn needs(args: &[&str]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let start_args = StartArgs::from_args(args.iter().map(|&arg| arg.to_owned()));
        let machine = MachineFiles { start_args, ..machine_in(folder.path()) };
        of(&machine).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn needs_are_found_in_each_spelling() {
        let tun = "/dev/net/tun";
        for (args, expected) in [
            (&["-accel", "kvm"][..], &["KVM"][..]),
            (&["-netdev", "bridge,id=n,br=virbr0"], &[tun, "-netdev bridge,id=cuckoo-check,br=virbr0"]),
            (&["-nic", "bridge,br=br0,model=rtl8139"], &[tun, "-netdev bridge,id=cuckoo-check,br=br0"]),
            (&["-netdev", "tap,id=n,helper=/h"], &[tun, "-netdev tap,id=cuckoo-check,helper=/h"]),
            (&["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no"], &[tun, "the tap tap0"]),
            (
                &["-netdev", "tap,id=n,vhost=on"],
                &[tun, "the script /etc/qemu-ifup for a tap", "/dev/vhost-net"],
            ),
            (&["-device", "vhost-vsock-pci,guest-cid=3"], &["/dev/vhost-vsock"]),
            (&["-chardev", "socket,id=c,path=%TPM_SOCKET_PATH%"], &["swtpm"]),
            (&["-netdev", "tap,id=n,fd=3"], &[]),
            (&["-netdev", "user,id=n", "-device", "rtl8139,netdev=n"], &[]),
        ] {
            assert_eq!(needs(args), expected, "{args:?}");
        }
    }

    #[test]
    fn taps_of_an_isolated_machine_need_only_their_device() {
        let folder = tempfile::tempdir().unwrap();
        let args = ["-netdev", "bridge,id=n,br=none", "-netdev", "tap,id=o"].map(str::to_owned);
        let start_args = StartArgs::from_args(args);
        let machine = MachineFiles { start_args, ..isolated_machine_in(folder.path(), "m") };
        let needs: Vec<String> = of(&machine).iter().map(ToString::to_string).collect();
        assert_eq!(needs, ["/dev/net/tun", "/dev/net/tun"]);
    }

    #[test]
    fn device_is_a_problem_when_nothing_is_behind_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device");
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(path.exists());
        let text = try_open(&path).unwrap_err().to_string();
        assert!(text.contains("No such device"), "{text}");
    }

    #[test]
    fn need_names_the_machines_that_have_it() {
        assert_eq!(machines_that_need(&["a"]), "machine 'a' needs");
        assert_eq!(machines_that_need(&["a", "b"]), "machines 'a', 'b' need");
        assert_eq!(machines_that_need(&["a", "b", "c", "d", "e"]), "machines 'a', 'b', 'c' and 2 more need");
    }
}
