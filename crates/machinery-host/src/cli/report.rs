//! Prints the findings of a check: problems first, then warnings, and the number of the rest.
//!
//! A large lab often has one finding for each machine. Findings that differ only by their machine are one entry, which has the
//! number and the names of the machines. `-v` prints each finding.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;

use machinery::{Finding, Level, Report};
use serde_json::json;

use super::output::plain_lines;

/// The word for the machine in the text of a folded entry.
const MACHINE: &str = "MACHINE";

/// Prints the findings of a check.
pub fn report(report: &Report, json: bool, is_verbose: bool) {
    if json {
        println!("{}", json!({"success": !report.has_problems(), "findings": report.findings()}));
    } else {
        print!("{}", text(report.findings(), is_verbose));
    }
}

/// Returns the findings as text.
fn text(findings: &[Finding], is_verbose: bool) -> String {
    let mut lines = String::new();
    let mut counts = Vec::new();
    for (level, mark) in [(Level::Problem, "PROBLEM"), (Level::Warning, "warning"), (Level::Good, "ok     ")]
    {
        let of_level = findings.iter().filter(|finding| finding.level == level);
        let texts: Vec<&str> = of_level.flat_map(|finding| problems_of(&finding.text)).collect();
        counts.push(texts.len());
        let entries = match level {
            _ if is_verbose => texts.into_iter().map(str::to_owned).collect(),
            Level::Good => Vec::from_iter((!texts.is_empty()).then(|| rest(texts.len()))),
            _ => folded(&texts),
        };
        for entry in entries {
            let entry = plain_lines(&entry).replace('\n', "\n         ");
            lines += &format!("{mark}  {entry}\n");
        }
    }
    let counted = |count, what| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    format!("{lines}\n{}, {}\n", counted(counts[0], "problem"), counted(counts[1], "warning"))
}

fn rest(count: usize) -> String {
    let (findings, are, them) =
        if count == 1 { ("finding", "is", "it") } else { ("findings", "are", "them") };
    format!("{count} more {findings} {are} in order: -v shows {them}")
}

/// Returns the problems of an error that combines several, or else the text.
fn problems_of(text: &str) -> Vec<&str> {
    let list = text.split_once(" problems:\n  - ");
    let list = list.filter(|(head, _)| head.ends_with(|last: char| last.is_ascii_digit()));
    list.map_or_else(|| vec![text], |(_, list)| list.split("\n  - ").collect())
}

/// A finding of a machine.
struct Found<'a> {
    text: &'a str,
    machine: Option<&'a str>,
    /// The text without its machine and its line in a file.
    general: String,
}

/// Folds texts that differ only by their machine, and by its numbers, paths and names in quotes. An entry is at the place of
/// its first text.
fn folded(texts: &[&str]) -> Vec<String> {
    let mut groups: Vec<Vec<Found<'_>>> = Vec::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for text in texts {
        let machine = machine_of(text);
        let general = machine.map_or_else(|| (*text).to_owned(), |machine| generalized(text, machine));
        let key = if machine.is_some() { shape(&general) } else { general.clone() };
        let index = *known.entry(key).or_insert(groups.len());
        groups.resize_with(groups.len().max(index + 1), Vec::new);
        groups[index].push(Found { text, machine, general });
    }
    groups.iter().flat_map(|group| entries(group)).collect()
}

