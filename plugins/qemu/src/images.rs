//! The files that a machine's arguments open: images that a run would write to, files that a run only reads,
//! and other places that a run writes to and that no overlay can replace.
//!
//! ```text
//! -drive file=/d/x.img,format=raw   ─▶ Image: each run gets an overlay, named in the file's place
//! -cdrom /d/x.iso, -kernel, …       ─▶ Source: belongs to what a template is made from
//! -fsdev local,path=/d, -tpmdev, …  ─▶ Shared: the next run finds what this one wrote
//! ```
//!
//! Files that QEMU only writes, such as a serial port's log, are none of these. Sources: QEMU's
//! qemu-options.hx, blockdev.c (`drive_new`), block.c (`bdrv_open_inherit`), qapi/block-core.json.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::options::{Options, walk};

/// The placeholder for the path of the disk's overlay. Source: Cuckoo3's `machineries/modules/qemu.py`.
pub const PLACEHOLDER: &str = "%DISPOSABLE_DISK_PATH%";

/// Options whose value is an image's path and nothing else.
const PATHS: [&str; 9] = ["hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash"];

/// Image formats that an overlay can be based on.
const FORMATS: [&str; 12] =
    ["raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels", "bochs", "cloop", "dmg"];

/// The reason why JSON that only QEMU can read is refused.
const UNREADABLE: &str = "is JSON that cannot be checked here; write it with double quotes";

/// Block drivers that pass all requests to the node below them.
const FILTERS: [&str; 4] = ["throttle", "copy-on-read", "preallocate", "compress"];

/// Options that an overlay cannot have: they would apply to the overlay instead of the image.
const UNFIT: [&str; 6] = ["backing", "data-file", "encrypt", "key-secret", "offset", "size"];

/// Options of the driver `file` that a format's driver does not have.
const OF_FILE: [&str; 7] =
    ["aio", "aio-max-batch", "locking", "pr-manager", "drop-cache", "x-check-cache-dropped", "filename"];

/// Options that name files which are only read: the option, the key of its first word, and the keys of files.
const READS: [(&str, &str, &[&str]); 14] = [
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
];

/// The files that the arguments of a machine open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opened {
    /// The images that each run needs an overlay of.
    pub images: Vec<Image>,
    pub sources: Vec<Source>,
    pub shared: Vec<Shared>,
    /// Whether the placeholder is an image's path, and not only part of a name.
    pub has_placeholder: bool,
    /// Paths that are written without a `/` at their beginning.
    pub relative: Vec<PathBuf>,
    /// The folder in which QEMU runs, where relative paths start.
    folder: PathBuf,
}

/// An image that a run would write to, and the place where the arguments name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub source: Source,
    changes: Vec<Change>,
}

/// A file that a guest depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    pub path: PathBuf,
    /// The format that the arguments give; QEMU probes the file if there is none.
    pub format: Option<String>,
}

/// A place that a run writes to and where the next run finds the changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    argument: String,
    what: String,
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.argument, self.what)
    }
}

/// The change of an argument when an overlay replaces an image.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    argument: usize,
    implied: &'static str,
    edit: Edit,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Edit {
    /// The whole argument is the path.
    Argument,
    /// The value of this key is the path.
    File(String),
    /// The node below this prefix is qcow2, whatever it was.
    Format(String),
    /// The node below this prefix was a plain file, and becomes a qcow2 node on top of a file.
    Wrap(String),
}

/// An option as written.
#[derive(Clone, Copy)]
struct Written<'a> {
    /// The index of the argument with its value.
    argument: usize,
    name: &'a str,
    value: &'a str,
}

/// The content of a block node.
#[derive(Clone)]
enum Found {
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
        source: Source,
        edits: Vec<Edit>,
    },
    /// Content that no overlay can be based on.
    Other(String),
}

/// A `-blockdev`.
struct Node<'a> {
    written: Written<'a>,
    name: String,
    is_read_only: bool,
    found: Found,
}

