//! The model: the host as its answers and events describe it, and the state of the dialogue with the operator.
//!
//! ```text
//! connected ─▶ asks for version, list and metrics ─▶ events change machines
//!                                                     ├─▶ any event: the metrics are due
//!                                                     └─▶ a reload, lost events, an accident or a failure: the list is due
//! ```
//!
//! Nothing is asked for without an event, and each answer at most once a second.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nix::unistd::{Uid, User};
use serde_json::{Value, json};

use super::clock::Now;
use super::machine;
use super::rates::Rates;
use super::table::Table;

/// The time between two questions of the same kind.
const QUESTION_INTERVAL: Duration = Duration::from_secs(1);

/// The connection to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// The host answers.
    Up,
    /// The connection was lost for this reason, and is opened anew.
    Lost(String),
}

/// An action of the operator on the selected machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Power the machine off.
    Stop,
    /// Return the machine to the pool.
    Enable,
    /// Take the machine out of the pool.
    Disable,
    /// Write the machine's screen to a file.
    Screenshot,
}

impl Action {
    /// Returns the word for people.
    pub fn verb(self) -> &'static str {
        match self {
            Action::Stop => "stop",
            Action::Enable => "enable",
            Action::Disable => "disable",
            Action::Screenshot => "screenshot",
        }
    }

    /// Returns the request for a machine.
    pub fn request(self, machine: &str) -> Value {
        match self {
            Action::Stop => json!({"action": "stop", "machine": machine}),
            Action::Enable => json!({"action": "enable_machine", "machine": machine}),
            Action::Disable => json!({"action": "disable_machine", "machine": machine}),
            Action::Screenshot => json!({"action": "screenshot", "machine": machine, "fd": true}),
        }
    }
}

/// The place of the operator's keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Dialogue {
    /// The table.
    #[default]
    Table,
    /// The line of the filter.
    Filter,
    /// The page of the keys.
    Help,
    /// The confirmation of an action on that machine.
    Confirm(Action, String),
}

/// A question to the host, which is repeated when it is due.
#[derive(Debug, Default)]
struct Question {
    is_due: bool,
    is_open: bool,
    asked: Option<Instant>,
}

impl Question {
    /// Reports whether the question is to be asked now, and notes that it is.
    fn ask(&mut self, at: Instant) -> bool {
        let has_passed = |asked: Instant| at.saturating_duration_since(asked) >= QUESTION_INTERVAL;
        let asks = self.is_due && !self.is_open && self.asked.is_none_or(has_passed);
        if asks {
            *self = Question { is_due: false, is_open: true, asked: Some(at) };
        }
        asks
    }
}

/// The host and its machines, and the dialogue with the operator.
#[derive(Debug)]
pub struct Model {
    /// The connection.
    pub link: Link,
    /// The host's answer to `version`.
    pub version: Value,
    /// The machines, in the order of the configuration.
    pub machines: Vec<Value>,
    /// The index of each machine.
    indices: HashMap<String, usize>,
    /// The table of machines.
    pub table: Table,
    /// The figures of actions.
    pub rates: Rates,
    /// The place of the operator's keys.
    pub dialogue: Dialogue,
    /// The latest result.
    pub notice: String,
    users: HashMap<u32, String>,
    list: Question,
    metrics: Question,
}

impl Default for Model {
    fn default() -> Self {
        Model {
            link: Link::Up,
            version: Value::Null,
            machines: Vec::new(),
            indices: HashMap::new(),
            table: Table::default(),
            rates: Rates::default(),
            dialogue: Dialogue::default(),
            notice: String::new(),
            users: HashMap::new(),
            list: Question::default(),
            metrics: Question::default(),
        }
    }
}

impl Model {
    /// Begins with a host, whose `version` the connection has.
    pub fn connected(&mut self, version: Value) {
        if self.version["started"] != version["started"] {
            self.rates.clear();
        }
        (self.link, self.version) = (Link::Up, version);
        let due = || Question { is_due: true, ..Question::default() };
        (self.list, self.metrics) = (due(), due());
    }

    /// Records that the connection was lost.
    pub fn lost(&mut self, reason: &str) {
        self.link = Link::Lost(reason.to_owned());
        (self.list, self.metrics) = Default::default();
    }

    /// Returns the requests to send now.
    pub fn requests(&mut self, at: Instant) -> Vec<Value> {
        let questions = [("list", &mut self.list), ("metrics", &mut self.metrics)];
        let due = questions.into_iter().filter_map(|(action, question)| question.ask(at).then_some(action));
        due.map(|action| json!({"action": action, "id": action})).collect()
    }

    /// Takes an answer to one of the [`requests`](Model::requests), or an event.
    pub fn receive(&mut self, message: &Value, now: Now) {
        match message["id"].as_str() {
            Some("list") => self.take_list(message, now),
            Some("metrics") => {
                self.metrics.is_open = false;
                // An action that has failed has left its error in the list.
                self.list.is_due |= self.rates.update(message, now.instant);
            }
            _ if message["event"].is_string() => self.on_event(message, now),
            _ => {}
        }
    }

    fn take_list(&mut self, answer: &Value, now: Now) {
        self.list.is_open = false;
        let Some(machines) = answer["machines"].as_array() else { return };
        self.machines.clone_from(machines);
        self.machines.iter_mut().for_each(|machine| machine::keep_next_try(machine, now.unix));
        let names = self.machines.iter().map(|machine| machine::text(machine, "name").to_owned());
        self.indices = names.zip(0..).collect();
        let uids: Vec<u32> = self.machines.iter().filter_map(machine::uid).collect();
        uids.into_iter().for_each(|uid| self.learn_user(uid));
        self.table.refresh(&self.machines);
    }

