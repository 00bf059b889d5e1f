//! Whether a plugin file may be loaded. Loading runs its code with the host's rights, so nobody may be
//! able to change it who does not have these rights anyway.
//!
//! ```text
//! searched:  /srv/plugins/libmachinery_qemu.so, a link to ../x/libmachinery_qemu-1.2.so
//! looked at: /   /srv   /srv/plugins   the link   /srv/x   the file
//! ```
//!
//! Who can write to a folder can replace what is in it, so every folder and every link on the way counts
//! like the file. Each has to belong to root or to the host's user, and nobody else may write to it.
//! Two groups are as good as these users: root's, and the user's private one, which has the user's name
//! and no other members (some systems let it write to all that the user makes).
//!
//! A folder like /tmp, in which everybody can make files but replace only his own (it has the sticky
//! bit), may be on the way. It may not hold the plugin, or a link to it: anybody could put another there
//! that the search would find first, such as a hard link to an old one.
//!
//! **Why a path is enough.** Steps are looked at from / on, and what is beyond a step that is in order
//! can only be replaced by those who are trusted. So the file at the resolved path stays the one that was
//! looked at, while it is hashed and loaded. Opening it once and loading `/proc/self/fd/N` would add nothing,
//! and cost: the library would have that name in the linker's messages, in debuggers and as its `$ORIGIN`.
//!
//! Access lists are not looked at. What one allows shows in the mode as the group's right, so the rule for
//! groups mostly holds for them too.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Component, Path, PathBuf};

use machinery::{Error, Result};
use nix::unistd::{Group, Uid, User};
use rustix::io::Errno;

/// As many links as the kernel follows on one way.
const MOST_LINKS: usize = 40;

const STICKY: u32 = 0o1000;
const WRITE_BY_GROUP: u32 = 0o020;
const WRITE_BY_OTHERS: u32 = 0o002;

/// Where the plugin file of that machinery really is, if it may be loaded. With `allow_insecure` it may be
/// although others can change it; the log tells so.
///
/// # Errors
/// Others can change it, with all the places where; or it is no file.
pub fn resolve(machinery: &str, path: &Path, allow_insecure: bool) -> Result<PathBuf> {
    let (real, steps) = way_to(path).map_err(|error| Error::io("look at the plugin", path, &error))?;
    if !real.is_file() {
        let reason = format!("cannot use {} as a plugin: it is no regular file", real.display());
        return Err(Error::configuration(reason).advice("Put the plugin's file there"));
    }
    let trusted = Trusted::by_this_host();
    let doubts: Vec<String> = steps.iter().flat_map(|step| trusted.doubts(step)).collect();
    if doubts.is_empty() {
        return Ok(real);
    }
    let why = doubts.join("; ");
    if !allow_insecure {
        let reason =
            format!("will not load {}, for others can have it run their code: {why}", path.display());
        return Err(Error::environment(reason)
            .advice("Put that right, or have it loaded all the same with --allow-insecure-plugins"));
    }
    tracing::warn!(machinery, plugin = %path.display(), why, "loaded, though others can have it run their code");
    Ok(real)
}

/// A folder, a link or a file on the way to a plugin, and who can change it.
#[derive(Debug)]
struct Step {
    path: PathBuf,
    what: What,
    uid: u32,
    gid: u32,
    mode: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// One that is only passed.
    Folder,
    /// The folder in which the plugin, or a link to it, has its name.
    Holder,
    Link,
    File,
}

impl Step {
    fn at(path: PathBuf) -> io::Result<Self> {
        let found = path.symlink_metadata()?;
        let what = match found.file_type() {
            kind if kind.is_dir() => What::Folder,
            kind if kind.is_symlink() => What::Link,
            _ => What::File,
        };
        Ok(Step { path, what, uid: found.uid(), gid: found.gid(), mode: found.mode() & 0o7777 })
    }
}

