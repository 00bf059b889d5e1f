//! The table of machines: its order, its filter, its folded clones, and the selected row.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::ops::Range;

use serde_json::Value;

use super::machine;
use crate::cli::clones::{self, Row};

/// The column by which the machines are ordered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Order {
    /// The order of the configuration.
    #[default]
    Configured,
    /// The most urgent state first.
    State,
    /// The longest run first.
    Run,
    /// By task.
    Task,
    /// The longest lock first.
    Lock,
    /// By the mode of the next restore.
    Mode,
    /// The most errors first.
    Errors,
}

impl Order {
    const ALL: [Order; 7] =
        [Order::Configured, Order::State, Order::Run, Order::Task, Order::Lock, Order::Mode, Order::Errors];

    /// Returns the next column.
    pub fn next(self) -> Self {
        let position = Order::ALL.iter().position(|order| *order == self).unwrap_or(0);
        Order::ALL[(position + 1) % Order::ALL.len()]
    }

    fn compare(self, one: &Value, other: &Value) -> Ordering {
        let last_if_none = |since: Option<u64>| since.unwrap_or(u64::MAX);
        match self {
            Order::Configured => Ordering::Equal,
            Order::State => machine::urgency(one).cmp(&machine::urgency(other)),
            Order::Run => {
                let since = |of| last_if_none(machine::running_since(of));
                since(one).cmp(&since(other))
            }
            Order::Task => {
                let key = |of| Some(machine::task(of)).filter(|task| !task.is_empty());
                // Machines without a task follow.
                (key(one).is_none(), key(one)).cmp(&(key(other).is_none(), key(other)))
            }
            Order::Lock => {
                let since = |of| last_if_none(machine::locked_since(of));
                since(one).cmp(&since(other))
            }
            Order::Mode => machine::mode(other).cmp(machine::mode(one)),
            Order::Errors => machine::errors(other).cmp(&machine::errors(one)),
        }
    }
}

/// A movement of the selection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// By this number of rows.
    By(isize),
    /// By this number of pages.
    Page(isize),
    /// To the first row.
    First,
    /// To the last row.
    Last,
}

/// The content of a row, which the selection follows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    /// The machine of this name.
    Machine(String),
    /// The clones of the machine of this name.
    Clones(String),
}

impl Content {
    fn of(row: &Row, machines: &[Value]) -> Option<Self> {
        let name = |index: &usize| Content::Machine(machine::text(&machines[*index], "name").to_owned());
        row.clone_of.clone().map(Content::Clones).or_else(|| row.members.first().map(name))
    }
}

/// The table of machines.
#[derive(Debug, Default)]
pub struct Table {
    /// The order.
    pub order: Order,
    /// True if the order is reversed.
    pub reversed: bool,
    /// The words that a machine must have to be shown.
    pub filter: String,
    /// The machines whose clones have a row each.
    unfolded: HashSet<String>,
    selected: Option<Content>,
    /// The position of the selected row, for the case that it is no longer shown.
    position: usize,
    /// The rows that are shown.
    rows: Vec<Row>,
    first: usize,
    height: usize,
}

impl Table {
    /// Chooses, orders and folds the rows. A filter unfolds all clones. The selection stays at its machine, or else at its
    /// position.
    pub fn refresh(&mut self, machines: &[Value]) {
        let words: Vec<String> = self.filter.split_whitespace().map(str::to_lowercase).collect();
        let mut shown: Vec<usize> =
            (0..machines.len()).filter(|index| matches(&machines[*index], &words)).collect();
        let order = self.order;
        shown.sort_by(|one, other| order.compare(&machines[*one], &machines[*other]));
        if self.reversed {
            shown.reverse();
        }
        self.rows = clones::rows(&shown, machines, |of| words.is_empty() && !self.unfolded.contains(of));
        let selected = self.selected.as_ref();
        let kept = selected.and_then(|selected| {
            self.rows.iter().position(|row| Content::of(row, machines).as_ref() == Some(selected))
        });
        self.position = kept.unwrap_or(self.position).min(self.rows.len().saturating_sub(1));
        self.selected = self.rows.get(self.position).and_then(|row| Content::of(row, machines));
    }

