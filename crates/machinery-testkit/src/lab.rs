//! A lab: a CWD with the qemu machinery and machines to do experiments on.
//!
//! ```text
//! <scratch>/cwd/conf/machineries/qemu.yaml     as an operator writes it
//! <scratch>/cwd/machines/<name>/               a machine as VMCloak leaves it
//! ```
//!
//! A run's processes have that folder on their command lines, and its disks and sockets are in it.
//! So what a run leaves is found here, whoever started it, also when the host was killed in between.
//! A lab that is dropped ends what is left, and is an error then: nothing may be left.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, Signal, kill_process};

use crate::Result;
use crate::error::{Context, Error};
use crate::guest::{self, Guest, MachineFolder, Qemu};
use crate::host::{self, RunningHost};
use crate::scratch::ScratchCwd;
use crate::snapshot::SnapshotFormat;

const YAML: &str = "conf/machineries/qemu.yaml";

/// Declare it before the hosts that serve it, so that they are gone before it looks what is left.
#[derive(Debug)]
pub struct Lab {
    cwd: ScratchCwd,
    qemu: Qemu,
    machines: BTreeMap<String, MachineFolder>,
}

impl Lab {
    /// A lab with these machines.
    pub fn new(machines: &[(&str, Guest, SnapshotFormat)]) -> Result<Self> {
        Self::below(Path::new("cwd"), machines)
    }

    /// A lab in the folder `path` of the scratch folder: for long paths.
    pub fn below(path: &Path, machines: &[(&str, Guest, SnapshotFormat)]) -> Result<Self> {
        let (qemu, cwd) = (Qemu::find()?, ScratchCwd::below(path, &[("qemu", "")])?);
        let folder = |(name, guest, format): &(&str, Guest, SnapshotFormat)| {
            let dir = cwd.root().join("machines").join(name);
            let machine = guest::master(&qemu, *guest)?.machine(&dir, name, &address().to_string(), *format);
            Ok(((*name).to_owned(), machine?))
        };
        let machines = machines.iter().map(folder).collect::<Result<_>>()?;
        let lab = Lab { cwd, qemu, machines };
        lab.write_yaml(&lab.fresh_yaml())?;
        Ok(lab)
    }

    /// Its CWD.
    pub fn cwd(&self) -> &ScratchCwd {
        &self.cwd
    }

    /// The QEMU that its machines run on.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// The folder of one of its machines.
    ///
    /// # Panics
    /// It has no such machine.
    pub fn folder(&self, name: &str) -> &MachineFolder {
        &self.machines[name]
    }

