//! Adds a machine's section to `machinery-host.yaml`, and removes it. All other text stays as it is.
//!
//! ```text
//! machineries:          ◀ each of these keys is added if it is missing
//!   qemu:
//!     machines:
//!       win10_1:        ◀ the section: below the last indented line of the mapping
//!         clones: 20
//! ```
//!
//! As with a machinery's own file, the text is parsed before and after: both must differ by the section only.

use std::ops::Range;
use std::path::Path;
use std::{fs, io};

use machinery::config::ConfigFile;
use machinery::{Error, Result};
use serde_yaml::{Mapping, Value};

use super::replace::replace;
use super::text::{indent_of, is_empty_value, lines, missing_newline, names, value_text, without_comment};

/// The keys above the sections of machines; the machinery's name is between them.
const KEYS: [&str; 2] = ["machineries", "machines"];

/// The section of one machine.
#[derive(Debug, Clone, Copy)]
pub struct Section<'a> {
    pub machinery: &'a str,
    pub machine: &'a str,
}

impl<'a> Section<'a> {
    fn path(self) -> [&'a str; 3] {
        [KEYS[0], self.machinery, KEYS[1]]
    }

    /// Returns the text of the file with this section, whose values are texts, numbers, or lists of them.
    ///
    /// # Errors
    /// The file has a section of the machine, or cannot be edited.
    pub fn added_to(self, file: &ConfigFile, keys: &Mapping) -> Result<String> {
        let mut expected = content(file)?;
        let machines = self.path().iter().try_fold(&mut expected, |above, key| inner(above, key));
        let Some(machines) = machines else {
            return Err(self.not_editable(file, keys, "a key above the section has another kind of value"));
        };
        if machines.contains_key(self.machine) {
            let key = [&self.path()[..], &[self.machine]].concat();
            return Err(file
                .error(&key, "the file has a section of this machine")
                .machine(self.machine)
                .advice("Remove it, or give the machine another name"));
        }
        machines.insert(self.machine.into(), keys.clone().into());
        let text = insert(&file.text, &self.path(), self.machine, keys);
        let text = text.filter(|text| serde_yaml::from_str::<Mapping>(text).is_ok_and(|got| got == expected));
        text.ok_or_else(|| self.not_editable(file, keys, "its mappings are not written as indented blocks"))
    }

    /// Adds the section to the file, which need not exist.
    ///
    /// # Errors
    /// As [`added_to`](Section::added_to); the file cannot be read or written.
    pub fn add(self, path: &Path, keys: &Mapping) -> Result<()> {
        let file = read(path)?;
        replace(path, &file.text, &self.added_to(&file, keys)?)
    }

    /// Returns the content of the section in the file, if it has one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn content(self, path: &Path) -> Result<Option<Mapping>> {
        let machines = read(path)?.parse_at::<Mapping>(&self.path())?.unwrap_or_default();
        Ok(machines.get(self.machine).map(|section| section.as_mapping().cloned().unwrap_or_default()))
    }

    /// Removes the section from the file, with keys above it that have nothing else. Returns the text before and after.
    ///
    /// # Errors
    /// The file cannot be read, edited or written. It stays unchanged then.
    pub fn remove(self, path: &Path) -> Result<(String, String)> {
        let file = read(path)?;
        let mut expected = content(&file)?;
        if let Some(machines) = self.path().iter().try_fold(&mut expected, |above, key| inner(above, key)) {
            machines.remove(self.machine);
        }
        let text = remove(&file.text, &self.path(), self.machine);
        let is_expected = |text: &String| {
            let got = serde_yaml::from_str::<Option<Mapping>>(text).ok().map(Option::unwrap_or_default);
            got.is_some_and(|got| pruned(got, &self.path()) == pruned(expected.clone(), &self.path()))
        };
        let text = text.filter(is_expected).ok_or_else(|| {
            let key = [&self.path()[..], &[self.machine]].concat();
            file.error(&key, "this section cannot be removed safely in a file of this form")
                .machine(self.machine)
                .advice("Remove it by hand, and repeat the command")
        })?;
        if text.trim().is_empty() && fs::symlink_metadata(path).is_ok_and(|found| found.is_file()) {
            fs::remove_file(path).map_err(|error| Error::io("remove", path, &error))?;
        } else {
            replace(path, &file.text, &text)?;
        }
        Ok((file.text, text))
    }

    fn not_editable(self, file: &ConfigFile, keys: &Mapping, reason: &str) -> Error {
        let text = insert("", &self.path(), self.machine, keys).unwrap_or_default();
        file.error(&[KEYS[0]], reason).machine(self.machine).advice(format!(
            "The file is as it was. Write each key of `machineries` in a line of its own, as in\n{text}and repeat the command"
        ))
    }
}