    fn on_event(&mut self, event: &Value, now: Now) {
        self.metrics.is_due = true;
        let kind = event["event"].as_str().unwrap_or("");
        let is_accident =
            matches!(kind, "run_error" | "capture_failed") || kind == "state" && event["reason"].is_string();
        self.list.is_due |= is_accident || matches!(kind, "reloaded" | "lagged");
        let index = event["machine"].as_str().and_then(|name| self.indices.get(name));
        if let Some(machine) = index.and_then(|index| self.machines.get_mut(*index)) {
            machine::apply(machine, event, now.unix);
            if let Some(uid) = machine::uid(machine) {
                self.learn_user(uid);
            }
        }
    }

    fn learn_user(&mut self, uid: u32) {
        self.users.entry(uid).or_insert_with(|| {
            let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
            user.map_or_else(|| uid.to_string(), |user| user.name)
        });
    }

    /// Returns the name of the user that has locked the machine.
    pub fn user(&self, machine: &Value) -> &str {
        machine::uid(machine).and_then(|uid| self.users.get(&uid)).map_or("", String::as_str)
    }

    /// Returns the selected machine, unless a row of clones is selected.
    pub fn selected(&self) -> Option<&Value> {
        let row = self.table.selected_row().filter(|row| row.clone_of.is_none())?;
        self.machines.get(*row.members.first()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(begin: Now, seconds: u64) -> Now {
        Now { unix: begin.unix + seconds, instant: begin.instant + Duration::from_secs(seconds) }
    }

    fn list(names: &[&str]) -> Value {
        let machine = |name: &&str| {
            json!({"name": name, "state": "poweroff", "quarantine": null, "disabled": false, "errors": [],
                "locked": true, "locked_by": "t", "locked_uid": 0, "locked_since": 7})
        };
        json!({"id": "list", "success": true, "machines": names.iter().map(machine).collect::<Vec<_>>()})
    }

    fn asked(model: &mut Model, now: Now) -> Vec<String> {
        let requests = model.requests(now.instant);
        requests.iter().map(|request| request["action"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns a model that has its first answers, and their moment.
    fn model() -> (Model, Now) {
        let (mut model, now) = (Model::default(), Now::present());
        model.connected(json!({"started": 1}));
        assert_eq!(asked(&mut model, now), ["list", "metrics"]);
        model.receive(&list(&["a", "b"]), now);
        model.receive(&json!({"id": "metrics", "metrics": []}), now);
        (model, now)
    }

    #[test]
    fn host_is_asked_for_nothing_without_an_event() {
        let (mut model, now) = model();
        assert_eq!(asked(&mut model, at(now, 3600)), [""; 0]);
        assert_eq!((model.machines.len(), model.table.selected()), (2, Some("a")));
        assert_eq!(model.user(&model.machines[0]), "root");
    }

    #[test]
    fn metrics_are_asked_for_once_a_second_in_a_burst_of_events() {
        let (mut model, now) = model();
        for _ in 0..1000 {
            model.receive(&json!({"event": "state", "machine": "b", "state": "running"}), now);
        }
        assert_eq!(model.machines[1]["state"], "running");
        assert_eq!(asked(&mut model, now), [""; 0], "a second has not passed");
        assert_eq!(asked(&mut model, at(now, 1)), ["metrics"]);
        model.receive(&json!({"event": "unlocked", "machine": "b"}), at(now, 1));
        assert_eq!(asked(&mut model, at(now, 9)), [""; 0], "the answer is missing");
        model.receive(&json!({"id": "metrics", "metrics": []}), at(now, 9));
        assert_eq!(asked(&mut model, at(now, 9)), ["metrics"]);
    }

    #[test]
    fn list_is_asked_for_after_accidents_reloads_and_failures() {
        for event in [
            json!({"event": "state", "machine": "a", "state": "poweroff", "reason": "QEMU was killed"}),
            json!({"event": "reloaded"}),
            json!({"event": "lagged", "count": 5}),
            json!({"event": "run_error", "machine": "a"}),
            json!({"id": "metrics", "metrics": [{"machinery": "q", "action": "stop", "count": 1, "failed": 1}]}),
        ] {
            let (mut model, now) = model();
            model.receive(&event, now);
            assert!(asked(&mut model, at(now, 1)).contains(&"list".to_owned()), "{event}");
        }
    }

    #[test]
    fn figures_begin_anew_with_another_host() {
        let (mut model, now) = model();
        let metrics = json!({"id": "metrics", "metrics": [{"machinery": "q", "action": "stop", "count": 9}]});
        model.receive(&metrics, now);
        model.lost("it closed the connection");
        assert_eq!(asked(&mut model, at(now, 5)), [""; 0]);
        model.connected(json!({"started": 1}));
        assert_eq!(
            (model.rates.last_minute(now.instant).len(), &model.link),
            (1, &Link::Up),
            "the same host"
        );
        model.lost("it closed the connection");
        model.connected(json!({"started": 2}));
        assert!(model.rates.last_minute(now.instant).is_empty());
        assert_eq!(asked(&mut model, at(now, 5)), ["list", "metrics"]);
    }

    #[test]
    fn event_of_an_unknown_machine_or_kind_changes_nothing() {
        let (mut model, now) = model();
        let before = model.machines.clone();
        for event in [
            json!({"event": "state", "machine": "z", "state": "running"}),
            json!({"event": "new", "machine": "a"}),
        ] {
            model.receive(&event, now);
        }
        assert_eq!(model.machines, before);
    }
}
