//! The files that a machine's arguments open: images that a run writes to, files that a run only reads, and
//! places that a run writes to and that no overlay can replace.
//!
//! ```text
//! -drive file=/d/x.img,format=raw   ─▶ Image: each run gets an overlay, named in the file's place
//! -cdrom /d/x.iso, -kernel, …       ─▶ ImageFile: part of the identity of a template
//! -fsdev local,path=/d, -tpmdev, …  ─▶ SharedWrite: the next run finds the changes
//! ```
//!
//! Files that QEMU only writes, such as a serial port's log, are none of these. Sources: QEMU's
//! qemu-options.hx, blockdev.c (`drive_new`), block.c (`bdrv_open_inherit`), qapi/block-core.json.
//!
//! | module | content |
//! | --- | --- |
//! | `opened` | reads all arguments |
//! | `node` | the content of one block node, in every spelling |
//! | `edit` | the changes of an argument when an overlay replaces an image |
//! | `files_read`, `shared_writes` | the other options |

mod edit;
mod files_read;
mod node;
mod opened;
mod shared_writes;

pub use node::PLACEHOLDER;
pub use opened::Opened;

#[cfg(test)]
mod tests {
    use machinery_backend::ImageFile;

    use super::*;
    use std::path::Path;

    fn opened(args: &[&str]) -> Opened {
        Opened::by(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>(), Path::new("/vms/m"))
    }

    /// Returns the arguments with the images replaced by overlays `/o/0`, `/o/1`.
    fn overlaid(args: &[&str]) -> Vec<String> {
        let mut new: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        opened(args).with_overlays(&mut new, |n| format!("/o/{n}"));
        new
    }

    fn image(opened: &Opened) -> (&str, Option<&str>) {
        assert_eq!((opened.images.len(), opened.shared.len()), (1, 0), "{opened:?}");
        let source = &opened.images[0].source;
        (source.path.to_str().unwrap(), source.format.as_deref())
    }

    #[test]
    fn capture_that_qemu_writes_is_no_source() {
        let sources = |object| opened(&["-object", object]).sources.len();
        assert_eq!(sources("filter-dump,id=f,netdev=n,file=/d/n.pcap"), 0);
        assert_eq!(sources("secret,id=s,file=/d/key"), 1);
    }

    #[test]
    fn json_that_only_qemu_reads_is_shared_wherever_it_is() {
        for args in [
            ["-blockdev", "{'driver':'qcow2','node-name':'d','file':{'driver':'file','filename':'/d/x'}}"],
            ["-drive", "file=json:{'driver':'qcow2',,'file':{'driver':'file',,'filename':'/d/x'}}"],
            ["-hdb", "json: {'driver':'qcow2','file.filename':'/d/x'}"],
            ["-device", "{'driver':'vhost-user-fs-pci','chardev':'c'}"],
        ] {
            let shared = opened(&args).shared;
            assert!(
                shared.len() == 1 && shared[0].to_string().contains("double quotes"),
                "{args:?}: {shared:?}"
            );
        }
        let padded = opened(&["-hdb", "json: {\"driver\":\"qcow2\",\"file.filename\":\"/d/x\"}"]);
        assert_eq!(padded.images.len(), 1);
    }

    #[test]
    fn disk_is_found_behind_an_option_without_a_value() {
        for flag in ["-async-teardown", "-nodefaults", "-no-kvm-pit-reinjection"] {
            assert_eq!(opened(&[flag, "/d/x.img"]).images.len(), 1, "{flag}");
        }
        assert_eq!(opened(&["-set", "drive.d.media=disk"]).shared.len(), 1);
    }

    #[test]
    fn path_starts_in_qemus_folder_when_it_is_relative() {
        let opened = opened(&["-drive", "file=%DISPOSABLE_DISK_PATH%", "-hdb", "b.qcow2", "-kernel", "./k"]);
        let paths: Vec<&Path> = opened.paths().collect();
        assert_eq!(paths, [Path::new("/vms/m/b.qcow2"), Path::new("/vms/m/./k")]);
    }

