//! Counts of words that made this repository hard to read, beside the limits for them.

use std::fmt;

use fancy_regex::Regex;

use super::text::{Kind, Text};

/// A measured word: its name, its pattern, and the most occurrences per 1,000 words of prose.
const MEASURED: [(&str, &str, f64); 3] = [
    ("told/tells", r"(?i)\b(?:told|tells)\b", 0.10),
    ("sentences that open with \"What\"", r#"(?:^|[.!?]["')*_]* )What\b"#, 0.03),
    ("stands", r"(?i)\bstands\b", 0.02),
];

/// Starts of the names of tests that have no subject.
const NO_SUBJECT: &str = "^(?:a|an|what|who)(?:[a-z]*ever)?_";

/// The counts of a set of texts.
#[derive(Debug, Default, PartialEq)]
pub struct Counts {
    words: usize,
    measured: [usize; 3],
    tests: usize,
    tests_without_subject: usize,
}

impl Counts {
    /// Counts the words of comments and documents, and the names of tests.
    pub fn of<'a>(texts: impl Iterator<Item = &'a Text>) -> Self {
        let patterns = MEASURED.map(|(_, pattern, _)| Regex::new(pattern).ok());
        let no_subject = Regex::new(NO_SUBJECT).ok();
        let mut counts = Self::default();
        for text in texts {
            let lines: Vec<&str> = text.lines.iter().map(|(_, line)| line.as_str()).collect();
            let words = lines.join(" ");
            match text.kind {
                Kind::Prose => {
                    counts.words += words.split_whitespace().count();
                    for (count, pattern) in counts.measured.iter_mut().zip(&patterns) {
                        *count += occurrences(pattern.as_ref(), &words);
                    }
                }
                Kind::TestName => {
                    counts.tests += 1;
                    counts.tests_without_subject += occurrences(no_subject.as_ref(), &words);
                }
                Kind::Code => {}
            }
        }
        counts
    }
}

fn occurrences(pattern: Option<&Regex>, words: &str) -> usize {
    pattern.map_or(0, |pattern| pattern.find_iter(words).flatten().count())
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} words of comments and documents; per 1,000 words:", self.words)?;
        for ((name, _, most), count) in MEASURED.iter().zip(self.measured) {
            #[expect(clippy::cast_precision_loss)]
            let share = count as f64 * 1000.0 / self.words.max(1) as f64;
            writeln!(f, "{share:6.2}  {name} ({count}; at most {most:.2})")?;
        }
        write!(f, "{} of {} tests begin with a/what/who", self.tests_without_subject, self.tests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(kind: Kind, line: &str) -> Text {
        Text { kind, lines: vec![(1, line.to_owned())] }
    }

    #[test]
    fn counts_are_of_prose_and_test_names() {
        let texts = [
            text(Kind::Prose, "What is told. What it tells stands. Somewhat."),
            text(Kind::Code, "told"),
            text(Kind::TestName, "a_lock_is_told"),
            text(Kind::TestName, "whoever_asks_waits"),
            text(Kind::TestName, "lock_survives"),
        ];
        let counts = Counts::of(texts.iter());
        assert_eq!(counts, Counts { words: 8, measured: [2, 2, 1], tests: 3, tests_without_subject: 2 });
        assert!(counts.to_string().contains("250.00  told/tells (2; at most 0.10)"), "{counts}");
    }
}
