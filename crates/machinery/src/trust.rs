//! Trust in a file: only root and the host's user may be able to change it.
//!
//! A plugin, a program or a configuration file decides which code runs with the host's rights. Nobody else may be able
//! to change it.
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
//! the path. It may not hold the file or a link to it: anybody could add another file that a search
//! finds first, such as a hard link to an old plugin.
//!
//! **Why checking the path is enough.** The components are checked from / on. A component below a trusted one
//! can only be replaced by trusted users. So the file at the resolved path stays the checked one while it is
//! hashed and loaded. Loading `/proc/self/fd/N` instead would not be safer. The library would have that name
//! in the linker's messages, in debuggers and as its `$ORIGIN`.
//!
//! **User namespaces.** The kernel shows one number, the overflow user, for every owner that the namespace does not
//! map. There, root and a stranger look alike. So no file, no link, and no folder that holds one is trusted if it
//! belongs to that user. Folders further above may belong to it, because nothing below `/home` could be used without
//! root. Source: user_namespaces(7).
//!
//! Access lists are not read. Their mask shows in the mode as the group's right, so the rule for groups
//! mostly covers them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Component, Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::unistd::{Group, Uid, User};

use crate::{Error, Result};

/// The number of links that the kernel follows on one path.
const MAX_LINKS: usize = 40;

const STICKY: u32 = 0o1000;
const WRITE_BY_GROUP: u32 = 0o020;
const WRITE_BY_OTHERS: u32 = 0o002;

/// The overflow user, unless the kernel says otherwise.
const OVERFLOW_USER: u32 = 65_534;

/// A path without links, and the reasons why other users could change what is there.
#[derive(Debug)]
pub struct Examined {
    /// The path, with all links resolved.
    pub path: PathBuf,
    issues: Vec<Issue>,
}

/// A reason why a component of a path is not trusted.
#[derive(Debug)]
struct Issue {
    text: String,
    /// True if the owner is unknown and may be root.
    is_unknown: bool,
}

/// Resolves all links of a path, and examines every component.
///
/// # Errors
/// Nothing is there, or the path cannot be followed.
pub fn examine(path: &Path) -> io::Result<Examined> {
    Trusted::by_this_host().examine(path, false)
}

impl Examined {
    /// Returns the reasons why other users could change what is at the path, each with the command that corrects it.
    pub fn reasons(&self) -> Option<String> {
        let texts: Vec<&str> = self.issues.iter().map(|issue| issue.text.as_str()).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    /// Reports whether other users could change it for certain: not only by an owner that may be root.
    fn is_certain(&self) -> bool {
        self.issues.iter().any(|issue| !issue.is_unknown)
    }
}

/// Expects that only root and the host's user can change a file or a folder, and returns its path without links. A
/// path at which nothing is yet is judged by the folders that exist.
///
/// A plain user's host accepts owners that may be root, with a warning in the log. In a user namespace without root,
/// every program of the system has such an owner.
///
/// # Errors
/// Other users can change it; the error names every place, and the command that corrects it.
pub fn expect_trusted(path: &Path) -> Result<PathBuf> {
    let examined = Trusted::by_this_host().examine(path, true);
    let examined = examined.map_err(|error| Error::io("look at", path, &error))?;
    let Some(why) = examined.reasons() else { return Ok(examined.path) };
    if !Uid::effective().is_root() && !examined.is_certain() {
        tracing::warn!(path = %path.display(), why, "using a file of an unknown owner");
        return Ok(examined.path);
    }
    let reason = format!("refusing to use {}: other users could modify it: {why}", path.display());
    Err(Error::configuration(reason)
        .advice("Compare it with the original, then correct the owners and modes"))
}

/// A folder, a link or a file on the path, and the users who can change it.
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
    /// A folder that holds the file or a link to it, or that is the end of the path.
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

/// Follows a path from `/` on. Returns the path without links and every component that was passed. With `may_lack`, a
/// path whose end does not exist leads to the last folder that does.
fn components(path: &Path, may_lack: bool) -> io::Result<(PathBuf, Vec<PathComponent>)> {
    let mut passed: Vec<PathComponent> = Vec::new();
    let mut links = 0;
    let mut here = PathBuf::new();
    let mut ahead = reversed_parts(&path::absolute(path)?);
    while let Some(part) = ahead.pop() {
        if part == ".." {
            here.pop();
            continue;
        }
        let component = match PathComponent::at(here.join(&part)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && may_lack => {
                set_parent(&mut passed, &here);
                here.push(part);
                here.extend(ahead.into_iter().rev());
                return Ok((here, passed));
            }
            component => component?,
        };
        if component.kind == Kind::Link {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP.into());
            }
        }
        if ahead.is_empty() && component.kind != Kind::Folder {
            set_parent(&mut passed, &here);
        }
        if component.kind == Kind::Link {
            ahead.extend(reversed_parts(&component.path.read_link()?));
        } else {
            here.clone_from(&component.path);
        }
        if passed.iter().all(|known| known.path != component.path) {
            passed.push(component);
        }
    }
    set_parent(&mut passed, &here);
    Ok((here, passed))
}

