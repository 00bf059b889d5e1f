//! Trust in a plugin file: only root and the host's user may be able to change it.
//!
//! Loading a plugin runs its code with the host's rights. Nobody else may be able to change that code.
//!
//! ```text
//! found:   /srv/plugins/libmachinery_qemu.so, a link to ../x/libmachinery_qemu-1.2.so
//! checked: /   /srv   /srv/plugins   the link   /srv/x   the file
//! ```
//!
//! A user who can write to a folder can replace its files. So every folder and every link on the path counts
//! like the file. Each must belong to root or to the host's user, and no other user may write to it. Two
//! groups are trusted as well: root's, and the user's private group. A private group has the user's name and
//! no other members; some systems let it write to all files of the user.
//!
//! A sticky folder, such as /tmp, lets everybody create files and replace only their own. It may be passed on
//! the path. It may not hold the plugin or a link to it: anybody could add another file that the search
//! finds first, such as a hard link to an old plugin.
//!
//! **Why checking the path is enough.** The components are checked from / on. A component below a trusted one
//! can only be replaced by trusted users. So the file at the resolved path stays the checked one while it is
//! hashed and loaded. Loading `/proc/self/fd/N` instead would not be safer. The library would have that name
//! in the linker's messages, in debuggers and as its `$ORIGIN`.
//!
//! Access lists are not read. Their mask shows in the mode as the group's right, so the rule for groups
//! mostly covers them.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Component, Path, PathBuf};

use machinery::{Error, Result};
use nix::unistd::{Group, Uid, User};
use rustix::io::Errno;

/// The number of links that the kernel follows on one path.
const MAX_LINKS: usize = 40;

const STICKY: u32 = 0o1000;
const WRITE_BY_GROUP: u32 = 0o020;
const WRITE_BY_OTHERS: u32 = 0o002;

/// Resolves all links of a machinery's plugin path and expects that only trusted users can change the file.
/// With `allow_insecure`, an untrusted file causes only a warning in the log.
///
/// # Errors
/// Other users can change the file; the error names every place. Or the path leads to no regular file.
pub fn resolve(machinery: &str, path: &Path, allow_insecure: bool) -> Result<PathBuf> {
    let (real, components) =
        components(path).map_err(|error| Error::io("look at the plugin", path, &error))?;
    if !real.is_file() {
        let reason = format!("cannot use {} as a plugin: it is no regular file", real.display());
        return Err(Error::configuration(reason).advice("Put the plugin's file there"));
    }
    let trusted = Trusted::by_this_host();
    let issues: Vec<String> = components.iter().flat_map(|component| trusted.issues(component)).collect();
    if issues.is_empty() {
        return Ok(real);
    }
    let why = issues.join("; ");
    if !allow_insecure {
        let reason = format!("refusing to load {}: other users could modify it: {why}", path.display());
        return Err(Error::environment(reason)
            .advice("Correct the owners and modes, or allow the plugin with --allow-insecure-plugins"));
    }
    tracing::warn!(machinery, plugin = %path.display(), why, "loading a plugin that other users could modify");
    Ok(real)
}

/// A folder, a link or a file on the path to a plugin, and the users who can change it.
#[derive(Debug)]
struct PathComponent {
    path: PathBuf,
    kind: Kind,
    uid: u32,
    gid: u32,
    mode: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A folder that is only passed.
    Folder,
    /// A folder that holds the plugin or a link to it.
    ParentDir,
    Link,
    File,
}

impl PathComponent {
    fn at(path: PathBuf) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => Kind::Folder,
            kind if kind.is_symlink() => Kind::Link,
            _ => Kind::File,
        };
        let (uid, gid, mode) = (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777);
        Ok(PathComponent { path, kind, uid, gid, mode })
    }
}

