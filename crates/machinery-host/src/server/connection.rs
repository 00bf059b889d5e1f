//! One client's connection.
//!
//! ```text
//! reader ─▶ request ─▶ (action: answered by its worker when it has ended) ─▶ lines ─▶ writer
//!                 subscribe: a task that forwards events ─────────────────────▲
//! ```
//!
//! Every line on its way to the client has a share of a fixed budget, taken before the line is made
//! and given back when it is written. While a client does not read, its budget runs out; then
//! nothing more is read from it and no event is made for it. So it costs a bounded amount, and
//! nobody else ever waits for it: whoever answers only puts a line into a queue.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::lines::{self, Line};
use super::protocol::{self, Refusal, Request};
use super::{Place, Shared};
use crate::actions::call::{Called, call};
use crate::actions::diagnose::diagnose_one;
use crate::actions::rules::plugin_at_fault;
use crate::actions::worker::Answer;
use crate::actions::{Action, Outcome};
use crate::capture;
use crate::events::Event;
use crate::fleet::standing::{Hold, NotHeld};
use crate::fleet::{Fleet, Machine};

/// The budget of one client: requests under way, and lines that wait to be written.
const BUDGET: u32 = 16_384;
/// The share of an answer about all machines, which can be long: a few may wait for one client.
const LARGE: u32 = BUDGET / 4;
/// The share of an answer that may be about one machine, with its latest errors.
const SOME: u32 = 32;
/// A client that reads nothing for this long is gone.
const STALLED: Duration = Duration::from_secs(60);
/// How often to look whether a client that is done sending still waits for its answers.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// A line on its way to the client, with its share of the budget.
struct Outgoing {
    /// An empty one closes the connection.
    line: Vec<u8>,
    _share: OwnedSemaphorePermit,
}