    #[test]
    fn image_is_found_and_replaced_in_each_spelling() {
        let json = r#"{"driver":"raw","node-name":"d","file":{"driver":"file","filename":"/d/x,y"}}"#;
        let json_after = r#"{"driver":"qcow2","file":{"driver":"file","filename":"/o/0"},"node-name":"d"}"#;
        for (option, value, format, after) in [
            ("-hda", "/d/x,y", None, "/o/0"),
            ("-pflash", "/d/x,y", None, "/o/0"),
            ("--hdb", "file:/d/x,y", None, "/o/0"),
            ("-mtdblock", "/d/x,y", None, "/o/0"),
            ("-nographic", "/d/x,y", None, "/o/0"),
            ("-drive", "file=/d/x,,y", None, "file=/o/0,driver=qcow2"),
            ("-drive", "file=/d/x,,y,format=raw,id=d", Some("raw"), "id=d,file=/o/0,format=qcow2"),
            ("-drive", "file=/d/x,,y,snapshot=on", None, "file=/o/0,driver=qcow2"),
            ("-drive", "id=d,noreadonly,file=/d/x,,y", None, "id=d,readonly=off,file=/o/0,driver=qcow2"),
            ("-drive", "driver=vmdk,file=file:/d/x,,y", Some("vmdk"), "file=/o/0,driver=qcow2"),
            ("-drive", "file.filename=/d/x,,y,snapshot=off", None, "file.filename=/o/0,driver=qcow2"),
            (
                "-drive",
                r#"file=json:{"driver":"qcow2",,"file":{"filename":"/d/x,,y"}},if=ide"#,
                Some("qcow2"),
                "if=ide,file=/o/0,driver=qcow2",
            ),
            (
                "-drive",
                "driver=file,filename=/d/x,,y,locking=off",
                Some("raw"),
                "file.locking=off,driver=qcow2,file.driver=file,file.filename=/o/0",
            ),
            (
                "-drive",
                "driver=throttle,throttle-group=t,file.driver=qcow2,file.file.filename=/d/x,,y",
                Some("qcow2"),
                "driver=throttle,throttle-group=t,file.file.filename=/o/0,file.driver=qcow2",
            ),
            (
                "-blockdev",
                "qcow2,node-name=d,file.driver=file,file.filename=/d/x,,y",
                Some("qcow2"),
                "node-name=d,file.driver=file,file.filename=/o/0,driver=qcow2",
            ),
            (
                "-blockdev",
                "file,node-name=d,filename=/d/x,,y",
                Some("raw"),
                "node-name=d,driver=qcow2,file.driver=file,file.filename=/o/0",
            ),
            ("-blockdev", json, Some("raw"), json_after),
        ] {
            let args = [option, value];
            assert_eq!(image(&opened(&args)), ("/d/x,y", format), "{value}");
            assert_eq!(overlaid(&args)[1], after, "{value}");
        }
    }

