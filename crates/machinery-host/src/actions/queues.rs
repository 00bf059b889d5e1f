//! The queues of all machines: where requests for actions enter.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::context::ActionContext;
use super::message::{InFlightGuard, Message, Pause, Pausing, Request, Responder, Screen, ScreenRequest};
use super::worker::Worker;
use super::{Action, CLOSING, Ending, REMOVED};
use crate::fleet::Machine;

/// The number of requests for one machine that may wait or run.
const MAX_REQUESTS: usize = 64;
/// The reason for refusing a further request.
const FULL: &str = "64 requests for this machine wait or run already: wait for their replies";

/// The queue of one machine.
struct Queue {
    messages: mpsc::UnboundedSender<Message>,
    /// The number of requests that wait or run.
    in_flight: watch::Sender<usize>,
    /// The number of those that wait.
    waiting: watch::Sender<usize>,
}

/// The queues of all machines, and their workers.
pub struct Queues {
    queues: Mutex<HashMap<String, Queue>>,
    closing: Arc<OnceLock<Ending>>,
    context: Arc<ActionContext>,
    /// The number of requests that wait or run, of all machines.
    in_flight: watch::Sender<usize>,
    workers: Mutex<JoinSet<()>>,
}

impl Queues {
    /// Returns queues without any machine.
    pub fn new(context: Arc<ActionContext>) -> Self {
        Queues {
            queues: Mutex::default(),
            closing: Arc::default(),
            context,
            in_flight: watch::Sender::new(0),
            workers: Mutex::default(),
        }
    }

    /// Adds a queue and starts a worker for the machine, unless the host ends.
    pub fn add(&self, machine: &Arc<Machine>) {
        let mut queues = self.queues();
        if self.closing().is_some() {
            return;
        }
        let (sender, messages) = mpsc::unbounded_channel();
        let queue =
            Queue { messages: sender, in_flight: watch::Sender::new(0), waiting: watch::Sender::new(0) };
        queues.insert(machine.name().to_owned(), queue);
        let (context, closing) = (Arc::clone(&self.context), Arc::clone(&self.closing));
        let worker = Worker::new(Arc::clone(machine), context, messages, closing);
        machine.notify_idle_work();
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        // Drops the entries of workers that have ended.
        while workers.try_join_next().is_some() {}
        workers.spawn(worker.run());
    }

    /// Submits an action to the machine's queue. The action runs even if nobody waits for its result.
    pub fn submit(&self, machine: &Machine, action: Action, responder: Responder) {
        match self.queues().get(machine.name()) {
            Some(queue) if *queue.in_flight.borrow() >= MAX_REQUESTS => {
                responder.respond(Err(FULL.to_owned()))
            }
            Some(queue) => {
                let in_flight = InFlightGuard::new([&queue.in_flight, &self.in_flight]);
                // A worker that has ended drops the request, which responds.
                let _ = queue.messages.send(Message::Request(Request {
                    action,
                    responder,
                    waiting: InFlightGuard::new([&queue.waiting]),
                    _in_flight: in_flight,
                }));
            }
            // A host that ends has no queues, and the dropped responder responds with that.
            None if self.closing().is_none() => responder.respond(Err(REMOVED.to_owned())),
            None => {}
        }
    }

    /// Reports whether an action of that machine waits or runs.
    pub fn is_busy(&self, machine: &Machine) -> bool {
        self.queues().get(machine.name()).is_some_and(|queue| *queue.in_flight.borrow() > 0)
    }

    /// Returns the number of requests for that machine that wait.
    pub fn waiting(&self, machine: &Machine) -> usize {
        self.queues().get(machine.name()).map_or(0, |queue| *queue.waiting.borrow())
    }

    /// Asks the machine's worker to pause, unless an action waits or runs. A preparation is cancelled.
    pub fn pause(&self, machine: &Machine) -> Option<Pausing> {
        let queues = self.queues();
        let idle = queues.get(machine.name()).filter(|queue| *queue.in_flight.borrow() == 0)?;
        let (pause, pausing) = Pause::new();
        idle.messages.send(Message::Pause(pause)).ok()?;
        Some(pausing)
    }

