//! A private libvirtd.
//!
//! libvirtd has its folders compiled in. The lab therefore runs libvirtd in a mount namespace in which the
//! lab's folders cover them. The libvirtd of a user who is not root takes its folders from the environment.
//! libvirtd also has a user compiled in, and ends where that user is missing; so the namespace has its own
//! `/etc/passwd` and `/etc/group`.
//!
//! The process namespace ends with its owner, whatever a test does, and so do libvirtd and every QEMU in it.
//! The first process of the namespace also reaps QEMUs that have ended; libvirtd waits for that when it stops
//! a domain.
//!
//! ```text
//! unshare ─▶ init (sleeps) ─┬─ libvirtd, started and killed at will
//!                           └─ QEMUs, which outlive libvirtd as they always do
//! ```

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, geteuid, kill_process, pidfd_open, set_parent_process_death_signal,
};

use crate::error::{Context, Error};
use crate::{Result, cache, command};

/// Ending a killed process takes no longer.
const PATIENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// The maximum time that libvirtd may take to start, in seconds: libvirtd may query QEMU's capabilities.
const START_TIMEOUT: &str = "120";

/// What the init does, with the daemon's folder as its argument. The folders are made where a package
/// that has not been configured has left them out; `/run` is an empty one of its own.
const INIT: &str = r#"
set -e
if [ "$(id -u)" = 0 ]; then
    mount -t tmpfs tmpfs /run
    for place in etc/libvirt run/libvirt var/lib/libvirt var/cache/libvirt var/log/libvirt; do
        mkdir -p "/$place" "$1/$place"
        mount --bind "$1/$place" "/$place"
    done
    for names in etc/passwd etc/group; do
        mount --bind "$1/$names" "/$names"
    done
fi
echo ready
exec env --ignore-signal=CHLD sleep infinity
"#;

/// QEMU runs as the user who runs the tests, without anything that needs a system around it.
const QEMU_CONF: &str = "security_driver = \"none\"\nstdio_handler = \"file\"\n";

/// Root has to say so; nobody else could choose.
const QEMU_CONF_OF_ROOT: &str = "\
user = \"root\"
group = \"root\"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
";

/// The users that distributions compile in as QEMU's (Debian and Ubuntu, Fedora). libvirtd looks up its user
/// before it reads `qemu.conf`, and ends if that user is missing. Only a package that the lab does not need
/// creates the user. No process runs as one of these users, so any number is valid: here that of `nobody`.
const USERS: [&str; 2] = ["libvirt-qemu:x:65534:65534::/:/bin/false", "qemu:x:65534:65534::/:/bin/false"];

/// The groups that distributions compile in.
const GROUPS: [&str; 3] = ["libvirt-qemu:x:65534:", "kvm:x:65534:", "qemu:x:65534:"];

/// Where the libvirtd of a user who is not root looks.
const FOLDERS: [(&str, &str); 4] = [
    ("XDG_CONFIG_HOME", "etc"),
    ("XDG_RUNTIME_DIR", "run"),
    ("XDG_CACHE_HOME", "var/cache"),
    ("XDG_DATA_HOME", "var/lib"),
];

/// A running libvirtd, or one that was killed and can be started again. Dropped, nothing of it is left.
#[derive(Debug)]
pub struct Libvirtd {
    folder: PathBuf,
    /// The one that has made the namespaces; its only child is their init.
    unshare: Child,
}

