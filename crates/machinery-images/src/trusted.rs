//! The backing chain of an image that somebody else has made: refused where it leaves what the guest may read.
//!
//! An image's header can name any file of this computer as its base, and the guest reads the base. Each name is
//! checked before the file behind it is opened. `qemu-img info` does not serve here: it opens an image's data file
//! before anything of it is known (CVE-2024-4467).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

use crate::{Backing, Header, probe_format};

/// The maximum number of files in a chain. A longer chain is a loop, or too slow: QEMU opens each of its files.
const MAX_FILES: usize = 200;

/// Formats whose headers name no other file. Source: QEMU's block/*.c.
const SELF_CONTAINED: [&str; 8] = ["raw", "vdi", "vpc", "vhdx", "parallels", "bochs", "cloop", "dmg"];

/// The rules for the files of a chain.
#[derive(Debug, Clone)]
pub struct ChainRules {
    /// The users whose files are accepted. Every other user could change a file after the check.
    pub owners: Vec<u32>,
    /// The folders with raw files that may be a base, besides the folder of the image that names the base. The guest
    /// reads a raw base as it is, so any other file of this computer could be one.
    pub raw_folders: Vec<PathBuf>,
}

/// The files of an image, all of which meet the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedChain {
    /// The files, from the image itself down to its base.
    pub files: Vec<PathBuf>,
    /// The format of the image itself, as given or as QEMU would detect it.
    pub format: String,
}

/// The image, and the file of its chain that is being checked.
struct Walk<'a> {
    rules: &'a ChainRules,
    image: &'a Path,
    files: Vec<PathBuf>,
}

impl TrustedChain {
    /// Resolves the chain of the image at `path`. `format` is the format in which QEMU opens the image. Opens no file
    /// that breaks a rule.
    ///
    /// # Errors
    /// A file of the chain breaks a rule, is missing, or cannot be read. The error names the image, the file, the
    /// reason and the cure.
    pub fn of(path: &Path, format: Option<&str>, rules: &ChainRules) -> Result<TrustedChain> {
        let mut walk = Walk { rules, image: path, files: Vec::new() };
        let mut top = None;
        let mut next = Some((path.to_owned(), format.map(str::to_owned)));
        while let Some((file, format)) = next.take() {
            walk.expect_file(&file)?;
            walk.files.push(file.clone());
            if walk.files.len() > MAX_FILES {
                return Err(
                    walk.refused(&format!("has a backing chain of more than {MAX_FILES} files"), LOOP)
                );
            }
            let format = walk.format(&file, format)?;
            let header = if format == "qcow2" { Header::read(&file)? } else { None };
            top.get_or_insert(format);
            if let Some(header) = header {
                next = walk.base(&file, header)?;
            }
        }
        Ok(TrustedChain { files: walk.files, format: top.unwrap_or_default() })
    }
}

const LOOP: &str = "Inspect it with `qemu-img info --backing-chain`: it may be a loop";
const REBASE: &str =
    "Correct the name with `qemu-img rebase -u -F FORMAT -b BASE IMAGE`, if you trust the image";
const CONVERT: &str = "Convert it with `qemu-img convert -O qcow2`, if you trust it";

