//! A private libvirtd.
//!
//! libvirtd has its folders compiled in. The lab therefore runs libvirtd in a mount namespace in which the
//! lab's folders cover them. The libvirtd of a user who is not root takes its folders from the environment.
//! libvirtd also has a user compiled in, and ends where that user is missing; so the namespace has its own
//! `/etc/passwd` and `/etc/group`.
//!
//! The process namespace ends with its owner, whatever a test does, and so do libvirtd and every QEMU in it.
//! The first process of the namespace also reaps QEMUs that have ended; libvirtd waits for that when it stops
//! a domain. [`namespaces`](super::namespaces) makes both namespaces, [`settings`](super::settings) the
//! configuration in them, and [`supervisor`](super::supervisor) the daemon.
//!
//! ```text
//! unshare ─▶ init (sleeps) ─── QEMUs, which outlive libvirtd as they always do
//! nsenter ─▶ supervisor ─▶ libvirtd, started and killed at will
//! ```

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, geteuid, kill_process};

use super::namespaces::{Namespaces, administrators_path};
use super::settings;
use super::supervisor::Supervisor;
use crate::error::{Context, Error};
use crate::{Result, cache, command};

/// The maximum time that libvirtd may take until it answers, in seconds: libvirtd may query QEMU's capabilities.
const START_TIMEOUT: &str = "120";

/// The process of a domain whose start has not got so far.
const NO_PROCESS: &str = " pid='0'";

/// A running libvirtd, or one that was killed and can be started again. When it is dropped, all its processes
/// end.
#[derive(Debug)]
pub struct Libvirtd {
    folder: PathBuf,
    // Dropped first: its end also ends the supervisor.
    namespaces: Namespaces,
    /// The supervisor of a daemon that was started.
    supervisor: Mutex<Option<Supervisor>>,
}

impl Libvirtd {
    /// Starts a libvirtd whose files are in `folder`, which must have a short path.
    pub fn start(folder: &Path) -> Result<Self> {
        let daemon = Self::without_daemon(folder)?;
        let known = learnt()?;
        let into = daemon.folder.join(capabilities());
        fs::create_dir_all(&into).context(|| format!("making {}", into.display()))?;
        for file in files(&known)? {
            let to = into.join(file.file_name().unwrap_or_default());
            fs::copy(&file, &to).context(|| format!("copying {}", file.display()))?;
        }
        daemon.start_daemon()?;
        Ok(daemon)
    }

    fn without_daemon(folder: &Path) -> Result<Self> {
        let what = || format!("preparing a libvirtd in {}", folder.display());
        for part in ["etc/libvirt", "sockets", "run", "var/cache", "var/lib"] {
            fs::create_dir_all(folder.join(part)).context(what)?;
        }
        let folder = folder.canonicalize().context(what)?;
        settings::write(&folder)?;
        let namespaces = Namespaces::new(&folder)?;
        Ok(Libvirtd { folder, namespaces, supervisor: Mutex::new(None) })
    }

    /// Starts the daemon after a kill, and waits until it serves.
    pub fn start_daemon(&self) -> Result<()> {
        self.launch(&[])
    }

    /// Starts the daemon after a kill, without the starts that the killed one has lost, as
    /// [`lose_start`](Libvirtd::lose_start) describes.
    pub fn start_daemon_without_lost_starts(&self) -> Result<()> {
        for file in files(&self.status_folder())? {
            if file.extension().is_some_and(|end| end == "xml") && status(&file)?.contains(NO_PROCESS) {
                fs::remove_file(&file).context(|| format!("removing {}", file.display()))?;
            }
        }
        self.start_daemon()
    }

    /// Makes a running domain, whose daemon and QEMU were killed, one whose start the daemon had not finished: the file
    /// names no process. The next daemon neither finishes that start nor stops the domain.
    pub fn lose_start(&self, label: &str) -> Result<()> {
        let file = self.status_folder().join(format!("{label}.xml"));
        let known = status(&file)?;
        let head =
            known.split_once("<domstatus ").and_then(|(head, rest)| Some((head, rest.split_once('>')?.1)));
        let (head, rest) = head.ok_or_else(|| Error::new(format!("{} has no state", file.display())))?;
        let state = format!("<domstatus state='paused' reason='starting up'{NO_PROCESS}>");
        let lost = format!("{head}{state}<job type='none' async='start' phase='none'/>{rest}");
        fs::write(&file, lost).context(|| format!("writing {}", file.display()))
    }

