//! The terminal, which is restored however the command ends.
//!
//! ```text
//! quit, signal, error ─▶ Screen is dropped ─┐
//! panic of any thread ─▶ hook ──────────────┴─▶ the terminal is as before
//! ```
//!
//! After a panic of another thread, the loop could wait for ever. So a panic ends the process.

use std::io::{self, IsTerminal, Stdout, stdout};
use std::panic;

use machinery::{Error, Result};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};

use crate::exit::{self, ExitCode};

/// The terminal in raw mode, with a screen of its own.
pub struct Screen(Terminal<CrosstermBackend<Stdout>>);

impl Screen {
    /// Prepares the terminal.
    ///
    /// # Errors
    /// The output is no terminal, or the terminal cannot be prepared.
    pub fn open() -> Result<Self> {
        if !stdout().is_terminal() {
            return Err(Error::environment("`top` needs a terminal, and its output is none")
                .advice("Use `cuckoo-machinery list` or `cuckoo-machinery metrics`, or `top --json`"));
        }
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            restore();
            hook(info);
            exit::end(ExitCode::from(1));
        }));
        let opened = enable_raw_mode()
            .and_then(|()| execute!(stdout(), EnterAlternateScreen, Hide))
            .and_then(|()| Terminal::new(CrosstermBackend::new(stdout())));
        opened.map(Screen).map_err(|error| {
            restore();
            Error::environment(format!("cannot prepare the terminal: {error}"))
        })
    }

    /// Returns the terminal.
    pub fn terminal(&mut self) -> &mut Terminal<CrosstermBackend<Stdout>> {
        &mut self.0
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal. It may be closed already.
fn restore() {
    let _ = disable_raw_mode();
    let _: io::Result<()> = execute!(stdout(), LeaveAlternateScreen, Show);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use machinery_testkit::terminal::Terminal;

    use super::*;

    /// Set in the program of a test that panics in a terminal.
    const PANICS: &str = "MACHINERY_TEST_PANICS";

    #[test]
    fn terminal_is_restored_and_the_process_ends_when_a_thread_panics() {
        if std::env::var_os(PANICS).is_some() {
            let _screen = Screen::open().unwrap();
            std::thread::spawn(|| panic!("as wanted")).join().unwrap_err();
            unreachable!("the panic has ended the process");
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = "cli::top::screen::tests::terminal_is_restored_and_the_process_ends_when_a_thread_panics";
        command.args(["--exact", name, "--nocapture"]).env(PANICS, "1");
        let mut terminal = Terminal::start(command, (24, 80)).unwrap();
        terminal.wait_for_words("as wanted").unwrap();
        assert_eq!(terminal.wait().unwrap().code(), Some(1), "{}", terminal.text());
        assert!(terminal.is_restored().unwrap(), "{}", terminal.text());
    }
}