    /// Folds or unfolds the clones that are selected, or that the selected machine belongs to.
    pub fn fold(&mut self, machines: &[Value]) {
        let Some(row) = self.selected_row() else { return };
        let of_machine = || machines[*row.members.first()?]["clone_of"].as_str().map(str::to_owned);
        let Some(of) = row.clone_of.clone().or_else(of_machine) else { return };
        if !self.unfolded.remove(&of) {
            self.unfolded.insert(of);
        } else {
            self.selected = Some(Content::Clones(of));
        }
        self.refresh(machines);
    }

    /// Moves the selection.
    pub fn select(&mut self, to: Move, machines: &[Value]) {
        let last = self.rows.len().saturating_sub(1);
        let page = isize::try_from(self.height.max(1)).unwrap_or(isize::MAX);
        self.position = match to {
            Move::By(rows) => self.position.saturating_add_signed(rows),
            Move::Page(pages) => self.position.saturating_add_signed(pages.saturating_mul(page)),
            Move::First => 0,
            Move::Last => last,
        };
        self.selected = None;
        self.refresh(machines);
    }

    /// Returns the name of the selected machine.
    pub fn selected(&self) -> Option<&str> {
        match &self.selected {
            Some(Content::Machine(name)) => Some(name),
            Some(Content::Clones(_)) | None => None,
        }
    }

    /// Returns the selected row.
    pub fn selected_row(&self) -> Option<&Row> {
        self.rows.get(self.position)
    }

    /// Returns the number of machines that pass the filter.
    pub fn len(&self) -> usize {
        self.rows.iter().map(|row| row.members.len()).sum()
    }

    /// Returns the rows that fit into that height, and the position of the selected one among them.
    pub fn window(&mut self, height: usize) -> (&[Row], usize) {
        self.height = height;
        // The window moves only as far as the selection needs.
        let lowest = (self.position + 1).saturating_sub(height);
        let most = self.rows.len().saturating_sub(height);
        self.first = self.first.clamp(lowest, self.position.max(lowest)).min(most.max(lowest));
        let Range { start, end } = self.first..(self.first + height).min(self.rows.len());
        (&self.rows[start.min(end)..end], self.position - start.min(self.position))
    }
}