impl Opened {
    /// Returns the files that these arguments open in a QEMU that runs in `folder`.
    pub fn by(args: &[String], folder: &Path) -> Opened {
        let mut opened = Opened { folder: folder.to_owned(), ..Opened::default() };
        let options = walk(args);
        let nodes = options.filter_map(|(argument, name, value)| {
            let written = Written { argument, name, value };
            (name == "blockdev").then(|| Node::of(written)).or_else(|| {
                opened.option(written);
                None
            })
        });
        let nodes: Vec<Node<'_>> = nodes.collect();
        nodes.iter().for_each(|node| opened.node(node, &nodes));
        let images = opened.images.iter_mut().map(|image| &mut image.source);
        for source in images.chain(&mut opened.sources).filter(|source| source.path.is_relative()) {
            let path = folder.join(&source.path);
            opened.relative.push(std::mem::replace(&mut source.path, path));
        }
        opened
    }

    /// Replaces each image in the arguments by its overlay: the n-th image by `overlay(n)`.
    pub fn with_overlays(&self, args: &mut [String], overlay: impl Fn(usize) -> String) {
        for (index, image) in self.images.iter().enumerate() {
            let path = overlay(index);
            for change in &image.changes {
                if let Some(argument) = args.get_mut(change.argument) {
                    *argument = change.applied(argument, &path);
                }
            }
        }
    }

    /// Returns the paths of all files that the arguments open.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let images = self.images.iter().map(|image| &image.source);
        images.chain(&self.sources).map(|source| source.path.as_path())
    }

    fn option(&mut self, written: Written<'_>) {
        let Written { name, value, .. } = written;
        match name {
            "drive" => self.drive(written, &Options::parse(value, "")),
            "cdrom" => self.found(named(value), written, true),
            "readconfig" => self.read_config(written),
            name if PATHS.contains(&name) => self.found(named(value), written, false),
            _ => {
                self.sources.extend(read_by(name, value));
                self.shared.extend(shared_by(name, value).map(|what| written.shared(what)));
            }
        }
    }

    fn drive(&mut self, written: Written<'_>, options: &Options) {
        let is_read_only = ["readonly", "read-only", "snapshot"].iter().any(|key| options.is_on(key))
            || options.get("media") == Some("cdrom");
        self.found(content(options, "", Spelling::Drive), written, is_read_only);
    }

    fn found(&mut self, found: Found, written: Written<'_>, is_read_only: bool) {
        match found {
            Found::Nothing | Found::Node { .. } => {}
            Found::Placeholder => self.has_placeholder = true,
            Found::File { source, .. } if is_read_only => self.sources.push(source),
            Found::File { source, edits } => {
                let changes = edits.into_iter().map(|edit| written.change(edit)).collect();
                self.images.push(Image { source, changes });
            }
            Found::Other(_) if is_read_only => {}
            Found::Other(what) => self.shared.push(written.shared(what)),
        }
    }

    /// Reads one `-blockdev` of `all`: a plain file gets its overlay together with the node of its format.
    fn node(&mut self, node: &Node<'_>, all: &[Node<'_>]) {
        let mut users = all.iter().filter(|user| user.is_on(&node.name)).peekable();
        let is_used = users.peek().is_some();
        let has_format = users.clone().any(|user| matches!(user.found, Found::Node { format: Some(_), .. }));
        let is_read_only = node.is_read_only || is_used && users.all(|user| user.is_read_only);
        match &node.found {
            Found::Node { name, format: Some(format), unfit } => {
                let file = all.iter().find(|file| file.name == *name);
                if let Some((file, source)) = file.and_then(|file| Some((file, file.plain()?))) {
                    let source = Source { format: Some(format.clone()), ..source.clone() };
                    self.file_in_format(node, unfit.as_ref(), file, source, is_read_only);
                }
            }
            Found::File { .. } if has_format && node.plain().is_some() => {}
            found => self.found(found.clone(), node.written, is_read_only),
        }
    }

    fn file_in_format(
        &mut self,
        node: &Node<'_>,
        unfit: Option<&String>,
        file: &Node<'_>,
        source: Source,
        is_read_only: bool,
    ) {
        if is_read_only {
            self.sources.push(source);
        } else if let Some(unfit) = unfit {
            self.shared.push(node.written.shared(unfit.clone()));
        } else {
            let changes = vec![
                file.written.change(Edit::File("filename".to_owned())),
                node.written.change(Edit::Format(String::new())),
            ];
            self.images.push(Image { source, changes });
        }
    }

    /// Reads a file of options. Such a file is not rewritten, so an image in it cannot be replaced.
    fn read_config(&mut self, written: Written<'_>) {
        self.sources.push(Source::of(written.value));
        let text = std::fs::read_to_string(self.folder.join(written.value)).unwrap_or_default();
        let mut inner = Opened::default();
        for (group, options) in sections(&text) {
            let within = Written { name: &group, value: "", ..written };
            match group.as_str() {
                "drive" | "blockdev" => inner.drive(within, &options),
                _ => inner.option(Written { value: &options.to_string(), ..within }),
            }
        }
        self.sources.append(&mut inner.sources);
        let images =
            inner.images.into_iter().map(|image| format!("writes to {}", image.source.path.display()));
        let others = inner.shared.into_iter().map(|shared| shared.what);
        self.shared.extend(images.chain(others).map(|what| written.shared(what)));
    }
}