impl Walk<'_> {
    /// Expects a regular file of an accepted owner.
    fn expect_file(&self, file: &Path) -> Result<()> {
        let metadata = fs::metadata(file).map_err(|error| self.unreadable(file, &error))?;
        if !metadata.is_file() {
            return Err(self.refuse(file, "is not a file", "Use an image file"));
        }
        let owner = metadata.uid();
        if !self.rules.owners.contains(&owner) {
            let why = format!("belongs to the user {owner}, who could change it at any time");
            return Err(self.refuse(file, &why, "Give it to root or to the host's user with `chown`"));
        }
        File::open(file).map(drop).map_err(|error| self.unreadable(file, &error))
    }

    fn unreadable(&self, file: &Path, error: &io::Error) -> Error {
        let unreadable = Error::io("open the image", file, error);
        match self.files.last() {
            None => unreadable,
            Some(overlay) => {
                let (overlay, reason) = (overlay.display(), unreadable.reason());
                Error::environment(format!("the backing chain is broken at {overlay}: {reason}"))
                    .advice("Put the missing file back, or correct its path with `qemu-img rebase -u`")
            }
        }
    }

    /// Returns the format of a file, whose header names other files only if it is qcow2.
    fn format(&self, file: &Path, given: Option<String>) -> Result<String> {
        let probe = || probe_format(file).map_err(|error| Error::io("read the image", file, &error));
        let format = given.map_or_else(|| probe().map(str::to_owned), Ok)?;
        if format == "qcow2" || SELF_CONTAINED.contains(&format.as_str()) {
            return Ok(format);
        }
        let why = format!("is of the format {format:?}, whose references to other files are not checked");
        Err(self.refuse(file, &why, CONVERT))
    }

    /// Returns the base that the header of `file` names, and its format.
    fn base(&self, file: &Path, header: Header) -> Result<Option<(PathBuf, Option<String>)>> {
        if let Some(data) = header.data_file {
            let why = format!("has its content in another file (data_file {data:?})");
            return Err(self.refuse(file, &why, CONVERT));
        }
        let Some(Backing { file: name, format }) = header.backing else { return Ok(None) };
        if let Some(why) = unsafe_name(&name) {
            return Err(self.refuse(file, &format!("is based on {name:?}, which {why}"), REBASE));
        }
        let base = file.parent().unwrap_or(Path::new("/")).join(&name);
        self.expect_file(&base)?;
        let is_stated = format.is_some();
        let format = self.format(&base, format)?;
        if format == "raw" && !is_stated {
            let why = format!("is based on {}, a raw file whose format it does not state", base.display());
            return Err(self.refuse(file, &why, REBASE));
        }
        if format == "raw" && !self.may_read_raw(&base, file) {
            let why = format!("is based on {}, a raw file outside of the image's folder", base.display());
            let cure =
                "Move the base into the folder of the image, or convert it with `qemu-img convert -O qcow2`";
            return Err(self.refuse(file, &why, cure));
        }
        Ok(Some((base, Some(format))))
    }

    fn may_read_raw(&self, base: &Path, image: &Path) -> bool {
        let Ok(base) = base.canonicalize() else { return false };
        let own = image.parent().and_then(|folder| folder.canonicalize().ok());
        own.iter().chain(&self.rules.raw_folders).any(|folder| base.starts_with(folder))
    }

    fn refuse(&self, file: &Path, why: &str, advice: &str) -> Error {
        Error::configuration(self.about(file, why)).advice(advice)
    }

    fn refused(&self, why: &str, advice: &str) -> Error {
        self.refuse(self.image, why, advice)
    }

    /// Describes a file of the chain, and its place.
    fn about(&self, file: &Path, why: &str) -> String {
        if file == self.image {
            return format!("the image {} {why}", file.display());
        }
        let named_by = self.files.iter().rev().find(|overlay| *overlay != file);
        let named_by = named_by.map_or(self.image, PathBuf::as_path);
        let chain = if named_by == self.image {
            String::new()
        } else {
            format!(" in the backing chain of {}", self.image.display())
        };
        format!("{}, which {} is based on{chain}, {why}", file.display(), named_by.display())
    }
}

