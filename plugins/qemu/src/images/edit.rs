//! The changes of arguments that put an overlay in an image's place.

use crate::options::Options;

/// Options of the driver `file` that a format's driver does not have.
const OF_FILE: [&str; 7] =
    ["aio", "aio-max-batch", "locking", "pr-manager", "drop-cache", "x-check-cache-dropped", "filename"];

/// The change of an argument when an overlay replaces an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub argument: usize,
    /// The key of the argument's first word.
    pub implied: &'static str,
    pub edit: Edit,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// The whole argument is the path.
    Argument,
    /// The value of this key is the path.
    File(String),
    /// The node below this prefix is qcow2, whatever it was before.
    Format(String),
    /// The node below this prefix was a plain file, and becomes a qcow2 node on top of a file.
    Wrap(String),
}

impl Change {
    /// Returns the argument with the overlay at `path`.
    pub fn applied(&self, argument: &str, path: &str) -> String {
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

/// Makes the node qcow2. A null in `backing` is removed, because it means no base, and the overlay has one.
fn be_qcow2(options: &mut Options, node: &str) {
    options.remove(&format!("{node}backing"));
    if node.is_empty() {
        options.remove("snapshot");
    }
    let format = if node.is_empty() && options.has("format") { "format" } else { "driver" };
    options.set(&format!("{node}{format}"), "qcow2");
}