impl Written<'_> {
    /// Returns the key of the value's first word.
    fn implied(&self) -> &'static str {
        if self.name == "blockdev" { "driver" } else { "" }
    }

    fn change(&self, edit: Edit) -> Change {
        Change { argument: self.argument, implied: self.implied(), edit }
    }

    fn shared(&self, what: String) -> Shared {
        Shared { argument: format!("-{} {}", self.name, self.value), what }
    }
}

impl Source {
    /// A file that holds no image.
    fn of(path: &str) -> Source {
        Source { path: path.into(), format: Some("raw".to_owned()) }
    }
}

impl Change {
    fn applied(&self, argument: &str, path: &str) -> String {
        let mut options = Options::parse(argument, self.implied);
        match &self.edit {
            Edit::Argument => return path.to_owned(),
            Edit::File(key) => options.set(key, path),
            Edit::Format(node) => be_qcow2(&mut options, node),
            Edit::Wrap(node) => {
                be_qcow2(&mut options, node);
                for key in OF_FILE {
                    options.rename(&format!("{node}{key}"), &format!("{node}file.{key}"));
                }
                options.set(&format!("{node}file.driver"), "file");
                options.set(&format!("{node}file.filename"), path);
            }
        }
        options.to_string()
    }
}

/// Makes the node qcow2. A null in `backing` is left out: it says that the image has no base, but the overlay
/// has one.
fn be_qcow2(options: &mut Options, node: &str) {
    options.remove(&format!("{node}backing"));
    let format = if node.is_empty() && options.has("format") { "format" } else { "driver" };
    options.set(&format!("{node}{format}"), "qcow2");
}

impl<'a> Node<'a> {
    fn of(written: Written<'a>) -> Node<'a> {
        let options = Options::parse(written.value, written.implied());
        Node {
            written,
            name: options.get("node-name").unwrap_or_default().to_owned(),
            is_read_only: options.is_on("read-only"),
            found: content(&options, "", Spelling::Blockdev),
        }
    }

    fn is_on(&self, node: &str) -> bool {
        matches!(&self.found, Found::Node { name, .. } if name == node)
    }

    /// Returns the file, if the node is a file and nothing more.
    fn plain(&self) -> Option<&Source> {
        match &self.found {
            Found::File { source, edits } if matches!(edits[..], [Edit::Wrap(_)]) => Some(source),
            _ => None,
        }
    }
}

/// The meaning of the text under a node's key `file`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// A file's name.
    Drive,
    /// Another node's name.
    Blockdev,
}

