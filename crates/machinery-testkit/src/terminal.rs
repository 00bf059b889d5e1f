//! A program in a terminal of its own, whose screen and keys belong to the test.
//!
//! ```text
//! test ─▶ keys, size ─▶ pseudo terminal ─▶ program
//!      ◀── Screen ◀──── terminal emulator ◀───┘
//! ```

use std::fs;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, ioctl_tiocsctty, kill_process, kill_process_group, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use vt100::{Parser, Screen};

use crate::Result;
use crate::error::{Context, Error};
use crate::process::{TIMEOUT, wait_for};

/// The time between two looks for the end of a program that writes nothing.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The size of a terminal: rows and columns.
pub type Size = (u16, u16);

/// A program in a terminal. Dropping it closes the terminal, and kills the program.
pub struct Terminal {
    child: Child,
    /// The side of the terminal that the test has.
    controller: OwnedFd,
    /// The side of the program, which keeps the terminal's settings readable after the program's end.
    terminal: OwnedFd,
    parser: Parser,
    ended: Option<ExitStatus>,
}

impl Terminal {
    /// Starts the program in a terminal of that size.
    pub fn start(mut command: Command, size: Size) -> Result<Self> {
        let what = || "making a terminal".to_owned();
        let controller =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context(what)?;
        grantpt(&controller).context(what)?;
        unlockpt(&controller).context(what)?;
        let name = ptsname(&controller, Vec::new()).context(what)?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(name, flags, Mode::empty()).context(what)?;
        let parser = Parser::new(some(size.0)?, some(size.1)?, 0);
        tcsetwinsize(&controller, window(size)).context(what)?;
        let side = || terminal.try_clone().context(what);
        command
            .stdin(side()?)
            .stdout(side()?)
            .stderr(side()?)
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR");
        let own = side()?;
        let lead = move || {
            setsid()?;
            Ok(ioctl_tiocsctty(&own)?)
        };
        // SAFETY: between fork and exec only what is async-signal-safe is allowed; these are two system calls, without
        // allocation or lock.
        unsafe { command.pre_exec(lead) };
        let child = command.spawn().context(|| format!("starting {}", command.get_program().display()))?;
        Ok(Terminal { child, controller, terminal, parser, ended: None })
    }

    /// Types these characters.
    pub fn type_keys(&self, keys: &str) -> Result<()> {
        let mut rest = keys.as_bytes();
        while !rest.is_empty() {
            rest = &rest[rustix::io::write(&self.controller, rest).context(|| "typing".to_owned())?..];
        }
        Ok(())
    }

    /// Changes the terminal's size.
    pub fn resize(&mut self, size: Size) -> Result<()> {
        self.parser.set_size(some(size.0)?, some(size.1)?);
        tcsetwinsize(&self.controller, window(size)).context(|| "resizing a terminal".to_owned())
    }

    /// Waits until the screen is as the test expects, and returns its text.
    pub fn wait_until(&mut self, what: &str, expected: impl Fn(&Screen) -> bool) -> Result<String> {
        let begun = Instant::now();
        while !expected(self.parser.screen()) {
            let has_ended = self.child.try_wait().context(|| "waiting for a program".to_owned())?.is_some();
            let has_output = self.read(LOOK_INTERVAL)?;
            if begun.elapsed() > TIMEOUT || has_ended && !has_output {
                return Err(Error::new(format!("{what}: not on the screen:\n{}", self.text())));
            }
        }
        Ok(self.text())
    }

    /// Waits until the screen has these words, and returns its text.
    pub fn wait_for_words(&mut self, words: &str) -> Result<String> {
        self.wait_until(words, |screen| screen.contents().contains(words))
    }

    /// Reads for that time, and returns the number of bytes that the program has written.
    pub fn read_for(&mut self, time: Duration) -> Result<usize> {
        let begun = Instant::now();
        let mut count = 0;
        while let Some(left) = time.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) {
            count += self.read_bytes(left)?.unwrap_or(0);
        }
        Ok(count)
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context(|| format!("sending {signal:?}"))
    }

    /// Waits for the end of the program.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let begun = Instant::now();
        while begun.elapsed() < TIMEOUT {
            let ended = self.child.try_wait().context(|| "waiting for a program".to_owned())?;
            // The program may wait for a reader of its output.
            while self.read(LOOK_INTERVAL)? {}
            if let Some(status) = ended {
                self.ended = Some(status);
                return Ok(status);
            }
        }
        Err(Error::new(format!("the program does not end:\n{}", self.text())))
    }

    /// Reports whether the terminal echoes and edits lines, and shows its main screen and the cursor, as before a program.
    pub fn is_restored(&self) -> Result<bool> {
        let settings = tcgetattr(&self.terminal).context(|| "reading a terminal's settings".to_owned())?;
        let screen = self.parser.screen();
        let edits_lines =
            settings.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
        Ok(edits_lines && !screen.alternate_screen() && !screen.hide_cursor())
    }

    /// Returns the text of the screen.
    pub fn text(&self) -> String {
        self.parser.screen().contents()
    }

    /// Returns the screen.
    pub fn screen(&self) -> &Screen {
        self.parser.screen()
    }

    /// Returns the processor time that the program has used.
    pub fn processor_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/schedstat", self.child.id());
        let what = || format!("reading {path}");
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).context(what)?.flatten();
        let texts = tasks.filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok());
        let used =
            texts.filter_map(|text| text.split_whitespace().next()?.parse().ok()).map(Duration::from_nanos);
        Ok(used.sum())
    }

    /// Takes output that arrives within that time. Returns false if there is none.
    fn read(&mut self, limit: Duration) -> Result<bool> {
        Ok(self.read_bytes(limit)?.is_some())
    }

    fn read_bytes(&mut self, limit: Duration) -> Result<Option<usize>> {
        let mut fds = [PollFd::new(&self.controller, PollFlags::IN)];
        wait_for(&mut fds, limit)?;
        if fds[0].revents().is_empty() {
            return Ok(None);
        }
        let mut bytes = [0; 4096];
        match rustix::io::read(self.controller.as_fd(), &mut bytes) {
            Ok(0) | Err(Errno::IO) => Ok(None),
            Ok(length) => {
                self.parser.process(&bytes[..length]);
                Ok(Some(length))
            }
            Err(error) => Err(error).context(|| "reading a terminal".to_owned()),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // The program leads a session, and with it a process group.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

fn some(number: u16) -> Result<NonZeroU16> {
    NonZeroU16::new(number).ok_or_else(|| Error::new("a terminal has rows and columns"))
}

fn window((rows, columns): Size) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
