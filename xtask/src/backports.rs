//! Tests with a newer QEMU and libvirt than the system's.
//!
//! These are QEMU 10.0 and libvirt 11.3 from Debian's bookworm-backports. They are unpacked into the user's
//! cache folder, together with the libraries that this system lacks. Nothing is installed, and apt's own
//! lists and caches are unchanged.
//!
//! Debian compiles the paths of drivers, firmware and CPU descriptions into both. The tests therefore run in
//! a mount namespace of their own, where the unpacked files are mounted over /usr.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::{self, Archive, KEYRING};
use crate::run::{Context, Failure, Result, cache, is_root, output};

const RELEASE: &str = "bookworm-backports";

/// The sources of the packages and their dependencies.
const SOURCES: [(Archive, &str); 4] = [
    (Archive::Main, "bookworm"),
    (Archive::Main, "bookworm-updates"),
    (Archive::Security, "bookworm-security"),
    (Archive::Main, RELEASE),
];

/// Packages that are always unpacked: their versions must match each other.
const OWN: [&str; 18] = [
    "qemu-system-x86",
    "qemu-system-common",
    "qemu-system-data",
    "qemu-utils",
    "seabios",
    "ipxe-qemu",
    "libvirt0",
    "libvirt-common",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-common",
    "libvirt-daemon-log",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-driver-network",
    "libvirt-daemon-driver-nodedev",
    "libvirt-daemon-driver-nwfilter",
    "libvirt-daemon-driver-secret",
    "libvirt-daemon-driver-storage",
];

/// Debian 12 has these names at its root as links to folders below /usr; packages have them as folders.
const MERGED: [&str; 3] = ["bin", "lib", "sbin"];

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/backports.sh");

/// The programs that tests use. A plain user's path lacks the folder of libvirtd.
const PROGRAMS: [&str; 4] = ["qemu-system-x86_64", "qemu-img", "/usr/sbin/libvirtd", "virsh"];

/// Arguments with which QEMU loads all its modules.
const LOAD_MODULES: [&str; 7] = ["-machine", "none", "-nodefaults", "-display", "none", "-device", "help"];

/// The unpacked packages.
pub struct Backports {
    folder: PathBuf,
}

impl Backports {
    /// Returns the packages in the cache folder, and fetches them if they are missing.
    pub fn new() -> Result<Self> {
        try_namespace()?;
        let folder = cache("backports")?;
        let parent = folder.parent().unwrap_or(&folder);
        let what = || format!("cannot make {}", folder.display());
        fs::create_dir_all(parent).context(what)?;
        let lock = File::create(folder.with_added_extension("lock")).context(what)?;
        lock.lock().context(what)?;
        let backports = Self { folder };
        // An update of the system may have removed a library that the packages need.
        let versions = backports.versions().or_else(|_| backports.fetch())?;
        // A program of another folder in the path may come first.
        eprintln!("The tests will run with these:\n  {}", versions.join("\n  "));
        Ok(backports)
    }

    /// Returns `command` in a mount namespace of its own, with the unpacked files over /usr. Keeps the
    /// program, its arguments and its folder, but no variables of `command`.
    pub fn inside(&self, command: &Command) -> Command {
        let mut inside = namespace();
        inside.args(["sh", SCRIPT]).arg(&self.folder).args(as_oneself());
        inside.arg(command.get_program()).args(command.get_args());
        if let Some(folder) = command.get_current_dir() {
            inside.current_dir(folder);
        }
        // This variable would select another QEMU.
        inside.env_remove("CUCKOO_TEST_QEMU_DIR");
        inside
    }

    /// Returns the versions of the programs, if all programs run.
    fn versions(&self) -> Result<Vec<String>> {
        output(&mut self.inside(Command::new(PROGRAMS[0]).args(LOAD_MODULES)))?;
        let version = |program| {
            let said = output(&mut self.inside(Command::new(program).arg("--version")))?;
            Ok(format!("{program}: {}", said.lines().next().unwrap_or_default()))
        };
        PROGRAMS.into_iter().map(version).collect()
    }

    fn fetch(&self) -> Result<Vec<String>> {
        let folder = &self.folder;
        eprintln!("QEMU and libvirt are fetched from {RELEASE} into {}.", folder.display());
        let new = tempfile::tempdir_in(folder.parent().unwrap_or(folder));
        let new = new.context(|| format!("cannot make a folder beside {}", folder.display()))?;
        unpack(new.path())?;
        replace(new, folder)?;
        self.versions()
    }
}

/// Starts a command in a mount namespace of its own. A plain user becomes root there, because only root
/// mounts.
fn namespace() -> Command {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !is_root() {
        command.arg("--map-root-user");
    }
    command
}

/// Returns the command that turns a namespace's root back into the plain user. As root, libvirtd would start
/// as the system's.
fn as_oneself() -> Vec<String> {
    if is_root() {
        return Vec::new();
    }
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    vec!["unshare".to_owned(), format!("--map-user={user}"), format!("--map-group={group}")]
}

/// Fails, before anything is fetched, if this user cannot mount over /usr.
fn try_namespace() -> Result<()> {
    let mount = ["mount", "-t", "overlay", "overlay", "-o", "lowerdir=/usr/bin:/usr/share", "/usr"];
    output(namespace().args(mount)).map(drop).map_err(|failure| match failure {
        Failure::Message(said) => Failure::Message(format!(
            "cannot mount other files over /usr for the tests alone: {said}\n\
             Root may do this, except in most containers. Other users may do it with kernel 5.11 or newer, \
             if they may make user namespaces. The settings kernel.unprivileged_userns_clone, \
             kernel.apparmor_restrict_unprivileged_userns and user.max_user_namespaces can forbid that"
        )),
        failure @ Failure::Step(_) => failure,
    })
}