/// Records that the folder at `path`, if it is one, holds the file.
fn set_parent(passed: &mut [PathComponent], path: &Path) {
    let folder = passed.iter_mut().find(|component| component.path == path && component.kind == Kind::Folder);
    folder.into_iter().for_each(|folder| folder.kind = Kind::ParentDir);
}

/// Returns the parts of a path, the first one last. The first part of an absolute path is `/`.
fn reversed_parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter(|part| *part != Component::CurDir);
    parts.map(|part| part.as_os_str().to_owned()).collect()
}

/// The users and groups that may be able to write a file.
struct Trusted {
    users: Vec<u32>,
    groups: Vec<u32>,
    /// The user that the kernel shows for an owner that it cannot map.
    overflow_user: u32,
    /// True if this user namespace does not map all owners.
    has_unmapped: bool,
}

impl Trusted {
    /// Returns what this process trusts. A lookup of users can take long, so there is one.
    fn by_this_host() -> &'static Self {
        static TRUSTED: OnceLock<Trusted> = OnceLock::new();
        TRUSTED.get_or_init(Trusted::of_this_process)
    }

    fn of_this_process() -> Self {
        let user = Uid::effective();
        let overflow_user = read_number("/proc/sys/kernel/overflowuid").unwrap_or(OVERFLOW_USER);
        let overflow_group = read_number("/proc/sys/kernel/overflowgid").unwrap_or(OVERFLOW_USER);
        let groups = [0].into_iter().chain(private_group(user).filter(|group| *group != overflow_group));
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        Trusted {
            users: vec![0, user.as_raw()],
            groups: groups.collect(),
            overflow_user,
            has_unmapped: has_unmapped(&map),
        }
    }

    fn examine(&self, path: &Path, may_lack: bool) -> io::Result<Examined> {
        let (path, components) = components(path, may_lack)?;
        let issues = components.iter().flat_map(|component| self.issues(component)).collect();
        Ok(Examined { path, issues })
    }

    /// Returns the reasons why other users can change this component, each with the command that corrects it.
    fn issues(&self, component: &PathComponent) -> Vec<Issue> {
        let PathComponent { path, kind, gid, mode, .. } = component;
        let path = path.display();
        let mut issues: Vec<Issue> = self.owner_issue(component).into_iter().collect();
        // The mode of a link means nothing. In a sticky folder only the owner can replace a file.
        if *kind == Kind::Link || *kind == Kind::Folder && mode & STICKY != 0 {
            return issues;
        }
        let advice = |change: &str| match kind {
            Kind::ParentDir if mode & STICKY != 0 => "use a folder of its own".to_owned(),
            _ => format!("`chmod {change} {path}`"),
        };
        let mut add = |text: String| issues.push(Issue { text, is_unknown: false });
        if mode & WRITE_BY_GROUP != 0 && !self.groups.contains(gid) {
            add(format!("the group {gid} can write to {path}, mode {mode:04o} ({})", advice("g-w")));
        }
        if mode & WRITE_BY_OTHERS != 0 {
            add(format!("everybody can write to {path}, mode {mode:04o} ({})", advice("o-w")));
        }
        issues
    }

    fn owner_issue(&self, PathComponent { path, kind, uid, .. }: &PathComponent) -> Option<Issue> {
        let path = path.display();
        if *uid != self.overflow_user {
            let text = format!(
                "{path} belongs to the user {uid}, who is neither root nor the host's user (`chown -h root {path}`)"
            );
            return (!self.users.contains(uid)).then_some(Issue { text, is_unknown: false });
        }
        let shown = format!("{path} belongs to the user {uid}");
        if !self.has_unmapped {
            let text = format!(
                "{shown}, which the kernel also shows for unknown owners (`chown -h root {path}`; a host that runs as \
                 this user needs one of its own)"
            );
            return Some(Issue { text, is_unknown: false });
        }
        (*kind != Kind::Folder).then(|| Issue {
            text: format!(
                "{shown}, which the kernel shows for every owner that this user namespace does not map, so anybody may \
                 own it (run the host outside of the namespace, map the owner, or use a copy that belongs to the \
                 host's user)"
            ),
            is_unknown: true,
        })
    }
}

