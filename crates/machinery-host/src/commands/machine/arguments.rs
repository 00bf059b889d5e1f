//! QEMU's arguments for a new machine.
//!
//! | | Windows | Linux |
//! | --- | --- | --- |
//! | disk | `ide-hd` on the AHCI controller | `virtio-blk-pci` |
//! | network card | `e1000` | `virtio-net-pci` |
//! | pointer | `usb-tablet` | `usb-tablet` |
//! | sound | `intel-hda`, unless it is left out | – |
//! | clock | local time | UTC |
//!
//! The machine type has a version, so that a snapshot is not lost when QEMU is upgraded. Each restore gets another
//! generation id, by which Windows and Linux renew their random numbers. Sources: VMCloak's `vmcloak/platforms/qemu.py`,
//! QEMU's docs/specs/vmgenid.rst.

use std::fs;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

use super::description::CARD_OF_WINDOWS;
use super::isolation::BRIDGE;
use super::options::{Accel, Create, Platform};

/// The placeholder for the path of the disk's overlay.
const DISK: &str = "%DISPOSABLE_DISK_PATH%";

/// The placeholder for the socket of a run's own TPM.
const TPM_SOCKET: &str = "%TPM_SOCKET_PATH%";

/// The name of the TPM's state in the machine's folder, which a cold boot starts from.
pub const TPM_STATE: &str = "tpm.state";

/// The interface of a machine with user networking.
pub const LOOPBACK: &str = "lo";

/// The name of the firmware's variables in the machine's folder.
pub const FIRMWARE_VARIABLES: &str = "efivars.fd";

/// The firmware for UEFI and its variables, by distribution.
const FIRMWARE: [(&str, &str); 4] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];

/// Returns the arguments of a machine with this network card. `version` is QEMU's.
///
/// # Errors
/// The file of further arguments cannot be read, or the firmware is not installed.
pub fn arguments(create: &Create, version: &str, mac: &str, accel: Accel) -> Result<Vec<String>> {
    let mut args = Vec::new();
    let mut add = |option: &str, value: &str| args.extend([option.to_owned(), value.to_owned()]);
    add("-machine", &format!("{},accel={}", machine_type(version), accelerator(accel)));
    if accel == Accel::Kvm {
        add("-cpu", "host");
    }
    add("-smp", &create.cpus.to_string());
    add("-m", &create.ram.to_string());
    add("-overcommit", "mem-lock=off");
    add("-vga", "std");
    add("-display", "none");
    add("-netdev", &netdev(create)?);
    add("-drive", &format!("file={DISK},format=qcow2,if=none,id=disk"));
    let devices = match create.platform {
        Platform::Windows => {
            add("-rtc", "base=localtime,driftfix=slew");
            let card = format!("e1000,netdev=net0,mac={mac},bus=pcie.0,addr=3");
            vec!["ide-hd,bus=ide.0,drive=disk,bootindex=1".to_owned(), card]
        }
        Platform::Linux => {
            add("-rtc", "base=utc,driftfix=slew");
            let card = format!("virtio-net-pci,netdev=net0,mac={mac},bus=pcie.0,addr=3");
            vec!["virtio-blk-pci,drive=disk,bootindex=1,bus=pcie.0,addr=4".to_owned(), card]
        }
    };
    let pointer = ["usb-ehci,id=ehci", "usb-tablet,bus=ehci.0"].map(str::to_owned);
    for device in devices.into_iter().chain(pointer) {
        add("-device", &device);
    }
    if create.platform == Platform::Windows && !create.no_sound {
        add("-device", "intel-hda");
        add("-device", "hda-duplex");
    }
    add("-device", "vmgenid,guid=auto");
    if create.uefi {
        let (code, _) = firmware()?;
        add("-drive", &format!("if=pflash,format=raw,unit=0,readonly=on,file={code}"));
        add("-drive", &format!("if=pflash,format=raw,unit=1,file={FIRMWARE_VARIABLES}"));
    }
    if create.tpm {
        add("-chardev", &format!("socket,id=tpm,path={TPM_SOCKET}"));
        add("-tpmdev", "emulator,id=tpm0,chardev=tpm");
        add("-device", "tpm-crb,tpmdev=tpm0");
    }
    args.insert(0, "-nodefaults".to_owned());
    if let Some(file) = &create.args {
        args.extend(further(file)?);
    }
    Ok(args)
}