/// Reads the file; a missing one is empty.
fn read(path: &Path) -> Result<ConfigFile> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(ConfigFile { path: path.to_owned(), text: String::new() })
        }
        _ => ConfigFile::read(path),
    }
}

fn content(file: &ConfigFile) -> Result<Mapping> {
    file.parse()
}

/// Returns the mapping under a key, which is made if there is none.
fn inner<'a>(above: &'a mut Mapping, key: &str) -> Option<&'a mut Mapping> {
    let value = above.entry(key.into()).or_insert(Value::Null);
    if value.is_null() {
        *value = Mapping::new().into();
    }
    value.as_mapping_mut()
}

/// Returns the content without empty mappings on that path.
fn pruned(mut above: Mapping, path: &[&str]) -> Mapping {
    let Some((key, rest)) = path.split_first() else { return above };
    let below = match above.get(*key) {
        Some(Value::Mapping(below)) => pruned(below.clone(), rest),
        Some(Value::Null) | None => Mapping::new(),
        Some(_) => return above,
    };
    if below.is_empty() {
        above.remove(*key);
    } else {
        above.insert((*key).into(), below.into());
    }
    above
}

/// A mapping in the text: the lines below its key.
struct Block {
    lines: Range<usize>,
    /// The indentation of the key; `None` for the whole file.
    above: Option<usize>,
}

impl Block {
    fn whole(text: &str) -> Block {
        Block { lines: 0..text.len(), above: None }
    }

    fn is_inside(&self, line: &str) -> bool {
        !line.trim().is_empty() && self.above.is_none_or(|above| indent_of(line) > above)
    }

    /// Returns the lines with their positions.
    fn all<'a>(&self, text: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
        let start = self.lines.start;
        lines(&text[self.lines.clone()]).map(move |(at, line)| (start + at, line))
    }

    /// Returns the indentation of the mapping's keys, if it has any.
    fn indent(&self, text: &str) -> Option<usize> {
        self.all(text).map(|(_, line)| line).find(|line| is_content(line)).map(indent_of)
    }

    /// Returns the line of a key, with its position.
    fn key<'a>(&self, text: &'a str, key: &str) -> Option<(usize, &'a str)> {
        let indent = self.indent(text)?;
        self.all(text).find(|(_, line)| is_content(line) && indent_of(line) == indent && names(line, key))
    }

    /// Returns the block below a key's line.
    fn below(&self, text: &str, (at, line): (usize, &str)) -> Block {
        let above = Some(indent_of(line));
        let (start, mut end) = (at + line.len(), at + line.len());
        let mut block = Block { lines: start..self.lines.end, above };
        for (at, line) in block.all(text) {
            if block.is_inside(line) {
                end = at + line.len();
            } else if is_content(line) {
                break;
            }
        }
        block.lines.end = end;
        block
    }
}

fn is_content(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.starts_with('#') && line != "---"
}

/// Returns the position of the value in a key's line.
fn value_of((at, line): (usize, &str)) -> Option<Range<usize>> {
    let colon = line.find(':')? + 1;
    Some(at + colon..at + colon + without_comment(&line[colon..]).len())
}

/// Returns the text with the section below these keys, or `None` if a key has no block.
fn insert(text: &str, path: &[&str], name: &str, keys: &Mapping) -> Option<String> {
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let (mut text, mut block, mut missing) = (text.to_owned(), Block::whole(text), path);
    while let Some((key, rest)) = missing.split_first() {
        let Some((at, line)) = block.key(&text, key).map(|(at, line)| (at, line.to_owned())) else { break };
        let value = value_of((at, &line))?;
        if !is_empty_value(&text[value.clone()]) {
            return None;
        }
        block = block.below(&text, (at, &line));
        // Such as `{}`.
        block.lines = block.lines.start - value.len()..block.lines.end - value.len();
        text.replace_range(value, "");
        missing = rest;
    }
    let mut indent = block.indent(&text).unwrap_or_else(|| block.above.map_or(0, |above| above + 2));
    let mut added = missing_newline(&text[..block.lines.end], newline).to_owned();
    for key in missing.iter().chain([&name]) {
        added += &format!("{}{}:{newline}", " ".repeat(indent), value_text("", &Value::from(*key)));
        indent += 2;
    }
    for (key, value) in keys {
        let key = key.as_str()?;
        added += &format!("{}{key}: {}{newline}", " ".repeat(indent), value_text(key, value));
    }
    text.insert_str(block.lines.end, &added);
    Some(text)
}

