//! The list of safe options: those of VMCloak, and those of common devices. Everything else is refused.
//!
//! A line has the names of options, and the form of their values. For an option with kinds, such as `-device`, each
//! line of [`KINDS`] has the kinds and their keys.
//!
//! | in a list of keys | meaning |
//! | --- | --- |
//! | `key` | any value: no value of this key names something on this computer |
//! | `key:class` | a value of that class: [`Class`](super::values::Class) |
//! | `+key` | the key is needed, and must be on |
//! | `key.*` | each key below this one |
//! | `*` | each other key whose value is a number or a switch |
//!
//! Sources: QEMU's qemu-options.hx, qapi/*.json, and `-device X,help`; VMCloak's `vmcloak/platforms/qemu.py`.

use Form::{
    Character, Display, Drive, Flag, Global, Image, Keys, Kinds, Read, Text, Vnc, Word, Words, Write,
};

/// The form of an option's value.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// There is no value.
    Flag,
    /// Any text: no value names something on this computer.
    Text,
    /// A single word without a `/`.
    Word,
    /// One of these words.
    Words(&'static str),
    /// The key of the first word, and the safe keys.
    Keys(&'static str, &'static str),
    /// Keys that depend on the kind of the thing: [`KINDS`].
    Kinds,
    /// The keys of `-drive`: those of a drive, and those of a block node.
    Drive,
    /// A file with an image.
    Image,
    /// A file that QEMU reads; [`MachineFiles`](crate::config::MachineFiles) checks its place.
    Read,
    /// A file that QEMU writes.
    Write,
    /// A character device in the old spelling, as in `-serial`.
    Character,
    /// `DRIVER.PROPERTY=VALUE`.
    Global,
    Display,
    Vnc,
}

/// The options, and the forms of their values.
pub const OPTIONS: &[(&str, Form)] = &[
    // The machine: type, processor, memory, time, firmware.
    (
        "machine M",
        Keys(
            "type",
            "type accel:accel kernel-irqchip kernel_irqchip memory-backend pflash0 pflash1 sata append firmware:read kernel:read initrd:read dtb:read x-south-bridge smp.* boot.order *",
        ),
    ),
    ("accel", Kinds),
    ("enable-kvm no-kvm no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection", Flag),
    ("no-acpi no-hpet no-fd-bootchk no-reboot nodefaults no-user-config nodefconfig usb S", Flag),
    ("win2k-hack rtc-td-hack localtime mem-prealloc only-migratable one-insn-per-tb singlestep", Flag),
    ("nographic full-screen no-frame no-quit alt-grab ctrl-grab", Flag),
    ("cpu smp m numa uuid name rtc action append watchdog watchdog-action balloon", Text),
    ("overcommit realtime startdate seed msg g compat", Text),
    ("boot", Keys("order", "order once menu splash:read splash-time reboot-timeout strict")),
    ("icount", Keys("shift", "shift align sleep")),
    (
        "smbios",
        Keys(
            "type",
            "type vendor version date release uefi manufacturer product serial uuid sku family asset location sock_pfx part max-speed current-speed processor-family processor-id bank loc_pfx speed value kind instance internal_reference external_reference connector_type port_type",
        ),
    ),
    (
        "acpitable",
        Keys("", "sig rev oem_id oem_table_id oem_rev asl_compiler_id asl_compiler_rev file:read data:read"),
    ),
    ("fw_cfg", Keys("name", "name string")),
    ("option-rom", Keys("romfile", "romfile:read bootindex")),
    ("bios kernel initrd dtb", Read),
    ("global", Global),
    ("vga k soundhw", Word),
    // Images.
    ("hda hdb hdc hdd fda fdb cdrom sd mtdblock pflash", Image),
    ("drive", Drive),
    ("blockdev", Keys("driver", BLOCK)),
    // Devices, and the parts behind them.
    ("device netdev nic net chardev object audiodev tpmdev", Kinds),
    ("audio", Kinds),
    ("usbdevice", Words("tablet mouse keyboard wacom-tablet")),
    ("serial parallel debugcon", Character),
    ("pidfile", Write),
    // The screen.
    ("display", Display),
    ("vnc", Vnc),
    (
        "spice",
        Keys(
            "",
            "port addr ipv4 ipv6 disable-ticketing password password-secret image-compression jpeg-wan-compression zlib-glz-wan-compression streaming-video agent-mouse playback-compression seamless-migration disable-copy-paste disable-agent-file-xfer plaintext-channel",
        ),
    ),
];