/// Returns the arguments that a domain of libvirt has besides its description: user networking, of which libvirt forwards
/// no port, and further ones.
///
/// # Errors
/// As [`arguments`].
pub fn domain_arguments(create: &Create, mac: &str) -> Result<Vec<String>> {
    let mut args = Vec::new();
    if let Some(ip) = create.ip.filter(|_| create.network.user) {
        let card = if create.platform == Platform::Windows { CARD_OF_WINDOWS } else { "virtio-net-pci" };
        // libvirt gives this slot to no device by itself.
        let card = format!("{card},netdev=net0,mac={mac},bus=pcie.0,addr=0x10");
        args.extend(["-netdev".to_owned(), user_netdev(ip, create.agent_port)?, "-device".to_owned(), card]);
    }
    if let Some(file) = &create.args {
        args.extend(further(file)?);
    }
    Ok(args)
}

/// Returns the files that belong into the machine's folder, with their names there.
///
/// # Errors
/// A file has no name or the name of another one, or the firmware is not installed.
pub fn files(create: &Create, reserved: &[&str]) -> Result<Vec<(PathBuf, String)>> {
    let mut files: Vec<(PathBuf, String)> = Vec::new();
    if create.uefi {
        files.push((firmware()?.1.into(), FIRMWARE_VARIABLES.to_owned()));
    }
    for file in &create.files {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let is_taken = reserved.contains(&name.as_str()) || files.iter().any(|(_, other)| *other == name);
        if name.is_empty() || name.starts_with('.') || is_taken || !file.is_file() {
            let reason = format!("--file {} is no file with a name of its own", file.display());
            return Err(Error::configuration(reason).advice("Name an existing file, under another name"));
        }
        files.push((file.clone(), name));
    }
    Ok(files)
}

/// Returns the type of the machine with QEMU's version, as in `pc-q35-7.2`.
fn machine_type(version: &str) -> String {
    let numbers = version.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    match numbers.take(2).collect::<Vec<_>>()[..] {
        [major, minor] => format!("pc-q35-{major}.{minor}"),
        _ => "q35".to_owned(),
    }
}

fn accelerator(accel: Accel) -> &'static str {
    match accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    }
}

fn netdev(create: &Create) -> Result<String> {
    match (&create.network.bridge, create.ip.filter(|_| create.network.user)) {
        (Some(bridge), _) => bridge_netdev(bridge),
        (None, Some(ip)) => user_netdev(ip, create.agent_port),
        (None, None) => bridge_netdev(BRIDGE),
    }
}

/// Returns the network of a machine on this bridge.
///
/// # Errors
/// The name cannot be that of a bridge.
pub fn bridge_netdev(bridge: &str) -> Result<String> {
    if bridge.contains(',') {
        return Err(Error::configuration(format!("'{bridge}' is no name of a bridge")));
    }
    Ok(format!("bridge,id=net0,br={bridge}"))
}

/// Returns the network of a machine that is connected to nothing but its agent's port.
///
/// # Errors
/// As [`forward`].
pub fn user_netdev(ip: IpAddr, port: u16) -> Result<String> {
    Ok(format!("user,id=net0,restrict=on,hostfwd={}", forward(ip, port)?))
}

/// Returns the forwarding of the agent's port, for user networking.
///
/// # Errors
/// The address is not one that only this host can reach.
fn forward(ip: IpAddr, port: u16) -> Result<String> {
    match ip {
        IpAddr::V4(ip) if ip.is_loopback() => Ok(format!("tcp:{ip}:{port}-:{port}")),
        _ => Err(Error::configuration(format!(
            "{ip} is not a loopback address, and --user forwards the agent's port to one"
        ))
        .advice("Give an address such as 127.0.1.1, or --bridge")),
    }
}

fn firmware() -> Result<(&'static str, &'static str)> {
    let found = FIRMWARE
        .into_iter()
        .find(|(code, variables)| Path::new(code).exists() && Path::new(variables).exists());
    found.ok_or_else(|| {
        Error::environment("the firmware for UEFI is not installed")
            .advice("Install it (Debian's package ovmf)")
    })
}

/// Reads the further arguments: in each line an option and its value. A line that begins with `#` is a comment.
fn further(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).map_err(|error| Error::io("read the arguments in", path, &error))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut args = Vec::new();
    for line in lines {
        if !line.starts_with('-') {
            let reason = format!("{}: '{line}' does not begin with an option of QEMU", path.display());
            return Err(Error::configuration(reason)
                .advice("Write an option and its value in each line, as in `-boot menu=on`"));
        }
        let (option, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        args.push(option.to_owned());
        args.extend(Some(value.trim()).filter(|value| !value.is_empty()).map(str::to_owned));
    }
    Ok(args)
}