/// Returns the reason why a base's name is refused; none if it is a path.
fn unsafe_name(name: &str) -> Option<&'static str> {
    // As in QEMU, the text before a colon is a protocol, unless a slash precedes the colon.
    let word = name.split(['/', ':']).next().unwrap_or_default();
    if name.starts_with("json:") {
        Some("is JSON and can name anything")
    } else if name[word.len()..].starts_with(':') {
        Some("names a protocol and no file")
    } else if name.contains(|c: char| c.is_control() || c == char::REPLACEMENT_CHARACTER) {
        Some("is not readable text")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn rules() -> ChainRules {
        ChainRules { owners: vec![0, rustix::process::geteuid().as_raw()], raw_folders: Vec::new() }
    }

    fn qemu_img(folder: &Path, args: &[&str]) {
        let ran = Command::new("qemu-img").args(args).current_dir(folder).output().unwrap();
        assert!(ran.status.success(), "{args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    /// Creates an overlay whose header has `backing` as the name of its base.
    fn overlay(folder: &Path, name: &str, backing: &str, format: &str) -> PathBuf {
        qemu_img(folder, &["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", backing, name, "1M"]);
        folder.join(name)
    }

    /// Removes the backing format from a header, as VMCloak's old images have it.
    fn without_format(path: &Path) {
        let mut content = fs::read(path).unwrap();
        let at = content.windows(4).position(|bytes| bytes == [0xE2, 0x79, 0x2A, 0xCA]).unwrap();
        content[at..at + 4].copy_from_slice(&[0x11, 0x22, 0x33, 0x44]);
        fs::write(path, content).unwrap();
    }

    #[track_caller]
    fn refused(image: &Path, words: &[&str]) {
        let text = TrustedChain::of(image, Some("qcow2"), &rules()).unwrap_err().to_string();
        let image = image.display().to_string();
        for word in words.iter().copied().chain([image.as_str()]) {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
    }

    #[test]
    fn chain_is_accepted_when_each_base_is_an_image_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base"), "base").unwrap();
        overlay(folder.path(), "middle", "base", "raw");
        let top = overlay(folder.path(), "top", "middle", "qcow2");
        // A qcow2 base is found without its format, too.
        without_format(&top);
        let chain = TrustedChain::of(&top, None, &rules()).unwrap();
        assert_eq!(chain.files, ["top", "middle", "base"].map(|name| folder.path().join(name)));
        assert_eq!(chain.format, "qcow2");
        let alone = TrustedChain::of(&top, Some("raw"), &rules()).unwrap();
        assert_eq!((alone.files, alone.format.as_str()), (vec![top], "raw"));
    }

    #[test]
    fn base_is_refused_when_its_name_is_no_path() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        for (name, why) in [
            (r#"json:{"driver":"raw","file":{"driver":"file","filename":"secret"}}"#, "is JSON"),
            ("nbd://127.0.0.1:1/x", "a protocol"),
            ("http://h/x", "a protocol"),
            ("ssh://h/x", "a protocol"),
            ("fd:3", "a protocol"),
            ("file:secret", "a protocol"),
            ("fat:/etc", "a protocol"),
        ] {
            let top = overlay(folder.path(), "top", name, "raw");
            refused(&top, &[why, "qemu-img rebase"]);
            let upper = overlay(folder.path(), "upper", "top", "qcow2");
            let top = top.display().to_string();
            refused(&upper, &[why, &top]);
        }
    }

    #[test]
    fn raw_base_is_refused_when_it_is_a_secret() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = elsewhere.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        let name = secret.display().to_string();
        let stated = overlay(folder.path(), "stated", &name, "raw");
        refused(&stated, &[&name, "outside of the image's folder"]);
        let accepted = ChainRules { raw_folders: vec![elsewhere.path().canonicalize().unwrap()], ..rules() };
        assert!(TrustedChain::of(&stated, None, &accepted).is_ok());
        let unstated = overlay(folder.path(), "unstated", &name, "raw");
        without_format(&unstated);
        refused(&unstated, &[&name, "does not state"]);
        // A link leads out of the folder, too.
        std::os::unix::fs::symlink(&secret, folder.path().join("link")).unwrap();
        refused(&overlay(folder.path(), "linked", "link", "raw"), &["link", "outside"]);
    }

    #[test]
    fn image_is_refused_when_its_content_is_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "top", "1M"]);
        refused(&folder.path().join("top"), &["data_file", "data.raw", "qemu-img convert"]);
        for format in ["vmdk", "qcow", "qed", "luks", "vvfat", "host_device", "raw\0x"] {
            let top = folder.path().join("top");
            let text = TrustedChain::of(&top, Some(format), &rules()).unwrap_err().to_string();
            assert!(text.contains("references to other files"), "{text}");
        }
    }

    #[test]
    fn file_is_refused_when_another_user_owns_it_or_it_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        qemu_img(folder.path(), &["create", "-q", "-f", "qcow2", "base", "1M"]);
        let top = overlay(folder.path(), "top", "base", "qcow2");
        let me = rustix::process::geteuid().as_raw();
        let others = ChainRules { owners: vec![me + 1], ..rules() };
        let text = TrustedChain::of(&top, None, &others).unwrap_err().to_string();
        assert!(text.contains(&format!("belongs to the user {me}")) && text.contains("chown"), "{text}");
        // Opening a FIFO would wait for a writer.
        fs::remove_file(folder.path().join("base")).unwrap();
        assert!(Command::new("mkfifo").arg(folder.path().join("base")).status().unwrap().success());
        refused(&top, &["base", "is not a file"]);
        fs::remove_file(folder.path().join("base")).unwrap();
        refused(&top, &["base", "No such file", "rebase"]);
    }

    #[test]
    fn chain_is_refused_when_it_is_a_loop() {
        let folder = tempfile::tempdir().unwrap();
        let one = overlay(folder.path(), "one", "two", "qcow2");
        overlay(folder.path(), "two", "one", "qcow2");
        refused(&one, &["loop"]);
    }

    #[test]
    fn last_header_extension_decides_as_in_qemu() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base"), "base").unwrap();
        let top = overlay(folder.path(), "top", "base", "raw");
        let mut content = fs::read(&top).unwrap();
        let at = content.windows(4).position(|bytes| bytes == [0xE2, 0x79, 0x2A, 0xCA]).unwrap();
        // The backing file's name follows the extensions: both move up by one extension.
        let (length, extension) = (u64::from_be_bytes(content[8..16].try_into().unwrap()), 16);
        let moved = content[at..length as usize + 4].to_vec();
        let mut first = content[at..at + extension].to_vec();
        first[8..16].copy_from_slice(b"vmdk\0\0\0\0");
        first[4..8].copy_from_slice(&4_u32.to_be_bytes());
        content[at..at + extension].copy_from_slice(&first);
        content[at + extension..at + extension + moved.len()].copy_from_slice(&moved);
        content[8..16].copy_from_slice(&(length + extension as u64).to_be_bytes());
        fs::write(&top, content).unwrap();
        let header = Header::read(&top).unwrap().unwrap();
        assert_eq!(header.backing, Some(Backing { file: "base".into(), format: Some("raw".into()) }));
        let info = Command::new("qemu-img").args(["info", "--output=json"]).arg(&top).output().unwrap();
        let info = String::from_utf8_lossy(&info.stdout).into_owned();
        assert!(info.contains("\"backing-filename-format\": \"raw\""), "{info}");
    }
}
