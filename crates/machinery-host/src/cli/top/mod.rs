//! `top`: shows the machines of the running host in the terminal, and acts on them.
//!
//! ```text
//! follow ─▶ answers, events ─┐             ┌─▶ Model ─▶ view ─▶ Screen
//! input ──▶ keys, signals ───┴─▶ Top::run ─┤
//!                                          └─▶ requests ─▶ host
//! ```
//!
//! Nothing is polled. The screen is drawn after inputs, at most five times a second, and once a second for the ages.

mod actions;
mod clock;
mod follow;
mod input;
mod keys;
mod machine;
mod model;
mod rates;
mod screen;
mod table;
mod theme;
mod view;

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use machinery::{Error, Result};
use ratatui::crossterm::event::Event;

use crate::client::Requests;
use crate::cwd::Cwd;
use actions::Actions;
use clock::Now;
use follow::{connect, follow};
use input::{Input, receive_keys, receive_signals};
use keys::{Effect, on_key};
use model::Model;
use screen::Screen;
use theme::Theme;

/// The time between two drawings, so that ages are right.
const TICK: Duration = Duration::from_secs(1);
/// The time between two drawings of a burst of events, at least.
const FRAME: Duration = Duration::from_millis(200);
/// The time in which the events of a burst are collected.
const SETTLE: Duration = Duration::from_millis(20);
/// The inputs that wait, at most. A host whose messages nobody takes sends `lagged`.
const MAX_INPUTS: usize = 1024;

/// Shows the machines until the operator quits.
///
/// # Errors
/// The output is no terminal, or no host answers at the begin.
pub fn run(cwd: &Cwd) -> Result<()> {
    let socket = cwd.manager_socket();
    let followed = connect(&socket)?;
    let (sender, inputs) = sync_channel(MAX_INPUTS);
    // Before the terminal is changed: a signal must not end the process in between.
    receive_signals(sender.clone())?;
    let mut screen = Screen::open()?;
    receive_keys(sender.clone())?;
    let following = move |sender: SyncSender<Input>| follow(&socket, followed, &sender);
    let started = thread::Builder::new().name("follow".to_owned()).spawn(move || following(sender));
    started.map_err(|error| Error::environment(format!("cannot follow the host: {error}")))?;
    Top { inputs, model: Model::default(), actions: Actions::default(), requests: None }.run(&mut screen)
}

/// The command at work.
struct Top {
    inputs: Receiver<Input>,
    model: Model,
    actions: Actions,
    /// The way to the host, while it answers.
    requests: Option<Requests>,
}

impl Top {
    fn run(&mut self, screen: &mut Screen) -> Result<()> {
        let theme = Theme::of_environment();
        loop {
            let drawn =
                screen.terminal().draw(|frame| view::draw(frame, &mut self.model, theme, Now::present()));
            drawn.map_err(|error| Error::environment(format!("cannot draw on the terminal: {error}")))?;
            if !self.take_inputs(Instant::now()) {
                return Ok(());
            }
            self.ask();
        }
    }

    /// Takes inputs until it is time to draw. Returns false at the end.
    fn take_inputs(&mut self, drawn: Instant) -> bool {
        let mut draw_at = drawn + TICK;
        loop {
            let wait = draw_at.saturating_duration_since(Instant::now());
            match self.inputs.recv_timeout(wait) {
                Ok(Input::Terminal(event)) => {
                    // The operator waits for the effect of a key.
                    return self.on_terminal(&event);
                }
                Ok(Input::End) | Err(RecvTimeoutError::Disconnected) => return false,
                Ok(input) => self.on_host(input),
                Err(RecvTimeoutError::Timeout) => return true,
            }
            let now = Instant::now();
            draw_at = draw_at.min((drawn + FRAME).max(now + SETTLE));
            if now >= draw_at {
                return true;
            }
        }
    }

    /// Takes an event of the terminal. Returns false if the operator quits.
    fn on_terminal(&mut self, event: &Event) -> bool {
        let Event::Key(key) = event else { return true };
        match on_key(&mut self.model, *key) {
            Some(Effect::Quit) => return false,
            Some(Effect::Act(action, machine)) => {
                let requests = self.requests.as_mut().ok_or_else(|| Error::failed("no host answers"));
                let begun = requests.and_then(|requests| self.actions.begin(action, &machine, requests));
                self.model.notice = begun.unwrap_or_else(|error| error.to_string());
            }
            None => {}
        }
        true
    }

    fn on_host(&mut self, input: Input) {
        match input {
            Input::Connected(requests, version) => {
                self.requests = Some(requests);
                self.model.connected(version);
                self.ask();
            }
            Input::Message(message) => match self.actions.end(&message) {
                Some(notice) => self.model.notice = notice,
                None => self.model.receive(&message, Now::present()),
            },
            Input::Lost(reason) => {
                self.requests = None;
                self.model.lost(&reason);
                if let Some(notice) = self.actions.abandon() {
                    self.model.notice = notice;
                }
            }
            Input::Terminal(_) | Input::End => {}
        }
    }

    /// Asks the host for the answers that are due. The receiving thread notices a lost connection.
    fn ask(&mut self) {
        let Some(requests) = &mut self.requests else { return };
        for request in self.model.requests(Instant::now()) {
            let _ = requests.send(&request, None);
        }
    }
}
