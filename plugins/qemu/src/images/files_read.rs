//! The files that QEMU only reads because of an option.

use machinery_backend::ImageFile;

use crate::options::Options;

/// Options that name files which are only read: the option, the key of its first word, and the keys of files.
const READS: [(&str, &str, &[&str]); 15] = [
    ("kernel", "", &[]),
    ("dtb", "", &[]),
    ("bios", "", &[]),
    ("shim", "", &[]),
    ("mem-path", "", &[]),
    ("initrd", "", &[]),
    ("option-rom", "romfile", &["romfile"]),
    ("acpitable", "", &["file", "data"]),
    ("smbios", "", &["file", "path"]),
    ("fw_cfg", "name", &["file"]),
    ("device", "driver", &["romfile", "file", "kernel", "initrd"]),
    ("object", "qom-type", &["file", "mem-path"]),
    ("machine", "type", &["kernel", "initrd", "dtb", "firmware"]),
    ("boot", "order", &["splash"]),
    ("plugin", "file", &["file"]),
];

/// Returns the files that QEMU reads because of an option.
pub fn files_read_by(name: &str, value: &str) -> Vec<ImageFile> {
    let name = if name == "M" { "machine" } else { name };
    let Some((_, implied, keys)) = READS.iter().find(|(option, ..)| *option == name) else {
        return Vec::new();
    };
    if name == "initrd" {
        // The value lists several modules, each with its arguments.
        return value.split(',').filter_map(|module| module.split(' ').next()).map(plain_file).collect();
    }
    if keys.is_empty() {
        return vec![plain_file(value)];
    }
    let options = Options::parse(value, implied);
    if options.get("qom-type") == Some("filter-dump") {
        // QEMU writes this file: a new capture in each run.
        return Vec::new();
    }
    let named = keys.iter().filter_map(|key| options.get(key)).flat_map(|files| match name {
        "acpitable" => files.split(':').collect(),
        _ => vec![files],
    });
    named.filter(|file| !file.is_empty()).map(plain_file).collect()
}

/// Returns a file that holds no image.
pub fn plain_file(path: &str) -> ImageFile {
    ImageFile { path: path.into(), format: Some("raw".to_owned()) }
}
