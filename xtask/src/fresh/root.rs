//! A root folder for commands, with a minimal Debian in it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use rustix::process::Signal;

use crate::debian::{self, Archive, KEYRING};
use crate::deny;
use crate::process::signal_at_our_end;
use crate::run::{Context, Failure, Result, cache, is_root, output, step, step_as, xtask_arguments};
use crate::system_packages;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/fresh/enter.sh");
const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The packages of the base besides those that every Debian has.
const COMPILER: &str = "gcc,libc6-dev";

/// The path of the clone within the root.
const CLONE: &str = "/root/cuckoo-machinery";

const RUSTUP_HOME: &str = "/opt/rustup";
const CARGO_HOME: &str = "/opt/cargo";
/// Tools of this system that take minutes to build, and their paths in the root.
const TOOLS: [(&str, &str); 2] =
    [("cargo-nextest", "/usr/local/bin/cargo-nextest"), ("cargo-deny", "/usr/local/bin/cargo-deny")];
const PATH: &str = "/opt/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Files of this system that configure its network, except apt's own settings. A file that does not exist is
/// not needed.
const NETWORK: [&str; 6] = [
    "etc/hosts",
    "etc/resolv.conf",
    "etc/apt/auth.conf",
    "etc/apt/auth.conf.d",
    "etc/ssl/certs/ca-certificates.crt",
    "usr/local/share/ca-certificates",
];

/// Environment variables that are kept. The names of proxies are also written in capitals.
const VARIABLES: [&str; 14] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "RUSTUP_TOOLCHAIN",
    "RUSTUP_AUTO_INSTALL",
    "RUST_BACKTRACE",
    deny::VARIABLE,
    "CARGO_BUILD_JOBS",
    "CI",
    "NO_COLOR",
    "TERM",
];

/// Prefixes of environment variables that are kept: the configuration of cargo and its test runner.
const PREFIXES: [&str; 6] =
    ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_SOURCE_", "CARGO_TERM_", "NEXTEST_"];

/// A copy of the base, with a clone of the checkout. Only one root of a release is in use at a time.
pub struct Root {
    release: &'static str,
    folder: PathBuf,
    /// Files and folders of this system, and their paths in the root.
    binds: Vec<(PathBuf, &'static str)>,
    _lock: File,
}

impl Root {
    /// Creates a root of that release. Makes the base if there is none yet.
    pub fn new(release: &'static str) -> Result<Self> {
        if !is_root() {
            return Err("only root can; run this with sudo, or as root".to_owned().into());
        }
        system_packages::ensure_for_roots()?;
        let place = cache("fresh")?.join(release);
        make_folder(&place)?;
        let lock = lock(&place)?;
        let base = base(&place, release)?;
        let root = Self { release, folder: place.join("root"), binds: binds(&place)?, _lock: lock };
        root.fill(&base)?;
        // This fails before any task has begun if something is wrong, such as a kernel without namespaces.
        let version = output(&mut root.command(&["cargo", "--version"]))?;
        eprintln!("A fresh Debian {release} has a C compiler, and {}.", version.trim());
        Ok(root)
    }

    /// Runs a task of the clone's own xtask.
    pub fn run(&self, task: &[&str]) -> Result<()> {
        let words = [&["cargo"], xtask_arguments(task).as_slice()].concat();
        let name = format!("{}    (on a fresh Debian {})", words.join(" "), self.release);
        step_as(&name, &mut self.command(&words))
    }

    /// Returns a command that runs `words` in the clone, with this root. The command and all its processes
    /// end with this process.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", SCRIPT]).arg(&self.folder);
        for (from, to) in &self.binds {
            command.arg(from).arg(to);
        }
        command.args(["--", "env", "--chdir", CLONE]).args(words);
        command.env_clear().envs(env::vars_os().filter(|(name, _)| is_kept(name)));
        command.envs([
            ("HOME", "/root"),
            ("PATH", PATH),
            ("RUSTUP_HOME", RUSTUP_HOME),
            ("CARGO_HOME", CARGO_HOME),
        ]);
        signal_at_our_end(&mut command, Signal::KILL);
        command
    }

