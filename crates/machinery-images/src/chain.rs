//! The backing chain of an image: the files that hold its content.

use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use serde_json::Value;

use crate::Header;

/// The maximum number of files in a chain. A longer chain is a loop, or too slow: QEMU opens each of its files.
const MAX_FILES: usize = 200;

/// All files of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The files, from the image itself down to its base. Each file comes with its data file, if it has one.
    pub files: Vec<PathBuf>,
    /// The base of the last file, if that base is no local file (such as `nbd://…`).
    pub remote: Option<String>,
}

/// The meaning of a file name in an image header.
enum Reference {
    File(PathBuf),
    Remote(String),
}

impl Chain {
    /// Resolves the chain of the image at `path`. `format` is the format in which QEMU opens the image; QEMU
    /// ignores the backing file of a `raw` image.
    ///
    /// # Errors
    /// A file of the chain is missing or unreadable; the error names it, and the file that refers to it. Or the chain
    /// does not end.
    pub fn of(path: &Path, format: Option<&str>) -> Result<Chain> {
        Chain::walk(path, format, |_| false)
    }

    /// Resolves the chain as [`of`](Chain::of) does, as far as its files exist. A missing file is the last one.
    ///
    /// # Errors
    /// A file of the chain is unreadable, or the chain does not end.
    pub fn as_far_as_it_exists(path: &Path, format: Option<&str>) -> Result<Chain> {
        Chain::walk(path, format, is_missing)
    }

    fn walk(path: &Path, format: Option<&str>, ends_at: impl Fn(&Path) -> bool) -> Result<Chain> {
        let mut chain = Chain { files: Vec::new(), remote: None };
        let mut next = Some((path.to_owned(), format.map(str::to_owned)));
        while let Some((image, format)) = next.take() {
            let header = if ends_at(&image) { None } else { chain.header(&image, format.as_deref())? };
            chain.files.push(image.clone());
            if chain.files.len() > MAX_FILES {
                return Err(endless(path));
            }
            let Some(header) = header else { break };
            let data_file = header.data_file.filter(|name| !name.is_empty());
            if let Some(Reference::File(data)) = data_file.map(|name| resolve(&name, &image)) {
                chain.files.push(data);
            }
            match header.backing.map(|backing| (resolve(&backing.file, &image), backing.format)) {
                Some((Reference::File(file), format)) => next = Some((file, format)),
                Some((Reference::Remote(name), _)) => chain.remote = Some(name),
                None => {}
            }
        }
        Ok(chain)
    }

    /// Returns the header of the chain's next file.
    fn header(&self, image: &Path, format: Option<&str>) -> Result<Option<Header>> {
        let read = match format {
            Some(other) if other != "qcow2" => {
                let opened = std::fs::File::open(image).map(|_| None);
                opened.map_err(|error| Error::io("open the image", image, &error))
            }
            _ => Header::read(image),
        };
        read.map_err(|error| match self.files.last() {
            None => error,
            Some(overlay) => {
                let (overlay, reason) = (overlay.display(), error.reason());
                let what = format!("the backing chain is broken at {overlay}: {reason}");
                Error::environment(what)
                    .advice("Put the missing file back, or correct its path with `qemu-img rebase -u`")
            }
        })
    }
}