/// Returns the text without the section, and without keys above it that have no other content and no comment.
fn remove(text: &str, path: &[&str], name: &str) -> Option<String> {
    let mut block = Block::whole(text);
    let mut entries: Vec<Range<usize>> = Vec::new();
    for key in path.iter().chain([&name]) {
        let (at, line) = block.key(text, key)?;
        block = block.below(text, (at, line));
        entries.push(at..block.lines.end);
    }
    let mut gone = entries.pop()?;
    for entry in entries.into_iter().rev() {
        let (at, line) = (entry.start, lines(&text[entry.clone()]).next()?.1);
        let others = [&text[at + line.len()..gone.start], &text[gone.end..entry.end]];
        if others.iter().any(|other| !other.trim().is_empty()) {
            break;
        }
        gone = entry;
    }
    Some(format!("{}{}", &text[..gone.start], &text[gone.end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Section<'_> = Section { machinery: "qemu", machine: "m" };

    fn keys() -> Mapping {
        serde_yaml::from_str("clones: 2\nclone_ips: 10.0.0.1-2\n").unwrap()
    }

    fn file(text: &str) -> ConfigFile {
        ConfigFile { path: "/c/machinery-host.yaml".into(), text: text.to_owned() }
    }

    #[test]
    fn section_is_added_below_the_keys_that_exist_and_removed_again() {
        let at = |indent: usize| {
            let indent = " ".repeat(indent);
            format!("{indent}m:\n{indent}  clones: 2\n{indent}  clone_ips: \"10.0.0.1-2\"\n")
        };
        for (before, expected) in [
            ("", format!("machineries:\n  qemu:\n    machines:\n{}", at(6))),
            ("# none\n", format!("# none\nmachineries:\n  qemu:\n    machines:\n{}", at(6))),
            ("heal: off", format!("heal: off\nmachineries:\n  qemu:\n    machines:\n{}", at(6))),
            (
                "machineries:\n    kvm: {standby: off}\n# more\nheal: off\n",
                format!(
                    "machineries:\n    kvm: {{standby: off}}\n    qemu:\n      machines:\n{}# more\nheal: off\n",
                    at(8)
                ),
            ),
            (
                "machineries:\n  qemu:\n    jail: auto # all\n\n    machines:  # some\n      a: {console: true}\n      # a's\n  kvm:\n    standby: off\n",
                format!(
                    "machineries:\n  qemu:\n    jail: auto # all\n\n    machines:  # some\n      a: {{console: true}}\n      # a's\n{}  kvm:\n    standby: off\n",
                    at(6)
                ),
            ),
        ] {
            let added = OURS.added_to(&file(before), &keys()).unwrap();
            assert_eq!(added, expected);
            let removed = remove(&added, &OURS.path(), "m").unwrap();
            assert_eq!(removed.trim_end(), before.trim_end(), "{added}");
            assert!(OURS.added_to(&file(&added), &keys()).unwrap_err().to_string().contains("has a section"));
        }
        let empty = OURS
            .added_to(&file("machineries: {qemu}\nheal: off\n".replace("{qemu}", "{}").as_str()), &keys());
        assert_eq!(empty.unwrap(), format!("machineries:\n  qemu:\n    machines:\n{}heal: off\n", at(6)));
    }

    #[test]
    fn file_is_refused_with_the_text_to_add_when_its_mappings_are_in_one_line() {
        for text in [
            "machineries: {qemu: {jail: auto}}\n",
            "machineries:\n  qemu: {jail: auto}\n",
            "machineries: 1\n",
        ] {
            let refused = OURS.added_to(&file(text), &keys()).unwrap_err().to_string();
            assert!(refused.contains("machines:\n      m:\n        clones: 2"), "{refused}");
        }
    }

    #[test]
    fn file_that_has_only_the_section_is_removed_with_it_and_other_sections_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machinery-host.yaml");
        OURS.add(&path, &keys()).unwrap();
        assert_eq!(OURS.content(&path).unwrap(), Some(keys()));
        OURS.remove(&path).unwrap();
        assert!(!path.exists() && OURS.content(&path).unwrap().is_none());
        let others = "machineries:\n  qemu:\n    machines:\n      a:\n        console: true\n      m:\n        # mine\n        clones: 3\n      z: {}\n";
        fs::write(&path, others).unwrap();
        OURS.remove(&path).unwrap();
        let left = others.replace("      m:\n        # mine\n        clones: 3\n", "");
        assert_eq!(fs::read_to_string(&path).unwrap(), left);
        fs::write(&path, "machineries: {qemu: {machines: {m: {clones: 3}}}}\n").unwrap();
        assert!(OURS.remove(&path).unwrap_err().to_string().contains("by hand"));
    }
}