/// The options whose value may be JSON. QEMU reads JSON in no other option.
pub const JSON: &str = "blockdev device netdev object";

/// The keys of the kind, for options whose kinds are in [`KINDS`].
pub const KIND_KEYS: &[(&str, &str)] = &[
    ("device", "driver"),
    ("netdev nic net tpmdev", "type"),
    ("chardev", "backend"),
    ("object", "qom-type"),
    ("audiodev audio", "driver"),
    ("accel", "accel"),
];

/// The options, their kinds, and the keys of these.
pub const KINDS: &[(&str, &str, &str)] = &[
    (
        "accel",
        "tcg kvm",
        "thread tb-size split-wx one-insn-per-tb kernel-irqchip kvm-shadow-mem dirty-ring-size notify-vmexit notify-window honor-guest-pat eager-split-size",
    ),
    (
        "netdev nic net",
        "user",
        "id ipv4 ipv6 net host ip6-net ip6-host ipv6-net ipv6-host ipv6-prefix ipv6-prefixlen restrict hostname dhcpstart dns ipv6-dns dnssearch domainname bootfile tftp-server-name hostfwd",
    ),
    ("netdev nic net", "bridge", "id br"),
    (
        "netdev nic net",
        "tap",
        "id ifname br script:no-script downscript:no-script vhost vhostforce queues sndbuf vnet_hdr poll-us",
    ),
    ("netdev nic net", "hubport", "id hubid netdev"),
    ("nic net", "none", ""),
    ("net", "nic", "netdev macaddr model name addr vectors"),
    ("nic", "user bridge tap hubport none", "model mac macaddr addr vectors"),
    ("net", "user bridge tap hubport", "name vlan"),
    (
        "chardev",
        "null vc pty stdio ringbuf file socket spicevmc spiceport qemu-vdagent msmouse",
        "id mux logfile:write logappend",
    ),
    ("chardev", "vc", "width height cols rows"),
    ("chardev", "stdio", "signal"),
    ("chardev", "ringbuf", "size"),
    ("chardev", "file", "path:write append"),
    ("chardev", "socket", "+server wait path:write host port to ipv4 ipv6 nodelay telnet tn3270 websocket"),
    ("chardev", "spicevmc spiceport", "name debug"),
    ("chardev", "qemu-vdagent", "mouse clipboard"),
    ("object", "rng-random", "id filename:random"),
    ("object", "rng-builtin", "id"),
    (
        "object",
        "memory-backend-ram memory-backend-memfd",
        "id size share prealloc merge dump host-nodes policy hugetlb hugetlbsize seal prealloc-threads reserve x-use-canonical-path-for-ramblock-id",
    ),
    (
        "object",
        "iothread",
        "id poll-max-ns poll-grow poll-shrink aio-max-batch thread-pool-min thread-pool-max",
    ),
    ("object", "throttle-group", "id limits.* x-*"),
    ("object", "filter-dump", "id netdev file:write maxlen queue status position insert"),
    ("tpmdev", "emulator", "id chardev"),
    ("audiodev", "none", "id timer-period in.* out.*"),
    ("audio", "none", "model id"),
    ("device", DISKS, DEVICE),
    ("device", NETWORK_CARDS, DEVICE),
    ("device", USB, DEVICE),
    ("device", SOUND, DEVICE),
    ("device", SCREENS, DEVICE),
    ("device", BUSES, DEVICE),
    ("device", OTHERS, DEVICE),
];