/// The path without links, and all that is passed on the way there, from `/` on.
fn way_to(path: &Path) -> io::Result<(PathBuf, Vec<Step>)> {
    let mut steps: Vec<Step> = Vec::new();
    let mut links = 0;
    let mut here = PathBuf::new();
    let mut ahead = backwards(&path::absolute(path)?);
    while let Some(part) = ahead.pop() {
        if part == ".." {
            here.pop();
            continue;
        }
        if ahead.is_empty()
            && let Some(step) = steps.iter_mut().find(|step| step.path == here)
        {
            step.what = What::Holder;
        }
        let step = Step::at(here.join(part))?;
        if step.what == What::Link {
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::LOOP.into());
            }
            ahead.extend(backwards(&step.path.read_link()?));
        } else {
            here.clone_from(&step.path);
        }
        if steps.iter().all(|known| known.path != step.path) {
            steps.push(step);
        }
    }
    Ok((here, steps))
}

/// The parts of a path, the first one last. That of an absolute path is `/`.
fn backwards(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter(|part| *part != Component::CurDir);
    parts.map(|part| part.as_os_str().to_owned()).collect()
}

/// Who may have written a plugin.
struct Trusted {
    users: Vec<u32>,
    groups: Vec<u32>,
}

impl Trusted {
    fn by_this_host() -> Self {
        let user = Uid::effective();
        // In a namespace that does not know root, its files seem to be somebody else's. Who owns `/` can
        // replace everything anyway.
        let root = Path::new("/").metadata().map_or(0, |found| found.uid());
        let groups = [0].into_iter().chain(private_group(user)).collect();
        Trusted { users: vec![0, user.as_raw(), root], groups }
    }

    /// Why this step lets others in, and how to put that right.
    fn doubts(&self, step: &Step) -> Vec<String> {
        let Step { path, what, uid, gid, mode } = step;
        let path = path.display();
        let mut doubts = Vec::new();
        if !self.users.contains(uid) {
            doubts.push(format!(
                "{path} belongs to the user {uid}, who is neither root nor the host's user (`chown -h root {path}`)"
            ));
        }
        // A link's mode says nothing, and what is passed in a sticky folder is its owner's alone.
        if *what == What::Link || *what == What::Folder && mode & STICKY != 0 {
            return doubts;
        }
        let advice = |mode: &str| match what {
            What::Holder if step.mode & STICKY != 0 => "give the plugin a folder of its own".to_owned(),
            _ => format!("`chmod {mode} {path}`"),
        };
        if mode & WRITE_BY_GROUP != 0 && !self.groups.contains(gid) {
            doubts.push(format!("the group {gid} can write to {path}, mode {mode:04o} ({})", advice("g-w")));
        }
        if mode & WRITE_BY_OTHERS != 0 {
            doubts.push(format!("everybody can write to {path}, mode {mode:04o} ({})", advice("o-w")));
        }
        doubts
    }
}

