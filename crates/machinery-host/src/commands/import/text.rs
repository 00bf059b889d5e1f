//! Putting machines into the text of a `qemu.yaml` without touching the rest of it.
//!
//! A key in the first column is always a key of the top level, whatever else the file holds, so
//! lines are enough to find the `machines` mapping and its end:
//!
//! ```text
//! machines:            ◀ nothing, {} or null behind it; anything else is refused
//!   win10_1:
//!     ip: 10.0.0.1
//!   # a last comment   ◀ new machines go below the last line that is indented
//!
//! # about other        ◀ what starts in the first column belongs to the next key
//! other: 1
//! ```
//!
//! What this cannot see through (anchors, several documents, …) the caller notices, because it
//! parses the result.

use std::ops::Range;

use machinery::Error;
use machinery::Result;
use machinery::config::ConfigFile;
use serde_yaml::Value;

use super::vmcloak::Machine;

const KEY: &str = "machines";

/// The file's text with the machines at the end of its `machines` mapping.
pub fn insert(file: &ConfigFile, machines: &[Machine]) -> Result<String> {
    let text = &file.text;
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let Some(section) = Section::find(text) else {
        let indent = first_indent(text).unwrap_or(2);
        let block = render(machines, indent, indent, newline);
        return Ok(format!("{text}{}{KEY}:{newline}{block}", line_end(text, newline)));
    };
    if !is_nothing(&text[section.value.clone()]) {
        return Err(not_editable(file, "the machines are not written as an indented block"));
    }
    let before = format!("{}{}", &text[..section.value.start], &text[section.value.end..section.end]);
    let block = render(machines, section.indent, section.step, newline);
    Ok(format!("{before}{}{block}{}", line_end(&before, newline), &text[section.end..]))
}

/// The text of a file that holds this machine only.
pub fn alone(machine: &Machine) -> String {
    format!("{KEY}:\n{}", render(std::slice::from_ref(machine), 2, 2, "\n"))
}

/// The file is left alone, and its operator has to do something about it.
pub fn not_editable(file: &ConfigFile, reason: &str) -> Error {
    file.error(&[KEY], reason).advice(
        "The file is as it was. Write `machines:` in the first column of a line of its own, with each machine \
         indented below it, and import again",
    )
}

/// Where the `machines` mapping is.
struct Section {
    /// What stands behind the colon, without a comment.
    value: Range<usize>,
    /// Where the next machine goes.
    end: usize,
    /// How far a machine's name is indented, and its keys further than that.
    indent: usize,
    step: usize,
}

impl Section {
    fn find(text: &str) -> Option<Section> {
        let (start, line, key) = lines(text).find_map(|(at, line)| Some((at, line, key_width(line)?)))?;
        let value = start + key..start + key + without_comment(&line[key..]).len();
        let body = start + line.len();
        let inside: Vec<_> = lines(&text[body..]).take_while(|(_, line)| !is_top_level(line)).collect();
        let last = inside.iter().rfind(|(_, line)| indent_of(line) > 0);
        let end = body + last.map_or(0, |(at, line)| at + line.len());
        let mut widths = inside.iter().filter_map(|(_, line)| content_indent(line));
        let first = widths.next();
        let indent = first.or_else(|| first_indent(text)).unwrap_or(2);
        let step = widths.find(|width| *width > indent).map_or(indent, |width| width - indent);
        Some(Section { value, end, indent, step })
    }
}

/// Each line, with its end, and where it starts.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split_inclusive('\n').scan(0, |at, line| {
        let start = *at;
        *at += line.len();
        Some((start, line))
    })
}

/// How wide the key and its colon are, if the line starts with the key we look for.
fn key_width(line: &str) -> Option<usize> {
    let quoted = [KEY.to_owned(), format!("\"{KEY}\""), format!("'{KEY}'")];
    let rest = quoted.iter().find_map(|key| line.strip_prefix(key.as_str()))?;
    let value = rest.trim_start_matches(' ').strip_prefix(':')?;
    value.starts_with([' ', '\t', '\r', '\n']).then(|| line.len() - value.len()).or_else(|| {
        // The last line of a file may end right after the colon.
        value.is_empty().then_some(line.len())
    })
}

/// The value behind a colon, up to its comment or to the end of its text.
fn without_comment(value: &str) -> &str {
    value.find(" #").map_or(value, |at| &value[..at]).trim_end()
}

fn is_nothing(value: &str) -> bool {
    matches!(value.replace(' ', "").as_str(), "" | "{}" | "~" | "null" | "Null" | "NULL")
}

fn is_top_level(line: &str) -> bool {
    !line.trim().is_empty() && !line.starts_with([' ', '\t', '#'])
}

/// How far a line is indented; an empty one is not.
fn indent_of(line: &str) -> usize {
    if line.trim().is_empty() { 0 } else { line.len() - line.trim_start().len() }
}

fn content_indent(line: &str) -> Option<usize> {
    Some(indent_of(line)).filter(|width| *width > 0 && !line.trim_start().starts_with('#'))
}

fn first_indent(text: &str) -> Option<usize> {
    lines(text).find_map(|(_, line)| content_indent(line))
}

/// What has to be added so that the next text starts on a line of its own.
fn line_end<'a>(text: &str, newline: &'a str) -> &'a str {
    if text.is_empty() || text.ends_with('\n') { "" } else { newline }
}

fn render(machines: &[Machine], indent: usize, step: usize, newline: &str) -> String {
    let (outer, inner) = (" ".repeat(indent), " ".repeat(indent + step));
    let mut lines = Vec::new();
    for machine in machines {
        lines.push(format!("{outer}{}:{newline}", scalar(&machine.name)));
        let keys = machine.keys.iter();
        lines.extend(keys.map(|(key, value)| format!("{inner}{key}: {}{newline}", shown(key, value))));
    }
    lines.concat()
}

fn shown(key: &str, value: &Value) -> String {
    match value {
        // Most versions look like numbers; so that all look alike, all are in quotes.
        Value::String(text) if key == "os_version" => quoted(text),
        Value::String(text) => scalar(text),
        Value::Sequence(list) => {
            let items: Vec<String> = list.iter().map(|item| shown(key, item)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Number(number) => number.to_string(),
        _ => "null".to_owned(),
    }
}

/// Plain only where no YAML parser could take it for anything but this text. Cuckoo's own reads
/// YAML 1.1, where `no` is a boolean and `10:20:30` a number.
fn scalar(text: &str) -> String {
    let first = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let rest = text.chars().all(|c| c.is_ascii_alphanumeric() || "/_.-".contains(c));
    let words = ["true", "false", "yes", "no", "on", "off", "y", "n", "null"];
    let plain = first && rest && !words.contains(&text.to_lowercase().as_str());
    if plain { text.to_owned() } else { quoted(text) }
}

/// A JSON string is a double-quoted YAML string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
