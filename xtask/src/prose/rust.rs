//! The texts of Rust source: comments, string literals and the names of test functions.
//!
//! A small scanner is enough: it distinguishes comments, strings and characters from all other code. The
//! compiler's own tokens lack ordinary comments.

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::markup::paragraphs;
use super::text::{Kind, Text};

/// Divides Rust source into the texts that readers see.
pub fn texts(source: &str) -> Vec<Text> {
    let mut scanner = Scanner::new(source);
    while scanner.next() {}
    let Scanner { code, comments, mut texts, .. } = scanner;
    texts.extend(paragraphs(comments.into_iter()));
    texts.extend(test_names(&code));
    texts
}

struct Scanner<'a> {
    rest: &'a str,
    line: usize,
    /// The source without comments and with empty strings; line breaks are kept.
    code: String,
    /// The lines of comments; an empty line separates two comments.
    comments: Vec<(usize, String)>,
    /// The sign before the last comment.
    sign: &'a str,
    texts: Vec<Text>,
}

impl<'a> Scanner<'a> {
    fn new(source: &'a str) -> Self {
        Self { rest: source, line: 1, code: String::new(), comments: Vec::new(), sign: "", texts: Vec::new() }
    }

    /// Reads one comment, literal or character; returns false at the end.
    fn next(&mut self) -> bool {
        if self.rest.starts_with("//") {
            self.line_comment();
        } else if self.rest.starts_with("/*") {
            self.block_comment();
        } else if let Some((open, close)) = string_start(self.rest, self.code.chars().last()) {
            self.string(open, &close);
        } else if let Some(length) = character(self.rest) {
            self.code.push_str("' '");
            self.take(length);
        } else if let Some(c) = self.rest.chars().next() {
            self.code.push(c);
            self.take(c.len_utf8());
        } else {
            return false;
        }
        true
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        self.line += taken.matches('\n').count();
        taken
    }

    fn line_comment(&mut self) {
        let follows_code = !self.code.rsplit('\n').next().unwrap_or_default().trim().is_empty();
        let line = self.line;
        let comment = self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
        let text = comment.trim_start_matches('/').trim_start_matches('!');
        self.comment_line(line, &comment[..comment.len() - text.len()], text, follows_code);
    }

    /// Adds a line after a sign such as `//`. A comment that follows code is a paragraph of its own.
    fn comment_line(&mut self, line: usize, sign: &'a str, text: &str, alone: bool) {
        let adjacent = self.comments.last().is_some_and(|(last, _)| last + 1 == line);
        if alone || !adjacent || self.sign != sign {
            self.comments.push((line, String::new()));
        }
        self.comments.push((line, text.to_owned()));
        self.sign = sign;
        if alone {
            self.comments.push((line, String::new()));
        }
    }

    fn block_comment(&mut self) {
        let (mut depth, mut length) = (0, 0);
        while let Some(at) = self.rest[length..].find(['/', '*']) {
            length += at;
            let pair = self.rest.get(length..length + 2).unwrap_or_default();
            depth += match pair {
                "/*" => 1,
                "*/" => -1,
                _ => 0,
            };
            length += if ["/*", "*/"].contains(&pair) { 2 } else { 1 };
            if depth == 0 {
                break;
            }
        }
        let line = self.line;
        let comment = self.take(if depth == 0 { length } else { self.rest.len() });
        let lines = comment.trim_matches(['/', '*', '!']).lines();
        for (index, text) in lines.enumerate() {
            self.comment_line(line + index, "/*", text, false);
        }
        self.code.extend(comment.chars().filter(|c| *c == '\n'));
    }

    /// Reads a string literal whose opening quote ends after `open` bytes.
    fn string(&mut self, open: usize, close: &str) {
        self.take(open);
        let line = self.line;
        let escapes = close == "\"";
        let mut length = 0;
        while !self.rest[length..].starts_with(close) {
            let Some(c) = self.rest[length..].chars().next() else { break };
            length += c.len_utf8();
            if escapes && c == '\\' {
                length += self.rest[length..].chars().next().map_or(0, char::len_utf8);
            }
        }
        let content = self.take(length);
        self.take(close.len().min(self.rest.len()));
        let lines = content.lines().enumerate().map(|(index, text)| (line + index, plain(text)));
        let lines: Vec<_> = lines.filter(|(_, text)| !text.is_empty()).collect();
        if !lines.is_empty() {
            self.texts.push(Text { kind: Kind::Code, lines });
        }
        self.code.push_str("\"\"");
        self.code.extend(content.chars().filter(|c| *c == '\n'));
    }
}

