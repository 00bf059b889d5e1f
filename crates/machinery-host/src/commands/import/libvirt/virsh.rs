//! Runs `virsh`, with a time limit for each call.
//!
//! An import makes read-only calls but one, so that a user without the right to change domains can read them.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use tokio::process::Command;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

/// The maximum time of a call; a libvirt on another computer may be slow.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The first message of virsh if it cannot reach libvirt.
const NOT_CONNECTED: &str = "failed to connect to the hypervisor";

/// The end of virsh's message for a domain whose snapshots are all older than its state.
const NO_CURRENT: &str = "has no current snapshot";

/// `virsh` for one libvirt.
pub struct Virsh<'a> {
    /// The address of the libvirt.
    pub dsn: &'a str,
    program: &'a str,
    timeout: Duration,
    runtime: Runtime,
    /// The file on which the processes have a shared lock.
    lock: Option<PathBuf>,
}

impl<'a> Virsh<'a> {
    /// # Errors
    /// The system has no resources for a runtime.
    pub fn new(dsn: &'a str) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Error::environment(format!("cannot run virsh: {error}")))?;
        Ok(Virsh { dsn, program: "virsh", timeout: TIMEOUT, runtime, lock: None })
    }

    /// Has the processes hold a shared lock on this file until their ends. They may outlive a program that is killed, and
    /// libvirt then still does the work.
    #[must_use]
    pub fn holding(self, lock: PathBuf) -> Self {
        Virsh { lock: Some(lock), ..self }
    }

    /// Runs a command on a read-only connection, and returns its output.
    ///
    /// # Errors
    /// There is no `virsh`, libvirt does not answer, or the command fails.
    pub fn read(&self, arguments: &[&str]) -> Result<String> {
        self.output(&["--readonly"], arguments, self.timeout)
    }

