//! Inserts machines into the text of a machinery's configuration file and leaves all other text as it is.
//!
//! A key in the first column is always a key of the top level. So the `machines` mapping and its end can be
//! found line by line:
//!
//! ```text
//! machines:            ◀ followed by nothing, {} or null; anything else is refused
//!   win10_1:
//!     ip: 10.0.0.1
//!   # a last comment   ◀ new machines are inserted below the last indented line
//!
//! # about other        ◀ a comment in the first column belongs to the next key
//! other: 1
//! ```
//!
//! Anchors, several documents and the like are not recognised here. The caller parses the result and so
//! detects them.

use std::ops::Range;

use machinery::Error;
use machinery::Result;
use machinery::config::ConfigFile;
use serde_yaml::Value;

use super::entry::Machine;

const KEY: &str = "machines";

/// Returns the file's text with the machines added to the end of its `machines` mapping.
pub fn insert(file: &ConfigFile, machines: &[Machine]) -> Result<String> {
    let text = &file.text;
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let Some(section) = Section::find(text) else {
        let indent = first_indent(text).unwrap_or(2);
        let block = render(machines, indent, indent, newline);
        return Ok(format!("{text}{}{KEY}:{newline}{block}", missing_newline(text, newline)));
    };
    if !is_empty_value(&text[section.value.clone()]) {
        return Err(not_editable(file, "the machines are not written as an indented block"));
    }
    let before = format!("{}{}", &text[..section.value.start], &text[section.value.end..section.end]);
    let block = render(machines, section.indent, section.step, newline);
    Ok(format!("{before}{}{block}{}", missing_newline(&before, newline), &text[section.end..]))
}

/// Returns the text of a file with these machines only.
pub fn machines(machines: &[Machine]) -> String {
    format!("{KEY}:\n{}", render(machines, 2, 2, "\n"))
}

/// Returns the text with that value of a key of the top level, which must be there.
pub fn with_value(text: &str, key: &str, value: &str) -> String {
    let changed = |line: &str| {
        let old = line.strip_prefix(key)?.strip_prefix(':')?.trim();
        (old != value).then(|| format!("{key}: {}\n", scalar(value)))
    };
    text.split_inclusive('\n').map(|line| changed(line).unwrap_or_else(|| line.to_owned())).collect()
}

/// Returns the error for a file that the import cannot edit.
pub fn not_editable(file: &ConfigFile, reason: &str) -> Error {
    file.error(&[KEY], reason).advice(
        "The file is as it was. Write `machines:` in the first column of a line of its own, with each machine \
         indented below it, and import again",
    )
}

/// The position of the `machines` mapping in the text.
struct Section {
    /// The text after the colon, without a comment.
    value: Range<usize>,
    /// The position of the next machine.
    end: usize,
    /// The indentation of a machine's name, and the further indentation of its keys.
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

/// Returns the lines with their line ends, and the start of each line.
pub fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split_inclusive('\n').scan(0, |at, line| {
        let start = *at;
        *at += line.len();
        Some((start, line))
    })
}

/// Returns the width of the key `machines` and its colon, if the line starts with this key.
fn key_width(line: &str) -> Option<usize> {
    let quoted = [KEY.to_owned(), format!("\"{KEY}\""), format!("'{KEY}'")];
    let rest = quoted.iter().find_map(|key| line.strip_prefix(key.as_str()))?;
    let value = rest.trim_start_matches(' ').strip_prefix(':')?;
    value.starts_with([' ', '\t', '\r', '\n']).then(|| line.len() - value.len()).or_else(|| {
        // The last line of a file may end right after the colon.
        value.is_empty().then_some(line.len())
    })
}

/// Returns the text of a value without its comment.
pub fn without_comment(value: &str) -> &str {
    value.find(" #").map_or(value, |at| &value[..at]).trim_end()
}

pub fn is_empty_value(value: &str) -> bool {
    matches!(value.replace(' ', "").as_str(), "" | "{}" | "~" | "null" | "Null" | "NULL")
}

fn is_top_level(line: &str) -> bool {
    !line.trim().is_empty() && !line.starts_with([' ', '\t', '#'])
}

/// Returns the indentation of a line, which is 0 for an empty line.
pub fn indent_of(line: &str) -> usize {
    if line.trim().is_empty() { 0 } else { line.len() - line.trim_start().len() }
}