fn is_missing(path: &Path) -> bool {
    std::fs::metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Resolves a name; a relative name starts at the folder of the image whose header has it.
fn resolve(name: &str, image: &Path) -> Reference {
    let folder = image.parent().unwrap_or(Path::new("/"));
    if let Some(json) = name.strip_prefix("json:") {
        let file = serde_json::from_str(json).ok().and_then(|value: Value| file_in(&value));
        return file
            .map_or_else(|| Reference::Remote(name.to_owned()), |file| Reference::File(folder.join(file)));
    }
    let path = name.strip_prefix("file:").unwrap_or(name);
    // As in QEMU, the text before a colon is a protocol, unless a slash precedes the colon.
    let is_protocol = path.split(['/', ':']).next().is_some_and(|word| path[word.len()..].starts_with(':'));
    if is_protocol { Reference::Remote(name.to_owned()) } else { Reference::File(folder.join(path)) }
}

/// Returns the local file in a block node's options, in their nested or dotted spelling.
fn file_in(options: &Value) -> Option<PathBuf> {
    let node = options.get("file").filter(|file| file.is_object());
    if let Some(node) = node {
        return file_in(node);
    }
    let driver = options.get("file.driver").or_else(|| options.get("driver"));
    let is_local = driver.is_none_or(|driver| ["file", "qcow2", "raw"].iter().any(|local| driver == local));
    let name = options.get("file.filename").or_else(|| options.get("filename"))?.as_str()?;
    is_local.then(|| name.strip_prefix("file:").unwrap_or(name).into())
}

fn endless(path: &Path) -> Error {
    let what = format!("the backing chain of {} has more than {MAX_FILES} files", path.display());
    Error::configuration(what).advice("Inspect it with `qemu-img info --backing-chain`: it may be a loop")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::Command;

    /// Creates an overlay whose header has `backing` as the name of its base.
    fn overlay(folder: &Path, name: &str, backing: &str, format: &str) -> PathBuf {
        let path = folder.join(name);
        let mut qemu_img = Command::new("qemu-img");
        qemu_img
            .args(["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing])
            .arg(&path)
            .arg("1M");
        assert!(qemu_img.status().unwrap().success());
        path
    }

    fn names(chain: &Chain) -> Vec<String> {
        chain.files.iter().map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn chain_lists_every_file_down_to_the_base() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base"), "base").unwrap();
        overlay(folder.path(), "middle", "base", "raw");
        let nested = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"middle"}}"#;
        let dotted = r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"middle"}"#;
        for backing in ["middle", "file:middle", nested, dotted] {
            let top = overlay(folder.path(), "top", backing, "qcow2");
            let chain = Chain::of(&top, None).unwrap();
            assert_eq!(
                (names(&chain), chain.remote),
                (vec!["top".into(), "middle".into(), "base".into()], None)
            );
        }
    }

    #[test]
    fn chain_ends_at_a_raw_image_when_the_format_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let inner = overlay(folder.path(), "inner", "gone", "raw");
        assert!(Chain::of(&inner, None).is_err());
        assert_eq!(names(&Chain::of(&inner, Some("raw")).unwrap()), ["inner"]);
        let outer = overlay(folder.path(), "outer", "inner", "raw");
        assert_eq!(names(&Chain::of(&outer, Some("qcow2")).unwrap()), ["outer", "inner"]);
    }

    #[test]
    fn chain_names_the_remote_base_when_it_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        for remote in ["nbd://h/x", r#"json:{"driver":"raw","file":{"driver":"nbd","host":"h"}}"#] {
            let top = overlay(folder.path(), "top", remote, "raw");
            assert_eq!(Chain::of(&top, None).unwrap().remote.as_deref(), Some(remote));
        }
    }

    #[test]
    fn chain_fails_and_names_both_files_when_the_base_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let top = overlay(folder.path(), "top", "gone.raw", "raw");
        let text = Chain::of(&top, None).unwrap_err().to_string();
        assert!(text.contains("top") && text.contains("gone.raw") && text.contains("rebase"), "{text}");
        let existing = Chain::as_far_as_it_exists(&top, None).unwrap();
        assert_eq!(names(&existing), ["top", "gone.raw"]);
    }

    #[test]
    fn chain_fails_when_it_is_a_loop() {
        let folder = tempfile::tempdir().unwrap();
        let one = overlay(folder.path(), "one", "two", "qcow2");
        overlay(folder.path(), "two", "one", "qcow2");
        assert!(Chain::of(&one, None).unwrap_err().to_string().contains("loop"));
    }
}
