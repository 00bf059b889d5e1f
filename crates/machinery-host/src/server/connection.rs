//! One client's connection.
//!
//! ```text
//! reader ─▶ request ─▶ (action: a task that waits for the outcome) ─▶ answers ─▶ writer
//!                 subscribe: a task that forwards events ──────────────▲
//! ```
//!
//! The reader takes no new line while too many requests are under way, and everything that answers
//! waits while the writer is behind; so a client that never reads costs a bounded amount, and then
//! stops being read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use machinery::State;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::lines::{self, Line};
use super::protocol::{self, Refusal, Request};
use super::{Place, Shared};
use crate::actions::call::{Called, call};
use crate::actions::worker::outcome_of;
use crate::actions::{Action, Outcome};
use crate::fleet::Machine;

/// Requests that one client may have under way.
const UNDER_WAY: usize = 16_384;
/// Answers that may wait for the writer.
const BACKLOG: usize = 64;
/// A client that reads nothing for this long is gone.
const STALLED: Duration = Duration::from_secs(60);
/// How long a plugin may take to tell a state.
const STATE: Duration = Duration::from_secs(10);

/// The lines on their way to the client. An empty one closes the connection.
type Answers = mpsc::Sender<Vec<u8>>;

/// Serves the client until it leaves or is done with. What it ordered goes on without it; its
/// `place` is taken until its last answer is given.
pub async fn serve(stream: UnixStream, shared: Arc<Shared>, place: Place) {
    let (reader, writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let (answers, lines) = mpsc::channel(BACKLOG);
    let writing = tokio::spawn(write(writer, lines, place));
    let gone = answers.clone();
    let mut connection =
        Connection { shared, answers, under_way: Arc::new(Semaphore::new(UNDER_WAY)), subscribed: false };
    tokio::select! {
        () = connection.read(&mut reader) => {}
        () = gone.closed() => {}
    }
    if has_left(reader.get_ref()) {
        writing.abort();
    }
}

/// Whether the client has closed the connection, and not only stopped to send: then nobody is there
/// for answers and events.
fn has_left(reader: &OwnedReadHalf) -> bool {
    let mut stream = [PollFd::new(reader.as_ref(), PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut stream, Some(&now)), Ok(1)) && stream[0].revents().contains(PollFlags::HUP)
}

async fn write(mut writer: OwnedWriteHalf, mut lines: mpsc::Receiver<Vec<u8>>, _place: Place) {
    while let Some(line) = lines.recv().await {
        if line.is_empty() {
            return;
        }
        match timeout(STALLED, writer.write_all(&line)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                tracing::warn!("a client reads nothing: its connection is closed");
                return;
            }
        }
    }
}

struct Connection {
    shared: Arc<Shared>,
    answers: Answers,
    under_way: Arc<Semaphore>,
    subscribed: bool,
}

/// Whether to go on reading.
type GoOn = bool;

impl Connection {
    async fn read(&mut self, reader: &mut BufReader<OwnedReadHalf>) {
        loop {
            let go_on = match lines::next(reader).await {
                Ok(Line::Whole(line)) => self.handle(&line).await,
                Ok(Line::TooLong) => {
                    let reason = format!("a line may have {} bytes at most", lines::LONGEST);
                    self.say_and_close(protocol::failure(&reason), None).await
                }
                Ok(Line::End) | Err(_) => false,
            };
            if !go_on {
                return;
            }
        }
    }

    async fn handle(&mut self, line: &[u8]) -> GoOn {
        let object = match protocol::object(line) {
            Ok(object) => object,
            Err(refusal) => return self.refuse(refusal, None).await,
        };
        let id = object.get("id").cloned();
        let enabled = self.shared.enabled.load(Ordering::SeqCst);
        let request = protocol::request(&object, enabled, |name| self.shared.find(name));
        match request {
            Ok(request) => self.fulfil(request, id).await,
            Err(refusal) => self.refuse(refusal, id).await,
        }
    }

    async fn fulfil(&mut self, request: Request, id: Option<Value>) -> GoOn {
        match request {
            Request::Act(machine, action) => {
                let outcome = self.shared.workers.order(&machine, action);
                self.later(id, async move { protocol::outcome(outcome_of(outcome.await)) }).await
            }
            Request::State(machine) => self.later(id, async move { state(&machine).await }).await,
            Request::ShutdownAll => {
                let shared = Arc::clone(&self.shared);
                self.later(id, async move { protocol::outcome(shutdown_all(&shared).await) }).await
            }
            Request::Subscribe => self.subscribe(id).await,
            Request::List => self.say(self.list(), id).await,
            Request::Version => self.say(self.version(), id).await,
            Request::EnableMachine(machine) => {
                machine.enable();
                self.say(json!({"success": true}), id).await
            }
            Request::SetEnabled(enabled) => {
                self.shared.enabled.store(enabled, Ordering::SeqCst);
                tracing::warn!(enabled, "the machinery manager was switched");
                self.say(json!({"success": true}), id).await
            }
        }
    }

