//! The consoles of machines: viewers of a running machine's screen, with its keyboard and mouse.
//!
//! ```text
//! connected ─▶ relayed ─▶ the viewer leaves, the hypervisor closes the connection, or the run ends
//! ```
//!
//! The bytes are RFB (RFC 6143), which the host passes on without a look at them. A machine has at most
//! [`MAX_VIEWERS`] at a time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, State};
use tokio::io::{AsyncRead, AsyncWrite, copy, split};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::Manager;
use crate::events::Event;
use crate::fleet::Machine;
use crate::fleet::machine::MAX_VIEWERS;
use crate::plugin::call::CallResult;

/// The number of bytes of a path that a socket address holds. Source: unix(7).
pub const MAX_ADDRESS: usize = 107;

/// A connection to the console of a running machine.
pub struct Console {
    stream: UnixStream,
    machine: Arc<Machine>,
    events: Receiver<Event>,
    _permit: OwnedSemaphorePermit,
}

impl Console {
    /// Connects to the machine, with events from before the call and a limit for the plugin.
    async fn connect(
        machine: &Arc<Machine>,
        events: Receiver<Event>,
        limit: Duration,
    ) -> Result<Self, String> {
        let permit = Arc::clone(&machine.viewers).try_acquire_owned().map_err(|_| {
            format!("machine '{}' has {MAX_VIEWERS} viewers already: close one", machine.name())
        })?;
        expect_on(machine)?;
        let called = machine
            .call(limit, |machine, deadline| machine.machinery.instance.console(machine.name(), deadline));
        let connected = match called.await {
            CallResult::Returned(connected) => connected.and_then(|stream| {
                let unusable = |error| Error::failed(format!("its connection cannot be used: {error}"));
                registered(stream).map_err(unusable)
            }),
            CallResult::Abandoned(_) => Err(Error::misbehaved("it did not return from the plugin")),
        };
        match connected {
            Ok(stream) => Ok(Console { stream, machine: Arc::clone(machine), events, _permit: permit }),
            Err(error) => Err(error.action("opening the console").machine(machine.name()).to_string()),
        }
    }

    /// Passes bytes between the machine and a viewer, until one of them closes its connection or the run ends.
    ///
    /// # Errors
    /// A connection has broken.
    pub async fn relay(self, viewer: impl AsyncRead + AsyncWrite) -> io::Result<()> {
        let Console { mut stream, machine, mut events, _permit } = self;
        let (mut from_viewer, mut to_viewer) = split(viewer);
        let (mut from_machine, mut to_machine) = stream.split();
        let copied = tokio::select! {
            copied = copy(&mut from_machine, &mut to_viewer) => copied,
            copied = copy(&mut from_viewer, &mut to_machine) => copied,
            () = end_of_run(&machine, &mut events) => return Ok(()),
        };
        copied.map(drop)
    }
}

/// Waits until the machine is off.
async fn end_of_run(machine: &Machine, events: &mut Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(Event::State { machine: name, state, .. }) if name == machine.name() && !is_on(state) => {
                return;
            }
            Err(RecvError::Lagged(_)) if !is_on(machine.status().state) => return,
            Err(RecvError::Closed) => return,
            Ok(_) | Err(RecvError::Lagged(_)) => {}
        }
    }
}

/// Reports whether a machine in that state can have viewers.
fn is_on(state: State) -> bool {
    matches!(state, State::Running | State::Paused | State::Suspended)
}

fn disabled(machine: &Machine) -> String {
    format!(
        "machine '{}' has no console: an operator enables it with `console: true` in the section of '{}' in \
         machinery-host.yaml, if that machinery has consoles",
        machine.name(),
        machine.machinery.name
    )
}

/// Returns the path of the socket of the machine's console.
///
/// # Errors
/// The machine has no console, or its path is too long; the reason is for clients.
pub fn console_socket(machine: &Machine, folder: &Path) -> Result<PathBuf, String> {
    let name = machine.name();
    if !machine.info().console {
        return Err(disabled(machine));
    }
    let path = folder.join(format!("{name}.sock"));
    let length = path.as_os_str().len();
    if length > MAX_ADDRESS {
        return Err(format!(
            "the console of machine '{name}' cannot have a socket: its path {} has {length} bytes, and an address \
             holds {MAX_ADDRESS}. Use a CWD with a shorter path",
            path.display()
        ));
    }
    Ok(path)
}