/// Returns whether this user can run guests by KVM.
pub fn accel(wanted: Option<Accel>) -> Accel {
    let has_kvm = || fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    wanted.unwrap_or_else(|| if has_kvm() { Accel::Kvm } else { Accel::Tcg })
}

/// Returns a random address of a network card, in QEMU's range.
///
/// # Errors
/// The kernel has no random numbers.
pub fn random_mac() -> Result<String> {
    let (mut bytes, source) = ([0; 3], Path::new("/dev/urandom"));
    let filled = fs::File::open(source).and_then(|mut file| file.read_exact(&mut bytes));
    filled.map_err(|error| Error::io("read", source, &error))?;
    Ok(format!("52:54:00:{:02x}:{:02x}:{:02x}", bytes[0], bytes[1], bytes[2]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(words: &[&str]) -> Create {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            create: Create,
        }
        let given = ["create", "m", "--disk", "/d/base.qcow2"].iter().chain(words);
        <Command as clap::Parser>::try_parse_from(given).unwrap().create
    }

    fn value<'a>(args: &'a [String], option: &str) -> Vec<&'a str> {
        args.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn arguments_are_those_of_the_platform() {
        let windows = create(&["--ip", "10.0.0.9", "--bridge", "br7", "--ram", "2G"]);
        let args = arguments(&windows, "QEMU 7.2.22", "52:54:00:00:00:01", Accel::Kvm).unwrap();
        assert_eq!(value(&args, "-machine"), ["pc-q35-7.2,accel=kvm"]);
        assert_eq!(
            (value(&args, "-m"), value(&args, "-netdev")),
            (vec!["2048"], vec!["bridge,id=net0,br=br7"])
        );
        let devices = value(&args, "-device").join(" ");
        assert!(
            devices.contains("e1000,") && devices.contains("hda-duplex") && devices.contains("vmgenid,"),
            "{devices}"
        );
        let isolated = create(&["--ip", "10.0.0.9", "--isolated", "--platform", "linux"]);
        let args = arguments(&isolated, "QEMU 7.2.22", "52:54:00:00:00:01", Accel::Kvm).unwrap();
        assert_eq!(value(&args, "-netdev"), ["bridge,id=net0,br=br0"]);
        let linux = create(&["--ip", "127.0.3.4", "--user", "--platform", "linux", "--os-version", "12"]);
        let args = arguments(&linux, "QEMU 10.0.8", "52:54:00:00:00:01", Accel::Tcg).unwrap();
        assert_eq!(value(&args, "-netdev"), ["user,id=net0,restrict=on,hostfwd=tcp:127.0.3.4:8000-:8000"]);
        let devices = value(&args, "-device").join(" ");
        assert!(
            devices.contains("virtio-blk-pci") && !devices.contains("hda") && value(&args, "-cpu").is_empty()
        );
    }

    #[test]
    fn user_network_is_refused_at_an_address_that_others_reach() {
        let create = create(&["--ip", "192.168.1.1", "--user"]);
        let error = arguments(&create, "QEMU 7.2", "m", Accel::Tcg).unwrap_err().to_string();
        assert!(error.contains("loopback"), "{error}");
    }

    #[test]
    fn further_arguments_are_an_option_and_its_value_in_each_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("args");
        fs::write(&path, "# direct boot\n-kernel vmlinuz\n\n-append  console=ttyS0 quiet\n-no-hpet\n")
            .unwrap();
        assert_eq!(
            further(&path).unwrap(),
            ["-kernel", "vmlinuz", "-append", "console=ttyS0 quiet", "-no-hpet"]
        );
        fs::write(&path, "kernel vmlinuz\n").unwrap();
        assert!(further(&path).unwrap_err().to_string().contains("'kernel vmlinuz'"));
    }

    #[test]
    fn file_is_refused_when_its_name_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinuz");
        fs::write(&path, "").unwrap();
        let path = path.to_str().unwrap();
        let with = |files: &[&str]| create(&[&["--ip", "127.0.0.9", "--user", "--file"], files].concat());
        assert_eq!(files(&with(&[path]), &[]).unwrap().len(), 1);
        assert!(files(&with(&[path]), &["vmlinuz"]).is_err());
        assert!(files(&with(&[path, "--file", path]), &[]).is_err());
        assert!(files(&with(&["/none/such"]), &[]).is_err());
    }
}