    fn fill(&self, base: &Path) -> Result<()> {
        let what = || format!("cannot fill {}", self.folder.display());
        // A run that was killed has left this folder.
        remove(&self.folder).context(what)?;
        output(Command::new("cp").arg("-a").args([base, &self.folder]))?;
        NETWORK.iter().try_for_each(|path| self.copy(path))?;
        let apt = self.folder.join("etc/apt");
        fs::write(apt.join("sources.list"), sources(self.release)).context(what)?;
        fs::write(apt.join("apt.conf.d/90host"), debian::download_settings()).context(what)?;
        for (from, to) in &self.binds {
            let to = self.inside(to);
            if from.is_dir() { make_folder(&to)? } else { File::create(&to).map(drop).context(what)? }
        }
        self.clone_checkout()
    }

    /// Copies the file or folder at that path of this system, if there is one.
    fn copy(&self, path: &str) -> Result<()> {
        let (from, to) = (Path::new("/").join(path), self.folder.join(path));
        if !from.exists() {
            return Ok(());
        }
        make_folder(to.parent().unwrap_or(&to))?;
        output(Command::new("cp").args(["-rLT"]).args([&from, &to])).map(drop)
    }

    fn clone_checkout(&self) -> Result<()> {
        // By default git refuses to clone from another user, such as the owner of CI's checkout.
        let config = self.folder.join("tmp/gitconfig");
        let what = || format!("cannot write {}", config.display());
        fs::write(&config, "[safe]\n\tdirectory = *\n").context(what)?;
        let git = || {
            let mut git = Command::new("git");
            git.env("GIT_CONFIG_GLOBAL", &config);
            git
        };
        output(git().args(["clone", "--quiet", CHECKOUT]).arg(self.inside(CLONE)))?;
        if !output(git().args(["-C", CHECKOUT, "status", "--porcelain"]))?.is_empty() {
            eprintln!("The checkout has changes that are not committed: its clone is without them.");
        }
        fs::remove_file(&config).context(what)
    }

    /// Returns the path in this system of a path in the root.
    pub fn inside(&self, path: &str) -> PathBuf {
        self.folder.join(path.trim_start_matches('/'))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // The next run removes files that remain.
        let _ = remove(&self.folder);
    }
}

/// Locks the folder of a release; waits for the run that holds the lock.
fn lock(place: &Path) -> Result<File> {
    let path = place.join("lock");
    let what = || format!("cannot lock {}", path.display());
    let lock = File::create(&path).context(what)?;
    if lock.try_lock().is_err() {
        eprintln!("Another run uses {}; this run waits until it has ended.", place.display());
        lock.lock().context(what)?;
    }
    Ok(lock)
}

/// Returns the folder of the base, which is made now if there is none.
fn base(place: &Path, release: &str) -> Result<PathBuf> {
    let base = place.join("base");
    if base.is_dir() {
        return Ok(base);
    }
    eprintln!("A minimal Debian {release} is made, once, in {}.", base.display());
    let unfinished = place.join("unfinished");
    let what = || format!("cannot make {}", base.display());
    remove(&unfinished).context(what)?;
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.arg(format!("--keyring={KEYRING}"));
    debootstrap.args(["--variant=minbase", &format!("--include={COMPILER}"), release]);
    debootstrap.arg(&unfinished).arg(Archive::Main.mirror());
    step(debootstrap.env("PATH", administrators_path()))?;
    remove(&unfinished.join("var/cache/apt/archives")).context(what)?;
    fs::rename(&unfinished, &base).context(what)?;
    Ok(base)
}

