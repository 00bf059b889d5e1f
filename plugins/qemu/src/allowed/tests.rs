use std::path::Path;

use super::*;
use crate::images::Opened;

/// Returns the arguments that QEMU 4.1 and newer gets from VMCloak, in the spelling of VMCloak.
const VMCLOAK: &[&str] = &[
    "-nodefaults",
    "-M",
    "q35",
    "-vga",
    "std",
    "-smp",
    "2",
    "-overcommit",
    "mem-lock=off",
    "-rtc",
    "base=localtime,driftfix=slew",
    "-m",
    "2048",
    "-netdev",
    "type=bridge,br=br0,id=net0",
    "-device",
    "rtl8139,netdev=net0,mac=52:54:00:12:34:56,bus=pcie.0,addr=3",
    "-device",
    "ich9-ahci,id=ahci",
    "-device",
    "ide-hd,bus=ahci.0,unit=0,drive=disk,bootindex=2",
    "-device",
    "ide-cd,bus=ahci.1,unit=0,drive=cdrom,bootindex=1",
    "-device",
    "usb-ehci,id=ehci",
    "-device",
    "usb-tablet,bus=ehci.0",
    "-soundhw",
    "hda",
    "-enable-kvm",
    "-drive",
    "if=none,id=cdrom,readonly=on",
    "-drive",
    "file=%DISPOSABLE_DISK_PATH%,format=qcow2,if=none,id=disk",
    "-display",
    "none",
];

/// The arguments of older versions that differ.
const OLD_VMCLOAK: &[&str] = &[
    "-realtime",
    "mlock=off",
    "--enable-kvm",
    "-device",
    "ide-drive,bus=ahci.0,unit=0,drive=disk,bootindex=2",
    "-device",
    "intel-hda",
    "-device",
    "hda-duplex",
    "-vnc",
    "0.0.0.0:1",
];

fn refused_in(folder: &Path, args: &[&str]) -> Vec<String> {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let area = Area::new(folder, &folder.join("disk.qcow2"));
    refusals(&args, &area).iter().map(ToString::to_string).collect()
}

fn refused(args: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    refused_in(folder.path(), args)
}

#[test]
fn arguments_of_vmcloak_are_safe() {
    assert_eq!(refused(VMCLOAK), [""; 0]);
    assert_eq!(refused(OLD_VMCLOAK), [""; 0]);
}