impl Libvirtd {
    /// Starts one with all that is its own in `folder`, which must have a short path.
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
        let of_root = if geteuid().is_root() { QEMU_CONF_OF_ROOT } else { "" };
        fs::write(folder.join("etc/libvirt/qemu.conf"), [QEMU_CONF, of_root].concat()).context(what)?;
        fs::write(folder.join("libvirtd.conf"), libvirtd_conf(&folder)).context(what)?;
        for (path, wanted) in [("etc/passwd", USERS.as_slice()), ("etc/group", GROUPS.as_slice())] {
            let system = fs::read_to_string(Path::new("/").join(path)).context(what)?;
            fs::write(folder.join(path), with_entries(&system, wanted)).context(what)?;
        }
        let unshare = unshare(&folder)?;
        Ok(Libvirtd { folder, unshare })
    }

    /// Starts the daemon after it was killed, and waits until it serves.
    pub fn start_daemon(&self) -> Result<()> {
        self.launch(&[])
    }

    /// Restarts the daemon so that it also listens on TCP, and returns the dsn for that.
    pub fn listens_on_tcp(&self) -> Result<String> {
        let what = || "having libvirtd listen on TCP".to_owned();
        let free =
            TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).context(what)?;
        let tcp = format!(
            "listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \"{}\"\ntcp_port = \"{}\"\n",
            free.ip(),
            free.port()
        );
        fs::write(self.conf(), libvirtd_conf(&self.folder) + &tcp).context(what)?;
        self.kill_daemon()?;
        self.launch(&["--listen"])?;
        Ok(format!("qemu+tcp://{free}/{}", kind()))
    }

    fn launch(&self, more: &[&str]) -> Result<()> {
        let (conf, pid) = (self.conf(), self.folder.join("libvirtd.pid"));
        let logged = fs::read(self.log()).map_or(0, |log| log.len());
        // It goes to the background by itself, once its sockets are there.
        let daemon = ["libvirtd", "--daemon", "--config", &text(&conf), "--pid-file", &text(&pid)];
        self.inside(&[&daemon[..], more].concat()).and_then(|_| self.wait_until_it_serves()).map_err(
            |error| {
                // A libvirtd that fails closes its sockets before its process ends.
                let _ = self.kill_daemon();
                let log = fs::read(self.log()).unwrap_or_default();
                let log = String::from_utf8_lossy(log.get(logged..).unwrap_or_default()).into_owned();
                Error::new(format!("libvirtd did not start; its log:\n{log}{error}"))
            },
        )
    }

    /// Waits until libvirtd answers a client. libvirtd creates its sockets before its drivers, and ends if a
    /// driver fails. It answers once all drivers work, so a client that connects earlier gets an answer then
    /// or sees libvirtd end.
    fn wait_until_it_serves(&self) -> Result<()> {
        self.inside(&["timeout", START_TIMEOUT, "virsh", "--connect", &self.dsn(), "uri"]).map(drop)
    }

    /// Runs a program to its end where the daemon is: with its view of files and processes.
    pub fn inside(&self, program: &[&str]) -> Result<String> {
        let init = self.init()?.to_string();
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &init, "--mount", "--pid"]);
        if !geteuid().is_root() {
            enter.args(["--user", "--preserve-credentials"]);
        }
        for (variable, place) in FOLDERS {
            enter.env(variable, self.folder.join(place));
        }
        command::output(enter.arg("--").args(program).env("PATH", path()))
    }

    /// Kills the daemon, and waits until it is gone. Its domains run on.
    pub fn kill_daemon(&self) -> Result<()> {
        let pid = self.daemon()?;
        let what = || format!("killing libvirtd, process {pid}");
        let process = pidfd_open(pid, PidfdFlags::empty()).context(what)?;
        kill_process(pid, Signal::KILL).context(what)?;
        match poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&PATIENCE)).context(what)? {
            0 => Err(Error::new(format!("{}: it goes on", what()))),
            _ => Ok(()),
        }
    }

    /// Sends the daemon a signal.
    pub fn signal_daemon(&self, signal: Signal) -> Result<()> {
        let pid = self.daemon()?;
        kill_process(pid, signal).context(|| format!("signalling libvirtd, process {pid}"))
    }

    /// The process of the daemon.
    pub fn daemon(&self) -> Result<Pid> {
        let conf = self.conf().display().to_string();
        let processes = crate::processes::list()?;
        let found = processes.into_iter().find(|(_, command)| {
            command.split(' ').next().is_some_and(|program| program.ends_with("libvirtd"))
                && command.contains(&conf)
        });
        found.map(|(pid, _)| pid).ok_or_else(|| Error::new(format!("no libvirtd runs with {conf}")))
    }

    /// What to connect to.
    pub fn dsn(&self) -> String {
        format!("qemu:///{}?socket={}", kind(), self.folder.join("sockets/libvirt-sock").display())
    }

    /// Runs `virsh` with these arguments, and gives what it says.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        command::output(Command::new("virsh").args(["--quiet", "--connect", &self.dsn()]).args(arguments))
    }

    /// Defines something by its description: `define`, or `snapshot-create NAME`.
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

    /// Where the daemon writes what it has to say.
    pub fn log(&self) -> PathBuf {
        self.folder.join("libvirtd.log")
    }

    fn conf(&self) -> PathBuf {
        self.folder.join("libvirtd.conf")
    }

    /// The init of the namespaces, by its number outside of them.
    fn init(&self) -> Result<u32> {
        let unshare = self.unshare.id();
        let path = format!("/proc/{unshare}/task/{unshare}/children");
        let children = fs::read_to_string(&path).context(|| format!("reading {path}"))?;
        let child = children.split_whitespace().next().and_then(|child| child.parse().ok());
        child.ok_or_else(|| Error::new("the private libvirtd's namespaces have ended"))
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        let init = self.init().ok().and_then(|init| Pid::from_raw(init.cast_signed()));
        let init = init.and_then(|init| pidfd_open(init, PidfdFlags::empty()).ok());
        // Its child ends with it, and with that all in its namespace. It ignores milder signals.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        if let Some(init) = init {
            // An init has ended when all others in its namespace have.
            let _ = poll(&mut [PollFd::new(&init, PollFlags::IN)], Some(&PATIENCE));
        }
    }
}

