//! The mount and process namespaces of a private libvirtd.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, set_parent_process_death_signal};

use crate::error::{Context, Error};
use crate::{Result, processes};

/// The maximum time until a killed process has ended.
pub const KILL_TIMEOUT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// The script of the namespaces' init; its argument is the daemon's folder. It makes folders that an
/// unconfigured package lacks, and mounts an empty `/run`.
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

/// The environment of a libvirtd whose user is not root: its folders below the lab's.
const FOLDERS: [(&str, &str); 4] = [
    ("XDG_CONFIG_HOME", "etc"),
    ("XDG_RUNTIME_DIR", "run"),
    ("XDG_CACHE_HOME", "var/cache"),
    ("XDG_DATA_HOME", "var/lib"),
];

/// The namespaces. Dropped, all processes in them have ended.
#[derive(Debug)]
pub struct Namespaces {
    /// The process that made the namespaces; its only child is their init.
    unshare: Child,
}

impl Namespaces {
    /// Makes the namespaces, with the lab's folders in the places of libvirtd's own.
    pub fn new(folder: &Path) -> Result<Self> {
        unshare(folder).map(|unshare| Namespaces { unshare })
    }

    /// Returns a command that runs a program to its end in the namespaces.
    pub fn enter(&self, folder: &Path, program: &[&str]) -> Result<Command> {
        let init = self.init()?.as_raw_nonzero().to_string();
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &init, "--mount", "--pid"]);
        if !geteuid().is_root() {
            enter.args(["--user", "--preserve-credentials"]);
        }
        for (variable, place) in FOLDERS {
            enter.env(variable, folder.join(place));
        }
        enter.arg("--").args(program).env("PATH", administrators_path());
        Ok(enter)
    }

    /// Returns the init of the namespaces, by its number outside of them.
    fn init(&self) -> Result<Pid> {
        let init = processes::child(Pid::from_child(&self.unshare))?;
        init.ok_or_else(|| Error::new("the private libvirtd's namespaces have ended"))
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        let init = self.init().ok().and_then(|init| pidfd_open(init, PidfdFlags::empty()).ok());
        // The init is killed with its parent, and all processes of its namespace with the init. It ignores
        // SIGTERM.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        if let Some(init) = init {
            // An init ends after all other processes of its namespace.
            let _ = poll(&mut [PollFd::new(&init, PollFlags::IN)], Some(&KILL_TIMEOUT));
        }
    }
}

/// Starts the namespaces, and waits until all folders are mounted.
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

/// Returns a PATH with the administrator's folders, which a plain user's lacks.
pub fn administrators_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