#[test]
fn common_arguments_are_safe() {
    for args in [
        &["-machine", "pc-q35-7.2,accel=kvm:tcg,usb=off,vmport=off,smm=on,kernel_irqchip=on,hpet=off"][..],
        &[
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "host,+invtsc,hv_relaxed,hv_spinlocks=0x1fff",
            "-smp",
            "4,cores=2",
        ],
        &[
            "-name",
            "guest=win10,debug-threads=on",
            "-uuid",
            "a2c5ab0b-2d3b-4f40-8b5f-5d20ee0dbe9b",
            "-k",
            "en-us",
        ],
        &[
            "-global",
            "ICH9-LPC.disable_s3=1",
            "-global",
            "kvm-pit.lost_tick_policy=discard",
            "-no-user-config",
        ],
        &[
            "-smbios",
            "type=1,manufacturer=Dell Inc.,product=OptiPlex,serial=X",
            "-boot",
            "order=c,menu=on",
            "-usb",
        ],
        &["-usbdevice", "tablet", "-no-reboot", "-balloon", "virtio", "-icount", "shift=auto,sleep=off"],
        &["-netdev", "user,id=n,restrict=on,net=10.0.3.0/24,hostfwd=tcp:127.0.0.1:2222-:22", "-nic", "none"],
        &["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no,vhost=on,vnet_hdr=off"],
        &[
            "-netdev",
            "tap,id=n,ifname=tap0",
            "-net",
            "nic,model=e1000,macaddr=52:54:00:0:0:1",
            "-net",
            "user",
        ],
        &["-nic", "bridge,br=br0,model=rtl8139,mac=52:54:00:0:0:1", "-netdev", "hubport,id=h,hubid=0"],
        &["-netdev", r#"{"type":"user","id":"n","hostfwd":[{"str":"tcp::80-:80"}]}"#],
        &["-blockdev", r#"{"driver":"file","filename":"/d/x,y","node-name":"s","auto-read-only":true}"#],
        &[
            "-blockdev",
            r#"{"node-name":"f","driver":"raw","file":"s","backing":null,"cache":{"direct":true}}"#,
        ],
        &["-blockdev", "qcow2,node-name=d,read-only=on,file.driver=file,file.filename=/d/x"],
        &["-drive", "file=x.raw,format=raw,if=pflash,unit=0,readonly=on", "-drive", "driver=null-co,size=1M"],
        &["-drive", "file.filename=x,cache=none,aio=native,discard=unmap,werror=stop", "-pflash", "vars.fd"],
        &[
            "-cdrom",
            "x.iso",
            "-hdb",
            "file:b.qcow2",
            "-fda",
            "f.img",
            "c.img",
            "-kernel",
            "k",
            "-initrd",
            "i",
        ],
        &["-device", "virtio-net-pci-non-transitional,netdev=n,romfile=,mq=on,vectors=8,host_mtu=1400"],
        &["-device", r#"{"driver":"virtio-blk-pci","drive":"d","bus":"pci.0","addr":"0x4","num-queues":2}"#],
        &[
            "-device",
            "qxl-vga,vgamem_mb=64,ram_size=0x4000000",
            "-device",
            "vmgenid,guid=auto",
            "-vga",
            "qxl",
        ],
        &["-device", "virtio-rng-pci,rng=r", "-object", "rng-random,id=r,filename=/dev/urandom"],
        &["-device", "pcie-root-port,id=p,chassis=1,slot=2,bus=pcie.0", "-device", "e1000e,netdev=n,bus=p"],
        &[
            "-device",
            "nvme,serial=S1,drive=d",
            "-device",
            "scsi-hd,drive=d,vendor=Dell",
            "-device",
            "usb-tablet",
        ],
        &["-object", "iothread,id=t", "-object", "memory-backend-ram,id=m,size=1G", "-numa", "node,memdev=m"],
        &["-audiodev", "none,id=a,out.frequency=44100", "-audio", "none,model=hda", "-nographic"],
        &["-vnc", "127.0.0.1:1,websocket=5700,password=on,to=99", "-display", "vnc=:3,share=ignore"],
        &["-vnc", "unix:vnc.sock", "-spice", "port=5930,addr=127.0.0.1,disable-ticketing=on"],
        &["-serial", "file:serial.log", "-serial", "null", "-serial", "tcp:127.0.0.1:4002,server,nowait"],
        &["-serial", "unix:./s.sock,server=on,wait=off", "-parallel", "none", "-serial", "chardev:c"],
        &["-chardev", "socket,id=c,path=c.sock,server=on,wait=off", "-chardev", "file,id=d,path=/dev/null"],
        &[
            "-chardev",
            "socket,id=c,host=127.0.0.1,port=0,server,nowait",
            "-chardev",
            "spicevmc,id=v,name=vdagent",
        ],
        &[
            "-object",
            "filter-dump,id=f,netdev=n,file=net.pcap",
            "-pidfile",
            "q.pid",
            "-fw_cfg",
            "opt/a,string=b",
        ],
        &[
            "-acpitable",
            "file=slic.bin",
            "-option-rom",
            "x.rom,bootindex=1",
            "-bios",
            "OVMF.fd",
            "-name",
            "-plugin",
        ],
    ] {
        assert_eq!(refused(args), [""; 0], "{args:?}");
    }
}

/// Expects that the argument is refused, and that a second argument after it is still found.
#[track_caller]
fn assert_refused(args: &[&str], why: &str) {
    let said = refused(args);
    assert!(said.len() == 1 && said[0].starts_with(args[0]), "{args:?}: {said:?}");
    assert!(said[0].contains(why), "{why:?} is not the reason of {said:?}");
    let both = refused(&[args, &["-plugin", "/x.so"]].concat());
    assert_eq!(both.len(), 2, "{args:?}: {both:?}");
}

#[test]
fn option_is_refused_when_it_runs_code() {
    for args in [
        ["-plugin", "/tmp/x.so"],
        ["--plugin", "file=/tmp/x.so,arg=1"],
        ["-L", "/tmp"],
        ["-netdev", "tap,id=n,script=/tmp/x.sh"],
        ["-netdev", "tap,id=n,ifname=t,script=no,downscript=./x.sh"],
        ["-netdev", "bridge,id=n,br=br0,helper=/tmp/x.sh"],
        ["-netdev", "type=tap,helper=/tmp/x.sh,id=n"],
        ["-netdev", r#"{"type":"tap","id":"n","script":"/tmp/x.sh"}"#],
        ["-nic", "tap,script=x"],
        ["-net", "user,smb=/"],
        ["-netdev", "user,id=n,smb=/"],
        ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:sh"],
        ["-netdev", "user,id=n,guestfwd=tcp:10.0.2.100:80-tcp:h:1"],
    ] {
        assert_refused(&args, "runs a program or code");
    }
}

#[test]
fn option_is_refused_when_it_writes_a_file() {
    for args in [
        ["-D", "/tmp/x"],
        ["-trace", "file=/tmp/x"],
        ["-dump-vmstate", "/tmp/x"],
        ["-writeconfig", "/tmp/x"],
        ["-dfilter", "0+1"],
        ["-serial", "file:/etc/cron.d/x"],
        ["-serial", "file:../x.log"],
        ["-serial", "file:machineinfo.json"],
        ["-serial", "file:x.log,append=on"],
        ["-serial", "unix:/run/x.sock,server=on"],
        ["-chardev", "file,id=c,path=/root/.bashrc"],
        ["-chardev", "null,id=c,logfile=/etc/x.log"],
        ["-chardev", "socket,id=c,path=disk.qcow2,server=on"],
        ["-object", "filter-dump,id=f,netdev=n,file=/tmp/x.pcap"],
        ["-vnc", "unix:/run/libvirt/x.sock"],
        ["-vnc", ":1,vnc=unix:/run/x.sock"],
        ["-display", "vnc=unix:/run/x.sock"],
        ["-pidfile", "/etc/x.pid"],
    ] {
        assert_refused(&args, "writes a file");
    }
}

#[test]
fn option_is_refused_when_it_opens_files_or_devices() {
    for args in [
        ["-drive", "file=nbd://h/x,format=raw"],
        ["-drive", "file=ssh://h/x,readonly=on"],
        ["-drive", "file=fat:/etc,readonly=on"],
        ["-drive", "file=json:{},format=raw"],
        ["-drive", "file=fd:3"],
        ["-drive", "file=/dev/sda,format=raw,readonly=on"],
        ["-hda", "http://h/x"],
        ["-cdrom", "/dev/sr0"],
        ["-drive", "driver=host_device,file.filename=/dev/sda"],
        ["-drive", "file.driver=nbd,file.host=h"],
        ["-drive", "format=vmdk,file=x"],
        ["-drive", "file=x,format=qcow2,backing.file.filename=/etc/shadow"],
        ["-blockdev", "driver=vvfat,dir=/etc,node-name=d"],
        ["-blockdev", r#"{"driver":"qcow2","file":{"driver":"https","url":"x"}}"#],
        ["-blockdev", r#"{"driver":"qcow2","file":"f","backing":"b"}"#],
        ["-blockdev", r#"{"driver":"qcow2","file":"f","data-file":"b"}"#],
        ["-fw_cfg", "name=opt/a,file=/etc/shadow"],
        ["-fw_cfg", "opt/a,file=/etc/shadow"],
        ["-smbios", "file=/etc/shadow"],
        ["-smbios", "type=11,path=/etc/shadow"],
        ["-global", "rtl8139.romfile=/etc/shadow"],
        ["-device", "loader,file=/etc/shadow"],
        ["-object", "secret,id=s,file=/etc/shadow"],
        ["-object", "rng-random,id=r,filename=/dev/sda"],
        ["-netdev", "user,id=n,tftp=/etc"],
        ["-vnc", ":1,tls-creds=t"],
        ["-vnc", ":1,x509=/etc"],
    ] {
        assert_refused(&args, "opens files or devices");
    }
}

#[test]
fn option_is_refused_when_it_shares_parts_of_the_computer() {
    for args in [
        ["-fsdev", "local,id=f,path=/,security_model=none"],
        ["-virtfs", "local,path=/,mount_tag=t,security_model=none,readonly=on"],
        ["-tpmdev", "passthrough,id=t"],
        ["-mem-path", "/dev/hugepages"],
        ["-device", "vfio-pci,host=01:00.0"],
        ["-device", "usb-host,vendorid=1"],
        ["-device", "usb-mtp,rootdir=/"],
        ["-device", r#"{"driver":"vhost-vsock-pci","guest-cid":3}"#],
        ["-device", "ivshmem-plain,memdev=m"],
        ["-device", "virtio-9p-pci,fsdev=f,mount_tag=t"],
        ["-device", "scsi-generic,drive=d"],
        ["-object", "memory-backend-file,id=m,mem-path=/x,size=1M"],
        ["-object", "input-linux,id=i,evdev=/dev/input/event0"],
        ["-serial", "/dev/ttyS0"],
        ["-serial", "pipe:/tmp/x"],
        ["-chardev", "tty,id=c,path=/dev/ttyS0"],
        ["-chardev", "pipe,id=c,path=/tmp/x"],
    ] {
        assert_refused(&args, "gives the guest a device, folder or memory");
    }
}

#[test]
fn option_is_refused_when_it_connects_elsewhere() {
    for args in [
        ["-netdev", "socket,id=n,connect=h:1"],
        ["-netdev", "vhost-user,id=n,chardev=c"],
        ["-chardev", "socket,id=c,host=h,port=1"],
        ["-chardev", "socket,id=c,path=c.sock,server=off"],
        ["-chardev", "udp,id=c,host=h,port=1"],
        ["-serial", "tcp:h:1"],
        ["-serial", "udp:h:1"],
        ["-serial", "unix:c.sock"],
        ["-vnc", "viewer:5500,reverse=on"],
        ["-object", "rng-egd,id=r,chardev=c"],
    ] {
        assert_refused(&args, "connects to another program");
    }
}

#[test]
fn option_is_refused_when_it_controls_qemu_or_leaves_its_jail() {
    for args in [
        ["-mon", "chardev=c,mode=readline"],
        ["-gdb", "tcp::1234"],
        ["-set", "mon.q.mode=control"],
        ["-readconfig", "/tmp/x"],
        ["-qtest", "unix:x"],
        ["-serial", "mon:stdio"],
        ["-accel", "qtest"],
        ["-serial", "chardev:cuckoo-monitor"],
        ["-device", r#"{"driver":"isa-serial","chardev":"cuckoo\u002dmonitor"}"#],
        ["-chardev", "null,id=cuckoo-monitor"],
    ] {
        assert_refused(&args, "controls QEMU");
    }
    assert_refused(&["-machine", "pc,accel=qtest"], "only kvm and tcg");
    assert_refused(&["-s"], "controls QEMU");
    for args in [
        ["-sandbox", "off"],
        ["-runas", "root"],
        ["-chroot", "/tmp"],
        ["-add-fd", "fd=3,set=1"],
        ["-netdev", "tap,id=n,fd=3"],
        ["-netdev", "tap,id=n,vhost=on,vhostfds=3:4"],
        ["-icount", "shift=1,rr=record,rrfile=/x"],
    ] {
        assert_refused(&args, "confinement");
    }
    for args in [["-display", "gtk"], ["-display", "sdl,gl=on"], ["-audiodev", "pa,id=a"], ["-audio", "alsa"]]
    {
        assert_refused(&args, "the desktop, the terminal or the sound");
    }
    assert_refused(&["-semihosting"], "call into this computer");
}

#[test]
fn option_is_refused_when_it_is_not_in_the_list() {
    for (args, why) in [
        (&["-no-such-option", "x"][..], "not in the list"),
        (&["-device", "no-such-device"], "the driver 'no-such-device' is not in the list"),
        (&["-device", "rtl8139,netdev=n,color=red"], "its key 'color' is not in the list"),
        (&["-device", "id=x"], "its driver is missing"),
        (&["-device", "rtl8139,driver=vfio-pci,host=1"], "driver is given twice"),
        (&["-netdev", "user,id=n,type=tap,script=/x"], "type is given twice"),
        (&["-drive=file=x", "y"], "QEMU knows no option in this spelling"),
        (&["---drive", "y"], "QEMU knows no option in this spelling"),
        (&["-k", "/etc/shadow"], "not a single word"),
        (&["-usbdevice", "disk:/d/x"], "tablet"),
        (&["-global", "driver=rtl8139,property=romfile,value=/x"], "DRIVER.PROPERTY=VALUE"),
    ] {
        assert_refused(args, why);
    }
    // The arguments that the machinery appends are no value of the last option.
    assert!(refused(&["-drive"])[0].contains("value is missing"));
}

#[test]
fn json_is_refused_where_versions_of_qemu_read_it_differently() {
    for args in [
        ["-nic", r#"{"type":"none","x":"a,type=user,smb=/"}"#],
        ["-chardev", r#"{"backend":"null","id":"c"}"#],
        ["-drive", r#"{"id":"a,file=/etc/shadow"}"#],
    ] {
        assert_refused(&args, "JSON, which QEMU does not read in this option");
    }
    assert_refused(&["-device", r#"{"driver":"rtl8139","id":"a,driver=vfio-pci,host=1"}"#], "older QEMUs");
    assert_refused(&["-device", "{'driver':'vfio-pci'}"], "double quotes");
}

#[test]
fn option_is_found_behind_a_value_that_looks_like_one() {
    // For QEMU the first `-name` has the second one as its value, and `/dev/sda` is a disk.
    let said = refused(&["-name", "-name", "/dev/sda"]);
    assert!(said.len() == 1 && said[0].starts_with("/dev/sda"), "{said:?}");
    assert_eq!(refused(&["-name", "-plugin", "-nodefaults"]), [""; 0]);
    let said = refused(&["-nodefaults", "-plugin", "x"]);
    assert!(said.len() == 1 && said[0].starts_with("-plugin x"), "{said:?}");
}

#[test]
fn file_is_among_the_checked_ones_when_an_accepted_key_reads_it() {
    for (args, path) in [
        (["-machine", "pc,firmware=/f"], "/f"),
        (["-machine", "pc,kernel=/f"], "/f"),
        (["-machine", "pc,initrd=/f"], "/f"),
        (["-machine", "pc,dtb=/f"], "/f"),
        (["-boot", "order=c,splash=/f"], "/f"),
        (["-acpitable", "file=/f"], "/f"),
        (["-acpitable", "data=/f"], "/f"),
        (["-option-rom", "/f"], "/f"),
        (["-bios", "/f"], "/f"),
        (["-kernel", "/f"], "/f"),
        (["-initrd", "/f"], "/f"),
        (["-dtb", "/f"], "/f"),
        (["-device", "rtl8139,romfile=/f"], "/f"),
    ] {
        assert_eq!(refused(&args), [""; 0], "{args:?}");
        let opened = Opened::by(&args.map(str::to_owned), Path::new("/"));
        assert_eq!(opened.paths().collect::<Vec<_>>(), [Path::new(path)], "{args:?}");
    }
    let lists = table::KINDS.iter().map(|(.., keys)| *keys).chain(table::OPTIONS.iter().filter_map(
        |(_, form)| {
            if let Form::Keys(_, keys) = form { Some(*keys) } else { None }
        },
    ));
    let read: std::collections::BTreeSet<&str> =
        lists.flat_map(str::split_whitespace).filter(|entry| entry.ends_with(":read")).collect();
    let known = [
        "data:read",
        "dtb:read",
        "file:read",
        "firmware:read",
        "initrd:read",
        "kernel:read",
        "romfile:read",
        "splash:read",
    ];
    assert_eq!(read.into_iter().collect::<Vec<_>>(), known, "a key without a line above");
}

#[test]
fn classes_of_the_table_are_all_known() {
    let lists = table::KINDS.iter().map(|(.., keys)| *keys).chain([table::DRIVE, table::BLOCK]);
    let forms = table::OPTIONS.iter().filter_map(|(_, form)| match form {
        Form::Keys(_, keys) => Some(*keys),
        _ => None,
    });
    for entry in lists.chain(forms).flat_map(str::split_whitespace) {
        let (name, class) = entry.split_once(':').unwrap_or((entry, ""));
        let is_known =
            ["", "read", "write", "image", "format", "no-script", "random", "accel", "null"].contains(&class);
        assert!(is_known && !name.is_empty(), "{entry}");
    }
}
