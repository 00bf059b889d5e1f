//! The table of machines: its order, its filter, and the selected machine.

use std::cmp::Ordering;
use std::ops::Range;

use serde_json::Value;

use super::machine;

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

/// The table of machines.
#[derive(Debug, Default)]
pub struct Table {
    /// The order.
    pub order: Order,
    /// True if the order is reversed.
    pub reversed: bool,
    /// The words that a machine must have to be shown.
    pub filter: String,
    selected: Option<String>,
    /// The position of the selected machine, for the case that it is no longer shown.
    position: usize,
    /// The indices of the machines that are shown.
    rows: Vec<usize>,
    first: usize,
    height: usize,
}

impl Table {
    /// Chooses and orders the rows. The selection stays at its machine, or else at its position.
    pub fn refresh(&mut self, machines: &[Value]) {
        let words: Vec<String> = self.filter.split_whitespace().map(str::to_lowercase).collect();
        self.rows = (0..machines.len()).filter(|index| matches(&machines[*index], &words)).collect();
        let order = self.order;
        self.rows.sort_by(|one, other| order.compare(&machines[*one], &machines[*other]));
        if self.reversed {
            self.rows.reverse();
        }
        let name = self.selected.as_deref();
        let kept = name
            .and_then(|name| self.rows.iter().position(|row| machine::text(&machines[*row], "name") == name));
        self.position = kept.unwrap_or(self.position).min(self.rows.len().saturating_sub(1));
        let selected =
            self.rows.get(self.position).map(|row| machine::text(&machines[*row], "name").to_owned());
        self.selected = selected;
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
        self.selected.as_deref()
    }

    /// Returns the index of the selected machine.
    pub fn selected_index(&self) -> Option<usize> {
        self.rows.get(self.position).copied()
    }

    /// Returns the number of machines that pass the filter.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns the rows that fit into that height, and the position of the selected one among them.
    pub fn window(&mut self, height: usize) -> (&[usize], usize) {
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
        table.rows.iter().map(|row| machine::text(&machines[*row], "name")).collect()
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
        assert_eq!((table.selected(), table.selected_index()), (Some("b"), Some(2)));
    }

    #[test]
    fn selection_follows_its_machine_and_stays_in_place_when_that_is_gone() {
        let (mut table, mut machines) = (Table::default(), machines());
        table.refresh(&machines);
        table.select(Move::By(1), &machines);
        assert_eq!(table.selected(), Some("a"));
        table.order = Order::Errors;
        table.refresh(&machines);
        assert_eq!((table.selected(), table.selected_index()), (Some("a"), Some(1)));
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
    fn window_has_the_selected_machine() {
        let machines: Vec<Value> = (0..100).map(|number| json!({"name": number.to_string()})).collect();
        let mut table = Table::default();
        table.refresh(&machines);
        assert_eq!(table.window(10), (&(0..10).collect::<Vec<_>>()[..], 0));
        table.select(Move::Page(1), &machines);
        assert_eq!(table.window(10), (&(1..11).collect::<Vec<_>>()[..], 9));
        table.select(Move::By(-1), &machines);
        assert_eq!(table.window(10).1, 8);
        table.select(Move::Last, &machines);
        assert_eq!(table.window(10), (&(90..100).collect::<Vec<_>>()[..], 9));
        table.select(Move::First, &machines);
        assert_eq!(table.window(200).0.len(), 100);
        table.select(Move::Last, &machines);
        assert_eq!(table.window(0).0.len(), 0);
        table.filter = "none".into();
        table.refresh(&machines);
        assert_eq!(table.window(5), (&[][..], 0));
    }
}