fn content_indent(line: &str) -> Option<usize> {
    Some(indent_of(line)).filter(|width| *width > 0 && !line.trim_start().starts_with('#'))
}

fn first_indent(text: &str) -> Option<usize> {
    lines(text).find_map(|(_, line)| content_indent(line))
}

/// Returns the line end to add to `text`, or nothing if it ends with one.
pub fn missing_newline<'a>(text: &str, newline: &'a str) -> &'a str {
    if text.is_empty() || text.ends_with('\n') { "" } else { newline }
}

fn render(machines: &[Machine], indent: usize, step: usize, newline: &str) -> String {
    let (outer, inner) = (" ".repeat(indent), " ".repeat(indent + step));
    let mut lines = Vec::new();
    for machine in machines {
        lines.push(format!("{outer}{}:{newline}", scalar(&machine.name)));
        let keys = machine.keys.iter();
        lines.extend(keys.map(|(key, value)| format!("{inner}{key}: {}{newline}", value_text(key, value))));
    }
    lines.concat()
}

pub fn value_text(key: &str, value: &Value) -> String {
    match value {
        // Most versions look like numbers. All are quoted, so that all look alike.
        Value::String(text) if key == "os_version" => quoted(text),
        Value::String(text) => scalar(text),
        Value::Sequence(list) => {
            let items: Vec<String> = list.iter().map(|item| value_text(key, item)).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Number(number) => number.to_string(),
        _ => "null".to_owned(),
    }
}

/// Returns the text as a scalar, without quotes only if every YAML parser reads it as this text. Cuckoo's
/// parser reads YAML 1.1, in which `no` is a boolean and `10:20:30` a number.
fn scalar(text: &str) -> String {
    let first = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let rest = text.chars().all(|c| c.is_ascii_alphanumeric() || "/_.-".contains(c));
    let words = ["true", "false", "yes", "no", "on", "off", "y", "n", "null"];
    let plain = first && rest && !words.contains(&text.to_lowercase().as_str());
    if plain { text.to_owned() } else { quoted(text) }
}

/// Returns the text in double quotes: a JSON string is a YAML string too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Returns the file's text without the entry of a machine. Comments that are indented further than its name are a part of
/// the entry.
pub fn remove(file: &ConfigFile, name: &str) -> Result<String> {
    let entry = entry(file, name)?;
    Ok(format!("{}{}", &file.text[..entry.start], &file.text[entry.end..]))
}

/// Returns the file's text with another value of a key in the entry of a machine. The comment behind the value stays.
pub fn set(file: &ConfigFile, name: &str, key: &str, value: &str) -> Result<String> {
    let (text, entry) = (&file.text, entry(file, name)?);
    let mut inside = lines(&text[entry.clone()]).skip(1);
    let (at, line) = inside
        .find(|(_, line)| names(line, key))
        .ok_or_else(|| not_editable(file, &format!("the machine '{name}' has no line with its {key}")))?;
    let (start, colon) = (entry.start + at, line.find(':').unwrap_or_default() + 1);
    let old = without_comment(line[colon..].trim_end());
    let (before, after) = (&text[..start + colon], &text[start + colon + old.len()..]);
    Ok(format!("{before} {}{after}", scalar(value)))
}

/// Returns the position of the entry of a machine.
fn entry(file: &ConfigFile, name: &str) -> Result<Range<usize>> {
    let text = &file.text;
    let missing = || not_editable(file, "the machine is not written as an indented block");
    let section = Section::find(text).ok_or_else(missing)?;
    let body = section.value.end..section.end;
    let mut inside = lines(&text[body.clone()]).skip(1).map(|(at, line)| (body.start + at, line));
    let is_entry = |line: &str| indent_of(line) == section.indent && names(line, name);
    let (start, _) = inside.find(|(_, line)| is_entry(line)).ok_or_else(missing)?;
    let is_next = |line: &str| !line.trim().is_empty() && indent_of(line) <= section.indent;
    Ok(start..inside.find(|(_, line)| is_next(line)).map_or(section.end, |(at, _)| at))
}

/// Reports whether the line has this key.
pub fn names(line: &str, key: &str) -> bool {
    let quoted = [key.to_owned(), format!("\"{key}\""), format!("'{key}'")];
    let rest = quoted.iter().find_map(|key| line.trim_start().strip_prefix(key.as_str()));
    rest.is_some_and(|rest| rest.trim_start().starts_with(':'))
}