    #[test]
    fn blockdev_is_replaced_together_with_the_node_of_its_format() {
        let file = r#"{"driver":"file","filename":"/d/x","node-name":"s","auto-read-only":true}"#;
        let format = r#"{"node-name":"f","read-only":false,"driver":"raw","file":"s","backing":null}"#;
        // The order of the arguments does not matter.
        for (args, at) in [([file, format], 1), ([format, file], 3)] {
            let args = ["-blockdev", args[0], "-blockdev", args[1]];
            assert_eq!(image(&opened(&args)), ("/d/x", Some("raw")));
            let after = overlaid(&args);
            assert!(after[at].contains(r#""filename":"/o/0""#), "{after:?}");
            assert_eq!(after[4 - at], r#"{"driver":"qcow2","file":"s","node-name":"f","read-only":false}"#);
        }
        let args = ["-blockdev", file, "-blockdev", "raw,file=s,node-name=f,read-only=on"];
        assert_eq!(opened(&args).sources, [ImageFile { path: "/d/x".into(), format: Some("raw".into()) }]);
        assert_eq!(overlaid(&args), args);
    }

    #[test]
    fn arguments_are_untouched_when_a_run_only_reads() {
        for (option, value, source) in [
            ("-cdrom", "/d/x.iso", "/d/x.iso"),
            ("-drive", "file=/d/x,readonly=on,if=pflash,format=raw", "/d/x"),
            // No overlay can have the size, and a file that is only read needs none.
            ("-drive", "file=/d/x,format=raw,size=512,readonly=on", "/d/x"),
            ("-drive", "file=/d/x,media=cdrom", "/d/x"),
            ("-blockdev", "qcow2,node-name=d,read-only=on,file.driver=file,file.filename=/d/x", "/d/x"),
            ("-kernel", "/d/x", "/d/x"),
            ("-bios", "/d/x", "/d/x"),
            ("-fw_cfg", "opt/a,file=/d/x", "/d/x"),
            ("-fw_cfg", "name=opt/a,file=/d/x", "/d/x"),
            ("-smbios", "file=/d/x", "/d/x"),
            ("-option-rom", "/d/x,bootindex=1", "/d/x"),
            ("-device", "virtio-net-pci,romfile=/d/x", "/d/x"),
            ("-device", r#"{"driver":"loader","file":"/d/x"}"#, "/d/x"),
            ("-object", "memory-backend-file,id=m,size=1M,mem-path=/d/x", "/d/x"),
            ("-M", "pc,kernel=/d/x", "/d/x"),
        ] {
            let (args, opened) = ([option, value], opened(&[option, value]));
            let paths: Vec<_> = opened.sources.iter().map(|source| source.path.to_str().unwrap()).collect();
            assert_eq!(paths, [source], "{value}");
            assert_eq!((&opened.images[..], &opened.shared[..]), (&[][..], &[][..]), "{value}");
            assert_eq!(overlaid(&args), args);
        }
        let tables = opened(&["-acpitable", "file=/d/a:/d/b", "-initrd", "/d/c x=1,/d/d"]);
        let paths: Vec<_> = tables.sources.iter().map(|source| source.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/d/a", "/d/b", "/d/c", "/d/d"]);
    }

    #[test]
    fn arguments_open_no_file_when_there_is_no_medium_or_only_output() {
        for args in [
            ["-drive", "if=none,id=cdrom,readonly=on"],
            ["-drive", "driver=null-co,size=1M,if=ide"],
            ["-drive", "file=null-co://,format=raw"],
            ["-drive", "file=fat:/d,format=raw"],
            ["-drive", "file=/dev/sdb,format=raw,readonly=on"],
            ["-drive", "file=nbd://h/x,snapshot=on"],
            ["-cdrom", "/dev/sr0"],
            ["-blockdev", "host_device,filename=/dev/sdb,node-name=d,read-only=on"],
            ["-serial", "file:/d/serial.log"],
            ["-chardev", "file,id=c,path=/d/log"],
            ["-D", "/d/log"],
            ["-fsdev", "local,id=f,path=/d,security_model=none,readonly=on"],
            ["-virtfs", "local,path=/d,mount_tag=t,security_model=none,readonly"],
            ["-object", "rng-random,id=r,filename=/dev/urandom"],
            ["-object", "memory-backend-file,id=m,mem-path=/dev/shm,share=on,size=1M"],
            ["-set", "drive.d.cache=none"],
            ["-netdev", "user,id=n,tftp=/d"],
            ["-device", "usb-mtp,rootdir=/d"],
        ] {
            let opened = opened(&args);
            assert_eq!((&opened.images[..], &opened.shared[..]), (&[][..], &[][..]), "{args:?}");
        }
    }

    #[test]
    fn shared_write_is_named_with_its_argument_when_no_overlay_can_replace_it() {
        for (args, what) in [
            (["-drive", "file=/dev/sdb,format=raw"], "the device /dev/sdb"),
            (["-hda", "/dev/vg/win10"], "the device /dev/vg/win10"),
            (["-drive", "driver=raw,file.driver=host_device,file.filename=/dev/x"], "driver host_device"),
            (["-blockdev", "host_device,filename=/dev/sdb,node-name=d"], "driver host_device"),
            (["-drive", "file=fat:rw:/d,format=raw"], "a folder"),
            (["-drive", "driver=vvfat,dir=/d,rw=on"], "a folder"),
            (["-drive", "file=nbd://h/x"], "protocol nbd"),
            (["-hda", "rbd:pool/x"], "protocol rbd"),
            (["-blockdev", "qcow2,node-name=d,file.driver=https,file.url=x"], "driver https"),
            (["-drive", "file=/d/x,format=raw,offset=512"], "'offset'"),
            (["-drive", "file=/d/x,format=qcow2,backing.driver=raw,backing.file.filename=/y"], "'backing'"),
            (["-drive", "file=/d/x,format=luks,key-secret=s"], "driver luks"),
            (["-fsdev", "local,id=f,path=/d,security_model=none"], "a folder"),
            (["-virtfs", "local,path=/d,mount_tag=t,security_model=none,readonly=off"], "a folder"),
            (["-device", "vhost-user-fs-pci,chardev=c"], "another process"),
            (["-device", r#"{"driver":"usb-mtp","rootdir":"/d","readonly":false}"#], "a folder"),
            (["-tpmdev", "emulator,id=t,chardev=c"], "TPM"),
            (["-object", "memory-backend-file,id=m,mem-path=/d/pmem,share=on,size=1M"], "/d/pmem"),
            (["-netdev", "user,id=n,smb=/d"], "smb"),
            (["-nic", "user,smb=/d"], "smb"),
            (["-usbdevice", "disk:format=raw:/d/x"], "obsolete"),
            (["-set", "drive.d.file=/d/x"], "changes a drive"),
        ] {
            let opened = opened(&args);
            assert_eq!((opened.shared.len(), opened.images.len()), (1, 0), "{args:?}: {opened:?}");
            let text = opened.shared[0].to_string();
            assert!(text.starts_with(&format!("{} {}: ", args[0], args[1])) && text.contains(what), "{text}");
        }
        let file = r#"{"driver":"file","filename":"/d/x","node-name":"s"}"#;
        let based = opened(&["-blockdev", file, "-blockdev", "qcow2,file=s,backing=b,node-name=f"]);
        assert!(based.shared[0].to_string().contains("'backing'") && based.images.is_empty(), "{based:?}");
    }

    #[test]
    fn placeholder_is_known_only_where_an_image_is_named() {
        let file = format!("file={PLACEHOLDER},format=qcow2");
        let json = format!(
            r#"{{"driver":"qcow2","node-name":"d","file":{{"driver":"file","filename":"{PLACEHOLDER}"}}}}"#
        );
        for args in [["-drive", &file], ["-hda", PLACEHOLDER], ["-blockdev", &json]] {
            let opened = opened(&args);
            assert!(opened.has_placeholder && opened.images.is_empty(), "{opened:?}");
        }
        assert!(!opened(&["-name", PLACEHOLDER]).has_placeholder);
    }

    #[test]
    fn image_is_a_shared_write_when_it_is_in_a_file_of_options() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.cfg");
        let shared = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let opened = opened(&["-readconfig", path.to_str().unwrap()]);
            assert_eq!(opened.sources[0].path, path);
            opened.shared.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        };
        let text = shared(
            "[drive \"d\"]\n  file = \"/d/x\"\n  format = \"raw\"\n[tpmdev \"t\"]\n  type = \"emulator\"\n",
        );
        assert!(text.contains("writes to /d/x") && text.contains("TPM") && text.contains("q.cfg"), "{text}");
        assert_eq!(
            shared("[drive \"d\"]\n  file = \"/d/x\"\n  readonly = \"on\"\n[machine]\n  type = \"pc\"\n"),
            ""
        );
    }
}