fn read_number(path: &str) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Reports whether a map of users leaves some out. The first user namespace maps all of them. Source:
/// user_namespaces(7).
fn has_unmapped(uid_map: &str) -> bool {
    let lengths = uid_map.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok());
    // A host without /proc is judged as if it were in no namespace, which is stricter.
    !uid_map.is_empty() && lengths.sum::<u64>() < u64::from(u32::MAX)
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

    use super::*;

    /// Returns the issues of such a component for a host of user 1000 with the private group 1001.
    fn issues(kind: Kind, uid: u32, gid: u32, mode: u32) -> String {
        issues_in(false, kind, uid, gid, mode)
    }

    /// Returns the issues in a user namespace that may not map all owners.
    fn issues_in(has_unmapped: bool, kind: Kind, uid: u32, gid: u32, mode: u32) -> String {
        let (users, groups) = (vec![0, 1000], vec![0, 1001]);
        let trusted = Trusted { users, groups, overflow_user: OVERFLOW_USER, has_unmapped };
        let issues = trusted.issues(&PathComponent { path: "/p".into(), kind, uid, gid, mode });
        issues.into_iter().map(|issue| issue.text).collect::<Vec<_>>().join("; ")
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
        let (real, passed) = components(&root.join("plugins/../plugins/first.so"), false).unwrap();
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
    fn overflow_user_is_never_trusted_with_a_file() {
        for kind in [Kind::ParentDir, Kind::Link, Kind::File] {
            let unmapped = issues_in(true, kind, OVERFLOW_USER, 0, 0o755);
            assert!(unmapped.contains("does not map") && unmapped.contains("map the owner"), "{unmapped}");
            let nobody = issues(kind, OVERFLOW_USER, 0, 0o755);
            assert!(nobody.contains("the user 65534") && nobody.contains("`chown"), "{nobody}");
        }
        // Root's folders above belong to that user as well.
        assert_eq!(issues_in(true, Kind::Folder, OVERFLOW_USER, OVERFLOW_USER, 0o755), "");
        assert!(issues_in(true, Kind::Folder, OVERFLOW_USER, OVERFLOW_USER, 0o775).contains("group 65534"));
        assert!(issues(Kind::Folder, OVERFLOW_USER, 0, 0o755).contains("the user 65534"));
        assert!(issues_in(true, Kind::Folder, 33, 0, 0o755).contains("the user 33,"));
    }

    #[test]
    fn namespace_has_unmapped_owners_unless_its_map_is_complete() {
        assert!(!has_unmapped("         0          0 4294967295\n"));
        assert!(!has_unmapped(""));
        assert!(has_unmapped("      1000          0          1\n"));
        assert!(has_unmapped("0 1000 1\n1 100000 65536\n"));
    }

    #[test]
    fn path_leads_to_the_last_existing_folder_when_its_end_is_missing() {
        let (_folder, root) = folder();
        fs::create_dir(root.join("a")).unwrap();
        let (path, passed) = components(&root.join("a/b/c"), true).unwrap();
        assert_eq!(path, root.join("a/b/c"));
        let last = passed.last().unwrap();
        assert_eq!((last.path.clone(), last.kind), (root.join("a"), Kind::ParentDir));
        assert!(components(&root.join("a/b/c"), false).is_err());
    }

    #[test]
    fn folder_at_the_end_of_a_path_counts_like_a_parent() {
        let (_folder, root) = folder();
        fs::create_dir(root.join("a")).unwrap();
        fs::set_permissions(&root, Permissions::from_mode(0o1777)).unwrap();
        assert_eq!(expect_trusted(&root.join("a")).unwrap(), root.join("a"));
        fs::write(root.join("file"), "").unwrap();
        for path in [root.clone(), root.join("file"), root.join("none")] {
            let text = expect_trusted(&path).unwrap_err().to_string();
            assert!(text.contains("use a folder of its own"), "{text}");
        }
    }

    #[test]
    fn examination_fails_when_a_link_is_dangling_or_circular() {
        let (_folder, root) = folder();
        symlink("b.so", root.join("a.so")).unwrap();
        symlink("a.so", root.join("b.so")).unwrap();
        symlink("none.so", root.join("c.so")).unwrap();
        for name in ["a.so", "c.so"] {
            assert!(examine(&root.join(name)).is_err());
        }
    }

    #[test]
    fn error_names_each_place_where_others_can_write() {
        let (_folder, root) = folder();
        let file = root.join("x.yaml");
        fs::write(&file, "").unwrap();
        assert_eq!(expect_trusted(&file).unwrap(), file);
        for path in [&root, &file] {
            fs::set_permissions(path, Permissions::from_mode(0o757)).unwrap();
        }
        let error = expect_trusted(&file).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Configuration);
        let text = error.to_string();
        assert!(text.starts_with(&format!("refusing to use {}: ", file.display())), "{text}");
        for path in [&root, &file] {
            assert!(text.contains(&format!("`chmod o-w {}`", path.display())), "{text}");
        }
    }
}