/// The user's first group, if that is private.
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

    /// What is wrong with such a step, for a host of the user 1000, whose private group is 1001.
    fn doubts(what: What, uid: u32, gid: u32, mode: u32) -> String {
        let trusted = Trusted { users: vec![0, 1000], groups: vec![0, 1001] };
        trusted.doubts(&Step { path: "/p".into(), what, uid, gid, mode }).join("; ")
    }

    #[test]
    fn root_and_the_hosts_user_may_write() {
        for what in [What::Folder, What::Holder, What::File] {
            for (uid, gid, mode) in
                [(0, 0, 0o755), (1000, 50, 0o755), (0, 0, 0o775), (1000, 1001, 0o2775), (0, 1001, 0o775)]
            {
                assert_eq!(doubts(what, uid, gid, mode), "", "{what:?} {uid} {gid} {mode:o}");
            }
        }
    }

    #[test]
    fn nobody_else_may() {
        for what in [What::Folder, What::Holder, What::File] {
            let owner = doubts(what, 33, 0, 0o755);
            assert!(owner.contains("/p belongs to the user 33,") && owner.contains("`chown"), "{owner}");
            let group = doubts(what, 1000, 50, 0o775);
            assert!(group.contains("the group 50 can") && group.contains("`chmod g-w /p`"), "{group}");
            let others = doubts(what, 0, 0, 0o757);
            assert!(others.contains("everybody can") && others.contains("`chmod o-w /p`"), "{others}");
            assert_eq!(doubts(what, 33, 50, 0o777).split("; ").count(), 3);
        }
    }

    #[test]
    fn a_sticky_folder_may_be_passed_and_may_not_hold() {
        assert_eq!(doubts(What::Folder, 0, 0, 0o1777), "");
        assert_eq!(doubts(What::Folder, 0, 50, 0o1775), "");
        // Its owner is no better for it.
        assert!(doubts(What::Folder, 33, 0, 0o1777).contains("user 33"));
        let holder = doubts(What::Holder, 0, 0, 0o1777);
        assert!(holder.contains("everybody can") && holder.contains("a folder of its own"), "{holder}");
        assert!(doubts(What::Holder, 0, 50, 0o1775).contains("group 50"));
        // On a file the bit says nothing.
        assert!(doubts(What::File, 0, 0, 0o1666).contains("`chmod o-w /p`"));
    }

    #[test]
    fn of_a_link_only_the_owner_counts() {
        assert_eq!(doubts(What::Link, 1000, 50, 0o777), "");
        assert!(doubts(What::Link, 33, 50, 0o777).contains("`chown -h"));
    }

    #[test]
    fn a_private_group_has_the_users_name_and_no_other_members() {
        let members = |names: &[&str]| names.iter().copied().map(str::to_owned).collect::<Vec<_>>();
        assert!(is_private("ann", "ann", &members(&[])));
        assert!(is_private("ann", "ann", &members(&["ann"])));
        assert!(!is_private("ann", "ann", &members(&["ann", "bob"])));
        assert!(!is_private("ann", "users", &members(&[])));
    }

    /// A folder, by its path without links.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        (folder, path)
    }

    #[test]
    fn all_that_is_passed_counts() {
        let (_folder, root) = folder();
        for made in ["plugins", "shelf", "deep/er"] {
            fs::create_dir_all(root.join(made)).unwrap();
        }
        fs::write(root.join("deep/er/real.so"), "").unwrap();
        symlink("../shelf/middle.so", root.join("plugins/first.so")).unwrap();
        symlink(root.join("short/er/./real.so"), root.join("shelf/middle.so")).unwrap();
        symlink("deep", root.join("short")).unwrap();
        let (real, steps) = way_to(&root.join("plugins/../plugins/first.so")).unwrap();
        assert_eq!(real, root.join("deep/er/real.so"));
        let first: Vec<_> = steps.iter().map(|step| step.path.clone()).take(2).collect();
        assert_eq!(first, root.ancestors().collect::<Vec<_>>().into_iter().rev().take(2).collect::<Vec<_>>());
        let below = steps.iter().filter_map(|step| Some((step.path.strip_prefix(&root).ok()?, step.what)));
        let below: Vec<_> = below.map(|(path, what)| (path.to_str().unwrap(), what)).collect();
        let expected = [
            ("", What::Folder),
            ("plugins", What::Holder),
            ("plugins/first.so", What::Link),
            ("shelf", What::Holder),
            ("shelf/middle.so", What::Link),
            ("short", What::Link),
            ("deep", What::Folder),
            ("deep/er", What::Holder),
            ("deep/er/real.so", What::File),
        ];
        assert_eq!(below, expected);
    }

    #[test]
    fn links_that_lead_nowhere_or_round_end() {
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
    fn only_a_file_is_a_plugin() {
        let (_folder, root) = folder();
        fs::create_dir(root.join("folder.so")).unwrap();
        mknodat(CWD, root.join("pipe.so"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        for name in ["folder.so", "pipe.so"] {
            let error = resolve("x", &root.join(name), true).unwrap_err().to_string();
            assert!(error.contains("no regular file"), "{error}");
        }
    }

    #[test]
    fn every_place_where_others_can_write_is_told_at_once() {
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