impl Manager {
    /// Returns the folder of the consoles' sockets.
    pub fn consoles(&self) -> &Path {
        &self.queues.context().folders.consoles
    }

    /// Returns the socket of the console of a machine that is on.
    ///
    /// # Errors
    /// The machine has no console, or is off; the socket could not be made. The reason is for clients.
    pub fn expect_console(&self, machine: &Machine) -> Result<PathBuf, String> {
        let path = console_socket(machine, self.consoles())?;
        expect_on(machine)?;
        match path.exists() {
            true => Ok(path),
            false => Err(format!("{} does not exist: the host's log may have the reason", path.display())),
        }
    }

    /// Connects a viewer to the machine's console.
    ///
    /// # Errors
    /// The machine has no console, is off, or has too many viewers; the plugin fails. The reason is for clients.
    pub async fn console(&self, machine: &Arc<Machine>) -> Result<Console, String> {
        if !machine.info().console {
            return Err(disabled(machine));
        }
        Console::connect(machine, self.subscribe(), self.queues.context().timeouts().state).await
    }
}

fn expect_on(machine: &Machine) -> Result<(), String> {
    let state = machine.status().state;
    is_on(state)
        .then_some(())
        .ok_or_else(|| format!("machine '{}' has no console now, because it is {state}", machine.name()))
}

fn registered(stream: std::os::unix::net::UnixStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;
    use crate::fleet::fake_plugin::{FakePlugin, info};
    use machinery::MachineInfo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LIMIT: Duration = Duration::from_secs(30);

    /// Returns a running machine with its plugin and its events.
    fn running() -> (Arc<Machine>, FakePlugin, Events) {
        let (plugin, events) = (FakePlugin::default(), Events::default());
        let machine = plugin.machine("m", &events);
        machine.set_info(MachineInfo { console: true, ..info("m") });
        machine.set_state(State::Running);
        (machine, plugin, events)
    }

    async fn connect(machine: &Arc<Machine>, events: &Events) -> Result<Console, String> {
        Console::connect(machine, events.subscribe(), LIMIT).await
    }

    #[tokio::test]
    async fn relay_ends_with_the_run_when_the_plugin_closes_nothing() {
        let (machine, plugin, events) = running();
        let console = connect(&machine, &events).await.unwrap();
        let server = plugin.take_viewer().unwrap();
        let (viewer, mut theirs) = tokio::io::duplex(64);
        let relayed = tokio::spawn(console.relay(viewer));
        theirs.write_all(b"ping").await.unwrap();
        let mut server = registered(server).unwrap();
        let mut bytes = [0; 4];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"ping");
        machine.set_state(State::Paused);
        machine.set_reported(State::Poweroff, "QEMU was killed");
        relayed.await.unwrap().unwrap();
        assert_eq!(theirs.read(&mut bytes).await.unwrap(), 0);
        assert_eq!(machine.viewers.available_permits(), MAX_VIEWERS);
    }

    #[tokio::test]
    async fn relay_ends_when_the_viewer_or_the_machine_closes_its_connection() {
        let (machine, plugin, events) = running();
        for viewer_leaves in [true, false] {
            let console = connect(&machine, &events).await.unwrap();
            let server = plugin.take_viewer();
            let (viewer, theirs) = tokio::io::duplex(64);
            let relayed = tokio::spawn(console.relay(viewer));
            let _kept = match viewer_leaves {
                true => {
                    drop(theirs);
                    (None, server)
                }
                false => {
                    drop(server);
                    (Some(theirs), None)
                }
            };
            relayed.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn console_is_refused_when_the_plugin_or_the_machine_has_none() {
        let (machine, plugin, events) = running();
        plugin.fail("console", Error::failed("no server"));
        let reason = connect(&machine, &events).await.err().unwrap();
        assert!(reason.contains("no server") && reason.contains("'m'"), "{reason}");
        machine.set_state(State::Starting);
        assert!(connect(&machine, &events).await.err().unwrap().contains("it is starting"));
        machine.set_info(info("m"));
        let reason = console_socket(&machine, Path::new("/c")).unwrap_err();
        assert!(reason.contains("`console: true`"), "{reason}");
        assert_eq!(machine.viewers.available_permits(), MAX_VIEWERS);
    }
}
