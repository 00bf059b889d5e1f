//! Clones of one machine as one row: how many there are, how many are ready, and which ones need an operator.
//!
//! `list` and `top` fold with the same rule: at least two clones of one machine are a row, at the place of the first.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::report::{numbered, ranges};

/// The words for a clone, in the order of their counts.
const WORDS: [&str; 12] = [
    "ready",
    "reserved",
    "locked",
    "running",
    "starting",
    "stopping",
    "paused",
    "suspended",
    "restored",
    "error",
    "disabled",
    "quarantined",
];
/// The modes of a restore, the fastest first.
const MODES: [&str; 3] = ["standby", "instant", "plain"];

/// A row: one machine, or all clones of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The machine whose clones are folded.
    pub clone_of: Option<String>,
    /// The indices of the row's machines.
    pub members: Vec<usize>,
}

/// Returns the rows of these machines. The clones of a machine are one row if they are folded and more than one.
pub fn rows(indices: &[usize], machines: &[Value], is_folded: impl Fn(&str) -> bool) -> Vec<Row> {
    let folded = |index: usize| machines[index]["clone_of"].as_str().filter(|of| is_folded(of));
    let mut clones: HashMap<&str, Vec<usize>> = HashMap::new();
    for index in indices {
        if let Some(of) = folded(*index) {
            clones.entry(of).or_default().push(*index);
        }
    }
    let row = |index: &usize| {
        let one = || Row { clone_of: None, members: vec![*index] };
        let Some((of, members)) = folded(*index).and_then(|of| clones.get_key_value(of)) else {
            return Some(one());
        };
        match members.as_slice() {
            [_] => Some(one()),
            members if members[0] == *index => {
                Some(Row { clone_of: Some((*of).to_owned()), members: members.to_vec() })
            }
            _ => None,
        }
    };
    indices.iter().filter_map(row).collect()
}

/// Returns the name of a row of clones, such as `win10_1 ×20`.
pub fn title(of: &str, clones: &[&Value]) -> String {
    format!("{of} ×{}", clones.len())
}

/// Returns the numbers of clones by their state, such as `18 ready, 2 running`. Each clone counts once.
pub fn states(clones: &[&Value]) -> String {
    counted(&WORDS, clones, word)
}

/// Returns the numbers of clones by the mode of their next restore, such as `17 standby, 3 plain`.
pub fn modes(clones: &[&Value]) -> String {
    counted(&MODES, clones, |clone| clone["ready"]["mode"].as_str().unwrap_or("plain"))
}

/// Returns the remarks about clones: the number of those with errors, the names of those out of the pool, and the numbers of
/// others with a remark.
pub fn remarks(clones: &[&Value]) -> String {
    let named = |what: &str| {
        let mut names: Vec<&str> =
            clones.iter().filter(|clone| word(clone) == what).map(|clone| name(clone)).collect();
        names.sort_by(|one, other| numbered(one).cmp(&numbered(other)));
        (!names.is_empty()).then(|| format!("{what}: {}", ranges(&names)))
    };
    let is = |key: &'static str| move |clone: &Value| clone[key] == json!(true);
    let has =
        |key: &'static str| move |clone: &Value| clone[key].as_array().is_some_and(|all| !all.is_empty());
    let number = |what: &str, is: &dyn Fn(&Value) -> bool| {
        let count = clones.iter().filter(|clone| is(clone)).count();
        (count > 0).then(|| format!("{count} {what}"))
    };
    let remarks = [
        number("with errors", &has("errors")),
        named("quarantined"),
        named("disabled"),
        number("locked", &is("locked")),
        number("reserved", &is("reserved")),
        number("with a pending configuration", &is("change_pending")),
        number("with warnings", &has("warnings")),
    ];
    remarks.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Returns the word for a clone: why it is out of the pool, or its state, or why no other task can have it.
fn word(clone: &Value) -> &str {
    let is = |key: &str| clone[key] == json!(true);
    match clone["state"].as_str().unwrap_or("") {
        _ if !clone["quarantine"].is_null() => "quarantined",
        _ if is("disabled") => "disabled",
        "poweroff" if is("locked") => "locked",
        "poweroff" if is("reserved") => "reserved",
        "poweroff" => "ready",
        state => state,
    }
}

fn counted(words: &[&str], clones: &[&Value], word: impl Fn(&Value) -> &str) -> String {
    let number = |wanted: &&str| {
        let count = clones.iter().filter(|clone| word(clone) == *wanted).count();
        (count > 0).then(|| format!("{count} {wanted}"))
    };
    words.iter().filter_map(number).collect::<Vec<_>>().join(", ")
}

fn name(clone: &Value) -> &str {
    clone["name"].as_str().unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone(number: usize, keys: Value) -> Value {
        let mut clone =
            json!({"name": format!("w-{number}"), "clone_of": "w", "state": "poweroff", "quarantine": null});
        clone.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        clone
    }

    #[test]
    fn clones_are_one_row_at_the_place_of_the_first_unless_there_is_only_one() {
        let of = |name: &str, of: Option<&str>| json!({"name": name, "clone_of": of});
        let machines =
            [of("a", None), of("w-1", Some("w")), of("w", None), of("x-1", Some("x")), of("w-2", Some("w"))];
        let row = |of: Option<&str>, members: &[usize]| Row {
            clone_of: of.map(str::to_owned),
            members: members.to_vec(),
        };
        let all = [0, 1, 2, 3, 4];
        assert_eq!(
            rows(&all, &machines, |_| true),
            [row(None, &[0]), row(Some("w"), &[1, 4]), row(None, &[2]), row(None, &[3])]
        );
        assert_eq!(rows(&all, &machines, |of| of != "w").len(), 5);
        assert_eq!(rows(&[4, 0], &machines, |_| true), [row(None, &[4]), row(None, &[0])]);
    }

    #[test]
    fn clone_is_counted_once_and_named_when_it_is_in_trouble() {
        let clones = [
            clone(1, json!({"ready": {"mode": "standby"}})),
            clone(2, json!({"ready": {"mode": "standby"}, "warnings": ["old"]})),
            clone(3, json!({"state": "running", "locked": true, "ready": {"mode": "instant"}})),
            clone(4, json!({"locked": true})),
            clone(5, json!({"reserved": true})),
            clone(10, json!({"disabled": true, "quarantine": {"tries": 1}})),
            clone(7, json!({"disabled": true, "state": "error"})),
            clone(8, json!({"disabled": true})),
            clone(9, json!({"disabled": true, "errors": ["killed"]})),
        ];
        let clones: Vec<&Value> = clones.iter().collect();
        assert_eq!(title("w", &clones), "w ×9");
        assert_eq!(states(&clones), "2 ready, 1 reserved, 1 locked, 1 running, 3 disabled, 1 quarantined");
        assert_eq!(modes(&clones), "2 standby, 1 instant, 6 plain");
        assert_eq!(
            remarks(&clones),
            "1 with errors; quarantined: w-10; disabled: w-7 … w-9; 2 locked; 1 reserved; 1 with warnings"
        );
        assert_eq!(remarks(&clones[..1]), "");
    }
}
