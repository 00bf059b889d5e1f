//! From a request to the manager's method, and from its result to the reply.
//!
//! A request for an action gets its slot in the outbox before it enters the machine's queue, and its reply from
//! the worker. A request that changes who has a machine makes the change at once, so that later requests on the
//! connection see it, and gets its reply when the change is on disk.

use std::sync::Arc;

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::outbox::{MACHINE, Outbox};
use super::protocol::Request;
use super::reply;
use crate::actions::message::Responder;
use crate::fleet::Machine;
use crate::fleet::availability::NotHeld;
use crate::manager::{Manager, Refused, UnsavedChange, UnsavedLock, UnsavedReservation};

/// Dispatches the requests of one client.
pub struct Dispatcher {
    manager: Arc<Manager>,
    outbox: Outbox,
    subscription: Option<JoinHandle<()>>,
    /// True once the client has left.
    hangup: watch::Sender<bool>,
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        if let Some(subscription) = &self.subscription {
            subscription.abort();
        }
    }
}

type Id = Option<Value>;

impl Dispatcher {
    /// Returns a dispatcher that replies through `outbox`.
    pub fn new(manager: Arc<Manager>, outbox: Outbox, hangup: watch::Sender<bool>) -> Self {
        Dispatcher { manager, outbox, subscription: None, hangup }
    }

    /// Carries out the request, whose line has that many bytes, and replies to it.
    pub async fn dispatch(&mut self, request: Request, id: Id, length: usize) {
        match request {
            Request::Act(machine, action) => {
                let slot = self.outbox.slot(length).await;
                let responder = Responder::new(move |result| slot.fill(reply::result(result), id.as_ref()));
                self.manager.queues().submit(&machine, action, responder);
            }
            Request::State(machine) => self.state(machine, id).await,
            Request::Console(machine) => self.console(&machine, id).await,
            Request::EnableMachine(machine) => match self.manager.enable_machine(machine).await {
                Ok(enabled) => self.reply_when_saved(enabled, id).await,
                Err(reason) => self.outbox.reply(reply::failure(&reason), id).await,
            },
            Request::DisableMachine(machine, reason) => {
                let disabled = self.manager.disable_machine(machine, &reason);
                self.reply_when_saved(disabled, id).await;
            }
            Request::Hold(machine, reason) => self.hold(&machine, reason.as_deref(), id).await,
            Request::Lock(machine, lock) => {
                let locked = self.manager.lock(machine, lock).await;
                self.reply_when_locked(locked, id).await;
            }
            Request::Acquire(query, lock) => {
                let locked = self.manager.acquire(&query, lock).await;
                self.reply_when_locked(locked, id).await;
            }
            Request::Reserve(machine, task_id) => {
                let reserved = self.manager.reserve(machine, &task_id).await;
                self.reply_when_reserved(reserved, id).await;
            }
            Request::Unlock(machine, task_id) => {
                let released = self.manager.unlock(machine, task_id.as_deref());
                self.reply_when_released(released, id).await;
            }
            Request::Unreserve(machine) => {
                let released = self.manager.unreserve(machine);
                self.reply_when_released(released, id).await;
            }
            Request::WaitIdle => self.wait_idle(id).await,
            Request::Reload => self.reload(id).await,
            Request::List => {
                let roster = self.manager.roster();
                let slot = self.outbox.large_slot(MACHINE + roster.machines().len() * 1024).await;
                slot.send(reply::list_line(&roster, self.manager.consoles(), id.as_ref()));
            }
            Request::Version => self.version(id).await,
            Request::Metrics => self.metrics(id).await,
            Request::Subscribe => self.subscribe(id).await,
            Request::ShutdownAll => {
                let manager = Arc::clone(&self.manager);
                let stopped = async move { reply::result(manager.shutdown_all().await) };
                self.outbox.reply_later(id, stopped).await;
            }
            Request::Upgrade => self.upgrade(id).await,
            Request::Shutdown => self.shutdown(id).await,
            Request::SetEnabled(enabled) => self.set_enabled(enabled, id).await,
        }
    }