    /// Runs a command, and returns its output.
    ///
    /// # Errors
    /// As [`read`](Virsh::read).
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.output(&[], arguments, self.timeout)
    }

    /// Runs a command that may take this long.
    ///
    /// # Errors
    /// As [`read`](Virsh::read).
    pub fn run_within(&self, limit: Duration, arguments: &[&str]) -> Result<String> {
        self.output(&[], arguments, limit)
    }

    /// Returns the lines of a command's output that are not empty.
    ///
    /// # Errors
    /// As [`read`](Virsh::read).
    pub fn names(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let output = self.read(arguments)?;
        Ok(output.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }

    /// Returns the name of the domain's current snapshot, if one is current.
    ///
    /// # Errors
    /// As [`read`](Virsh::read).
    pub fn current_snapshot(&self, label: &str) -> Result<Option<String>> {
        match self.read(&["snapshot-current", "--name", "--domain", label]) {
            Ok(name) => Ok(Some(name.trim().to_owned())),
            Err(error) if error.reason().contains(NO_CURRENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn command(&self, options: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::from(machinery::command(self.program));
        command.args(["--quiet", "--connect", self.dsn]).args(options).args(arguments);
        // Its messages are in English. Some versions of glibc let LANGUAGE overrule C.UTF-8.
        command.env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE").kill_on_drop(true);
        command
    }

    /// Returns the standard input, which virsh does not read: it carries the lock.
    fn input(&self) -> Result<Stdio> {
        let Some(path) = &self.lock else { return Ok(Stdio::null()) };
        let file = File::options().write(true).create(true).truncate(false).open(path);
        let locked = file.and_then(|file| Ok(flock(&file, FlockOperation::LockShared).map(|()| file)?));
        locked.map(Stdio::from).map_err(|error| Error::io("lock", path, &error))
    }

    fn output(&self, options: &[&str], arguments: &[&str], limit: Duration) -> Result<String> {
        let mut command = self.command(options, arguments);
        command.stdin(self.input()?);
        let ended = self.runtime.block_on(async { timeout(limit, command.output()).await });
        let Ok(ended) = ended else {
            let seconds = limit.as_secs();
            let reason = format!("libvirt at {} has not answered for {seconds} s", self.dsn);
            return Err(
                Error::timeout(reason).advice(format!("Try `virsh --connect {} list --all`", self.dsn))
            );
        };
        let output = ended.map_err(|error| not_started(&error))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(self.failure(arguments, &output))
    }

    fn failure(&self, arguments: &[&str], output: &Output) -> Error {
        let errors = String::from_utf8_lossy(&output.stderr);
        // Other lines are of libvirt's log.
        let said: Vec<&str> = errors.lines().filter_map(|line| line.strip_prefix("error: ")).collect();
        let said = said.join("; ");
        let Some(why) = said.strip_prefix(NOT_CONNECTED) else {
            let command = arguments.join(" ");
            return Error::failed(format!("`virsh {command}` failed")).detail(&said);
        };
        let is = |words: &[&str]| words.iter().any(|word| why.to_lowercase().contains(word));
        let advice = match () {
            () if is(&["permission denied", "authentication", "polkit", "access denied"]) => {
                "Run the command as root, or as a user in the group `libvirt`"
            }
            () if is(&["no such file", "connection refused"]) => {
                "Start libvirtd (such as `systemctl start libvirtd`), or correct dsn in kvm.yaml or --dsn"
            }
            () => "Correct dsn in kvm.yaml or --dsn",
        };
        let reason = format!("virsh cannot connect to libvirt at {}", self.dsn);
        Error::environment(reason).detail(why.trim_start_matches("; ")).advice(advice)
    }
}

fn not_started(error: &io::Error) -> Error {
    let new = Error::environment(format!("cannot run virsh, libvirt's client: {error}"));
    match error.kind() {
        io::ErrorKind::NotFound => new.advice("Install it (on Debian `libvirt-clients`)"),
        _ => new,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn error(virsh: &Virsh<'_>) -> String {
        virsh.read(&["list", "--name"]).unwrap_err().to_string()
    }

    /// Runs this shell script instead of virsh.
    fn error_of(script: &str, timeout: Duration) -> String {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("virsh");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let program = program.to_str().unwrap();
        error(&Virsh { program, timeout, ..Virsh::new("qemu:///system").unwrap() })
    }

    #[test]
    fn error_advises_what_to_do_when_virsh_is_missing_or_does_not_answer() {
        let missing = error(&Virsh { program: "/none/virsh", ..Virsh::new("qemu:///system").unwrap() });
        assert!(missing.contains("cannot run virsh") && missing.contains("libvirt-clients"), "{missing}");
        let hung = error_of("exec sleep 1000", Duration::from_millis(50));
        assert!(hung.contains("qemu:///system has not answered"), "{hung}");
    }

    #[test]
    fn error_has_virshs_reason_and_advice_when_libvirt_cannot_be_reached() {
        for (said, advice) in [
            ("Failed to connect socket to '/r/s': Permission denied", "in the group `libvirt`"),
            ("authentication unavailable: no polkit agent available", "in the group `libvirt`"),
            ("Failed to connect socket to '/r/s': No such file or directory", "systemctl start libvirtd"),
            ("no connection driver available for quemu:///system", "Correct dsn"),
        ] {
            let script = format!("echo 'error: {NOT_CONNECTED}' >&2; echo \"error: {said}\" >&2; exit 1");
            let error = error_of(&script, TIMEOUT);
            assert!(error.starts_with("virsh cannot connect to libvirt at qemu:///system: "), "{error}");
            assert!(error.contains(said) && error.contains(advice), "{error}");
        }
        let other = error_of("echo 'error: it is odd' >&2; exit 1", TIMEOUT);
        assert_eq!(other, "`virsh list --name` failed: it is odd");
    }

    #[test]
    fn lock_is_held_by_the_process_and_not_after_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let (lock, program) = (folder.path().join("lock"), folder.path().join("virsh"));
        let script = format!("flock --nonblock --exclusive '{}' echo free || echo held", lock.display());
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let virsh = Virsh { program: program.to_str().unwrap(), ..Virsh::new("qemu:///system").unwrap() };
        assert_eq!(virsh.read(&[]).unwrap(), "free\n");
        let virsh = virsh.holding(lock.clone());
        assert_eq!(virsh.read(&[]).unwrap(), "held\n");
        let file = File::open(&lock).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    }

    #[test]
    fn messages_of_virsh_are_in_english() {
        let virsh = Virsh::new("test:///default").unwrap();
        let command = virsh.command(&[], &["list"]);
        let variable = |name: &str| {
            let mut set = command.as_std().get_envs();
            set.find(|set| set.0 == name).map(|set| set.1.map(|value| value.to_string_lossy().into_owned()))
        };
        assert_eq!((variable("LC_ALL"), variable("LANGUAGE")), (Some(Some("C.UTF-8".into())), Some(None)));
    }
}
