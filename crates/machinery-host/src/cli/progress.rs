//! Shows the progress of an action on the terminal.

use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::output;

/// The time after which an action shows its progress.
const SHOW_AFTER: Duration = Duration::from_secs(1);

/// An action under way. On a terminal, an action of more than a second shows a spinner, or a bar if the
/// machinery reports progress.
pub struct Progress {
    what: String,
    machine: Value,
    begun: Instant,
    json: bool,
    bar: ProgressBar,
    /// Dropped when the action has ended.
    ended: Option<mpsc::Sender<()>>,
}

impl Progress {
    /// Starts the progress of this request.
    pub fn new(request: &Value, json: bool) -> Self {
        let text = |key: &str| request[key].as_str().unwrap_or("").to_owned();
        let what = format!("{} {}", text("action"), text("machine"));
        let bar = ProgressBar::hidden().with_message(what.clone());
        style(&bar, "{spinner} {msg} {elapsed}");
        let ended = (!json && std::io::stderr().is_terminal()).then(|| show_later(bar.clone()));
        Progress { what, machine: request["machine"].clone(), begun: Instant::now(), json, bar, ended }
    }

    /// Updates the bar if the event is about this action.
    pub fn on_event(&mut self, event: &Value) {
        if event["event"] != json!("progress") || event["machine"] != self.machine {
            return;
        }
        if self.bar.length().is_none() {
            self.bar.set_length(1000);
            style(&self.bar, "{msg} {bar:40} {percent}% {elapsed}");
        }
        let thousandths = event["fraction"].as_f64().unwrap_or(0.0).clamp(0.0, 1.0) * 1000.0;
        self.bar.set_position(thousandths as u64);
    }

    /// Prints the result of the action.
    pub fn done(mut self, answer: &Value) {
        self.ended.take();
        self.bar.finish_and_clear();
        if !self.json && answer["success"] == json!(true) {
            println!("{}: done in {:.1?}", self.what, self.begun.elapsed());
        }
        output::reply(answer, self.json);
    }
}

/// Shows the bar after [`SHOW_AFTER`], unless the returned sender is dropped before.
fn show_later(bar: ProgressBar) -> mpsc::Sender<()> {
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || {
        if end.recv_timeout(SHOW_AFTER) == Err(RecvTimeoutError::Timeout) {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(100));
        }
    });
    ended
}

fn style(bar: &ProgressBar, template: &str) {
    // The templates are constants. If one were invalid, the bar would keep its previous style.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