// Types of devices. `-pci`, `-device` and the variants of virtio's are left out: `virtio-net` is all of them.
const DISKS: &str = "ide-hd ide-cd ide-drive scsi-hd scsi-cd scsi-disk virtio-blk virtio-scsi nvme nvme-ns nvme-subsys usb-storage floppy isa-fdc lsi lsi53c810 lsi53c895a megasas megasas-gen2 mptsas1068 pvscsi am53c974 dc390 sdhci sd-card piix3-ide piix4-ide isa-ide ich9-ahci ahci";
const NETWORK_CARDS: &str = "rtl8139 e1000 e1000-82540em e1000-82544gc e1000-82545em e1000e igb i82550 i82551 i82557a i82557b i82557c i82558a i82558b i82559a i82559b i82559c i82559er i82562 i82801 pcnet ne2k_pci ne2k_isa tulip vmxnet3 virtio-net usb-net";
const USB: &str = "piix3-usb-uhci piix4-usb-uhci ich9-usb-uhci1 ich9-usb-uhci2 ich9-usb-uhci3 ich9-usb-uhci4 ich9-usb-uhci5 ich9-usb-uhci6 ich9-usb-ehci1 ich9-usb-ehci2 usb-ehci qemu-xhci nec-usb-xhci pci-ohci usb-tablet usb-mouse usb-kbd usb-wacom-tablet usb-hub usb-audio usb-serial usb-redir";
const SOUND: &str = "intel-hda ich9-intel-hda hda-duplex hda-micro hda-output AC97 ES1370 sb16 adlib gus cs4231a virtio-sound";
const SCREENS: &str = "VGA secondary-vga bochs-display ramfb cirrus-vga isa-cirrus-vga isa-vga vmware-svga qxl qxl-vga virtio-vga virtio-gpu";
const BUSES: &str = "pci-bridge pcie-root-port ioh3420 pcie-pci-bridge i82801b11-bridge dmi-to-pci-bridge pxb pxb-pcie x3130-upstream xio3130-downstream intel-iommu amd-iommu virtio-iommu";
const OTHERS: &str = "isa-serial pci-serial pci-serial-2x pci-serial-4x isa-parallel isa-debugcon isa-debug-exit virtio-serial virtconsole virtserialport virtio-balloon virtio-rng virtio-tablet virtio-mouse virtio-keyboard vmgenid vmcoreinfo pvpanic i6300esb ib700 hpet isa-applesmc smbus-eeprom sga vmmouse vmport pc-dimm pc-testdev pci-testdev edu tpm-crb tpm-tis";

/// The keys of devices. Properties with numbers and switches are many, and name nothing on this computer.
pub const DEVICE: &str = "id driver bus addr drive netdev chardev tpmdev audiodev iothread rng memdev display mac serial model ver vendor product vendor_id product_id wwn device_id name guid osk version type policy loadparm werror rerror bios-chs-trans lost_tick_policy speed duplex tx subsys primary-bus rombar romfile:read host_mtu *";

/// The keys of a block node in `-blockdev`; each may also be below `file`.
pub const BLOCK: &str = "driver:format node-name read-only auto-read-only discard detect-zeroes force-share cache.direct cache.no-flush filename:image file:image locking aio aio-max-batch size lazy-refcounts pass-discard-request pass-discard-snapshot pass-discard-other overlap-check overlap-check.* cache-size l2-cache-size l2-cache-entry-size refcount-cache-size cache-clean-interval throttle-group limits.* prealloc-size prealloc-align read-zeroes backing:null";

/// The keys of `-drive`, together with those of `-blockdev`.
pub const DRIVE: &str = "if bus unit index media id format:format driver:format readonly read-only snapshot cache cache.writeback cache.direct cache.no-flush aio werror rerror serial copy-on-read cyls heads secs trans addr boot group bps bps_rd bps_wr bps_max bps_rd_max bps_wr_max iops iops_rd iops_wr iops_max iops_rd_max iops_wr_max iops_size throttling.* stats-intervals.* stats-account-invalid stats-account-failed";
