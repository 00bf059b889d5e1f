//! The format of an image, by its first bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::MAGIC;

/// The first bytes of image formats other than raw, and their offsets. Sources: the headers in QEMU's
/// block/*.c.
const MAGICS: [(u64, &[u8], &str); 10] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, MAGIC, "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
];

/// The size of the part that QEMU probes, in bytes. Source: `BLOCK_PROBE_BUF_SIZE` in QEMU's
/// include/block/block_int-common.h.
const PROBED: usize = 512;

/// The line by which QEMU detects a VMDK description, which is text. Source: `vmdk_probe` in QEMU's block/vmdk.c.
const VMDK_TEXT: &[u8] = b"version=";

/// Detects the format of an image as QEMU does where no format is stated. Returns `raw` for everything unknown.
///
/// # Errors
/// The file cannot be read.
pub fn probe_format(path: &Path) -> io::Result<&'static str> {
    let file = File::open(path)?;
    let has = |offset: u64, magic: &[u8]| {
        let mut start = vec![0; magic.len()];
        file.read_exact_at(&mut start, offset).is_ok() && start == magic
    };
    if let Some((.., format)) = MAGICS.iter().find(|(offset, magic, _)| has(*offset, magic)) {
        return Ok(format);
    }
    let mut start = [0; PROBED];
    let length = file.read_at(&mut start, 0)?;
    let is_vmdk = start[..length].windows(VMDK_TEXT.len()).any(|part| part == VMDK_TEXT);
    Ok(if is_vmdk { "vmdk" } else { "raw" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_is_detected_by_its_magic_when_none_is_given() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        for format in ["raw", "qcow2", "qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"] {
            let mut make = std::process::Command::new("qemu-img");
            make.args(["create", "-q", "-f", format]).arg(&path);
            assert!(make.arg("8M").status().unwrap().success(), "{format}");
            assert_eq!(probe_format(&path).unwrap(), format);
        }
        let text = "# Disk DescriptorFile\nversion=1\nRW 16 FLAT \"/etc/shadow\" 0\n";
        std::fs::write(&path, text).unwrap();
        assert_eq!(probe_format(&path).unwrap(), "vmdk");
    }
}