    async fn hold(&self, machine: &Machine, reason: Option<&str>, id: Id) {
        match reason {
            Some(reason) => self.manager.hold_machine(machine, reason),
            None => self.manager.release_machine(machine),
        }
        self.outbox.reply(reply::success(), id).await;
    }

    async fn set_enabled(&self, enabled: bool, id: Id) {
        self.manager.set_enabled(enabled);
        self.outbox.reply(reply::success(), id).await;
    }

    async fn upgrade(&self, id: Id) {
        let manager = Arc::clone(&self.manager);
        let requested = async move {
            let requested = manager.replacement().request().await;
            reply::result(requested.map_err(|error| error.to_string()))
        };
        self.outbox.reply_later(id, requested).await;
    }

    async fn shutdown(&self, id: Id) {
        self.outbox.reply(reply::success(), id).await;
        self.manager.ask_to_end();
    }

    async fn version(&self, id: Id) {
        let wall = self.manager.wall_address().borrow().clone();
        let version = reply::version(&self.manager.roster(), self.manager.origin(), wall.as_deref());
        self.outbox.reply(version, id).await;
    }

    async fn metrics(&self, id: Id) {
        self.outbox.reply(reply::metrics(self.manager.metrics(), &self.manager.roster()), id).await;
    }

    async fn state(&self, machine: Arc<Machine>, id: Id) {
        let manager = Arc::clone(&self.manager);
        let state = async move { reply::state(manager.machine_state(&machine).await) };
        self.outbox.reply_later(id, state).await;
    }

    async fn console(&self, machine: &Machine, id: Id) {
        self.outbox.reply(reply::console(self.manager.expect_console(machine)), id).await;
    }

    async fn reload(&self, id: Id) {
        let manager = Arc::clone(&self.manager);
        self.outbox.reply_later(id, async move { reply::reloaded(manager.reload().await) }).await;
    }

    /// Replies when no action waits or runs. That can last for ever, so it ends when the client leaves.
    async fn wait_idle(&self, id: Id) {
        let (manager, mut hangup) = (Arc::clone(&self.manager), self.hangup.subscribe());
        let idle = async move {
            tokio::select! {
                () = manager.queues().idle() => reply::success(),
                _ = hangup.wait_for(|hangup| *hangup) => reply::failure("the client has left"),
            }
        };
        self.outbox.reply_later(id, idle).await;
    }

    async fn subscribe(&mut self, id: Id) {
        if self.subscription.is_some() {
            return self.outbox.reply(reply::failure("this connection has subscribed already"), id).await;
        }
        let events = self.manager.subscribe();
        self.outbox.reply(reply::success(), id).await;
        self.subscription = Some(tokio::spawn(self.outbox.clone().forward(events)));
    }

    async fn reply_when_locked(&self, locked: Result<UnsavedLock, Refused>, id: Id) {
        match locked {
            Ok(lock) => {
                let manager = Arc::clone(&self.manager);
                let locked = async move { reply::locked(lock.save().await, manager.consoles()) };
                self.outbox.reply_later(id, locked).await;
            }
            Err(refused) => self.outbox.reply(reply::failure(&refused.to_string()), id).await,
        }
    }

    async fn reply_when_reserved(&self, reserved: Result<UnsavedReservation, Refused>, id: Id) {
        match reserved {
            Ok(reservation) => {
                self.outbox.reply_later(id, async { reply::result(reservation.save().await) }).await;
            }
            Err(refused) => self.outbox.reply(reply::failure(&refused.to_string()), id).await,
        }
    }

    async fn reply_when_saved(&self, change: UnsavedChange, id: Id) {
        self.outbox.reply_later(id, async { reply::result(change.save().await) }).await;
    }

    /// Replies to a release. A client repeats a release whose save has failed. Then there is nothing to release
    /// any more, but the save is due.
    async fn reply_when_released(&self, released: Result<UnsavedChange, NotHeld>, id: Id) {
        match released {
            Ok(change) => self.reply_when_saved(change, id).await,
            Err(not_held) => {
                let manager = Arc::clone(&self.manager);
                let failed = async move {
                    manager.flush_pending().await;
                    reply::failure(&not_held.to_string())
                };
                self.outbox.reply_later(id, failed).await;
            }
        }
    }
}