/// Follows a path from `/` on. Returns the path without links and every component that was passed.
fn components(path: &Path) -> io::Result<(PathBuf, Vec<PathComponent>)> {
    let mut passed: Vec<PathComponent> = Vec::new();
    let mut links = 0;
    let mut here = PathBuf::new();
    let mut ahead = reversed_parts(&path::absolute(path)?);
    while let Some(part) = ahead.pop() {
        if part == ".." {
            here.pop();
            continue;
        }
        if ahead.is_empty()
            && let Some(parent) = passed.iter_mut().find(|component| component.path == here)
        {
            parent.kind = Kind::ParentDir;
        }
        let component = PathComponent::at(here.join(part))?;
        if component.kind == Kind::Link {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP.into());
            }
            ahead.extend(reversed_parts(&component.path.read_link()?));
        } else {
            here.clone_from(&component.path);
        }
        if passed.iter().all(|known| known.path != component.path) {
            passed.push(component);
        }
    }
    Ok((here, passed))
}

/// Returns the parts of a path, the first one last. The first part of an absolute path is `/`.
fn reversed_parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter(|part| *part != Component::CurDir);
    parts.map(|part| part.as_os_str().to_owned()).collect()
}

/// The users and groups that may be able to write a plugin.
struct Trusted {
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Trusted {
    fn by_this_host() -> Self {
        let user = Uid::effective();
        // In a user namespace without root, root's files belong to another user id. The owner of `/` can
        // replace everything anyway.
        let root = Path::new("/").metadata().map_or(0, |found| found.uid());
        let groups = [0].into_iter().chain(private_group(user)).collect();
        Trusted { users: vec![0, user.as_raw(), root], groups }
    }

    /// Returns the reasons why other users can change this component, each with the command that corrects it.
    fn issues(&self, component: &PathComponent) -> Vec<String> {
        let PathComponent { path, kind, uid, gid, mode } = component;
        let path = path.display();
        let mut issues = Vec::new();
        if !self.users.contains(uid) {
            issues.push(format!(
                "{path} belongs to the user {uid}, who is neither root nor the host's user (`chown -h root {path}`)"
            ));
        }
        // The mode of a link means nothing. In a sticky folder only the owner can replace a file.
        if *kind == Kind::Link || *kind == Kind::Folder && mode & STICKY != 0 {
            return issues;
        }
        let advice = |change: &str| match kind {
            Kind::ParentDir if mode & STICKY != 0 => "give the plugin a folder of its own".to_owned(),
            _ => format!("`chmod {change} {path}`"),
        };
        if mode & WRITE_BY_GROUP != 0 && !self.groups.contains(gid) {
            issues.push(format!("the group {gid} can write to {path}, mode {mode:04o} ({})", advice("g-w")));
        }
        if mode & WRITE_BY_OTHERS != 0 {
            issues.push(format!("everybody can write to {path}, mode {mode:04o} ({})", advice("o-w")));
        }
        issues
    }
}

/// Returns the primary group of the user, if it is private.
fn private_group(user: Uid) -> Option<u32> {
    let user = User::from_uid(user).ok()??;
    let group = Group::from_gid(user.gid).ok()??;
    is_private(&user.name, &group.name, &group.mem).then_some(group.gid.as_raw())
}

fn is_private(user: &str, group: &str, members: &[String]) -> bool {
    group == user && members.iter().all(|member| member == user)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    /// Returns the issues of such a component for a host of user 1000 with the private group 1001.
    fn issues(kind: Kind, uid: u32, gid: u32, mode: u32) -> String {
        let trusted = Trusted { users: vec![0, 1000], groups: vec![0, 1001] };
        trusted.issues(&PathComponent { path: "/p".into(), kind, uid, gid, mode }).join("; ")
    }

    #[test]
    fn component_is_trusted_when_only_root_and_the_hosts_user_may_write() {
        for kind in [Kind::Folder, Kind::ParentDir, Kind::File] {
            for (uid, gid, mode) in
                [(0, 0, 0o755), (1000, 50, 0o755), (0, 0, 0o775), (1000, 1001, 0o2775), (0, 1001, 0o775)]
            {
                assert_eq!(issues(kind, uid, gid, mode), "", "{kind:?} {uid} {gid} {mode:o}");
            }
        }
    }

    #[test]
    fn component_has_an_issue_when_others_may_write() {
        for kind in [Kind::Folder, Kind::ParentDir, Kind::File] {
            let owner = issues(kind, 33, 0, 0o755);
            assert!(owner.contains("/p belongs to the user 33,") && owner.contains("`chown"), "{owner}");
            let group = issues(kind, 1000, 50, 0o775);
            assert!(group.contains("the group 50 can") && group.contains("`chmod g-w /p`"), "{group}");
            let others = issues(kind, 0, 0, 0o757);
            assert!(others.contains("everybody can") && others.contains("`chmod o-w /p`"), "{others}");
            assert_eq!(issues(kind, 33, 50, 0o777).split("; ").count(), 3);
        }
    }

    #[test]
    fn sticky_folder_may_be_passed_and_may_not_be_the_parent() {
        assert_eq!(issues(Kind::Folder, 0, 0, 0o1777), "");
        assert_eq!(issues(Kind::Folder, 0, 50, 0o1775), "");
        // The owner is checked all the same.
        assert!(issues(Kind::Folder, 33, 0, 0o1777).contains("user 33"));
        let parent = issues(Kind::ParentDir, 0, 0, 0o1777);
        assert!(parent.contains("everybody can") && parent.contains("a folder of its own"), "{parent}");
        assert!(issues(Kind::ParentDir, 0, 50, 0o1775).contains("group 50"));
        // The bit means nothing on a file.
        assert!(issues(Kind::File, 0, 0, 0o1666).contains("`chmod o-w /p`"));
    }

    #[test]
    fn link_is_checked_by_its_owner_only() {
        assert_eq!(issues(Kind::Link, 1000, 50, 0o777), "");
        assert!(issues(Kind::Link, 33, 50, 0o777).contains("`chown -h"));
    }

    #[test]
    fn private_group_has_the_users_name_and_no_other_members() {
        let members = |names: &[&str]| names.iter().copied().map(str::to_owned).collect::<Vec<_>>();
        assert!(is_private("ann", "ann", &members(&[])));
        assert!(is_private("ann", "ann", &members(&["ann"])));
        assert!(!is_private("ann", "ann", &members(&["ann", "bob"])));
        assert!(!is_private("ann", "users", &members(&[])));
    }

    /// Makes a temporary folder and returns its path without links.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        (folder, path)
    }