/// Returns which kind of libvirtd this user runs.
fn kind() -> &'static str {
    if geteuid().is_root() { "system" } else { "session" }
}

/// libvirtd starts faster with what another one has learnt about this QEMU.
fn capabilities() -> &'static str {
    match geteuid().is_root() {
        true => "var/cache/libvirt/qemu/capabilities",
        false => "var/cache/libvirt/qemu/cache/capabilities",
    }
}

/// The folder with what libvirtd has learnt about the QEMUs here, made now if need be. libvirtd itself
/// sees when it is outdated.
fn learnt() -> Result<PathBuf> {
    let version = command::output(Command::new("libvirtd").arg("--version").env("PATH", path()))?;
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

fn libvirtd_conf(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "unix_sock_dir = \"{folder}/sockets\"\nunix_sock_rw_perms = \"0700\"\nauth_unix_rw = \"none\"\n\
         auth_unix_ro = \"none\"\nlog_outputs = \"3:file:{folder}/libvirtd.log\"\n"
    )
}

/// Returns the text of a `passwd` or `group` file with the entries of `wanted` whose names it lacks.
fn with_entries(system: &str, wanted: &[&str]) -> String {
    let name = |entry: &str| entry.split(':').next().unwrap_or_default().to_owned();
    let known: Vec<String> = system.lines().map(name).collect();
    let lacking = wanted.iter().copied().filter(|entry| !known.contains(&name(entry)));
    system.lines().chain(lacking).map(|entry| format!("{entry}\n")).collect()
}

/// Starts the namespaces, and waits until all is in its place there.
fn unshare(folder: &Path) -> Result<Child> {
    let what = || "making namespaces for a private libvirtd".to_owned();
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    if !geteuid().is_root() {
        unshare.arg("--map-current-user");
    }
    unshare.args(["--", "sh", "-c", INIT, "libvirtd-init"]).arg(folder);
    let errors = folder.join("init.log");
    let log = fs::File::create(&errors).context(what)?;
    unshare.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let die_with_me = || Ok(set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: between fork and exec only a single system call is made, which takes no lock and no
    // memory.
    unsafe { unshare.pre_exec(die_with_me) };
    let mut child = unshare.spawn().context(what)?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line).context(what)?;
    }
    if line.trim() == "ready" {
        return Ok(child);
    }
    let _ = child.kill();
    let _ = child.wait();
    let said = fs::read_to_string(errors).unwrap_or_default();
    Err(Error::new(format!(
        "{}: {}. It needs root, or a kernel that gives unprivileged users namespaces",
        what(),
        said.trim()
    )))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Where libvirtd is, also for those who have no administrator's path.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_added_when_their_names_are_missing() {
        let system = "root:x:0:0::/root:/bin/sh\nqemu:x:107:107::/:/sbin/nologin";
        let extended = with_entries(system, &USERS);
        let lines: Vec<&str> = extended.lines().collect();
        assert_eq!(lines[..2], system.lines().collect::<Vec<_>>());
        assert_eq!(lines[2..], [USERS[0]]);
        assert_eq!(with_entries(&extended, &USERS), extended);
    }

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
}