    fn status_folder(&self) -> PathBuf {
        self.folder.join(if geteuid().is_root() { "run/libvirt/qemu" } else { "run/libvirt/qemu/run" })
    }

    /// Restarts the daemon so that it also listens on TCP, and returns the DSN for that.
    pub fn listens_on_tcp(&self) -> Result<String> {
        let what = || "having libvirtd listen on TCP".to_owned();
        let free =
            TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context(what)?;
        let tcp = format!(
            "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \"{}\"\ntcp_port = \"{}\"\n",
            free.ip(),
            free.port()
        );
        fs::write(self.conf(), settings::libvirtd_conf(&self.folder) + &tcp).context(what)?;
        self.kill_daemon()?;
        self.launch(&["--listen"])?;
        Ok(format!("qemu+tcp://{free}/{}", kind()))
    }

    fn launch(&self, more: &[&str]) -> Result<()> {
        let logged = fs::read(self.log()).map_or(0, |log| log.len());
        let started = Supervisor::start(&self.namespaces, &self.folder, &self.conf(), more);
        let serves = started.and_then(|supervisor| {
            *self.supervisor() = Some(supervisor);
            self.wait_until_it_serves()
        });
        serves.map_err(|error| {
            // A libvirtd that fails closes its sockets before its process ends.
            let _ = self.kill_daemon();
            let log = fs::read(self.log()).unwrap_or_default();
            let log = String::from_utf8_lossy(log.get(logged..).unwrap_or_default()).into_owned();
            Error::new(format!("libvirtd did not start; its log:\n{log}{error}"))
        })
    }

    /// Waits until libvirtd answers a client. libvirtd makes its sockets before its drivers, and ends if a driver fails.
    /// It answers once all drivers work, so a client that connects earlier gets an answer then or sees libvirtd end.
    fn wait_until_it_serves(&self) -> Result<()> {
        self.inside(&["timeout", START_TIMEOUT, "virsh", "--connect", &self.dsn(), "uri"]).map(drop)
    }

    fn supervisor(&self) -> MutexGuard<'_, Option<Supervisor>> {
        self.supervisor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a program to its end in the daemon's namespaces.
    pub fn inside(&self, program: &[&str]) -> Result<String> {
        command::output(&mut self.namespaces.enter(&self.folder, program)?)
    }

    /// Kills the daemon, and waits for its end. Its domains run on.
    pub fn kill_daemon(&self) -> Result<()> {
        self.supervisor().take().ok_or_else(|| self.no_daemon())?.kill()
    }

    /// Sends the daemon a signal.
    pub fn signal_daemon(&self, signal: Signal) -> Result<()> {
        let pid = self.daemon()?;
        kill_process(pid, signal).context(|| format!("signalling libvirtd, process {pid}"))
    }

    /// Returns the daemon's process.
    pub fn daemon(&self) -> Result<Pid> {
        self.supervisor().as_ref().ok_or_else(|| self.no_daemon())?.daemon()
    }

    fn no_daemon(&self) -> Error {
        Error::new(format!("no libvirtd runs with {}", self.conf().display()))
    }

    /// Returns the DSN of the daemon.
    pub fn dsn(&self) -> String {
        format!("qemu:///{}?socket={}", kind(), self.folder.join("sockets/libvirt-sock").display())
    }

    /// Runs `virsh` with these arguments, and returns its output.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        command::output(Command::new("virsh").args(["--quiet", "--connect", &self.dsn()]).args(arguments))
    }

    /// Defines an object by its description: `define`, or `snapshot-create NAME`.
    pub fn virsh_with_file(&self, arguments: &[&str], text: &str, more: &[&str]) -> Result<String> {
        let file = tempfile::NamedTempFile::new_in(&self.folder);
        let what = || "writing a description for virsh".to_owned();
        let file = file.context(what)?;
        fs::write(file.path(), text).context(what)?;
        let path = file.path().display().to_string();
        let all: Vec<&str> =
            arguments.iter().copied().chain([path.as_str()]).chain(more.iter().copied()).collect();
        self.virsh(&all)
    }

    /// Returns the path of the daemon's log.
    pub fn log(&self) -> PathBuf {
        self.folder.join("libvirtd.log")
    }

    fn conf(&self) -> PathBuf {
        self.folder.join("libvirtd.conf")
    }
}

