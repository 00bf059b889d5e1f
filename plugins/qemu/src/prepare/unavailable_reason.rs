//! The reasons why a machine cannot have a template, by its arguments and its QEMU.
//!
//! The RAM of such a machine is not one block of anonymous memory that a file can replace, or a device would
//! write to that file besides the guest.

use serde_json::Value;

use crate::machineinfo::StartArgs;
use crate::version::Version;

/// Options that configure the guest's RAM, and the conflict with a template.
const OPTIONS: [(&str, &str); 4] = [
    ("mem-path", "brings a RAM file of its own"),
    ("mem-prealloc", "touches all of the RAM, which a template leaves alone"),
    ("numa", "splits the RAM into several blocks"),
    ("readconfig", "reads arguments from a file, which may hold anything"),
];

/// Properties of `-machine` that configure the guest's RAM, and the conflict.
const MACHINE: [(&str, &str); 3] = [
    ("memory-backend", "brings a memory backend of its own"),
    ("memory-encryption", "encrypts the RAM"),
    ("confidential-guest-support", "encrypts the RAM"),
];

/// Values of `-overcommit` and `-realtime` that keep all of the RAM in memory.
const LOCKED: [&str; 3] = ["mem-lock=on", "mem-lock=on-fault", "mlock=on"];

/// Returns the reason why a machine cannot have a template; none if it can. Sources: QEMU's migration/ram.c (`x-ignore-shared`, since 4.0),
/// hw/core/machine.c (`memory-backend`, since 5.0), softmmu/physmem.c (`ram_block_discard_range`).
pub fn unavailable_reason(args: &StartArgs, version: Version) -> Option<String> {
    if !version.has_memory_backends() {
        return Some(format!(
            "QEMU {version} cannot map a guest's RAM from a file and load the rest: QEMU 5.0 and newer can"
        ));
    }
    args.options().find_map(|(option, value)| option_reason(option, value, version))
}

fn option_reason(option: &str, value: &str, version: Version) -> Option<String> {
    let reason = |why: &str| Some(format!("its start_args have -{option} {value}, which {why}"));
    if let Some((_, why)) = OPTIONS.iter().find(|(name, _)| *name == option) {
        return Some(format!("its start_args have -{option}, which {why}"));
    }
    match option {
        "machine" | "M" => {
            let key = |part: &str| part.split('=').next().unwrap_or("").trim().to_owned();
            let found = value.split(',').find_map(|part| MACHINE.iter().find(|(name, _)| *name == key(part)));
            found.and_then(|(_, why)| reason(why))
        }
        "object" if kind(value, "qom-type").starts_with("memory-backend-") => {
            reason("brings a memory backend of its own")
        }
        "netdev" if kind(value, "type") == "vhost-user" => reason("shares the RAM with another process"),
        "overcommit" | "realtime" if value.split(',').any(|part| LOCKED.contains(&part.trim())) => {
            reason("keeps all of the RAM in memory, which a template leaves alone")
        }
        "balloon" => device_reason("virtio-balloon", version).and_then(reason),
        "device" => device_reason(&kind(value, "driver"), version).and_then(reason),
        _ => None,
    }
}

fn device_reason(driver: &str, version: Version) -> Option<&'static str> {
    if driver.starts_with("vhost-user") || driver.starts_with("ivshmem") {
        Some("shares the RAM with another process")
    } else if driver.starts_with("vfio") {
        Some("hands the RAM to a device of this computer")
    } else if version.discards_into_files()
        && (driver.contains("balloon") || driver.starts_with("virtio-mem"))
    {
        Some("gives RAM back by punching holes, before QEMU 8.2 also into a template")
    } else {
        None
    }
}

/// Returns the kind of the object that an option describes: the value of the key, or else the first word.
fn kind(value: &str, key: &str) -> String {
    if let Ok(Value::Object(json)) = serde_json::from_str(value) {
        return json.get(key).and_then(Value::as_str).unwrap_or("").to_owned();
    }
    let named = value.split(',').find_map(|part| part.strip_prefix(key)?.strip_prefix('='));
    named.unwrap_or_else(|| value.split(',').next().unwrap_or("")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Version = Version::new(7, 2, 22);
    const NEW: Version = Version::new(10, 0, 2);

    fn why(args: &[&str], version: Version) -> Option<String> {
        let args = ["-drive", "file=%DISPOSABLE_DISK_PATH%"].iter().chain(args).map(|arg| (*arg).to_owned());
        unavailable_reason(&StartArgs::from_args(args), version)
    }

    #[test]
    fn reason_is_none_for_an_ordinary_machine() {
        let args = [
            "-machine",
            "q35,accel=kvm",
            "-m",
            "2G",
            "-device",
            "virtio-net-pci,netdev=n",
            "-netdev",
            "tap,id=n,ifname=tap0",
            "-object",
            "rng-random,id=r",
            "-device",
            "{\"driver\": \"e1000\"}",
            "-name",
            "numa",
        ];
        assert_eq!(why(&args, OLD), None);
        assert_eq!(why(&args, Version::new(5, 0, 0)), None);
        assert!(why(&args, Version::new(4, 2, 1)).unwrap().contains("4.2.1"));
    }

    #[test]
    fn reason_names_the_argument() {
        for args in [
            ["-mem-path", "/dev/hugepages"],
            ["-overcommit", "cpu-pm=on,mem-lock=on"],
            ["--numa", "node"],
            ["-readconfig", "/x"],
            ["-machine", "pc,memory-backend=m"],
            ["-M", "q35,confidential-guest-support=sev0"],
            ["-object", "memory-backend-memfd,id=m,size=1G"],
            ["-object", "{\"qom-type\": \"memory-backend-ram\", \"id\": \"m\"}"],
            ["-object", "id=m,qom-type=memory-backend-file"],
            ["-device", "vfio-pci,host=01:00.0"],
            ["-device", "vhost-user-fs-pci,chardev=c"],
            ["-device", "{\"id\": \"s\", \"driver\": \"ivshmem-plain\"}"],
            ["-netdev", "vhost-user,id=n,chardev=c"],
        ] {
            let reason = why(&args, NEW).unwrap_or_else(|| panic!("{args:?}"));
            assert!(reason.contains(args[0].trim_start_matches('-')), "{reason}");
        }
        assert!(why(&["-mem-prealloc"], NEW).unwrap().contains("-mem-prealloc"));
    }

    #[test]
    fn reason_is_a_balloon_only_when_qemu_is_older() {
        for device in ["virtio-balloon-pci", "virtio-balloon", "virtio-mem-pci,memdev=m"] {
            assert!(why(&["-device", device], OLD).unwrap().contains("holes"), "{device}");
            assert_eq!(why(&["-device", device], NEW), None, "{device}");
        }
    }
}