/// Returns the content of the node whose keys begin with `node`.
fn content(options: &Options, node: &str, spelling: Spelling) -> Found {
    if options.is_unreadable() {
        return Found::Other(UNREADABLE.to_owned());
    }
    let key = |name: &str| format!("{node}{name}");
    let driver = options.get(&key("driver"));
    let driver = driver.or_else(|| options.get("format").filter(|_| node.is_empty()));
    let file = || local(options.get(&key("filename")).unwrap_or_default());
    let wrap = || vec![Edit::Wrap(node.to_owned())];
    match driver {
        Some("file") => file().in_format(Some("raw"), wrap()),
        None if options.has(&key("filename")) => file().in_format(None, wrap()),
        Some("null-co" | "null-aio") => Found::Nothing,
        Some("vvfat") if !options.is_on(&key("rw")) => Found::Nothing,
        Some("vvfat") => Found::Other("writes to a folder of this computer (vvfat)".to_owned()),
        Some(filter) if FILTERS.contains(&filter) => below(options, node, spelling, None),
        Some(format) if FORMATS.contains(&format) => below(options, node, spelling, Some(format)),
        None => below(options, node, spelling, Some("")),
        Some(other) => Found::Other(format!("writes by the block driver {other}")),
    }
}

/// Returns the content of a node in that format (`None` for a filter, an empty text if QEMU probes the
/// format).
fn below(options: &Options, node: &str, spelling: Spelling, format: Option<&str>) -> Found {
    let key = |name: &str| format!("{node}{name}");
    let told = format.filter(|format| !format.is_empty());
    let unfit = UNFIT.iter().find(|name| options.has_any(&key(name)));
    let unfit = unfit.map(|name| format!("writes to an image with '{name}', which an overlay cannot have"));
    let file = options.get(&key("file"));
    if let (Some(name), Spelling::Blockdev) = (file, spelling) {
        return Found::Node { name: name.to_owned(), format: told.map(str::to_owned), unfit };
    }
    let (found, name) = match (file, options.get(&key("file.driver"))) {
        (Some(file), _) => (named(file), key("file")),
        (None, None | Some("file")) if format.is_some() => {
            (local(options.get(&key("file.filename")).unwrap_or_default()), key("file.filename"))
        }
        _ => return content(options, &key("file."), spelling),
    };
    match (found, unfit) {
        (Found::File { .. }, Some(unfit)) => Found::Other(unfit),
        (found, _) => found.in_format(told, vec![Edit::File(name), Edit::Format(node.to_owned())]),
    }
}

impl Found {
    /// Sets the format of a file, if `told` gives one, and the edits that put an overlay in the file's place.
    fn in_format(self, told: Option<&str>, edits: Vec<Edit>) -> Found {
        match self {
            Found::File { source: Source { path, format }, .. } => {
                Found::File { source: Source { path, format: told.map(str::to_owned).or(format) }, edits }
            }
            other => other,
        }
    }
}

/// Reads a file's name where QEMU also accepts protocols. Source: `path_has_protocol` in QEMU's block.c.
fn named(name: &str) -> Found {
    let protocol = name.split_once(':').map(|(word, _)| word).filter(|word| !word.contains('/'));
    match protocol {
        None => local(name),
        Some("file") => local(&name["file:".len()..]),
        Some("json") => {
            let options = Options::parse_json(&name["json:".len()..]);
            content(&options, "", Spelling::Drive).in_format(None, vec![Edit::Argument])
        }
        Some("null-co" | "null-aio") => Found::Nothing,
        Some("fat") if !name.split(':').any(|word| word == "rw") => Found::Nothing,
        Some("fat") => Found::Other("writes to a folder of this computer (vvfat)".to_owned()),
        Some(other) => Found::Other(format!("writes by the protocol {other}")),
    }
}

