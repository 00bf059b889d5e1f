//! Shows the progress of work on the terminal, once it takes more than a second.

use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::output;

/// The time after which work shows its progress.
const SHOW_AFTER: Duration = Duration::from_secs(1);

/// Work under way. On a terminal, work of more than a second shows a spinner with the time. Dropping it removes it.
pub struct Spinner {
    bar: ProgressBar,
    /// The thread that shows the bar, and the sender that is dropped when the work has ended.
    shown: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Spinner {
    /// Starts the spinner of this work. JSON is for programs, so that it has none.
    pub fn start(what: &str, json: bool) -> Self {
        let bar = ProgressBar::hidden().with_message(what.to_owned());
        style(&bar, "{spinner} {msg} {elapsed}");
        let shown = (!json && std::io::stderr().is_terminal()).then(|| show_later(bar.clone()));
        Spinner { bar, shown }
    }

    /// Names the present step of the work.
    pub fn step(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Prints while the spinner is hidden.
    pub fn print(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if let Some((ended, thread)) = self.shown.take() {
            drop(ended);
            // A panic there leaves nothing on the terminal.
            let _ = thread.join();
        }
        self.bar.finish_and_clear();
    }
}

/// An action under way, whose spinner becomes a bar if the machinery reports progress.
pub struct Progress {
    what: String,
    machine: Value,
    begun: Instant,
    json: bool,
    spinner: Spinner,
}

impl Progress {
    /// Starts the progress of this request.
    pub fn new(request: &Value, json: bool) -> Self {
        let text = |key: &str| request[key].as_str().unwrap_or("").to_owned();
        let what = format!("{} {}", text("action"), text("machine"));
        let spinner = Spinner::start(&what, json);
        Progress { what, machine: request["machine"].clone(), begun: Instant::now(), json, spinner }
    }

    /// Updates the bar if the event is about this action.
    pub fn on_event(&mut self, event: &Value) {
        if event["event"] != json!("progress") || event["machine"] != self.machine {
            return;
        }
        let bar = &self.spinner.bar;
        if bar.length().is_none() {
            bar.set_length(1000);
            style(bar, "{msg} {bar:40} {percent}% {elapsed}");
        }
        let thousandths = event["fraction"].as_f64().unwrap_or(0.0).clamp(0.0, 1.0) * 1000.0;
        bar.set_position(thousandths as u64);
    }

    /// Prints the result of the action.
    pub fn done(self, answer: &Value) {
        drop(self.spinner);
        if !self.json && answer["success"] == json!(true) {
            println!("{}: done in {:.1?}", self.what, self.begun.elapsed());
        }
        output::reply(answer, self.json);
    }
}

/// Shows the bar after [`SHOW_AFTER`], unless the returned sender is dropped before.
fn show_later(bar: ProgressBar) -> (mpsc::Sender<()>, JoinHandle<()>) {
    let (ended, end) = mpsc::channel();
    let thread = thread::spawn(move || {
        if end.recv_timeout(SHOW_AFTER) == Err(RecvTimeoutError::Timeout) {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(100));
        }
    });
    (ended, thread)
}

fn style(bar: &ProgressBar, template: &str) {
    // The templates are constants. If one were invalid, the bar would keep its previous style.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