fn unpack(into: &Path) -> Result<()> {
    let apt = Apt::new()?;
    output(&mut apt.get(&["update"]))?;
    let mut packages: Vec<String> = OWN.map(str::to_owned).to_vec();
    packages.extend(apt.lacking_libraries()?);
    packages.sort_unstable();
    packages.dedup();
    for package in apt.download(&packages)? {
        output(Command::new("dpkg-deb").arg("-x").args([package.as_path(), into]))?;
    }
    MERGED.into_iter().try_for_each(|name| merge(&into.join(name), &into.join("usr").join(name)))
}

/// Moves the content of `from`, if it exists, into `into`.
fn merge(from: &Path, into: &Path) -> Result<()> {
    if !from.is_dir() {
        return Ok(());
    }
    let what = || format!("cannot move {} to {}", from.display(), into.display());
    fs::create_dir_all(into).context(what)?;
    output(Command::new("cp").arg("-a").args([from.join(".").as_path(), into]))?;
    fs::remove_dir_all(from).context(what)
}

fn replace(new: tempfile::TempDir, folder: &Path) -> Result<()> {
    let what = || format!("cannot replace {}", folder.display());
    if folder.exists() {
        fs::remove_dir_all(folder).context(what)?;
    }
    fs::set_permissions(new.path(), Permissions::from_mode(0o755)).context(what)?;
    fs::rename(new.path(), folder).context(what)?;
    // The folder no longer has its temporary name.
    let _ = new.keep();
    Ok(())
}

/// An apt-get with its own sources, lists and caches.
struct Apt {
    work: tempfile::TempDir,
}

impl Apt {
    fn new() -> Result<Self> {
        if !Path::new(KEYRING).is_file() {
            return Err(format!(
                "there is no {KEYRING} to verify Debian's packages with: install debian-archive-keyring"
            )
            .into());
        }
        let what = || "cannot prepare a folder for apt-get".to_owned();
        let work = tempfile::tempdir().context(what)?;
        for folder in ["lists/partial", "archives/partial", "debs"] {
            fs::create_dir_all(work.path().join(folder)).context(what)?;
        }
        let sources = SOURCES.map(|(archive, suite)| debian::source(archive, suite));
        fs::write(work.path().join("sources.list"), sources.concat()).context(what)?;
        Ok(Self { work })
    }

    fn get(&self, args: &[&str]) -> Command {
        let at = |name: &str| self.work.path().join(name).display().to_string();
        let mut command = Command::new("apt-get");
        command.env("LC_ALL", "C").current_dir(self.work.path().join("debs")).arg("-qq");
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::Cache={}", at("")),
            format!("Dir::Cache::archives={}", at("archives")),
            // Only this user can write to the folder; apt's own user could not.
            "APT::Sandbox::User=".to_owned(),
            "APT::Get::AllowUnauthenticated=false".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.args(args);
        command
    }

    /// Returns the libraries that an installation would add to this system.
    fn lacking_libraries(&self) -> Result<Vec<String>> {
        let mut args = vec!["install", "-s", "--no-install-recommends", "-t", RELEASE];
        args.extend(OWN);
        Ok(libraries(&output(&mut self.get(&args))?))
    }

    /// Downloads packages, and returns their files.
    fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        let mut args = vec!["download", "-t", RELEASE];
        args.extend(packages.iter().map(String::as_str));
        output(&mut self.get(&args))?;
        let debs = self.work.path().join("debs");
        let entries = fs::read_dir(&debs).context(|| format!("cannot list {}", debs.display()))?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    }
}

/// Returns the libraries in apt-get's simulation, whose lines are like `Inst name [old] (new …)`.
///
/// Other packages, such as another systemd, serve services that the tests do not start. Headers stay those of
/// the build.
fn libraries(simulation: &str) -> Vec<String> {
    let names = simulation.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    names.filter(|name| name.starts_with("lib") && !name.ends_with("-dev")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_apts_simulation() {
        let simulation = "NOTE: This is only a simulation!\nInst liburing2 (2.3-3 Debian:12 [amd64])\n\
                          Inst libvirt-dev [9.0.0] (11.3.0 backports [amd64]) []\n\
                          Inst systemd [252] (254 backports [amd64]) []\n\
                          Inst libsystemd0 [252] (254 backports [amd64]) []\nConf liburing2 (2.3-3)\n";
        assert_eq!(libraries(simulation), ["liburing2", "libsystemd0"]);
    }

    #[test]
    fn folders_at_the_root_are_merged_below_usr() {
        let root = tempfile::tempdir().unwrap();
        let (from, into) = (root.path().join("lib"), root.path().join("usr/lib"));
        fs::create_dir_all(from.join("udev")).unwrap();
        fs::write(from.join("udev/new"), "").unwrap();
        merge(&from, &into).unwrap();
        merge(&from, &into).unwrap();
        assert!(into.join("udev/new").is_file());
        assert!(!from.exists());
    }

    #[test]
    fn inside_keeps_program_arguments_and_folder() {
        let backports = Backports { folder: PathBuf::from("/cache/back ports") };
        let inside = backports.inside(Command::new("virsh").args(["list", "--all"]).current_dir("/tmp"));
        let words: Vec<_> = inside.get_args().map(|word| word.to_string_lossy()).collect();
        assert_eq!(inside.get_program(), "unshare");
        assert_eq!(inside.get_current_dir(), Some(Path::new("/tmp")));
        assert!(words.iter().any(|word| word == "/cache/back ports"), "{words:?}");
        assert!(words.ends_with(&["virsh".into(), "list".into(), "--all".into()]), "{words:?}");
    }
}
