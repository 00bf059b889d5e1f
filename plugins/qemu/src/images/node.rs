//! The content of a block node: the value of `-drive`, `-blockdev` and the like, down to its file.

use machinery_backend::ImageFile;

use super::edit::Edit;
use crate::options::Options;

/// The placeholder for the path of the disk's overlay. Source: Cuckoo3's `machineries/modules/qemu.py`.
pub const PLACEHOLDER: &str = "%DISPOSABLE_DISK_PATH%";

/// Image formats that an overlay can be based on.
const FORMATS: [&str; 12] =
    ["raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels", "bochs", "cloop", "dmg"];

/// The reason why JSON that only QEMU can read is refused.
pub const UNREADABLE: &str = "is JSON that cannot be checked here; write it with double quotes";

/// Block drivers that pass all requests to the node below them.
const FILTERS: [&str; 4] = ["throttle", "copy-on-read", "preallocate", "compress"];

/// Options that an overlay cannot have: they would apply to the overlay instead of the image.
const UNFIT: [&str; 6] = ["backing", "data-file", "encrypt", "key-secret", "offset", "size"];

/// The content of a block node.
#[derive(Clone)]
pub enum NodeContent {
    /// No medium, or one that keeps nothing.
    Nothing,
    /// The disk's overlay, by the placeholder.
    Placeholder,
    /// In `-blockdev`: the node of that name, in that format unless this node is a filter; and the reason why
    /// an overlay cannot replace it, if there is one.
    Node {
        name: String,
        format: Option<String>,
        unfit: Option<String>,
    },
    File {
        source: ImageFile,
        edits: Vec<Edit>,
    },
    /// A file that no overlay can be based on, and the reason.
    Unfit(ImageFile, String),
    /// Content that no overlay can be based on.
    Other(String),
}

/// The meaning of the text under a node's key `file`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// A file's name.
    Drive,
    /// Another node's name.
    Blockdev,
}

/// Returns the content of the node whose keys begin with `node`.
pub fn content(options: &Options, node: &str, spelling: Spelling) -> NodeContent {
    if options.is_unreadable() {
        return NodeContent::Other(UNREADABLE.to_owned());
    }
    let key = |name: &str| format!("{node}{name}");
    let driver = options.get(&key("driver"));
    let driver = driver.or_else(|| options.get("format").filter(|_| node.is_empty()));
    let file = || local(options.get(&key("filename")).unwrap_or_default());
    let wrap = || vec![Edit::Wrap(node.to_owned())];
    match driver {
        Some("file") => file().in_format(Some("raw"), wrap()),
        None if options.has(&key("filename")) => file().in_format(None, wrap()),
        Some("null-co" | "null-aio") => NodeContent::Nothing,
        Some("vvfat") if !options.is_on(&key("rw")) => NodeContent::Nothing,
        Some("vvfat") => NodeContent::Other("writes to a folder of this computer (vvfat)".to_owned()),
        Some(filter) if FILTERS.contains(&filter) => below(options, node, spelling, None),
        Some(format) if FORMATS.contains(&format) => below(options, node, spelling, Some(format)),
        None => below(options, node, spelling, Some("")),
        Some(other) => NodeContent::Other(format!("writes by the block driver {other}")),
    }
}

/// Returns the content of a node in that format (`None` for a filter, an empty text if QEMU probes the
/// format).
fn below(options: &Options, node: &str, spelling: Spelling, format: Option<&str>) -> NodeContent {
    let key = |name: &str| format!("{node}{name}");
    let given = format.filter(|format| !format.is_empty());
    let unfit = UNFIT.iter().find(|name| options.has_any(&key(name)));
    let unfit = unfit.map(|name| format!("writes to an image with '{name}', which an overlay cannot have"));
    let file = options.get(&key("file"));
    if let (Some(name), Spelling::Blockdev) = (file, spelling) {
        return NodeContent::Node { name: name.to_owned(), format: given.map(str::to_owned), unfit };
    }
    let (found, name) = match (file, options.get(&key("file.driver"))) {
        (Some(file), _) => (named(file), key("file")),
        (None, None | Some("file")) if format.is_some() => {
            (local(options.get(&key("file.filename")).unwrap_or_default()), key("file.filename"))
        }
        _ => return content(options, &key("file."), spelling),
    };
    match (found, unfit) {
        (NodeContent::File { source: ImageFile { path, format }, .. }, Some(unfit)) => {
            let format = given.map(str::to_owned).or(format);
            NodeContent::Unfit(ImageFile { path, format }, unfit)
        }
        (found, _) => found.in_format(given, vec![Edit::File(name), Edit::Format(node.to_owned())]),
    }
}

impl NodeContent {
    /// Sets the format of a file, if `given` gives one, and the edits that put an overlay in the file's place.
    fn in_format(self, given: Option<&str>, edits: Vec<Edit>) -> NodeContent {
        match self {
            NodeContent::File { source: ImageFile { path, format }, .. } => NodeContent::File {
                source: ImageFile { path, format: given.map(str::to_owned).or(format) },
                edits,
            },
            other => other,
        }
    }
}

/// Reads a file's name where QEMU also accepts protocols. Source: `path_has_protocol` in QEMU's block.c.
pub fn named(name: &str) -> NodeContent {
    let protocol = name.split_once(':').map(|(word, _)| word).filter(|word| !word.contains('/'));
    match protocol {
        None => local(name),
        Some("file") => local(&name["file:".len()..]),
        Some("json") => {
            let options = Options::parse_json(&name["json:".len()..]);
            content(&options, "", Spelling::Drive).in_format(None, vec![Edit::Argument])
        }
        Some("null-co" | "null-aio") => NodeContent::Nothing,
        Some("fat") if !name.split(':').any(|word| word == "rw") => NodeContent::Nothing,
        Some("fat") => NodeContent::Other("writes to a folder of this computer (vvfat)".to_owned()),
        Some(other) => NodeContent::Other(format!("writes by the protocol {other}")),
    }
}

/// Returns the content at that path.
fn local(path: &str) -> NodeContent {
    let is_device = path.starts_with("/dev/") && !path.starts_with("/dev/shm/");
    match path {
        "" => NodeContent::Nothing,
        PLACEHOLDER => NodeContent::Placeholder,
        _ if is_device => NodeContent::Other(format!("writes to the device {path} itself")),
        _ => {
            let source = ImageFile { path: path.into(), format: None };
            NodeContent::File { source, edits: vec![Edit::Argument] }
        }
    }
}
