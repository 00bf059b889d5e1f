//! Reads a machine's arguments, and sorts the files that they open.

use std::path::{Path, PathBuf};

use machinery_backend::ImageFile;

use super::edit::{Change, Edit};
use super::files_read::{files_read_by, plain_file};
use super::node::{NodeContent, Spelling, content, named};
use super::shared_writes::{SharedWrite, shared_writes_of};
use crate::options::{Options, read_options_file, walk};
use crate::tpm;

/// Options whose value is an image's path and nothing else.
const PATHS: [&str; 9] = ["hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash"];

/// The files that the arguments of a machine open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Opened {
    /// The images that each run needs an overlay of.
    pub images: Vec<Image>,
    pub sources: Vec<ImageFile>,
    pub shared: Vec<SharedWrite>,
    /// True if the placeholder is an image's path, and not only part of a name.
    pub has_placeholder: bool,
    /// Paths that are written without a `/` at their beginning.
    pub relative: Vec<PathBuf>,
    /// The folder in which QEMU runs, where relative paths start.
    folder: PathBuf,
}

/// An image that a run would write to, and the place where the arguments name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub source: ImageFile,
    changes: Vec<Change>,
}

/// An option of the arguments.
#[derive(Clone, Copy)]
struct GivenOption<'a> {
    /// The index of the argument with its value.
    argument: usize,
    name: &'a str,
    value: &'a str,
}

/// A `-blockdev`.
struct Node<'a> {
    given: GivenOption<'a>,
    name: String,
    is_read_only: bool,
    content: NodeContent,
}