/// Returns the files that the root shares with this system, and with earlier runs.
fn binds(place: &Path) -> Result<Vec<(PathBuf, &'static str)>> {
    let mut binds = vec![(rust_home("RUSTUP_HOME", ".rustup")?, RUSTUP_HOME)];
    binds.push((rust_home("CARGO_HOME", ".cargo")?, CARGO_HOME));
    for (name, to) in [("archives", "/var/cache/apt/archives"), ("cache", "/root/.cache")] {
        make_folder(&place.join(name))?;
        binds.push((place.join(name), to));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    for (tool, to) in TOOLS {
        let found = env::split_paths(&path).map(|folder| folder.join(tool)).find(|path| path.is_file());
        binds.extend(found.map(|found| (found, to)));
    }
    Ok(binds)
}

/// Returns a folder of rustup, whose content is the same on every system.
fn rust_home(variable: &str, default: &str) -> Result<PathBuf> {
    let default = || env::home_dir().map(|home| home.join(default));
    let home = env::var_os(variable).map(PathBuf::from).or_else(default).filter(|home| home.is_dir());
    home.ok_or_else(|| {
        Failure::Message(format!("the Rust toolchain is not rustup's: there is no {variable}"))
    })
}

fn sources(release: &str) -> String {
    [
        debian::source(Archive::Main, release),
        debian::source(Archive::Main, &format!("{release}-updates")),
        debian::source(Archive::Security, &format!("{release}-security")),
    ]
    .concat()
}

fn is_kept(name: &OsString) -> bool {
    let Some(name) = name.to_str() else { return false };
    let listed = VARIABLES.iter().any(|variable| *variable == name || *variable == name.to_lowercase());
    listed || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Returns a PATH with the administrators' programs: debootstrap is one, and calls others.
fn administrators_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))
}

/// Removes a folder, if it exists.
fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// Creates a root with only the programs of this system. `None` for users who cannot enter it.
    fn with_programs() -> Option<Root> {
        if !is_root() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap().keep();
        let lock = tempfile::tempfile().unwrap();
        for name in ["dev", "proc", "sys", "mnt", "usr", CLONE.trim_start_matches('/')] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        for name in ["bin", "lib", "lib64", "sbin"] {
            symlink(Path::new("usr").join(name), folder.join(name)).unwrap();
        }
        Some(Root { release: "none", folder, binds: vec![("/usr".into(), "/usr")], _lock: lock })
    }

    #[test]
    fn command_sees_only_the_folder_when_it_runs_in_the_root() {
        let Some(root) = with_programs() else { return };
        assert_eq!(output(&mut root.command(&["pwd"])).unwrap().trim(), CLONE);
        let seen = output(&mut root.command(&["ls", "/"])).unwrap();
        let seen: Vec<&str> = seen.split_whitespace().collect();
        assert_eq!(seen, ["bin", "dev", "lib", "lib64", "mnt", "proc", "root", "sbin", "sys", "usr"]);
        assert_eq!(output(&mut root.command(&["ls", "/mnt"])).unwrap(), "");
    }

    /// A plain chroot would fail here.
    #[test]
    fn unshare_works_when_it_runs_in_the_root() {
        let Some(root) = with_programs() else { return };
        output(&mut root.command(&["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]))
            .unwrap();
    }

    #[test]
    fn orphans_are_reaped_when_they_end_in_the_root() {
        let Some(root) = with_programs() else { return };
        let orphan = "mkfifo /dev/shm/end
                      pid=$(sh -c 'cat /dev/shm/end > /dev/null & echo $!')
                      true > /dev/shm/end
                      while [ -e /proc/$pid ]; do :; done";
        output(&mut root.command(&["timeout", "60", "sh", "-c", orphan])).unwrap();
    }

    #[test]
    fn exit_code_is_that_of_the_command_when_it_fails_in_the_root() {
        let Some(root) = with_programs() else { return };
        let failure = step(&mut root.command(&["sh", "-c", "exit 7"])).unwrap_err();
        assert!(matches!(failure, Failure::Step(7)), "{failure:?}");
    }

    #[test]
    fn proxies_and_settings_of_cargo_are_kept_and_nothing_that_names_programs_is() {
        for kept in ["http_proxy", "HTTPS_PROXY", "SSL_CERT_FILE", "CARGO_NET_OFFLINE", "TERM"] {
            assert!(is_kept(&kept.into()), "{kept}");
        }
        for dropped in ["PATH", "HOME", "CARGO_HOME", "CUCKOO3_PYTHON", "LD_LIBRARY_PATH", "ssl_cert_file"] {
            assert!(!is_kept(&dropped.into()), "{dropped}");
        }
    }

    #[test]
    fn sources_have_updates_and_security_of_the_release() {
        let sources = sources("trixie");
        for suite in [" trixie main\n", " trixie-updates main\n", " trixie-security main\n"] {
            assert!(sources.contains(suite), "{sources}");
        }
    }
}