    async fn refuse(&self, refusal: Refusal, id: Option<Value>) -> GoOn {
        let answer = protocol::failure(&refusal.reason);
        if refusal.close { self.say_and_close(answer, id).await } else { self.say(answer, id).await }
    }

    async fn say(&self, answer: Value, id: Option<Value>) -> GoOn {
        self.answers.send(protocol::line(answer, id.as_ref())).await.is_ok()
    }

    async fn say_and_close(&self, answer: Value, id: Option<Value>) -> GoOn {
        self.say(answer, id).await;
        // Nobody is left to tell if this fails.
        let _ = self.answers.send(Vec::new()).await;
        false
    }

    /// Answers when `answer` is there, without holding up the requests that follow.
    async fn later(&self, id: Option<Value>, answer: impl Future<Output = Value> + Send + 'static) -> GoOn {
        let Ok(permit) = Arc::clone(&self.under_way).acquire_owned().await else { return false };
        let answers = self.answers.clone();
        tokio::spawn(async move {
            let line = protocol::line(answer.await, id.as_ref());
            // The client may have left; the action has run all the same.
            let _ = answers.send(line).await;
            drop(permit);
        });
        true
    }

    async fn subscribe(&mut self, id: Option<Value>) -> GoOn {
        if self.subscribed {
            return self.say(protocol::failure("this connection has subscribed already"), id).await;
        }
        self.subscribed = true;
        let mut events = self.shared.events.subscribe();
        let answers = self.answers.clone();
        let go_on = self.say(json!({"success": true}), id).await;
        tokio::spawn(async move {
            loop {
                let line = tokio::select! {
                    event = events.recv() => match event {
                        Ok(event) => json!(event),
                        Err(RecvError::Lagged(count)) => json!({"event": "lost", "count": count}),
                        Err(RecvError::Closed) => return,
                    },
                    () = answers.closed() => return,
                };
                if answers.send(protocol::line(line, None)).await.is_err() {
                    return;
                }
            }
        });
        go_on
    }

    fn list(&self) -> Value {
        let machines = self.shared.fleet.get().map_or(&[][..], |fleet| fleet.machines());
        let machines: Vec<Value> = machines.iter().map(|machine| machine.to_json()).collect();
        json!({"success": true, "machines": machines})
    }

    fn version(&self) -> Value {
        let machines = self.shared.fleet.get().map_or(&[][..], |fleet| fleet.machines());
        let mut machineries = Map::new();
        for machine in machines {
            machineries.insert(machine.machinery.name.clone(), json!(machine.machinery.version));
        }
        json!({
            "success": true,
            "version": env!("CARGO_PKG_VERSION"),
            "interface": machinery::host::interface_version(),
            "machineries": machineries,
        })
    }
}

/// During an action the state is what the worker and the plugin say; else the hypervisor is asked.
async fn state(machine: &Arc<Machine>) -> Value {
    let known = machine.status();
    if known.busy {
        return json!({"success": true, "state": known.state});
    }
    let asked =
        call(machine, STATE, |machine, deadline| machine.machinery.instance.state(machine.name(), deadline));
    match asked.await {
        Called::Returned(Ok(state)) => json!({"success": true, "state": state}),
        Called::Returned(Err(error)) => {
            let error = error.action("telling the state").machine(machine.name());
            protocol::failure(&error.to_string())
        }
        Called::Lost(_) => protocol::failure("telling the state did not come back from the plugin"),
    }
}

/// Stops all machines that are not off; says which could not be stopped.
async fn shutdown_all(shared: &Shared) -> Outcome {
    let machines = shared.fleet.get().map_or(&[][..], |fleet| fleet.machines());
    let on = machines.iter().filter(|machine| {
        let status = machine.status();
        status.busy || status.state != State::Poweroff
    });
    let orders: Vec<_> = on.map(|machine| shared.workers.order(machine, Action::Stop)).collect();
    let mut failures = Vec::new();
    for order in orders {
        if let Err(reason) = outcome_of(order.await) {
            failures.push(reason);
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}
