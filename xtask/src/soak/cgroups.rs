//! The cgroups of the host and of the programs that it starts: one with a limit of memory, and one that is delegated to
//! the host, as systemd does it for `Delegate=yes`.
//!
//! For a shortage of memory, the cgroup gets a limit close to its usage, and a process fills it. The kernel first takes
//! back pages of files, and then kills that process. Sources: cgroups(7), systemd.resource-control(5),
//! Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use machinery_testkit::host::run_command;
use rustix::fs::{XattrFlags, setxattr};

use crate::run::{Context, Result};

/// The memory that is left above the usage, in bytes: more than a start of a QEMU needs. With less, the kernel kills the host
/// between the end of the hog and the end of the limit.
const SPACE: u64 = 128 << 20;

/// Fills memory until the kernel kills it, before any other process.
const HOG: &str = "echo 1000 > /proc/self/oom_score_adj; echo $$ > \"$1\"; exec tail /dev/zero";

/// Enters cgroups, whose files come before `--`, and runs a program.
const ENTER: &str = "while [ \"$1\" != -- ]; do echo $$ > \"$1\" || exit; shift; done; shift; exec \"$@\"";

/// A limit of memory and the usage, as files of a cgroup, and the limit's value for none.
#[derive(Debug, Clone, Copy)]
struct Files {
    limit: &'static str,
    usage: &'static str,
    none: &'static str,
}

const VERSION_1: Files = Files { limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", none: "-1" };
const VERSION_2: Files = Files { limit: "memory.max", usage: "memory.current", none: "max" };

/// The cgroups that this user may make.
#[derive(Debug)]
pub struct Cgroups {
    delegated: Option<PathBuf>,
    memory: Option<(PathBuf, Files)>,
}

impl Cgroups {
    /// Makes the cgroups.
    pub fn new() -> Self {
        let delegated = mounted("cgroup2").and_then(|mount| make(&mount)).filter(|folder| delegate(folder));
        let with_limit = |folder: PathBuf, files: Files| {
            // A cgroup without the controller has no such file.
            folder.join(files.limit).exists().then_some((folder, files))
        };
        let memory = delegated.clone().and_then(|folder| with_limit(folder, VERSION_2));
        let memory = memory.or_else(|| with_limit(make(Path::new("/sys/fs/cgroup/memory"))?, VERSION_1));
        Cgroups { delegated, memory }
    }

    /// Makes a command start in the cgroups.
    pub fn enter(&self, command: &mut Command) {
        let files: Vec<PathBuf> = self.folders().map(processes).collect();
        if files.is_empty() {
            return;
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", ENTER, "enter"]).args(files).arg("--");
        shell.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        *command = shell;
    }

    fn folders(&self) -> impl Iterator<Item = &Path> {
        let memory = self.memory.as_ref().map(|(folder, _)| folder);
        let memory = memory.filter(|folder| Some(*folder) != self.delegated.as_ref());
        [self.delegated.as_ref(), memory].into_iter().flatten().map(PathBuf::as_path)
    }

    /// Reports whether there is a limit of memory.
    pub fn limit_memory(&self) -> bool {
        self.memory.is_some()
    }

    /// Returns the cgroups of machines.
    pub fn of_machines(&self) -> Vec<PathBuf> {
        let entries =
            self.delegated.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
        let machines = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("machine-"));
        machines.map(|entry| entry.path()).collect()
    }

    /// Uses all memory up, for a moment.
    pub fn use_memory_up(&self) -> Result<()> {
        let Some((folder, files)) = &self.memory else { return Ok(()) };
        let what = || format!("cannot limit the memory of {}", folder.display());
        let usage = fs::read_to_string(folder.join(files.usage)).context(what)?;
        let usage: u64 = usage.trim().parse().context(what)?;
        fs::write(folder.join(files.limit), (usage + SPACE).to_string()).context(what)?;
        let mut hog = Command::new("sh");
        hog.args(["-c", HOG, "hog"]).arg(processes(folder));
        let ended = run_command(hog);
        fs::write(folder.join(files.limit), files.none).context(what)?;
        match ended?.code {
            None => Ok(()),
            code => Err(format!("the memory of {} is not used up: {code:?}", folder.display()).into()),
        }
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let machines = self.of_machines();
        let folders = self.folders().map(Path::to_owned).flat_map(|folder| [folder.join("host"), folder]);
        // The host has ended, or its failure to end was reported; so were cgroups of machines.
        for folder in machines.into_iter().chain(folders) {
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Returns the file through which a process enters the cgroup. After its first start, the host is in one below.
fn processes(folder: &Path) -> PathBuf {
    let below = folder.join("host");
    let folder = if below.exists() { &below } else { folder };
    folder.join("cgroup.procs")
}

fn make(mount: &Path) -> Option<PathBuf> {
    let folder = mount.join(format!("machinery-soak-{}", process::id()));
    (fs::create_dir(&folder).is_ok() || folder.exists()).then_some(folder)
}

/// Marks the cgroup as systemd does.
fn delegate(folder: &Path) -> bool {
    setxattr(folder, "trusted.delegate", b"1", XattrFlags::empty()).is_ok()
}

/// Returns the folder where a file system of that type is mounted.
fn mounted(kind: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let is_wanted = |line: &&str| line.split(' ').nth(2) == Some(kind);
    mounts.lines().find(is_wanted)?.split(' ').nth(1).map(PathBuf::from)
}