    /// The names of its machines.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.machines.keys().map(String::as_str)
    }

    /// Where a machine's disposable disk is while it runs.
    pub fn disposable(&self, name: &str) -> PathBuf {
        self.folder(name).dir.join(format!("{name}_disposable.qcow2"))
    }

    /// The first count of a micro guest that was restored.
    pub fn restored_count(&self) -> Result<u32> {
        Ok(guest::master(&self.qemu, Guest::Micro)?.snapshot_count()? + 1)
    }

    /// Starts a host for it.
    pub fn host(&self) -> Result<RunningHost> {
        RunningHost::start(&self.cwd)
    }

    /// Runs `cuckoo-machinery` with these arguments to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<host::Ran> {
        host::run(&self.cwd, arguments)
    }

    /// What `qemu.yaml` says.
    pub fn yaml(&self) -> Result<String> {
        let path = self.cwd.root().join(YAML);
        fs::read_to_string(&path).context(|| format!("reading {}", path.display()))
    }

    /// Writes `qemu.yaml` anew.
    pub fn write_yaml(&self, text: &str) -> Result<()> {
        self.cwd.write(YAML, text)
    }

    /// Puts `new` in the place of the first `old` in `qemu.yaml`, where it has to be.
    pub fn change_yaml(&self, old: &str, new: &str) -> Result<()> {
        let yaml = self.yaml()?;
        if !yaml.contains(old) {
            return Err(Error::new(format!("there is no {old:?} in qemu.yaml:\n{yaml}")));
        }
        self.write_yaml(&yaml.replacen(old, new, 1))
    }

    /// Changes a machine's start arguments.
    pub fn change_start_args(&self, name: &str, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
        let machine = self.folder(name);
        let mut args = machine.start_args.clone();
        change(&mut args);
        let info = serde_json::json!({"machine": {"start_args": args}}).to_string();
        fs::write(&machine.machineinfo, info).context(|| format!("changing the arguments of {name}"))
    }

    /// Puts a shell script in QEMU's place. Asked for its version, it says `version`.
    pub fn fake_qemu(&self, version: &str, script: &str) -> Result<()> {
        let path = self.cwd.root().join("fake-qemu");
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version {version}' && exit\n{script}\n"
        );
        self.cwd.write("fake-qemu", text)?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&path, mode).context(|| format!("writing {}", path.display()))?;
        self.change_yaml(&self.qemu.system.display().to_string(), &path.display().to_string())
    }

    /// The QEMU that runs for that machine.
    pub fn qemu_of(&self, name: &str) -> Result<Pid> {
        let disk = self.disposable(name).display().to_string();
        let of_it = |(_, command): &(Pid, String)| command.contains(&disk) && !command.contains("qemu-img");
        let found: Vec<_> = processes()?.into_iter().filter(of_it).collect();
        match found.as_slice() {
            [(qemu, _)] => Ok(*qemu),
            other => Err(Error::new(format!("{} processes run on {disk}, not one: {other:?}", other.len()))),
        }
    }

    /// What is there because of a run: processes (without the host), disposable disks, monitors'
    /// sockets, unfinished files.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let mut left: Vec<_> = self.processes()?.iter().map(|process| format!("{process:?}")).collect();
        collect_remains(self.cwd.root(), &mut left)?;
        Ok(left)
    }

    /// Nothing is left of any run.
    ///
    /// # Panics
    /// Something is.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.leftovers(), Ok(Vec::new()), "this is left of a run");
    }

    fn fresh_yaml(&self) -> String {
        let mut text = format!(
            "interface: lo\ndisposable_copy_dir:\nbinaries:\n  qemu_img: {}\n  qemu_system_x86_64: {}\nmachines:\n",
            self.qemu.img.display(),
            self.qemu.system.display()
        );
        for machine in self.machines.values() {
            text += &format!(
                "  {}:\n    qcow2_path: {}\n    snapshot_path: {}\n    machineinfo_path: {}\n    ip: {}\n    \
                 platform: windows\n    os_version: 10\n",
                machine.name,
                machine.disk.display(),
                machine.snapshot.display(),
                machine.machineinfo.display(),
                machine.ip
            );
        }
        text
    }

    /// All that has the lab on its command line, but for the hosts.
    fn processes(&self) -> Result<Vec<(Pid, String)>> {
        let root = self.cwd.root().display().to_string();
        let is_host = |command: &str| {
            command.split(' ').next().is_some_and(|program| program.ends_with("cuckoo-machinery"))
        };
        let ours = |(_, command): &(Pid, String)| command.contains(&root) && !is_host(command);
        Ok(processes()?.into_iter().filter(ours).collect())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let left = self.leftovers();
        for (process, _) in self.processes().unwrap_or_default() {
            // It may have ended meanwhile.
            let _ = kill_process(process, Signal::KILL);
        }
        if !std::thread::panicking() {
            assert_eq!(left, Ok(Vec::new()), "this was left of a run");
        }
    }
}

/// A loopback address that most likely nobody else uses. Those that tests write down are in 127.0.
fn address() -> Ipv4Addr {
    let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_be_bytes();
    Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254))
}