/// Reports whether the machine has all words.
fn matches(machine: &Value, words: &[String]) -> bool {
    if words.is_empty() {
        return true;
    }
    let keys = ["name", "machinery_name", "state", "ip", "platform", "os_version", "disabled_reason"];
    let tags = machine["tags"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let task = machine::task(machine);
    let own = [machine::state(machine), machine::mode(machine), task.as_str()];
    let texts = keys.iter().map(|key| machine::text(machine, key)).chain(own).chain(tags);
    let text = texts.collect::<Vec<_>>().join(" ").to_lowercase();
    words.iter().all(|word| text.contains(word))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machines() -> Vec<Value> {
        let one = |name: &str, state: &str, since: Option<u64>, disabled: bool, errors: usize| {
            json!({"name": name, "state": state, "running_since": since, "disabled": disabled, "quarantine": null,
                "disabled_reason": "old", "errors": vec!["x"; errors], "locked": since.is_some(), "locked_since": since,
                "locked_by": format!("task-{name}"), "tags": ["office"], "ready": {"mode": "instant"}})
        };
        vec![
            one("c", "running", Some(50), false, 0),
            one("a", "poweroff", None, false, 2),
            one("b", "poweroff", None, true, 1),
            one("d", "running", Some(20), false, 0),
        ]
    }

    fn names(table: &Table, machines: &[Value]) -> String {
        table.rows.iter().map(|row| machine::text(&machines[row.members[0]], "name")).collect()
    }

    /// Returns the indices of the machines in the window, and the position of the selected one.
    fn window(table: &mut Table, height: usize) -> (Vec<usize>, usize) {
        let (rows, selected) = table.window(height);
        (rows.iter().map(|row| row.members[0]).collect(), selected)
    }

    #[test]
    fn machines_are_ordered_by_each_column_and_keep_the_configured_order_otherwise() {
        let (mut table, machines) = (Table::default(), machines());
        for expected in ["cabd", "bcda", "dcab", "cdab", "dcab", "cabd", "abcd"] {
            table.refresh(&machines);
            assert_eq!(names(&table, &machines), expected, "{:?}", table.order);
            table.order = table.order.next();
        }
        assert_eq!(table.order, Order::Configured);
        table.reversed = true;
        table.refresh(&machines);
        assert_eq!(names(&table, &machines), "dbac");
    }

    #[test]
    fn filter_shows_machines_that_have_all_words() {
        let (mut table, machines) = (Table::default(), machines());
        for (filter, expected) in
            [("RUNNING", "cd"), ("poweroff off old", "ab"), ("task-d", "d"), ("zzz", ""), ("disabled", "b")]
        {
            table.filter = filter.into();
            table.refresh(&machines);
            assert_eq!(names(&table, &machines), expected, "{filter}");
        }
        assert_eq!((table.selected(), table.position), (Some("b"), 0));
    }

    #[test]
    fn selection_follows_its_machine_and_stays_in_place_when_that_is_gone() {
        let (mut table, mut machines) = (Table::default(), machines());
        table.refresh(&machines);
        table.select(Move::By(1), &machines);
        assert_eq!(table.selected(), Some("a"));
        table.order = Order::Errors;
        table.refresh(&machines);
        assert_eq!((table.selected(), table.position), (Some("a"), 0));
        machines.remove(1);
        table.refresh(&machines);
        assert_eq!(table.selected(), Some("b"));
        table.select(Move::By(-7), &machines);
        table.select(Move::Last, &machines);
        assert_eq!(table.selected(), Some("d"));
        table.refresh(&[]);
        assert_eq!((table.selected(), table.len()), (None, 0));
    }

    #[test]
    fn clones_are_one_row_until_they_are_unfolded_or_filtered() {
        let one = |name: &str, of: Option<&str>, state: &str| json!({"name": name, "clone_of": of, "state": state, "disabled": false, "quarantine": null});
        let w = Some("w");
        let machines = [
            one("w-1", w, "poweroff"),
            one("a", None, "poweroff"),
            one("w-2", w, "running"),
            one("b", None, "error"),
        ];
        let mut table = Table::default();
        table.refresh(&machines);
        assert_eq!((table.rows.len(), table.len(), table.selected()), (3, 4, None));
        table.fold(&machines);
        assert_eq!((names(&table, &machines).as_str(), table.selected()), ("w-1aw-2b", Some("w-1")));
        table.select(Move::By(2), &machines);
        table.fold(&machines);
        assert_eq!((table.rows.len(), table.selected(), table.position), (3, None, 0));
        // The row of clones is ordered as the first of them.
        table.order = Order::State;
        table.refresh(&machines);
        assert_eq!((names(&table, &machines).as_str(), table.position), ("bw-2a", 1));
        table.filter = "w-".into();
        table.refresh(&machines);
        assert_eq!(names(&table, &machines), "w-2w-1");
        table.filter = "zzz".into();
        table.refresh(&machines);
        table.fold(&machines);
        assert_eq!(table.rows, []);
    }

    #[test]
    fn window_has_the_selected_machine() {
        let machines: Vec<Value> = (0..100).map(|number| json!({"name": number.to_string()})).collect();
        let mut table = Table::default();
        table.refresh(&machines);
        assert_eq!(window(&mut table, 10), ((0..10).collect(), 0));
        table.select(Move::Page(1), &machines);
        assert_eq!(window(&mut table, 10), ((1..11).collect(), 9));
        table.select(Move::By(-1), &machines);
        assert_eq!(table.window(10).1, 8);
        table.select(Move::Last, &machines);
        assert_eq!(window(&mut table, 10), ((90..100).collect(), 9));
        table.select(Move::First, &machines);
        assert_eq!(table.window(200).0.len(), 100);
        table.select(Move::Last, &machines);
        assert_eq!(table.window(0).0.len(), 0);
        table.filter = "none".into();
        table.refresh(&machines);
        assert_eq!(window(&mut table, 5), (vec![], 0));
    }
}