    /// Asks the machine's worker for the screen, unless the machine is busy.
    pub fn submit_screen(&self, machine: &Machine) -> Option<oneshot::Receiver<Screen>> {
        let queues = self.queues();
        let idle = queues.get(machine.name()).filter(|queue| *queue.in_flight.borrow() == 0)?;
        let (request, screen) = ScreenRequest::new();
        idle.messages.send(Message::Screen(request)).ok()?;
        Some(screen)
    }

    /// Removes the machine's queue: no later action is accepted.
    pub fn remove(&self, machine: &Machine) {
        self.queues().remove(machine.name());
    }

    /// Returns the context of all executors.
    pub fn context(&self) -> &ActionContext {
        &self.context
    }

    /// Returns the reason for refusing new actions, if the host ends.
    pub fn closing(&self) -> Option<&'static str> {
        self.closing.get().map(|_| CLOSING)
    }

    /// Waits until no action waits or runs.
    pub async fn idle(&self) {
        // The sender is here, so this cannot fail.
        let _ = self.in_flight.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Closes all queues. Waiting requests fail. Each worker finishes its present action, powers its machine off unless
    /// the next host adopts it, and ends. The returned set is empty when every worker has ended.
    pub fn close(&self, ending: Ending) -> JoinSet<()> {
        // A host ends once.
        let _ = self.closing.set(ending);
        self.context.close();
        self.queues().clear();
        std::mem::take(&mut self.workers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes and releases the locks of the queues.
    pub fn pass_locks(&self) {
        drop(self.queues());
        drop(self.workers.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<String, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::lab::Lab;
    use super::super::message::NoScreen;
    use super::super::{ActionResult, PrepareOrigin};
    use super::*;
    use crate::fleet::fake_plugin::FakePlugin;
    use machinery::{Capabilities, State};
    use tokio::time::timeout;

    /// Returns the queues of a lab, with a worker of its machine.
    fn queues(lab: &Lab) -> Queues {
        let queues = Queues::new(Arc::clone(&lab.context));
        queues.add(&lab.machine);
        queues
    }

    fn submit(queues: &Queues, lab: &Lab, action: Action) -> oneshot::Receiver<ActionResult> {
        let (sender, receiver) = oneshot::channel();
        queues.submit(&lab.machine, action, Responder::new(|result| drop(sender.send(result))));
        receiver
    }

    /// Waits until all workers have ended.
    async fn ended(workers: JoinSet<()>) {
        assert!(timeout(Duration::from_secs(60), workers.join_all()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn action_runs_and_responds_with_its_result() {
        let lab = Lab::new("");
        let queues = queues(&lab);
        assert!(!queues.is_busy(&lab.machine));
        let started = submit(&queues, &lab, Action::RestoreStart);
        assert!(queues.is_busy(&lab.machine));
        started.await.unwrap().unwrap();
        queues.idle().await;
        assert!(!queues.is_busy(&lab.machine));
        lab.plugin.fail("stop", machinery::Error::failed("killed"));
        assert!(submit(&queues, &lab, Action::Stop).await.unwrap().unwrap_err().contains("killed"));
    }

    #[tokio::test(start_paused = true)]
    async fn request_is_refused_when_as_many_wait_as_may() {
        let lab = Lab::new("");
        let queues = queues(&lab);
        let waiting: Vec<_> = (0..MAX_REQUESTS).map(|_| submit(&queues, &lab, Action::Stop)).collect();
        assert_eq!(submit(&queues, &lab, Action::Stop).await.unwrap(), Err(FULL.to_owned()));
        assert!(timeout(Duration::ZERO, queues.idle()).await.is_err());
        for result in waiting {
            result.await.unwrap().unwrap();
        }
        queues.idle().await;
        submit(&queues, &lab, Action::Stop).await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn worker_pauses_only_when_no_action_waits() {
        let lab = Lab::new("");
        let queues = queues(&lab);
        let stopped = submit(&queues, &lab, Action::Stop);
        assert!(queues.pause(&lab.machine).is_none());
        stopped.await.unwrap().unwrap();
        queues.idle().await;
        let paused = queues.pause(&lab.machine).unwrap().reached().await.unwrap();
        let mut waiting = submit(&queues, &lab, Action::Stop);
        assert!(timeout(Duration::from_secs(60), &mut waiting).await.is_err());
        drop(paused);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn requests_are_refused_when_the_machine_is_removed() {
        let lab = Lab::new("");
        let queues = queues(&lab);
        let paused = queues.pause(&lab.machine).unwrap().reached().await.unwrap();
        let waiting = submit(&queues, &lab, Action::Stop);
        queues.remove(&lab.machine);
        assert_eq!(submit(&queues, &lab, Action::Stop).await.unwrap(), Err(REMOVED.to_owned()));
        paused.retire();
        assert_eq!(waiting.await.unwrap(), Err(REMOVED.to_owned()));
        assert!(!lab.plugin.take_calls().contains(&"stop".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn closed_queues_refuse_actions_and_power_the_hosts_own_run_off() {
        let lab = Lab::new("");
        let queues = queues(&lab);
        assert_eq!(queues.closing(), None);
        lab.start_own_run();
        let release = lab.plugin.block("acpi_stop");
        let running = submit(&queues, &lab, Action::AcpiStop);
        lab.plugin.called("acpi_stop").await;
        let waiting = submit(&queues, &lab, Action::Stop);
        let workers = queues.close(Ending::Stop);
        assert_eq!(queues.closing(), Some(CLOSING));
        assert_eq!(submit(&queues, &lab, Action::Stop).await.unwrap(), Err(CLOSING.to_owned()));
        assert!(lab.context.restore_permit(&lab.machine).await.is_err());
        lab.plugin.set_state("m", State::Poweroff);
        release.send(()).unwrap();
        running.await.unwrap().unwrap();
        assert_eq!(waiting.await.unwrap(), Err(CLOSING.to_owned()));
        ended(workers).await;
        queues.add(&lab.machine);
        assert!(queues.pause(&lab.machine).is_none(), "no worker is added any more");
    }

    #[tokio::test(start_paused = true)]
    async fn run_ends_with_the_host_unless_it_is_of_somebody_else_or_the_next_host_adopts_it() {
        for (own, ending, adopts, stops) in [
            (true, Ending::Stop, true, true),
            (true, Ending::HandOver, false, true),
            (true, Ending::HandOver, true, false),
            (false, Ending::Stop, true, false),
        ] {
            let lab = Lab::new("");
            lab.machine.machinery.adopts.store(adopts, std::sync::atomic::Ordering::SeqCst);
            if own {
                lab.start_own_run()
            } else {
                lab.start_foreign_run()
            }
            ended(queues(&lab).close(ending)).await;
            assert_eq!(
                lab.plugin.take_calls().contains(&"stop".to_owned()),
                stops,
                "{own} {ending:?} {adopts}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn next_restore_is_prepared_by_the_host_and_by_request() {
        let lab = Lab::new("");
        let queues = queues(&lab);
        lab.plugin.called("prepare").await;
        queues.idle().await;
        lab.plugin.take_calls();
        submit(&queues, &lab, Action::Prepare(PrepareOrigin::Request)).await.unwrap().unwrap();
        assert_eq!(lab.plugin.take_calls(), ["prepare"]);
    }

    #[tokio::test(start_paused = true)]
    async fn preparation_is_cancelled_when_the_machine_is_to_be_stopped() {
        let lab = Lab::new("");
        let release = lab.plugin.block("prepare");
        let queues = queues(&lab);
        lab.plugin.called("prepare").await;
        let plugin = lab.plugin.clone();
        // The plugin's preparation ends with its cancellation.
        lab.plugin.once("stop", move |_| {
            plugin.set_state("m", State::Poweroff);
            let _ = release.send(());
            Ok(())
        });
        submit(&queues, &lab, Action::Stop).await.unwrap().unwrap();
        assert_eq!(lab.plugin.take_calls()[..3], ["prepare", "stop", "stop"]);
    }

    #[tokio::test(start_paused = true)]
    async fn preparation_by_request_is_refused_when_a_stop_waits() {
        let lab = Lab::new("");
        let permits =
            [lab.context.prepare_permit(&lab.machine).await, lab.context.prepare_permit(&lab.machine).await];
        let queues = queues(&lab);
        let prepared = submit(&queues, &lab, Action::Prepare(PrepareOrigin::Request));
        let stopped = submit(&queues, &lab, Action::Stop);
        assert!(prepared.await.unwrap().unwrap_err().contains("not prepared"));
        stopped.await.unwrap().unwrap();
        assert!(!lab.plugin.take_calls().contains(&"prepare".to_owned()));
        drop(permits);
        lab.plugin.called("prepare").await;
    }

    #[tokio::test(start_paused = true)]
    async fn screen_is_shown_only_when_no_action_waits_or_runs() {
        let plugin = FakePlugin::default();
        plugin.set_capabilities(Capabilities { screenshot: true, ..Capabilities::default() });
        let lab = Lab::with(plugin, "");
        lab.start_own_run();
        let queues = queues(&lab);
        let shown = queues.submit_screen(&lab.machine).unwrap();
        assert!(shown.await.unwrap().is_err_and(|why| why != NoScreen::Off), "the plugin writes no file");
        assert_eq!(lab.plugin.take_calls(), ["screenshot"]);
        // The stop arrives when the request for the screen waits.
        let refused = queues.submit_screen(&lab.machine).unwrap();
        let stopped = submit(&queues, &lab, Action::Stop);
        assert!(queues.submit_screen(&lab.machine).is_none());
        stopped.await.unwrap().unwrap();
        assert!(refused.await.is_err());
        assert_eq!(lab.plugin.take_calls(), ["stop"]);
    }

    #[tokio::test(start_paused = true)]
    async fn worker_has_a_pending_change_applied_when_its_machine_is_free() {
        let lab = Lab::new("");
        lab.start_own_run();
        let queues = queues(&lab);
        lab.machine.set_pending_change(true);
        let minute = Duration::from_secs(60);
        assert!(timeout(minute, lab.context.pending_change.notified()).await.is_err());
        submit(&queues, &lab, Action::Stop).await.unwrap().unwrap();
        assert!(timeout(minute, lab.context.pending_change.notified()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn worker_tries_a_machine_in_quarantine_and_stops_a_run_that_is_too_long() {
        let lab = Lab::new("max_run: 60");
        let queues = queues(&lab);
        lab.machine.take_out(machinery::ErrorKind::Failed, "killed", crate::config::Heal::Auto);
        lab.plugin.called("restore_start").await;
        queues.idle().await;
        assert!(timeout(Duration::from_secs(60), lab.plugin.called("stop")).await.is_ok());
        while lab.quarantine().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        submit(&queues, &lab, Action::RestoreStart).await.unwrap().unwrap();
        lab.plugin.take_calls();
        lab.plugin.called("stop").await;
        assert!(lab.machine.status().errors[0].contains("max_run"));
    }

    #[tokio::test]
    async fn locks_are_passed_only_when_they_are_free() {
        let lab = Lab::new("");
        let queues = &queues(&lab);
        std::thread::scope(|scope| {
            let held = queues.queues();
            let (passed, receiver) = std::sync::mpsc::channel();
            scope.spawn(move || {
                queues.pass_locks();
                passed.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err());
            drop(held);
            receiver.recv().unwrap();
        });
    }

    #[tokio::test(start_paused = true)]
    async fn machine_that_is_locked_while_its_preparation_waits_is_not_prepared() {
        let lab = Lab::new("");
        let permits =
            [lab.context.prepare_permit(&lab.machine).await, lab.context.prepare_permit(&lab.machine).await];
        let _queues = queues(&lab);
        // The clock is paused: this returns when the worker waits.
        tokio::time::sleep(Duration::from_millis(1)).await;
        lab.machine.lock(&crate::fleet::availability::TaskLock::default()).unwrap();
        drop(permits);
        // The worker was first, so it has returned its permit when both are here.
        let _permits =
            [lab.context.prepare_permit(&lab.machine).await, lab.context.prepare_permit(&lab.machine).await];
        assert!(lab.plugin.take_calls().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn preparation_that_another_action_has_displaced_is_made_afterwards() {
        let lab = Lab::new("");
        let permits =
            [lab.context.prepare_permit(&lab.machine).await, lab.context.prepare_permit(&lab.machine).await];
        let queues = queues(&lab);
        tokio::time::sleep(Duration::from_millis(1)).await;
        submit(&queues, &lab, Action::AcpiStop).await.unwrap().unwrap();
        drop(permits);
        assert!(timeout(Duration::from_secs(60), lab.plugin.called("prepare")).await.is_ok());
    }
}
