//! The list of forbidden phrases, and their search in a text.

use fancy_regex::{Regex, RegexBuilder};

use super::text::{Kind, Text};
use crate::run::{Context, Result};

/// The list of this repository.
pub const PHRASES: &str = include_str!("../../prose.txt");

/// A place in a file where a phrase was found.
#[derive(Debug, PartialEq)]
pub struct Finding {
    pub path: String,
    pub line: usize,
    pub phrase: String,
    pub suggestion: String,
}

/// Forbidden phrases.
pub struct List {
    phrases: Vec<Phrase>,
    test_names: Vec<Phrase>,
}

/// One line of the list.
struct Phrase {
    pattern: Regex,
    suggestion: String,
}

impl List {
    /// Reads a list in the format that `prose.txt` describes.
    pub fn read(list: &str) -> Result<Self> {
        let mut read = Self { phrases: Vec::new(), test_names: Vec::new() };
        let mut of_names = false;
        for (number, line) in list.lines().enumerate() {
            match line.trim() {
                "" => {}
                "[phrases]" => of_names = false,
                "[test names]" => of_names = true,
                line if line.starts_with('#') => {}
                line => {
                    let phrase = Phrase::read(line).context(|| format!("prose.txt, line {}", number + 1))?;
                    if of_names { read.test_names.push(phrase) } else { read.phrases.push(phrase) }
                }
            }
        }
        Ok(read)
    }

    /// Returns the phrases that the text contains; of overlapping ones, the first in the list.
    pub fn check(&self, path: &str, text: &Text) -> Vec<Finding> {
        let (words, starts) = joined(text);
        let mut found = search(&self.phrases, &words);
        if text.kind == Kind::TestName {
            let name = text.lines.iter().map(|(_, line)| line.as_str()).collect::<String>();
            found.extend(search(&self.test_names, &name));
        }
        let finding = |found: Found| Finding {
            path: path.to_owned(),
            line: starts.iter().rev().find(|(at, _)| *at <= found.start).map_or(0, |(_, line)| *line),
            phrase: shortened(&found.words),
            suggestion: found.suggestion,
        };
        found.into_iter().map(finding).collect()
    }
}

impl Phrase {
    fn read(line: &str) -> Result<Self, String> {
        let (pattern, suggestion) =
            line.split_once(" => ").ok_or("a phrase needs ` => ` and a suggestion".to_owned())?;
        let pattern = RegexBuilder::new(pattern.trim()).case_insensitive(true).build();
        let pattern = pattern.map_err(|error| error.to_string())?;
        Ok(Self { pattern, suggestion: suggestion.trim().to_owned() })
    }
}

/// An occurrence of a phrase.
struct Found {
    start: usize,
    end: usize,
    words: String,
    suggestion: String,
}

fn search(phrases: &[Phrase], text: &str) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for phrase in phrases {
        for occurrence in phrase.pattern.find_iter(text).flatten() {
            let (start, end) = (occurrence.start(), occurrence.end());
            if found.iter().any(|other| start < other.end && other.start < end) {
                continue;
            }
            let (words, suggestion) = (occurrence.as_str().to_owned(), phrase.suggestion.clone());
            found.push(Found { start, end, words, suggestion });
        }
    }
    found
}

/// Joins the lines with spaces; returns each line's start and number beside the text.
fn joined(text: &Text) -> (String, Vec<(usize, usize)>) {
    let (mut words, mut starts) = (String::new(), Vec::new());
    for (number, line) in &text.lines {
        if !words.is_empty() {
            words.push(' ');
        }
        starts.push((words.len(), *number));
        words.push_str(line.trim());
    }
    if text.kind == Kind::TestName {
        words = words.replace('_', " ");
    }
    (words, starts)
}

/// Returns the start of a long phrase.
fn shortened(phrase: &str) -> String {
    let phrase = phrase.trim_start_matches(|c: char| !c.is_alphanumeric());
    if phrase.chars().count() <= 50 {
        return phrase.trim().to_owned();
    }
    phrase.chars().take(50).chain("…".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(kind: Kind, lines: &[&str]) -> Text {
        Text { kind, lines: lines.iter().enumerate().map(|(n, line)| (n + 1, (*line).to_owned())).collect() }
    }

    fn found(kind: Kind, lines: &[&str]) -> Vec<(usize, String)> {
        let list = List::read(PHRASES).unwrap();
        let findings = list.check("a.rs", &text(kind, lines));
        findings.into_iter().map(|finding| (finding.line, finding.phrase)).collect()
    }

    fn refuses(line: &str) -> bool {
        !found(Kind::Prose, &[line]).is_empty()
    }

    #[test]
    fn list_refuses_each_forbidden_phrase() {
        for line in [
            "It lets go of the lock.",
            "It is `off` to the outside.",
            "That costs the machine.",
            "The host takes over the CWD.",
            "The client is told.",
            "It tells the client.",
            "The name stands in the file.",
            "It is otherwise than before.",
            "The house waits.",
            "The same has gone the same way.",
            "A script can have it be started.",
            "What a run has written is removed.",
            "It fails. Whether it is there is unknown.",
            "Who has the lock.",
            "How long it took.",
        ] {
            assert!(refuses(line), "{line}");
        }
    }

    #[test]
    fn list_accepts_terms_of_the_field_and_questions() {
        for line in [
            "A standby is a QEMU that stands by, and standing by is cheap.",
            "The stand-in answers.",
            "What happens to a request while a reload runs?",
            "How to run one test",
            "Returns whether it runs.",
            "The letter goes.",
            "Somewhat, somehow.",
        ] {
            assert!(!refuses(line), "{line}: {:?}", found(Kind::Prose, &[line]));
        }
    }

    #[test]
    fn phrase_is_found_across_lines_when_it_is_wrapped() {
        assert_eq!(
            found(Kind::Prose, &["A fine line.", "The host takes", "over all."]),
            [(2, "takes over".to_owned())]
        );
    }

    #[test]
    fn test_name_is_refused_when_it_has_no_subject_or_a_forbidden_word() {
        assert_eq!(found(Kind::TestName, &["a_lock_is_kept"]), [(1, "a_".to_owned())]);
        assert_eq!(found(Kind::TestName, &["lock_is_told_at_once"]), [(1, "told".to_owned())]);
        assert_eq!(found(Kind::TestName, &["lock_survives_when_the_host_restarts"]), []);
        assert_eq!(found(Kind::Code, &["a_lock_is_kept"]), []);
    }

    #[test]
    fn list_is_refused_with_its_line_when_a_pattern_is_wrong() {
        let failure = format!("{:?}", List::read("[phrases]\n(x => y\n").err());
        assert!(failure.contains("line 2"), "{failure}");
        let failure = format!("{:?}", List::read("x\n").err());
        assert!(failure.contains("suggestion"), "{failure}");
    }
}
