//! Everything that wakes the loop: keys, signals, and the host.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::thread;

use machinery::{Error, Result};
use ratatui::crossterm::event::{self, Event};
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::client::Requests;

/// One input.
pub enum Input {
    /// A key, or another size of the terminal.
    Terminal(Event),
    /// The host answers: the way to it, and its answer to `version`.
    Connected(Requests, Value),
    /// An answer or an event of the host.
    Message(Value),
    /// The connection was lost for this reason.
    Lost(String),
    /// A signal has arrived, or the terminal is closed.
    End,
}

/// Receives the signals that end a program, and sends each as an input.
///
/// # Errors
/// The system has no descriptors or threads left.
pub fn receive_signals(inputs: SyncSender<Input>) -> Result<()> {
    let failed = |error: std::io::Error| Error::environment(format!("cannot receive signals: {error}"));
    let (mut received, sender) = UnixStream::pair().map_err(failed)?;
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        pipe::register(signal, sender.try_clone().map_err(failed)?).map_err(failed)?;
    }
    let wait = move || {
        let _ = received.read(&mut [0]);
        let _ = inputs.send(Input::End);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).map(drop).map_err(failed)
}

/// Receives the keys, and sends each as an input.
///
/// # Errors
/// The system has no threads left.
pub fn receive_keys(inputs: SyncSender<Input>) -> Result<()> {
    let wait = move || {
        while let Ok(event) = event::read() {
            if inputs.send(Input::Terminal(event)).is_err() {
                return;
            }
        }
        let _ = inputs.send(Input::End);
    };
    let started = thread::Builder::new().name("keys".to_owned()).spawn(wait).map(drop);
    started.map_err(|error| Error::environment(format!("cannot receive keys: {error}")))
}