fn status(file: &Path) -> Result<String> {
    fs::read_to_string(file).context(|| format!("reading {}", file.display()))
}

/// Returns the kind of libvirtd that this user runs.
fn kind() -> &'static str {
    if geteuid().is_root() { "system" } else { "session" }
}

/// Returns the folder of capabilities. libvirtd starts faster with those that another one has probed.
fn capabilities() -> &'static str {
    match geteuid().is_root() {
        true => "var/cache/libvirt/qemu/capabilities",
        false => "var/cache/libvirt/qemu/cache/capabilities",
    }
}

/// Returns the folder of capabilities in the cache, and probes them if there are none. libvirtd detects
/// outdated ones.
fn learnt() -> Result<PathBuf> {
    let version =
        command::output(Command::new("libvirtd").arg("--version").env("PATH", administrators_path()))?;
    let qemu = crate::guest::Qemu::find()?.version()?;
    let name = format!("libvirt-{}", cache::fingerprint(&(version, qemu)));
    let cache = cache::open(&cache::default()?)?;
    let folder = cache::folder(&cache, &name, |folder| {
        let work = tempfile::tempdir().context(|| "making a folder for libvirtd".to_owned())?;
        let daemon = Libvirtd::without_daemon(work.path())?;
        daemon.start_daemon()?;
        daemon.virsh(&["domcapabilities", "--virttype", "qemu"])?;
        for file in files(&daemon.folder.join(capabilities()))? {
            let to = folder.join(file.file_name().unwrap_or_default());
            fs::copy(&file, &to).context(|| format!("copying {}", file.display()))?;
        }
        Ok(())
    })?;
    Ok(folder)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).context(|| format!("listing {}", folder.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A minimal system has no user for QEMU. The libvirtd of a plain user looks up no user.
    #[test]
    fn libvirtd_finds_its_compiled_in_user_when_the_system_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = Libvirtd::without_daemon(folder.path()).unwrap();
        daemon.start_daemon().unwrap();
        if geteuid().is_root() {
            let user = daemon.inside(&["id", "--user", "libvirt-qemu"]).unwrap();
            assert!(user.trim().parse::<u32>().is_ok_and(|id| id != 0), "{user}");
        }
    }

    #[test]
    fn start_daemon_fails_with_the_reason_when_libvirtd_ends_after_its_start() {
        let folder = tempfile::tempdir().unwrap();
        let daemon = Libvirtd::without_daemon(folder.path()).unwrap();
        fs::write(folder.path().join("etc/libvirt/qemu.conf"), "stdio_handler = \"nowhere\"\n").unwrap();
        let error = daemon.start_daemon().unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
        assert!(daemon.daemon().is_err(), "libvirtd runs on");
    }

    /// libvirt 9.0 crashes when a domain is destroyed at one moment of its start. A system starts it again.
    #[test]
    fn libvirtd_is_started_again_when_it_crashes_and_not_when_it_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let libvirtd = Libvirtd::without_daemon(folder.path()).unwrap();
        libvirtd.start_daemon().unwrap();
        let first = libvirtd.daemon().unwrap();
        libvirtd.signal_daemon(Signal::SEGV).unwrap();
        libvirtd.supervisor().as_mut().unwrap().wait_until_ready().unwrap();
        assert_ne!(libvirtd.daemon().unwrap(), first);
        libvirtd.virsh(&["uri"]).unwrap();
        libvirtd.kill_daemon().unwrap();
        assert!(libvirtd.daemon().is_err(), "libvirtd runs on");
        libvirtd.start_daemon().unwrap();
        libvirtd.virsh(&["uri"]).unwrap();
    }
}
