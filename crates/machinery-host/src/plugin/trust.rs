//! Trust in a plugin file: only root and the host's user may be able to change it.
//!
//! The rule is that of [`machinery::trust`]. Loading a plugin runs its code with the host's rights, so the rule has no
//! exception but the operator's.

use std::path::{Path, PathBuf};

use machinery::trust::examine;
use machinery::{Error, Result};

/// Resolves all links of a machinery's plugin path and expects that only trusted users can change the file.
/// With `allow_insecure`, an untrusted file causes only a warning in the log.
///
/// # Errors
/// Other users can change the file; the error names every place. Or the path leads to no regular file.
pub fn resolve(machinery: &str, path: &Path, allow_insecure: bool) -> Result<PathBuf> {
    let examined = examine(path).map_err(|error| Error::io("look at the plugin", path, &error))?;
    if !examined.path.is_file() {
        let reason = format!("cannot use {} as a plugin: it is no regular file", examined.path.display());
        return Err(Error::configuration(reason).advice("Put the plugin's file there"));
    }
    let Some(why) = examined.reasons() else { return Ok(examined.path) };
    if !allow_insecure {
        let reason = format!("refusing to load {}: other users could modify it: {why}", path.display());
        return Err(Error::environment(reason)
            .advice("Correct the owners and modes, or allow the plugin with --allow-insecure-plugins"));
    }
    tracing::warn!(machinery, plugin = %path.display(), why, "loading a plugin that other users could modify");
    Ok(examined.path)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    /// Makes a temporary folder and returns its path without links.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        (folder, path)
    }

    #[test]
    fn resolve_fails_when_a_link_is_dangling_or_circular() {
        let (_folder, root) = folder();
        symlink("b.so", root.join("a.so")).unwrap();
        symlink("a.so", root.join("b.so")).unwrap();
        symlink("none.so", root.join("c.so")).unwrap();
        for name in ["a.so", "c.so"] {
            let path = root.join(name);
            let error = resolve("x", &path, true).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn resolve_fails_when_the_plugin_is_no_regular_file() {
        let (_folder, root) = folder();
        fs::create_dir(root.join("folder.so")).unwrap();
        mknodat(CWD, root.join("pipe.so"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for name in ["folder.so", "pipe.so"] {
            let error = resolve("x", &root.join(name), true).unwrap_err().to_string();
            assert!(error.contains("no regular file"), "{error}");
        }
    }

    #[test]
    fn resolve_names_each_place_where_others_can_write() {
        let (_folder, root) = folder();
        let file = root.join("x.so");
        fs::write(&file, "").unwrap();
        assert_eq!(resolve("x", &file, false).unwrap(), file);
        for path in [&root, &file] {
            fs::set_permissions(path, Permissions::from_mode(0o757)).unwrap();
        }
        let error = resolve("x", &file, false).unwrap_err();
        assert_eq!(error.kind(), machinery::ErrorKind::Environment);
        let text = error.to_string();
        for path in [&root, &file] {
            assert!(text.contains(&format!("`chmod o-w {}`", path.display())), "{text}");
        }
        assert!(text.contains("--allow-insecure-plugins"), "{text}");
        assert_eq!(resolve("x", &file, true).unwrap(), file);
    }
}