/// Serves the client until it leaves or is done with, or the host ends. What it ordered goes on
/// without it; its `place` is taken until its last answer is given.
pub async fn serve(stream: UnixStream, shared: Arc<Shared>, place: Place) {
    let (reader, writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let (lines, outgoing) = mpsc::unbounded_channel();
    let mut writing = tokio::spawn(write(writer, outgoing, place));
    let mut ending = shared.ending.subscribe();
    let gone = watch::Sender::new(false);
    let budget = Arc::new(Semaphore::new(BUDGET as usize));
    let mut connection = Connection { shared, lines, budget, subscription: None, gone: gone.clone() };
    tokio::select! {
        () = connection.read(&mut reader) => {}
        // The host ends: what has been answered is still written.
        _ = ending.wait_for(|ending| *ending) => {}
        _ = &mut writing => return,
    }
    // A client that is done sending is heard no more of, and may be gone: its answers are still
    // written, events are not.
    drop(connection);
    tokio::select! {
        // Ends early only by a panic, which is in the log.
        _ = &mut writing => return,
        () = leaves(reader.get_ref().as_ref()) => gone.send_replace(true),
    };
    let _ = writing.await;
}

/// Waits until a client that is done sending is not there any more. Both look the same to the runtime,
/// so the kernel is asked now and then; there is somebody to ask for only while an answer is due.
async fn leaves(stream: &UnixStream) {
    let is_there = || {
        let mut client = [PollFd::new(stream, PollFlags::empty())];
        poll(&mut client, Some(&Timespec::default())).is_err()
            || !client[0].revents().contains(PollFlags::HUP)
    };
    while is_there() {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn write(mut writer: OwnedWriteHalf, mut outgoing: UnboundedReceiver<Outgoing>, _place: Place) {
    while let Some(Outgoing { line, _share }) = outgoing.recv().await {
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
    lines: UnboundedSender<Outgoing>,
    budget: Arc<Semaphore>,
    subscription: Option<JoinHandle<()>>,
    /// True once the client is not there any more.
    gone: watch::Sender<bool>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(subscription) = &self.subscription {
            subscription.abort();
        }
    }
}

/// Why a task is not given what it asks for.
type Refused = Box<dyn Error + Send + Sync>;

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
        let id = match protocol::id(&object) {
            Ok(id) => id,
            Err(refusal) => return self.refuse(refusal, None).await,
        };
        let enabled = self.shared.enabled.load(Ordering::SeqCst);
        let request = protocol::request(&object, enabled, |name| self.shared.find(name));
        match request {
            Ok(request) => self.fulfil(request, id).await,
            Err(refusal) => self.refuse(refusal, id).await,
        }
    }

    async fn fulfil(&mut self, request: Request, id: Option<Value>) -> GoOn {
        let answer = match request {
            Request::Act(machine, action) => {
                let slot = self.slot(1).await;
                let answer = Answer::to(move |outcome| slot.fill(protocol::outcome(outcome), id.as_ref()));
                self.shared.workers.order(&machine, action, answer);
                return true;
            }
            Request::State(machine) => {
                let shared = Arc::clone(&self.shared);
                return self.later(id, async move { state(&machine, &shared).await }).await;
            }
            Request::ShutdownAll => {
                let shared = Arc::clone(&self.shared);
                return self.later(id, async move { protocol::outcome(shutdown_all(&shared).await) }).await;
            }
            Request::Reload => {
                let shared = Arc::clone(&self.shared);
                return self.later(id, async move { reload(&shared).await }).await;
            }
            Request::Subscribe => return self.subscribe(id).await,
            Request::List => {
                self.slot(LARGE).await.fill(self.list(), id.as_ref());
                return true;
            }
            Request::Version => self.version(),
            Request::Metrics => json!({"success": true, "metrics": self.shared.metrics.to_json()}),
            Request::WaitIdle => {
                let (shared, mut gone) = (Arc::clone(&self.shared), self.gone.subscribe());
                let idle = async move {
                    // It can take for ever; a client that has left is not waited for.
                    tokio::select! {
                        () = shared.workers.idle() => json!({"success": true}),
                        _ = gone.wait_for(|gone| *gone) => protocol::failure("the client has left"),
                    }
                };
                return self.later(id, idle).await;
            }
            Request::EnableMachine(machine) => return self.enable(id, machine).await,
            Request::DisableMachine(machine, reason) => {
                machine.disable(&reason);
                return self.noted(id, machine).await;
            }
            Request::Lock(machine, hold) => {
                let given = self.given(|fleet| Ok(fleet.lock(&machine, &hold)?)).await;
                return self.locked(id, given.map(|new| (machine, new)), hold).await;
            }
            Request::Acquire(wanted, hold) => {
                let given = self.given(|fleet| Ok(fleet.acquire(&wanted, &hold)?)).await;
                return self.locked(id, given, hold).await;
            }
            Request::Reserve(machine, task_id) => {
                let given = self.given(|fleet| Ok(fleet.reserve(&machine, &task_id)?)).await;
                return self.reserved(id, machine, given).await;
            }
            Request::Unlock(machine, task_id) => match machine.unlock(task_id.as_deref()) {
                Ok(()) => return self.noted(id, machine).await,
                Err(error) => return self.not_held(id, error).await,
            },
            Request::Unreserve(machine) => match machine.unreserve() {
                Ok(()) => return self.noted(id, machine).await,
                Err(error) => return self.not_held(id, error).await,
            },
            Request::SetEnabled(enabled) => {
                // Cuckoo3's node enables the machine at each of its starts.
                if self.shared.enabled.swap(enabled, Ordering::SeqCst) != enabled {
                    tracing::warn!(enabled, "the machinery manager was switched");
                }
                json!({"success": true})
            }
        };
        self.say(answer, id).await
    }

    async fn refuse(&self, refusal: Refusal, id: Option<Value>) -> GoOn {
        let answer = protocol::failure(&refusal.reason);
        if refusal.close { self.say_and_close(answer, id).await } else { self.say(answer, id).await }
    }

    async fn say(&self, answer: Value, id: Option<Value>) -> GoOn {
        self.slot(1).await.fill(answer, id.as_ref());
        true
    }

    async fn say_and_close(&self, answer: Value, id: Option<Value>) -> GoOn {
        self.say(answer, id).await;
        self.slot(1).await.send(Vec::new());
        false
    }

    /// A place for one line, as soon as the budget has room for it.
    async fn slot(&self, share: u32) -> Slot {
        let share = Arc::clone(&self.budget).acquire_many_owned(share).await;
        Slot { lines: self.lines.clone(), share: share.ok() }
    }

    /// Answers when `answer` is there, without holding up the requests that follow.
    async fn later(&self, id: Option<Value>, answer: impl Future<Output = Value> + Send + 'static) -> GoOn {
        let slot = self.slot(SOME).await;
        tokio::spawn(async move { slot.fill(answer.await, id.as_ref()) });
        true
    }

    /// Answers when the change is on disk. The change itself was made before, so that what follows on
    /// this connection finds it.
    async fn noted(&self, id: Option<Value>, machine: Arc<Machine>) -> GoOn {
        let books = Arc::clone(&self.shared.books);
        let noted = async move {
            capture::end_of_task(&machine).await;
            protocol::outcome(books.save().await.map_err(|error| error.machine(machine.name()).to_string()))
        };
        self.later(id, noted).await
    }

    /// Returns the machine to the pool, if its plugin can use it.
    async fn enable(&self, id: Option<Value>, machine: Arc<Machine>) -> GoOn {
        let limit = self.shared.workers.house().timeouts().state;
        match diagnose_one(&machine, limit).await {
            Ok(()) => {
                machine.enable();
                self.noted(id, machine).await
            }
            Err(why) => {
                let reason = format!("machine '{}' cannot be used yet: {why}", machine.name());
                self.say(protocol::failure(&reason), id).await
            }
        }
    }

    /// What was to be given back is not held. It may be that it has been given back, and only the
    /// writing of that has failed: then the next attempt makes good for it.
    async fn not_held(&self, id: Option<Value>, error: NotHeld) -> GoOn {
        let books = Arc::clone(&self.shared.books);
        let told = async move {
            books.catch_up().await;
            protocol::failure(&error.to_string())
        };
        self.later(id, told).await
    }

    /// Gives a machine to a task, unless the host ends. While a new configuration is taken over, that waits;
    /// and nothing is waited for in the middle of it, because that would keep a reload waiting.
    async fn given<T>(&self, give: impl FnOnce(&Fleet) -> Result<T, Refused>) -> Result<T, Refused> {
        let _giving = self.shared.reloader.giving().await;
        match self.shared.workers.closing() {
            Some(closing) => Err(closing.into()),
            None => give(&self.shared.fleet),
        }
    }

    /// Answers when the lock is on disk. A new one that cannot be brought there is not given.
    async fn locked(
        &self,
        id: Option<Value>,
        given: Result<(Arc<Machine>, bool), Refused>,
        hold: Hold,
    ) -> GoOn {
        let (machine, new) = match given {
            Ok(given) => given,
            Err(error) => return self.say(protocol::failure(&error.to_string()), id).await,
        };
        let books = Arc::clone(&self.shared.books);
        let noted = async move {
            match books.save().await {
                // One that was asked for twice may have been taken back for the other's sake.
                Ok(()) if machine.hold().as_ref() != Some(&hold) => protocol::failure(&format!(
                    "the lock of machine '{}' was taken back. Ask again.",
                    machine.name()
                )),
                Ok(()) => json!({"success": true, "machine": machine.to_json()}),
                Err(error) => {
                    if new {
                        // It may have been taken back already.
                        let _ = machine.unlock(Some(&hold.task_id));
                        books.catch_up().await;
                    }
                    protocol::failure(&error.action("lock").machine(machine.name()).to_string())
                }
            }
        };
        self.later(id, noted).await
    }

    /// The same for a reservation.
    async fn reserved(&self, id: Option<Value>, machine: Arc<Machine>, given: Result<bool, Refused>) -> GoOn {
        let new = match given {
            Ok(new) => new,
            Err(error) => return self.say(protocol::failure(&error.to_string()), id).await,
        };
        let books = Arc::clone(&self.shared.books);
        let noted = async move {
            let Err(error) = books.save().await else { return json!({"success": true}) };
            if new {
                let _ = machine.unreserve();
                books.catch_up().await;
            }
            protocol::failure(&error.action("reserve").machine(machine.name()).to_string())
        };
        self.later(id, noted).await
    }

    async fn subscribe(&mut self, id: Option<Value>) -> GoOn {
        if self.subscription.is_some() {
            return self.say(protocol::failure("this connection has subscribed already"), id).await;
        }
        let events = self.shared.events.subscribe();
        let go_on = self.say(json!({"success": true}), id).await;
        let forward = forward(events, self.lines.clone(), Arc::clone(&self.budget));
        self.subscription = Some(tokio::spawn(forward));
        go_on
    }

    fn list(&self) -> Value {
        let roll = self.shared.fleet.roll();
        let machines: Vec<Value> = roll.machines().iter().map(|machine| machine.to_json()).collect();
        json!({"success": true, "machines": machines})
    }

    fn version(&self) -> Value {
        let mut machineries = Map::new();
        for machinery in self.shared.fleet.roll().machineries() {
            machineries.insert(machinery.name.clone(), json!(machinery.version));
        }
        json!({
            "success": true,
            "version": env!("CARGO_PKG_VERSION"),
            "interface": machinery::host::interface_version(),
            "machineries": machineries,
        })
    }
}

/// A place for one line to the client.
struct Slot {
    lines: UnboundedSender<Outgoing>,
    /// None only when the connection is being torn down.
    share: Option<OwnedSemaphorePermit>,
}

impl Slot {
    fn fill(self, answer: Value, id: Option<&Value>) {
        self.send(protocol::line(answer, id));
    }

    fn send(self, line: Vec<u8>) {
        if let Some(share) = self.share {
            // The client may have left.
            let _ = self.lines.send(Outgoing { line, _share: share });
        }
    }
}

/// Forwards events until it is aborted, with its connection.
async fn forward(
    mut events: broadcast::Receiver<Event>,
    lines: UnboundedSender<Outgoing>,
    budget: Arc<Semaphore>,
) {
    loop {
        let event = match events.recv().await {
            Ok(event) => json!(event),
            Err(RecvError::Lagged(count)) => json!({"event": "lost", "count": count}),
            Err(RecvError::Closed) => return,
        };
        let share = Arc::clone(&budget).acquire_owned().await.ok();
        Slot { lines: lines.clone(), share }.fill(event, None);
    }
}

/// During an action the state is what the worker and the plugin say; else the hypervisor is asked,
/// by one at a time. A plugin that does not come back, or does not do as it should, costs the machine.
async fn state(machine: &Arc<Machine>, shared: &Shared) -> Value {
    let known = machine.status();
    let asking = if known.busy { None } else { machine.ask() };
    let Some(asking) = asking else {
        return json!({"success": true, "state": known.state});
    };
    let asked = call(machine, shared.workers.house().timeouts().state, move |machine, deadline| {
        // Held until the plugin comes back, however late that is.
        let _asking = asking;
        machine.machinery.instance.state(machine.name(), deadline)
    });
    let (error, costs) = match asked.await {
        Called::Returned(Ok(state)) => return json!({"success": true, "state": state}),
        Called::Returned(Err(error)) => {
            let costs = plugin_at_fault(&error);
            (error, costs)
        }
        Called::Lost(_) => (machinery::Error::timeout("it did not come back from the plugin"), true),
    };
    let reason = error.action("telling the state").machine(machine.name()).to_string();
    if costs {
        machine.add_error(&reason);
        machine.disable(&reason);
        if let Err(error) = shared.books.save().await {
            tracing::error!(machine = machine.name(), %error, "disabled, but not beyond a restart of the host");
        }
    }
    protocol::failure(&reason)
}

async fn reload(shared: &Shared) -> Value {
    match shared.reloader.reload(shared).await {
        Ok(taken) => {
            let mut answer = json!(taken);
            answer["success"] = json!(true);
            answer
        }
        Err(error) => protocol::failure(&error.to_string()),
    }
}

/// Stops all machines whose runs the host has started, and reports those that could not be stopped.
async fn shutdown_all(shared: &Shared) -> Outcome {
    let roll = shared.fleet.roll();
    // The action of a busy machine may be a start whose run has not begun yet.
    let on =
        roll.machines().iter().filter(|machine| shared.workers.is_busy(machine) || machine.status().own_run);
    let (outcomes, mut answered) = mpsc::unbounded_channel();
    for machine in on {
        let outcomes = outcomes.clone();
        let answer = Answer::to(move |outcome: Outcome| {
            // Whoever asked for all this may have left.
            let _ = outcomes.send(outcome);
        });
        shared.workers.order(machine, Action::StopOwn, answer);
    }
    drop(outcomes);
    let mut failures = Vec::new();
    while let Some(outcome) = answered.recv().await {
        failures.extend(outcome.err());
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}