/// Returns the entry of a group, or the texts if these are of one machine.
fn entries(group: &[Found<'_>]) -> Vec<String> {
    let mut machines: Vec<&str> = group.iter().filter_map(|found| found.machine).collect();
    machines.sort_by(|one, other| numbered(one).cmp(&numbered(other)));
    machines.dedup();
    if machines.len() < 2 {
        let mut texts: Vec<String> = group.iter().map(|found| found.text.to_owned()).collect();
        texts.dedup();
        return texts;
    }
    let general = common(group);
    let hint = if general.contains('…') { " (-v shows each)" } else { "" };
    let general = general.strip_prefix("machine 'MACHINE': ").unwrap_or(&general);
    let (findings, count) = (BTreeSet::from_iter(group.iter().map(|found| found.text)).len(), machines.len());
    let number = if findings > count { format!("{findings} findings of {count}") } else { count.to_string() };
    vec![format!("{number} machines: {general}\n{}{hint}", ranges(&machines))]
}

/// Returns the text without the words that may differ between machines.
fn shape(general: &str) -> String {
    let is_own =
        |word: &str| word.contains(|c: char| c.is_ascii_digit() || c == '/') || word.starts_with('\'');
    general.split(' ').map(|word| if is_own(word) { "…" } else { word }).collect::<Vec<_>>().join(" ")
}

/// Returns the words that the texts of a group have in common, and `…` for others.
fn common(group: &[Found<'_>]) -> String {
    let all: Vec<Vec<&str>> = group.iter().map(|found| found.general.split(' ').collect()).collect();
    let word = |(index, word): (usize, &&str)| {
        let is_common = all.iter().all(|words| words.get(index) == Some(word));
        let end = word.chars().last().filter(|c| matches!(c, '.' | ',' | ':' | ';')).map(String::from);
        if is_common { (*word).to_owned() } else { format!("…{}", end.unwrap_or_default()) }
    };
    all.first().into_iter().flat_map(|words| words.iter().enumerate()).map(word).collect::<Vec<_>>().join(" ")
}

/// Returns the machine that a text names first: as `machine 'NAME'`, or by a key below `machines.NAME`.
fn machine_of(text: &str) -> Option<&str> {
    let quoted = text
        .split_once("machine '")
        .and_then(|(before, rest)| Some((before.len(), rest.split_once('\'')?.0)));
    let key = text.split_once(": machines.");
    let key = key.and_then(|(before, rest)| Some((before.len(), rest.split_once(['.', ':'])?.0)));
    let first = quoted.into_iter().chain(key).min();
    first.map(|(_, name)| name).filter(|name| !name.is_empty())
}

/// Returns the text without its machine and its line in a file.
fn generalized(text: &str, machine: &str) -> String {
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let mut general = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(machine) {
        let is_word = !before.ends_with(is_part) && !after.starts_with(is_part);
        general += before;
        general += if is_word { MACHINE } else { machine };
        rest = after;
    }
    general += rest;
    match general.split_once(".yaml:") {
        Some((file, after)) => {
            let place = after.trim_start_matches(|c: char| c.is_ascii_digit());
            format!("{file}.yaml{}{place}", if place.starts_with(':') { "" } else { ":" })
        }
        None => general,
    }
}

/// Returns the names, with those that are numbered in a row as a range.
pub fn ranges(names: &[&str]) -> String {
    let mut runs: Vec<RangeInclusive<usize>> = Vec::new();
    for index in 0..names.len() {
        match runs.last_mut() {
            Some(run) if is_next(names[*run.end()], names[index]) => *run = *run.start()..=index,
            _ => runs.push(index..=index),
        }
    }
    let text = |run: RangeInclusive<usize>| match run.clone().count() {
        ..3 => names[run].join(", "),
        _ => format!("{} … {}", names[*run.start()], names[*run.end()]),
    };
    runs.into_iter().map(text).collect::<Vec<_>>().join(", ")
}

/// Reports whether the second name has the number after that of the first.
fn is_next(name: &str, next: &str) -> bool {
    let ((one, number), (other, after)) = (numbered(name), numbered(next));
    one == other && number.is_some_and(|number| number.checked_add(1) == after)
}

/// Returns the name without the number at its end, and that number.
pub fn numbered(name: &str) -> (&str, Option<u64>) {
    let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (prefix, name[prefix.len()..].parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(level: Level, text: impl Into<String>) -> Finding {
        Finding { level, text: text.into() }
    }

    fn lab() -> Vec<Finding> {
        let mut findings = vec![finding(Level::Good, "the CWD is /cwd")];
        for number in 1..=20 {
            let name = format!("win10_{number}");
            findings.push(finding(Level::Good, format!("machine '{name}': can be restored instantly")));
            findings.push(finding(
                Level::Warning,
                format!("machine '{name}': its disk {name}.qcow2 is slow. Convert it"),
            ));
            if number % 10 == 3 {
                let text = format!("/cwd/qemu.yaml:{number}: machines.{name}.ip: no IP. Add it.");
                findings.push(finding(Level::Problem, text));
            }
        }
        findings.push(finding(Level::Warning, "there is no /dev/kvm"));
        findings
    }

    #[test]
    fn problems_are_first_and_equal_findings_are_one_entry() {
        let expected = "\
PROBLEM  2 machines: /cwd/qemu.yaml: machines.MACHINE.ip: no IP. Add it.
         win10_3, win10_13
warning  20 machines: its disk MACHINE.qcow2 is slow. Convert it
         win10_1 … win10_20
warning  there is no /dev/kvm
ok       21 more findings are in order: -v shows them

2 problems, 21 warnings
";
        assert_eq!(text(&lab(), false), expected);
    }

    #[test]
    fn findings_are_printed_one_by_one_when_more_is_asked_for() {
        let printed = text(&lab(), true);
        assert_eq!(printed.lines().count(), lab().len() + 2);
        assert!(printed.starts_with("PROBLEM  /cwd/qemu.yaml:3: machines.win10_3.ip"), "{printed}");
        assert!(printed.contains("ok       machine 'win10_20': can be restored instantly\n"), "{printed}");
    }

    #[test]
    fn finding_of_one_machine_stays_as_it_is() {
        let text_of = |texts: &[&str]| folded(texts).join("\n");
        let twice = ["q.yaml:3: machines.m.ip: used", "q.yaml:3: machines.m.ip: used"];
        assert_eq!(text_of(&twice), twice[0]);
        let names = ["machine 'm1': m1 and m10 differ", "machine 'm10': m1 and m10 differ"];
        assert_eq!(text_of(&names), names.join("\n"));
    }

    #[test]
    fn words_that_are_of_one_machine_only_are_left_out() {
        let texts = [
            "k.yaml:3: machines.a.label: libvirt has no domain 'vm-a'; there is 'x', see 10.9",
            "k.yaml:7: machines.b.label: libvirt has no domain 'other'; there is 'x', see 10.9",
            "k.yaml:9: machines.b.label: it is no word",
        ];
        let expected = "2 machines: k.yaml: machines.MACHINE.label: libvirt has no domain …; there is 'x', see 10.9\na, b (-v shows each)";
        assert_eq!(folded(&texts), [expected, texts[2]]);
    }

    #[test]
    fn entry_has_the_number_of_findings_when_a_machine_has_several() {
        let texts = [
            "q.yaml:3: machines.a.qcow2_path: /d/a.qcow2 is missing",
            "q.yaml:4: machines.a.qcow2_path: /d/tools.iso is missing",
            "q.yaml:4: machines.a.qcow2_path: /d/tools.iso is missing",
            "q.yaml:9: machines.b.qcow2_path: /d/b.qcow2 is missing",
        ];
        let expected = "3 findings of 2 machines: q.yaml: machines.MACHINE.qcow2_path: … is missing\n\
                        a, b (-v shows each)";
        assert_eq!(folded(&texts), [expected]);
    }

    #[test]
    fn combined_problems_are_folded_too() {
        let list = "checking 'kvm' failed: 2 problems:\n  - k.yaml:4: machines.a.ip: no IP\n  - k.yaml:9: machines.b.ip: no IP";
        let printed = text(&[finding(Level::Problem, list)], false);
        assert_eq!(
            printed,
            "PROBLEM  2 machines: k.yaml: machines.MACHINE.ip: no IP\n         a, b\n\n2 problems, 0 warnings\n"
        );
        assert_eq!(problems_of("no problems:\n  - x"), ["no problems:\n  - x"]);
    }

    #[test]
    fn names_in_a_row_are_a_range() {
        let names = ["a1", "a2", "a3", "b3", "b4", "c", "d9", "d10", "d11"];
        assert_eq!(machine_of("q.yaml:1: machines.a.ip: that of machine 'b'"), Some("a"));
        assert_eq!(machine_of("machine 'b': as in q.yaml: machines.a.ip: x"), Some("b"));
        assert_eq!(ranges(&names), "a1 … a3, b3, b4, c, d9 … d11");
    }
}
