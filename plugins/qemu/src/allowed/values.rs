//! Values and keys of options, as QEMU reads them.

use serde_json::Value;

use super::dangers::Danger;
use super::table;
use crate::options::Options;

/// The outcome of a check, with the reason for a refusal.
pub type Checked = Result<(), String>;

/// The class of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Anything.
    Any,
    /// A file that QEMU reads; its place is checked with all files that the arguments open.
    Read,
    /// A file or socket that QEMU makes.
    Write,
    /// A file with an image.
    Image,
    /// A block driver that opens files, or an image format.
    Format,
    /// No script, or QEMU's own.
    NoScript,
    /// The kernel's random numbers.
    Random,
    Accelerator,
    /// Nothing at all.
    Null,
}

/// Block drivers that open files or nothing, and pass requests on; and formats of images. Source: QEMU's
/// qapi/block-core.json (`BlockdevDriver`).
pub const FORMATS: &str = "raw qcow2 file null-co null-aio throttle copy-on-read preallocate compress vdi vpc vhdx parallels bochs cloop dmg";

/// QEMU's own scripts of a tap. Source: `DEFAULT_NETWORK_SCRIPT` in QEMU's net/net.h.
pub const DEFAULT_SCRIPTS: [&str; 2] = ["/etc/qemu-ifup", "/etc/qemu-ifdown"];

/// Returns the reason unless the condition is met.
pub fn expect(is_met: bool, why: &str) -> Checked {
    if is_met { Ok(()) } else { Err(why.to_owned()) }
}

/// Reports whether the list of words has this one.
pub fn has(words: &str, word: &str) -> bool {
    words.split_whitespace().any(|known| known == word)
}

/// Reports whether the text is a single word, which is no path.
pub fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_+.".contains(c))
}

/// Reports whether a value is a number, a size or a switch, which names nothing.
pub fn is_number(value: &Value) -> bool {
    let Some(text) = value.as_str() else {
        return value.is_number() || value.is_boolean() || value.is_null();
    };
    if has("on off auto yes no true false y n", text) {
        return true;
    }
    if let Some(hex) = text.strip_prefix("0x") {
        return !hex.is_empty() && hex.chars().all(|c| c.is_ascii_hexdigit());
    }
    let text = text.strip_prefix('-').unwrap_or(text);
    let text = text.strip_suffix(|c: char| c.is_ascii_alphabetic()).unwrap_or(text);
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.')
}

/// Returns the class of a key if the entry of a list is about it.
fn class_of(entry: &str, key: &str) -> Option<Class> {
    let (name, class) = entry.split_once(':').unwrap_or((entry, ""));
    let name = name.strip_prefix('+').unwrap_or(name);
    let is_about = match name.strip_suffix(".*") {
        Some(above) => key.strip_prefix(above).is_some_and(|rest| rest.starts_with('.')),
        None => name == key && name != "*",
    };
    is_about.then_some(match class {
        "" => Class::Any,
        "read" => Class::Read,
        "write" => Class::Write,
        "image" => Class::Image,
        "format" => Class::Format,
        "no-script" => Class::NoScript,
        "random" => Class::Random,
        "accel" => Class::Accelerator,
        // A class without a meaning accepts nothing.
        _ => Class::Null,
    })
}

/// Returns the class of a key in a list of keys.
pub fn class_in(list: &str, key: &str) -> Option<Class> {
    list.split_whitespace().find_map(|entry| class_of(entry, key))
}

/// Returns the key of a block node without the levels above it, in a list of such keys.
pub fn block_key<'a>(key: &'a str, list: &str) -> &'a str {
    let mut key = key;
    while let Some(below) =
        key.strip_prefix("file.").filter(|_| class_in(list, "filename") == Some(Class::Image))
    {
        key = below;
    }
    key
}

/// Returns the type of a device without its bus: `virtio-net` of `virtio-net-pci-non-transitional`.
pub fn base_type(kind: &str) -> &str {
    let ends = ["-non-transitional", "-transitional", "-pci", "-device"];
    ends.iter().fold(kind, |kind, end| kind.strip_suffix(end).unwrap_or(kind))
}

/// Refuses names of images that are no files. Source: `path_has_protocol` in QEMU's block.c.
pub fn image_name(name: &str) -> Checked {
    let word = name.split(['/', ':']).next().unwrap_or_default();
    let path = match name[word.len()..].strip_prefix(':') {
        Some(path) if word == "file" => path,
        Some(_) if word == "null-co" || word == "null-aio" => return Ok(()),
        Some(_) => return Err(format!("{} (the protocol {word})", Danger::ReadsFiles.describe())),
        None => name,
    };
    let is_device = path.starts_with("/dev/") && !path.starts_with("/dev/shm/");
    expect(!is_device, &format!("{} ({path})", Danger::ReadsFiles.describe()))
}

/// Parses an option's value as QEMU does. QEMU reads JSON only in some options, and in older versions in none: there,
/// a comma within a JSON text would begin another key.
pub fn parse(name: &str, value: &str, implied: &str) -> Result<Options, String> {
    let options = Options::parse(value, implied);
    let is_json = value.starts_with('{');
    if options.is_unreadable() {
        return Err("it is JSON that cannot be checked here; write it with double quotes".to_owned());
    }
    if is_json && !has(table::JSON, name) {
        return Err("it is JSON, which QEMU does not read in this option".to_owned());
    }
    let has_comma = |(key, value): (&str, &Value)| key.contains(',') || value.to_string().contains(',');
    if is_json && name != "blockdev" && options.pairs().any(has_comma) {
        return Err("it is JSON with a comma in a text, which older QEMUs read differently".to_owned());
    }
    Ok(options)
}