impl Opened {
    /// Returns the files that these arguments open in a QEMU that runs in `folder`.
    pub fn by(args: &[String], folder: &Path) -> Opened {
        let mut opened = Opened { folder: folder.to_owned(), ..Opened::default() };
        let options = walk(args);
        let nodes = options.filter_map(|(argument, name, value)| {
            let given = GivenOption { argument, name, value };
            if name == "blockdev" {
                return Some(Node::of(given));
            }
            // The run's own TPM ends with the run.
            if name != "tpmdev" || !tpm::is_own(value, args) {
                opened.option(given);
            }
            None
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

    fn option(&mut self, given: GivenOption<'_>) {
        let GivenOption { name, value, .. } = given;
        match name {
            "drive" => self.drive(given, &Options::parse(value, "")),
            "cdrom" => self.add(named(value), given, true),
            "readconfig" => self.read_config(given),
            name if PATHS.contains(&name) => self.add(named(value), given, false),
            _ => {
                self.sources.extend(files_read_by(name, value));
                self.shared.extend(shared_writes_of(name, value).map(|what| given.shared(what)));
            }
        }
    }

    fn drive(&mut self, given: GivenOption<'_>, options: &Options) {
        // With `snapshot`, the overlay takes the place of a file that QEMU would make itself.
        let is_read_only = ["readonly", "read-only"].iter().any(|key| options.is_on(key))
            || options.get("media") == Some("cdrom");
        let content = content(options, "", Spelling::Drive);
        let is_discarded = options.is_on("snapshot") && matches!(content, NodeContent::Other(_));
        self.add(content, given, is_read_only || is_discarded);
    }

    /// Adds the content of a node.
    fn add(&mut self, content: NodeContent, given: GivenOption<'_>, is_read_only: bool) {
        match content {
            NodeContent::Nothing | NodeContent::Node { .. } => {}
            NodeContent::Placeholder => self.has_placeholder = true,
            NodeContent::File { source, .. } if is_read_only => self.sources.push(source),
            NodeContent::File { source, edits } => {
                let changes = edits.into_iter().map(|edit| given.change(edit)).collect();
                self.images.push(Image { source, changes });
            }
            NodeContent::Unfit(source, _) if is_read_only => self.sources.push(source),
            NodeContent::Unfit(_, what) => self.shared.push(given.shared(what)),
            NodeContent::Other(_) if is_read_only => {}
            NodeContent::Other(what) => self.shared.push(given.shared(what)),
        }
    }

    /// Reads one `-blockdev` of `all`: a plain file gets its overlay together with the node of its format.
    fn node(&mut self, node: &Node<'_>, all: &[Node<'_>]) {
        let mut users = all.iter().filter(|user| user.is_on(&node.name)).peekable();
        let is_used = users.peek().is_some();
        let has_format =
            users.clone().any(|user| matches!(user.content, NodeContent::Node { format: Some(_), .. }));
        let is_read_only = node.is_read_only || is_used && users.all(|user| user.is_read_only);
        match &node.content {
            NodeContent::Node { name, format: Some(format), unfit } => {
                let file = all.iter().find(|file| file.name == *name);
                if let Some((file, source)) = file.and_then(|file| Some((file, file.plain()?))) {
                    let source = ImageFile { format: Some(format.clone()), ..source.clone() };
                    self.file_in_format(node, unfit.as_ref(), file, source, is_read_only);
                }
            }
            NodeContent::File { .. } if has_format && node.plain().is_some() => {}
            content => self.add(content.clone(), node.given, is_read_only),
        }
    }

    fn file_in_format(
        &mut self,
        node: &Node<'_>,
        unfit: Option<&String>,
        file: &Node<'_>,
        source: ImageFile,
        is_read_only: bool,
    ) {
        if is_read_only {
            self.sources.push(source);
        } else if let Some(unfit) = unfit {
            self.shared.push(node.given.shared(unfit.clone()));
        } else {
            let changes = vec![
                file.given.change(Edit::File("filename".to_owned())),
                node.given.change(Edit::Format(String::new())),
            ];
            self.images.push(Image { source, changes });
        }
    }

    /// Reads a file of options. Such a file is not rewritten, so an image in it cannot be replaced.
    fn read_config(&mut self, given: GivenOption<'_>) {
        self.sources.push(plain_file(given.value));
        let text = read_options_file(&self.folder.join(given.value)).unwrap_or_default();
        let mut inner = Opened::default();
        for (group, options) in sections(&text) {
            let within = GivenOption { name: &group, value: "", ..given };
            match group.as_str() {
                "drive" | "blockdev" => inner.drive(within, &options),
                _ => inner.option(GivenOption { value: &options.to_string(), ..within }),
            }
        }
        self.sources.append(&mut inner.sources);
        let images =
            inner.images.into_iter().map(|image| format!("writes to {}", image.source.path.display()));
        let others = inner.shared.into_iter().map(|shared| shared.what);
        self.shared.extend(images.chain(others).map(|what| given.shared(what)));
    }
}

impl GivenOption<'_> {
    /// Returns the key of the value's first word.
    fn implied(&self) -> &'static str {
        if self.name == "blockdev" { "driver" } else { "" }
    }

    fn change(&self, edit: Edit) -> Change {
        Change { argument: self.argument, implied: self.implied(), edit }
    }

    fn shared(&self, what: String) -> SharedWrite {
        SharedWrite { argument: format!("-{} {}", self.name, self.value), what }
    }
}

impl<'a> Node<'a> {
    fn of(given: GivenOption<'a>) -> Node<'a> {
        let options = Options::parse(given.value, given.implied());
        Node {
            given,
            name: options.get("node-name").unwrap_or_default().to_owned(),
            is_read_only: options.is_on("read-only"),
            content: content(&options, "", Spelling::Blockdev),
        }
    }

    fn is_on(&self, node: &str) -> bool {
        matches!(&self.content, NodeContent::Node { name, .. } if name == node)
    }

    /// Returns the file, if the node is a file and nothing more.
    fn plain(&self) -> Option<&ImageFile> {
        match &self.content {
            NodeContent::File { source, edits } if matches!(edits[..], [Edit::Wrap(_)]) => Some(source),
            _ => None,
        }
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
