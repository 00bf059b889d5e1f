//! The writes of a run that the next run finds, and that no overlay can replace.

use std::fmt;
use std::path::Path;

use super::node::UNREADABLE;
use crate::options::Options;
use crate::tpm;

/// A place that a run writes to and where the next run finds the changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedWrite {
    pub argument: String,
    pub what: String,
}

impl fmt::Display for SharedWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.argument, self.what)
    }
}

/// Describes the writes of an option that the next run would find, except those to images.
pub fn shared_writes_of(name: &str, value: &str) -> Option<String> {
    let options = |implied| Options::parse(value, implied);
    if options("").is_unreadable() {
        return Some(UNREADABLE.to_owned());
    }
    match name {
        "fsdev" | "virtfs" => {
            let options = options("fsdriver");
            let is_clean = options.is_on("readonly") || options.get("fsdriver") == Some("synth");
            (!is_clean).then(|| "shares a folder of this computer for writing".to_owned())
        }
        "tpmdev" => Some(format!(
            "keeps the TPM's state outside of the run; a run's own TPM has path={}",
            tpm::PLACEHOLDER
        )),
        "netdev" | "nic" | "net" if options("type").has("smb") => {
            Some("shares a folder of this computer for writing (smb)".to_owned())
        }
        "device" => shared_writes_of_device(&options("driver")),
        "object" => {
            let options = options("qom-type");
            let is_shared = options.get("qom-type") == Some("memory-backend-file")
                && options.is_on("share")
                && !options.is_on("readonly");
            let path = options.get("mem-path").unwrap_or_default();
            // If the path is a folder, QEMU creates an unnamed file in it.
            (is_shared && !Path::new(path).is_dir()).then(|| format!("writes the guest's memory to {path}"))
        }
        "usbdevice" if value.starts_with("disk:") => {
            Some("writes to an image in an obsolete spelling".to_owned())
        }
        "set" => {
            let key = value.split('=').next().unwrap_or_default();
            let what = key.strip_prefix("drive.").and_then(|key| key.split_once('.'))?.1;
            let opens = ["file", "format", "driver", "readonly", "read-only", "snapshot", "media"];
            opens.iter().any(|key| what.split('.').next() == Some(key)).then(|| "changes a drive".to_owned())
        }
        _ => None,
    }
}

fn shared_writes_of_device(options: &Options) -> Option<String> {
    let driver = options.get("driver").unwrap_or_default();
    let is_served = ["vhost-user-fs", "vhost-user-blk", "vhost-user-scsi", "vhost-scsi", "ivshmem-doorbell"];
    if is_served.iter().any(|name| driver.starts_with(name)) {
        Some("writes to what another process of this computer serves".to_owned())
    } else if driver == "usb-mtp" && options.switch("readonly") == Some(false) {
        Some("shares a folder of this computer for writing".to_owned())
    } else {
        None
    }
}
