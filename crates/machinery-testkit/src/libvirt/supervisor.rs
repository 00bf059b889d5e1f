//! The supervisor of a private libvirtd.
//!
//! It does for libvirtd what systemd does (`Restart=on-failure`): it starts a crashed libvirtd again. A libvirtd that
//! was killed, or that ends by itself, stays away, because a test wants that.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::namespaces::{KILL_TIMEOUT, Namespaces};
use crate::error::{Context, Error};
use crate::{Result, processes};

/// The maximum time until libvirtd has made its sockets.
const START_TIMEOUT: Timespec = Timespec { tv_sec: 120, tv_nsec: 0 };

/// The script. 134 and 139 are the ends by SIGABRT and SIGSEGV.
const SCRIPT: &str = r#"
while :; do
    libvirtd --config "$LIBVIRTD_CONF" "$@"
    case $? in
        134 | 139) echo "libvirtd has crashed, and is started again" ;;
        *) exit ;;
    esac
done
"#;

/// A supervisor with its libvirtd.
#[derive(Debug)]
pub struct Supervisor {
    process: Child,
    /// The socket on which libvirtd reports that its sockets exist. Source: sd_notify(3), and `virSystemdNotifyReady` in
    /// libvirt's src/util/virsystemd.c.
    ready: UnixDatagram,
}

impl Supervisor {
    /// Starts libvirtd with that configuration and these arguments, and waits for its sockets. Its output goes to a
    /// file in `folder`.
    pub fn start(
        namespaces: &Namespaces,
        folder: &Path,
        configuration: &Path,
        arguments: &[&str],
    ) -> Result<Supervisor> {
        let what = || "starting libvirtd".to_owned();
        let socket = folder.join("ready");
        // The socket of an earlier libvirtd may exist.
        let _ = std::fs::remove_file(&socket);
        let ready = UnixDatagram::bind(&socket).context(what)?;
        let output = folder.join("libvirtd.out");
        let log = File::options().create(true).append(true).open(output).context(what)?;
        let script = ["sh", "-c", SCRIPT, "libvirtd"];
        let mut command = namespaces.enter(folder, &[&script[..], arguments].concat())?;
        // A search for leftovers finds processes by the folder on their command line.
        command.env("LIBVIRTD_CONF", configuration);
        command.env("NOTIFY_SOCKET", socket).stdin(Stdio::null());
        command.stdout(log.try_clone().context(what)?).stderr(log);
        let mut supervisor = Supervisor { process: command.spawn().context(what)?, ready };
        supervisor.wait_until_ready().inspect_err(|_| {
            // A libvirtd that hangs ends with its namespace.
            let _ = supervisor.process.kill();
        })?;
        Ok(supervisor)
    }

    /// Returns libvirtd's process. A process that libvirtd has forked has the same command line until it executes QEMU.
    pub fn daemon(&self) -> Result<Pid> {
        processes::child(self.script()?)?.ok_or_else(|| Error::new("libvirtd has ended"))
    }

    fn script(&self) -> Result<Pid> {
        let script = processes::child(Pid::from_child(&self.process))?;
        script.ok_or_else(|| Error::new("the supervisor of libvirtd has ended"))
    }

    /// Kills libvirtd, and waits for its end.
    pub fn kill(self) -> Result<()> {
        let daemon = self.daemon();
        // First, so that it does not start libvirtd again, which may be crashing.
        kill_and_wait(self.script()?)?;
        kill_and_wait(daemon?)
    }

    /// Waits until libvirtd has made its sockets, also after a crash.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let what = || "waiting for libvirtd".to_owned();
        let pid = Pid::from_child(&self.process);
        let process = pidfd_open(pid, PidfdFlags::empty()).context(what)?;
        let mut events = [PollFd::new(&self.ready, PollFlags::IN), PollFd::new(&process, PollFlags::IN)];
        if poll(&mut events, Some(&START_TIMEOUT)).context(what)? == 0 {
            return Err(Error::new("libvirtd makes no sockets in time"));
        }
        if events[0].revents().is_empty() {
            return Err(Error::new("libvirtd has ended"));
        }
        let mut message = [0; 256];
        let length = self.ready.recv(&mut message).context(what)?;
        match message.get(..length) {
            Some(b"READY=1") => Ok(()),
            other => Err(Error::new(format!("libvirtd reports {other:?}"))),
        }
    }
}

impl Drop for Supervisor {
    /// Waits for the end of the supervisor. It was killed, or its namespace has ended.
    fn drop(&mut self) {
        let _ = self.process.wait();
    }
}

fn kill_and_wait(process: Pid) -> Result<()> {
    let what = || format!("killing process {process}");
    let end = pidfd_open(process, PidfdFlags::empty()).context(what)?;
    pidfd_send_signal(&end, Signal::KILL).context(what)?;
    match poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&KILL_TIMEOUT)).context(what)? {
        0 => Err(Error::new(format!("{}: it still runs", what()))),
        _ => Ok(()),
    }
}