    #[test]
    fn components_include_every_folder_and_link_on_the_path() {
        let (_folder, root) = folder();
        for made in ["plugins", "shelf", "deep/er"] {
            fs::create_dir_all(root.join(made)).unwrap();
        }
        fs::write(root.join("deep/er/real.so"), "").unwrap();
        symlink("../shelf/middle.so", root.join("plugins/first.so")).unwrap();
        symlink(root.join("short/er/./real.so"), root.join("shelf/middle.so")).unwrap();
        symlink("deep", root.join("short")).unwrap();
        let (real, passed) = components(&root.join("plugins/../plugins/first.so")).unwrap();
        assert_eq!(real, root.join("deep/er/real.so"));
        let first: Vec<_> = passed.iter().map(|component| component.path.clone()).take(2).collect();
        assert_eq!(first, root.ancestors().collect::<Vec<_>>().into_iter().rev().take(2).collect::<Vec<_>>());
        let below = passed
            .iter()
            .filter_map(|component| Some((component.path.strip_prefix(&root).ok()?, component.kind)));
        let below: Vec<_> = below.map(|(path, kind)| (path.to_str().unwrap(), kind)).collect();
        let expected = [
            ("", Kind::Folder),
            ("plugins", Kind::ParentDir),
            ("plugins/first.so", Kind::Link),
            ("shelf", Kind::ParentDir),
            ("shelf/middle.so", Kind::Link),
            ("short", Kind::Link),
            ("deep", Kind::Folder),
            ("deep/er", Kind::ParentDir),
            ("deep/er/real.so", Kind::File),
        ];
        assert_eq!(below, expected);
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