/// Returns the content at that path.
fn local(path: &str) -> Found {
    let is_device = path.starts_with("/dev/") && !path.starts_with("/dev/shm/");
    match path {
        "" => Found::Nothing,
        PLACEHOLDER => Found::Placeholder,
        _ if is_device => Found::Other(format!("writes to the device {path} itself")),
        _ => {
            let source = Source { path: path.into(), format: None };
            Found::File { source, edits: vec![Edit::Argument] }
        }
    }
}

/// Returns the files that QEMU reads because of an option.
fn read_by(name: &str, value: &str) -> Vec<Source> {
    let name = if name == "M" { "machine" } else { name };
    let Some((_, implied, keys)) = READS.iter().find(|(option, ..)| *option == name) else {
        return Vec::new();
    };
    if name == "initrd" {
        // The value lists several modules, each with its arguments.
        return value.split(',').filter_map(|module| module.split(' ').next()).map(Source::of).collect();
    }
    if keys.is_empty() {
        return vec![Source::of(value)];
    }
    let options = Options::parse(value, implied);
    if options.get("qom-type") == Some("filter-dump") {
        // QEMU writes its file: a capture, which is another one in each run.
        return Vec::new();
    }
    let named = keys.iter().filter_map(|key| options.get(key)).flat_map(|files| match name {
        "acpitable" => files.split(':').collect(),
        _ => vec![files],
    });
    named.filter(|file| !file.is_empty()).map(Source::of).collect()
}

/// Describes the writes of an option that the next run would find, except those to images.
fn shared_by(name: &str, value: &str) -> Option<String> {
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
        "tpmdev" => Some("keeps the TPM's state outside of the run".to_owned()),
        "netdev" | "nic" | "net" if options("type").has("smb") => {
            Some("shares a folder of this computer for writing (smb)".to_owned())
        }
        "device" => shared_by_device(&options("driver")),
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

fn shared_by_device(options: &Options) -> Option<String> {
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

/// Reads the sections of a file of `-readconfig`: `[group "id"]`, then lines such as `key = "value"`.
fn sections(text: &str) -> Vec<(String, Options)> {
    let mut sections: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            let group = section
                .split(|c: char| c.is_whitespace() || c == ']')
                .find(|word| !word.is_empty())
                .unwrap_or_default();
            sections.push((group.to_owned(), Vec::new()));
        } else if let (Some((key, value)), Some((_, pairs))) = (line.split_once('='), sections.last_mut()) {
            pairs.push((key.trim().to_owned(), value.trim().trim_matches('"').to_owned()));
        }
    }
    sections.into_iter().map(|(group, pairs)| (group, Options::of(pairs))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn image_is_found_and_replaced_in_every_spelling() {
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
            ("-drive", "id=d,noreadonly,file=/d/x,,y", None, "id=d,readonly=off,file=/o/0,driver=qcow2"),
            ("-drive", "driver=vmdk,file=file:/d/x,,y", Some("vmdk"), "file=/o/0,driver=qcow2"),
            (
                "-drive",
                "file.filename=/d/x,,y,snapshot=off",
                None,
                "snapshot=off,file.filename=/o/0,driver=qcow2",
            ),
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
        assert_eq!(opened(&args).sources, [Source { path: "/d/x".into(), format: Some("raw".into()) }]);
        assert_eq!(overlaid(&args), args);
    }

    #[test]
    fn arguments_are_untouched_when_a_run_only_reads() {
        for (option, value, source) in [
            ("-cdrom", "/d/x.iso", "/d/x.iso"),
            ("-drive", "file=/d/x,readonly=on,if=pflash,format=raw", "/d/x"),
            ("-drive", "file=/d/x,media=cdrom", "/d/x"),
            ("-drive", "file=/d/x,snapshot=on", "/d/x"),
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
    fn nothing_is_opened_when_there_is_no_medium_or_only_output() {
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
    fn whatever_cannot_be_replaced_is_named_with_its_argument() {
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
    fn images_in_a_file_of_options_are_shared() {
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