/// All processes, with their command lines; those that have ended have none.
fn processes() -> Result<Vec<(Pid, String)>> {
    let entries = fs::read_dir("/proc").context(|| "listing processes".to_owned())?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let with_command = |pid: Pid| {
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        Some((pid, String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ")))
    };
    Ok(pids.filter_map(Pid::from_raw).filter_map(with_command).collect())
}

fn collect_remains(folder: &Path, left: &mut Vec<String>) -> Result<()> {
    let what = || format!("looking through {}", folder.display());
    for entry in fs::read_dir(folder).context(what)? {
        let entry = entry.context(what)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().context(what)?.is_dir() {
            collect_remains(&entry.path(), left)?;
        } else if name.ends_with("_disposable.qcow2")
            || name.starts_with("qemu_") && name.ends_with(".sock")
            || name.starts_with(".unfinished-")
        {
            left.push(entry.path().display().to_string());
        }
    }
    Ok(())
}

/// Something that happens to a file of a machine's folder.
#[derive(Debug, Clone, Copy)]
pub enum Happens<'a> {
    /// Somebody opens the file of that name.
    Opened(&'a str),
    /// Somebody reads from it.
    Read(&'a str),
}

impl Happens<'_> {
    fn is(self, event: &inotify::Event<'_>) -> bool {
        let (wanted, file) = match self {
            Happens::Opened(file) => (ReadFlags::OPEN, file),
            Happens::Read(file) => (ReadFlags::ACCESS, file),
        };
        event.events().contains(wanted)
            && event.file_name().is_some_and(|name| name.to_bytes() == file.as_bytes())
    }
}

/// What happens to the files of a folder, from the moment on at which this was made.
pub struct FileWatch {
    folder: PathBuf,
    news: OwnedFd,
}

impl FileWatch {
    /// Watches a folder.
    pub fn new(folder: &Path) -> Result<Self> {
        let what = || format!("watching {}", folder.display());
        let news = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).context(what)?;
        inotify::add_watch(&news, folder, WatchFlags::OPEN | WatchFlags::ACCESS).context(what)?;
        Ok(FileWatch { folder: folder.to_owned(), news })
    }

    /// Waits until all of this has happened, one after the other.
    pub fn wait(self, steps: &[Happens<'_>], timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut news = inotify::Reader::new(&self.news, &mut space);
        steps.iter().try_for_each(|step| self.step(*step, &mut news, end))
    }

    fn step(&self, step: Happens<'_>, news: &mut inotify::Reader<'_, &OwnedFd>, end: Instant) -> Result<()> {
        let what = || format!("waiting for {step:?} in {}", self.folder.display());
        loop {
            match news.next() {
                Ok(event) if step.is(&event) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.more(end).context(what)?,
                Err(error) => return Err(error).context(what),
            }
        }
    }

    fn more(&self, end: Instant) -> Result<()> {
        let what = || "watching".to_owned();
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).context(what)?;
        let mut news = [PollFd::new(&self.news, PollFlags::IN)];
        match retry_on_intr(|| poll(&mut news, Some(&left))).context(what)? {
            0 => Err(Error::new("it does not happen")),
            _ => Ok(()),
        }
    }
}

/// A very small file system, to see what happens when it is full.
pub struct TinyDisk {
    path: PathBuf,
}

impl TinyDisk {
    /// Mounts one in the lab; `None` where this user may not mount.
    pub fn mount(lab: &Lab, kib: u32) -> Result<Option<Self>> {
        let path = lab.cwd.root().join("tiny");
        fs::create_dir_all(&path).context(|| format!("making {}", path.display()))?;
        let size = format!("size={kib}k");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path);
        let mounted = host::run_command(mount)?;
        Ok((mounted.code == Some(0)).then_some(TinyDisk { path }))
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        // Lazily: a process that is just ending may still have a file on it open.
        let mut umount = Command::new("umount");
        umount.arg("--lazy").arg(&self.path);
        let unmounted = host::run_command(umount);
        if !std::thread::panicking() {
            assert_eq!(unmounted.map(|ran| ran.code), Ok(Some(0)), "{} stays", self.path.display());
        }
    }
}
