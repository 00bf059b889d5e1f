//! The reasons why options, kinds and keys are refused.

/// The reason for a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Danger {
    RunsCode,
    ReadsFiles,
    WritesFiles,
    SharesHost,
    Connects,
    ControlsQemu,
    WeakensJail,
    UsesDesktop,
    LoadsGuest,
    Unlisted,
}

impl Danger {
    /// Describes the danger; the sentence follows the name of the option.
    pub fn describe(self) -> &'static str {
        match self {
            Danger::RunsCode => "it runs a program or code on this computer",
            Danger::ReadsFiles => "it opens files or devices of this computer for the guest",
            Danger::WritesFiles => "it writes a file of its choice on this computer",
            Danger::SharesHost => "it gives the guest a device, folder or memory of this computer",
            Danger::Connects => "it connects to another program or computer",
            Danger::ControlsQemu => "it controls QEMU besides this machinery",
            Danger::WeakensJail => "it changes the confinement of QEMU, or uses a descriptor of the host",
            Danger::UsesDesktop => "it uses the desktop, the terminal or the sound of this computer",
            Danger::LoadsGuest => "it lets code of the guest call into this computer",
            Danger::Unlisted => "it is not in the list of safe options",
        }
    }
}

use Danger::{
    Connects, ControlsQemu, LoadsGuest, ReadsFiles, RunsCode, SharesHost, UsesDesktop, WeakensJail,
    WritesFiles,
};

/// The options that are refused for a known reason.
pub const OPTIONS: &[(&str, Danger)] = &[
    ("plugin tb-plugin L", RunsCode),
    ("D d dfilter trace writeconfig dump-vmstate perfmap jitdump", WritesFiles),
    ("mon monitor qmp qmp-pretty gdb s qtest qtest-log set readconfig incoming preconfig echr", ControlsQemu),
    ("sandbox runas chroot daemonize run-with add-fd elevateprivileges async-teardown", WeakensJail),
    ("fsdev virtfs virtfs_synth tpmdev mem-path xen-domid xen-attach xen-create", SharesHost),
    ("sdl curses spice-app", UsesDesktop),
    ("semihosting semihosting-config", LoadsGuest),
    ("bt vlan redir tftp smb bootp", Connects),
    ("shim", ReadsFiles),
];

/// The kinds that are refused for a known reason; `*` is any end.
pub const KINDS: &[(&str, Danger)] = &[
    (
        "socket stream dgram vhost-user vhost-vdpa l2tpv3 vde netmap af-xdp passt vmnet* udp telnet tcp",
        Connects,
    ),
    ("dbus braille", Connects),
    ("pipe serial tty parallel parport passthrough", SharesHost),
    ("vfio* vhost* ivshmem* usb-host usb-mtp usb-bt* scsi-generic scsi-block virtio-9p* u2f-*", SharesHost),
    (
        "ccid-card-* usb-ccid usb-braille virtio-input-host* virtio-pmem nvdimm tpm-* ipmi-bmc-extern cxl-*",
        SharesHost,
    ),
    ("memory-backend-file memory-backend-epc memory-backend-shm input-linux can-host-*", SharesHost),
    ("loader guest-loader secret secret_keyring tls-creds-* cryptodev-*", ReadsFiles),
    (
        "rng-egd colo-compare filter-mirror filter-redirector filter-replay authz-* pr-manager-helper",
        Connects,
    ),
    (
        "alsa pa pulse pipewire jack oss sdl spice sndio coreaudio dsound wav gtk curses egl-headless",
        UsesDesktop,
    ),
    ("spice-app virtio-vga-gl virtio-gpu-gl* virtio-gpu-rutabaga* virtio-vga-rutabaga", UsesDesktop),
    ("qtest xen", ControlsQemu),
    ("xen-*", SharesHost),
];

/// The keys that are refused for a known reason.
pub const KEYS: &[(&str, Danger)] = &[
    ("script downscript helper smb smbserver guestfwd", RunsCode),
    ("fd fds vhostfd vhostfds sndbuf-fd rrfile rr fdset", WeakensJail),
    (
        "file path mem-path filename data-file tftp x509* tls-creds dumpdtb backing* input-path evdev",
        ReadsFiles,
    ),
    ("logfile", WritesFiles),
    ("host hostbus hostaddr hostport sysfsdev rootdir device dir", SharesHost),
    ("connect listen mcast localaddr reverse remote server addr*", Connects),
];

/// Finds the danger of a name in one of these lists.
pub fn find(list: &[(&str, Danger)], name: &str) -> Danger {
    let is = |pattern: &str| match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    };
    let found = list.iter().find(|(names, _)| names.split(' ').any(is));
    found.map_or(Danger::Unlisted, |(_, danger)| *danger)
}
