//! Waits until a guest is ready to be saved, and shows its screen's progress meanwhile.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::{Error, Result};

use super::options::Ready;
use super::session::Session;

/// The interval of looks at the guest.
const INTERVAL: Duration = Duration::from_millis(500);
/// The interval of screenshots, and the time that one may take.
const SCREEN_INTERVAL: Duration = Duration::from_secs(2);
const SCREEN_TIMEOUT: Duration = Duration::from_secs(10);
/// The time that an agent has to answer.
const AGENT_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits until the guest is ready. `scratch` is a folder for a screenshot.
///
/// # Errors
/// The guest ends, or is not ready in time.
pub fn wait(
    session: &Session,
    ready: &Ready,
    agent: SocketAddr,
    scratch: &Path,
    step: &dyn Fn(&str),
) -> Result<()> {
    let begun = Instant::now();
    let moment = Moment::of(ready, agent);
    let mut screen = Screen::new(scratch, ready.screenshot.as_deref());
    while !moment.is_there(begun) {
        session.expect_run(INTERVAL)?;
        if begun.elapsed() > Duration::from_secs(ready.timeout) {
            return Err(Error::timeout(format!("{} within {} s; {screen}", moment.missed(), ready.timeout))
                .advice("Look at its screen with --screenshot FILE, set --timeout, or give --ready-after or --ready-key"));
        }
        screen.look(session)?;
        step(&format!("waiting for {}; {screen}", moment.name()));
    }
    Ok(())
}

/// The moment at which the guest is ready.
enum Moment {
    Agent(SocketAddr),
    After(Duration),
    Key(Receiver<()>),
}

impl Moment {
    fn of(ready: &Ready, agent: SocketAddr) -> Moment {
        match (ready.ready_after, ready.ready_key) {
            (Some(seconds), _) => Moment::After(Duration::from_secs(seconds)),
            (None, true) => Moment::Key(enter()),
            (None, false) => Moment::Agent(agent),
        }
    }

    fn is_there(&self, begun: Instant) -> bool {
        match self {
            Moment::Agent(address) => answers(*address),
            Moment::After(time) => begun.elapsed() >= *time,
            // Without a standard input, nobody can press the key: the time is up at some point.
            Moment::Key(pressed) => {
                !matches!(pressed.try_recv(), Err(TryRecvError::Empty | TryRecvError::Disconnected))
            }
        }
    }

    fn name(&self) -> String {
        match self {
            Moment::Agent(address) => format!("the agent at {address}"),
            Moment::After(time) => format!("{} s to pass", time.as_secs()),
            Moment::Key(_) => "Enter".to_owned(),
        }
    }

    fn missed(&self) -> String {
        match self {
            Moment::Agent(address) => format!("the agent at http://{address} has not answered"),
            Moment::After(_) => "the time of --ready-after has not passed".to_owned(),
            Moment::Key(_) => "Enter was not pressed".to_owned(),
        }
    }
}

/// Returns the receiver of a message that comes when Enter is pressed.
fn enter() -> Receiver<()> {
    let (sender, receiver) = mpsc::channel();
    // The thread ends with the process.
    thread::spawn(move || {
        let mut line = String::new();
        if io::stdin().read_line(&mut line).is_ok_and(|length| length > 0) {
            let _ = sender.send(());
        }
    });
    receiver
}

/// Reports whether an agent answers `GET /` with the status 200.
pub fn answers(address: SocketAddr) -> bool {
    let asked = || -> io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, AGENT_TIMEOUT)?;
        stream.set_read_timeout(Some(AGENT_TIMEOUT))?;
        stream.set_write_timeout(Some(AGENT_TIMEOUT))?;
        // In one piece: a simple agent may read only once.
        let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut status = [0; "HTTP/1.1 200".len()];
        stream.read_exact(&mut status)?;
        Ok(status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"))
    };
    asked().unwrap_or(false)
}

/// Expects that nobody answers at the agent's address before the guest runs, if the agent's answer is waited for.
///
/// # Errors
/// Another machine or program has the address: its answer would be taken for that of the guest.
pub fn expect_no_answer(ready: &Ready, agent: SocketAddr) -> Result<()> {
    if ready.ready_after.is_some() || ready.ready_key {
        return Ok(());
    }
    match TcpStream::connect_timeout(&agent, AGENT_TIMEOUT) {
        Err(_) => Ok(()),
        Ok(_) => {
            Err(Error::environment(format!("somebody answers at {agent} already, before the guest runs"))
                .advice("Give another --ip, or end the machine or the program that has this address"))
        }
    }
}

