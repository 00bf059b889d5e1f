//! A viewer of a machine's console: reads the screen, and presses keys. Every wait has a timeout.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::Deadline;
use machinery_backend::rfb;

use crate::Result;
use crate::error::{Context, Error};

pub use machinery_backend::rfb::Screen;

/// Reports whether it is the text screen of a PC, on which the firmware has written.
pub fn is_text(screen: &Screen) -> bool {
    (screen.width, screen.height) == (720, 400) && screen.rgb.iter().any(|byte| *byte > 100)
}

/// The maximum time of an answer, and of the end of a connection.
const PATIENCE: Duration = Duration::from_secs(30);
/// The maximum time of one screen.
const SCREEN_TIMEOUT: Duration = Duration::from_secs(3);
/// The begin of the greeting of an RFB server. Source: RFC 6143, 7.1.1.
const GREETING: &[u8] = b"RFB 003.";
/// The numbers of messages. Source: RFC 6143, 7.5.
const UPDATE_REQUEST: u8 = 3;
const KEY_EVENT: u8 = 4;

/// A viewer.
#[derive(Debug)]
pub struct Viewer {
    stream: UnixStream,
    socket: PathBuf,
}

impl Viewer {
    /// Connects to a console's socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let what = || format!("connecting to {}", socket.display());
        let stream = UnixStream::connect(socket).context(what)?;
        stream.set_read_timeout(Some(PATIENCE)).context(what)?;
        stream.set_write_timeout(Some(PATIENCE)).context(what)?;
        Ok(Viewer { stream, socket: socket.to_owned() })
    }

    /// Reads the greeting of the RFB server.
    pub fn greeting(&mut self) -> Result<()> {
        match self.read::<12>()? {
            greeting if greeting.starts_with(GREETING) => Ok(()),
            other => Err(Error::new(format!("{} greets with {other:?}", self.socket.display()))),
        }
    }

    /// Connects to a console's socket, and reads the whole screen, until `is_expected` accepts it. A server shows the screen
    /// of a restored guest a moment later, and never sends the whole of a screen whose size changes meanwhile.
    pub fn of_screen(socket: &Path, is_expected: impl Fn(&Screen) -> bool) -> Result<Self> {
        let end = Deadline::after(PATIENCE);
        loop {
            let viewer = Viewer::connect(socket)?;
            let read = viewer.stream.set_read_timeout(Some(SCREEN_TIMEOUT));
            read.context(|| viewer.what("setting the timeout"))?;
            match rfb::read_screen(&viewer.stream, Deadline::after(SCREEN_TIMEOUT)) {
                Ok(screen) if is_expected(&screen) => {
                    let reset = viewer.stream.set_read_timeout(Some(PATIENCE));
                    reset.context(|| viewer.what("setting the timeout"))?;
                    return Ok(viewer);
                }
                read if end.passed() => {
                    let seen = read.map(|screen| format!("{} x {}", screen.width, screen.height));
                    return Err(Error::new(format!("{}: {seen:?}", viewer.what("reading the screen"))));
                }
                _ => {}
            }
        }
    }

    /// Presses and releases a key, by its symbol of X. The screen was read before.
    pub fn press(&mut self, symbol: u32) -> Result<()> {
        for is_down in [1, 0] {
            self.send(&[&[KEY_EVENT, is_down, 0, 0], &symbol.to_be_bytes()[..]].concat())?;
        }
        Ok(())
    }

    /// Requests one pixel, and waits for the begin of the server's answer. The screen was read before.
    pub fn is_served(&mut self) -> Result<()> {
        self.send(&[UPDATE_REQUEST, 0, 0, 0, 0, 0, 0, 1, 0, 1])?;
        self.read::<4>().map(drop)
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context(|| self.what("sending"))
    }

    /// Sends bytes until the machine accepts no more.
    pub fn flood(&mut self) -> Result<()> {
        let what = || format!("flooding {}", self.socket.display());
        self.stream.set_write_timeout(Some(Duration::from_secs(1))).context(what)?;
        loop {
            match self.stream.write(&[0; 1 << 16]) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context(what),
            }
        }
    }

    /// Reads bytes.
    pub fn read<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).context(|| self.what("reading"))?;
        Ok(bytes)
    }

    /// Waits until the connection is closed.
    pub fn wait_for_close(&mut self) -> Result<()> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error).context(|| self.what("waiting for the end of the connection")),
        }
    }

    fn what(&self, action: &str) -> String {
        format!("{action} at {}", self.socket.display())
    }
}