/// Returns a string's line without escapes and placeholders such as `{machine}`.
fn plain(line: &str) -> String {
    static NO_WORDS: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"\\[nrt]|\\$|\{\w*(:[^}]*)?\}|`[^`]*`").ok());
    let words = NO_WORDS.as_ref().map_or(line.into(), |pattern| pattern.replace_all(line, " "));
    words.trim().to_owned()
}

/// Returns the length of a string literal's start, and its closing quote.
fn string_start(rest: &str, before: Option<char>) -> Option<(usize, String)> {
    if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
        return rest.starts_with('"').then(|| (1, "\"".to_owned()));
    }
    let prefix = rest.find(|c| !"bcr".contains(c))?;
    let hashes = rest[prefix..].find(|c| c != '#')?;
    let is_string = prefix <= 2 && rest[prefix + hashes..].starts_with('"');
    let is_raw = rest[..prefix].ends_with('r');
    let close = || format!("\"{}", "#".repeat(hashes));
    (is_string && (is_raw || hashes == 0)).then(|| (prefix + hashes + 1, close()))
}

/// Returns the length of a character literal; a lifetime is none.
fn character(rest: &str) -> Option<usize> {
    let inner = rest.strip_prefix('\'')?;
    if inner.starts_with('\\') {
        return inner[2..].find('\'').map(|at| at + 4);
    }
    let length = inner.chars().next()?.len_utf8();
    inner[length..].starts_with('\'').then_some(length + 2)
}

/// Finds the names of functions with an attribute `#[test]`.
fn test_names(code: &str) -> Vec<Text> {
    let Ok(pattern) = Regex::new(r"#\[(?:\w+::)*test(?:\([^)]*\))?\][^{;]*?\bfn\s+(\w+)") else {
        return Vec::new();
    };
    let names = pattern.captures_iter(code).flatten().filter_map(|found| found.get(1));
    names
        .map(|name| {
            let line = code[..name.start()].matches('\n').count() + 1;
            Text { kind: Kind::TestName, lines: vec![(line, name.as_str().to_owned())] }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(source: &str, kind: Kind) -> Vec<Vec<(usize, String)>> {
        texts(source).into_iter().filter(|text| text.kind == kind).map(|text| text.lines).collect()
    }

    fn words(source: &str, kind: Kind) -> Vec<String> {
        let join = |lines: Vec<(usize, String)>| {
            lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>().join(" ")
        };
        of(source, kind).into_iter().map(join).collect()
    }

    #[test]
    fn comments_are_joined_to_paragraphs() {
        let source = "//! One\n//! two.\n//!\n//! Three `told`.\n/// Four\nfn x() {} // five\n// six\n/* sev/* */en */";
        assert_eq!(
            words(source, Kind::Prose),
            ["One two.", "Three ``.", "Four", "five", "six", "sev/* */en"]
        );
    }

    #[test]
    fn strings_are_read_without_escapes_and_placeholders() {
        let source = r####"f("one\ntwo {told:?}", r#"a "raw" one"#, b"x", 'c', '"', '\'', "it\"s \
            more"); g::<'a, 'b>("last")"####;
        let wanted = ["one two", "a \"raw\" one", "x", "it\\\"s more", "last"];
        assert_eq!(words(source, Kind::Code), wanted);
    }

    #[test]
    fn test_names_are_found_with_their_lines() {
        let source = "/*\n*/\n#[test]\n#[ignore = \"slow\"]\nfn one() {}\nfn told() {}\n#[tokio::test(x = 1)]\nasync fn two() {}";
        assert_eq!(of(source, Kind::TestName), [vec![(5, "one".to_owned())], vec![(8, "two".to_owned())]]);
    }

    #[test]
    fn identifiers_are_not_read() {
        let found = texts("fn told(stands: Tells) -> Told { stands.tell() }");
        assert_eq!(found, []);
    }
}