/// The screen of a guest.
struct Screen {
    picture: PathBuf,
    /// The operator's file, which gets each changed screen.
    copy: Option<PathBuf>,
    looked: Option<Instant>,
    hash: u64,
    size: Option<(u32, u32)>,
    changes: u32,
    changed: Instant,
}

impl Screen {
    fn new(scratch: &Path, copy: Option<&Path>) -> Screen {
        Screen {
            picture: scratch.join("screen.png"),
            copy: copy.map(Path::to_owned),
            looked: None,
            hash: 0,
            size: None,
            changes: 0,
            changed: Instant::now(),
        }
    }

    /// Takes a screenshot, unless the last one is new. A guest without a screen has none.
    fn look(&mut self, session: &Session) -> Result<()> {
        if self.looked.is_some_and(|looked| looked.elapsed() < SCREEN_INTERVAL) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        let path = self.picture.clone();
        let taken = session.call("screenshot", SCREEN_TIMEOUT, move |instance, machine, deadline| {
            instance.screenshot(machine, &path, deadline)
        });
        let Ok(picture) = taken
            .and_then(|()| fs::read(&self.picture).map_err(|error| Error::io("read", &self.picture, &error)))
        else {
            return Ok(());
        };
        let mut hasher = DefaultHasher::new();
        picture.hash(&mut hasher);
        if hasher.finish() == self.hash {
            return Ok(());
        }
        self.hash = hasher.finish();
        self.size = size_of(&picture);
        self.changes += 1;
        self.changed = Instant::now();
        self.copy.as_ref().map_or(Ok(()), |copy| write_whole(copy, &picture))
    }
}

impl std::fmt::Display for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.size {
            None => f.write_str("no screen yet"),
            Some((width, height)) => write!(
                f,
                "screen {width}x{height}, changed {} times, last {} s ago ({:08x})",
                self.changes,
                self.changed.elapsed().as_secs(),
                self.hash as u32
            ),
        }
    }
}

/// Returns width and height in the header of a PNG. Source: the PNG specification, section 11.2.1.
fn size_of(png: &[u8]) -> Option<(u32, u32)> {
    let number = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?));
    Some((number(16)?, number(20)?))
}

/// Replaces the content of the file, so that a viewer sees a whole picture.
fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = tempfile::NamedTempFile::new_in(folder).and_then(|mut file| {
        file.write_all(content)?;
        file.persist(path).map_err(|failed| failed.error)
    });
    written.map(drop).map_err(|error| Error::io("write the screenshot to", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Returns the address of a server that answers once with that text.
    fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(answer.as_bytes());
        });
        address
    }

    #[test]
    fn agent_answers_only_with_the_status_of_success() {
        assert!(answers(server("HTTP/1.1 200 OK\r\n\r\n{}")));
        assert!(answers(server("HTTP/1.0 200 OK\r\n\r\n{}")));
        for other in ["", "HTTP/1.1 404 Not Found\r\n\r\n", "SSH-2.0-OpenSSH_9.2 200\r\n"] {
            assert!(!answers(server(other)), "{other}");
        }
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(!answers(closed));
    }

    #[test]
    fn address_is_refused_when_somebody_answers_before_the_guest_runs() {
        let agent = Ready { ready_after: None, ready_key: false, timeout: 1, screenshot: None };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let refused = expect_no_answer(&agent, address).unwrap_err().to_string();
        assert!(refused.contains(&address.to_string()) && refused.contains("--ip"), "{refused}");
        // The answer is of no use to these.
        expect_no_answer(&Ready { ready_after: Some(1), ..agent.clone() }, address).unwrap();
        expect_no_answer(&Ready { ready_key: true, ..agent.clone() }, address).unwrap();
        drop(listener);
        expect_no_answer(&agent, address).unwrap();
    }

    #[test]
    fn size_of_a_picture_is_in_its_header() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend([0, 0, 2, 0xd0, 0, 0, 1, 0x90]);
        assert_eq!(size_of(&png), Some((720, 400)));
        assert_eq!(size_of(b"\x89PNG"), None);
    }
}
