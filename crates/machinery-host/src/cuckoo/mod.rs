//! Finds the places where Cuckoo3 reads its own files differently from this host.
//!
//! ```text
//! file ─▶ events of a YAML parser, with the notation of each scalar
//!              ─▶ each scalar that the host reads: its value for Cuckoo3, its value for the host ─▶ findings
//! ```
//!
//! The node of Cuckoo3 reads the same files as the host, with a parser of YAML 1.1 (`yaml11`) and type
//! loaders for each key. For example, Cuckoo3 reads an unquoted MAC address 52:54:00:00:01:01 as a number,
//! and the unquoted version 18.10 as 18.1. Source: `common/config.py`, `machineries/config.py` and
//! `core/config.py` of Cuckoo3.

mod yaml11;

use machinery::config::ConfigFile;
use machinery::{Error, Place, Report};
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_yaml::Mapping;

use crate::cwd::Cwd;
use yaml11::Plain;

/// The machineries of Cuckoo3, which does not read the files of other machineries.
const MACHINERIES: [&str; 3] = ["kvm", "proxmox", "qemu"];

/// Keys of a machinery's file that may be empty.
const MAY_BE_EMPTY: [&str; 5] = ["mac_address", "snapshot", "interface", "tags", "disposable_copy_dir"];

/// Reports the values that Cuckoo3 reads differently in `cuckoo.yaml` and in the files of these machineries.
pub fn check(cwd: &Cwd, machineries: &[String], report: &mut Report) {
    // A file that cannot be read is reported by the code that needs its content.
    if let Ok(file) = ConfigFile::read(&cwd.cuckoo_yaml()) {
        compare(&file, kind_in_cuckoo_yaml, report);
    }
    for name in machineries.iter().filter(|name| MACHINERIES.contains(&name.as_str())) {
        let Ok(file) = ConfigFile::read(&cwd.machinery_yaml(name)) else { continue };
        compare(&file, kind_in_machinery_yaml, report);
        if let Some(example) = example_machine(name, &file) {
            report.warning(example.to_string());
        }
    }
}

/// Advises to remove the machine `example1`, if the file has it: Cuckoo3 adds this machine to each new file.
pub fn example_machine(machinery: &str, file: &ConfigFile) -> Option<Error> {
    const EXAMPLE: &str = "example1";
    if !MACHINERIES.contains(&machinery) {
        return None;
    }
    let machines: Mapping = file.parse_at(&["machines"]).ok()??;
    machines.get(EXAMPLE)?;
    let error = file.error(&["machines", EXAMPLE], "this is the example in Cuckoo3's default file");
    Some(error.advice(format!(
        "Unless it is a machine of yours, remove it: `cuckoo machine delete {machinery} {EXAMPLE}`"
    )))
}

/// The YAML 1.1 key that inserts the keys of another mapping.
const MERGE: &str = "<<";

/// The type that Cuckoo3's type loader gives to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    Flag,
    Words,
}

/// Returns the kind of the value under a key; `None` if the host does not read the key.
type KindOf = fn(&[&str]) -> Option<Kind>;

fn kind_in_cuckoo_yaml(path: &[&str]) -> Option<Kind> {
    match path {
        ["machineries"] => Some(Kind::Words),
        ["resultserver", "listen_ip"] | ["tcpdump", "path"] => Some(Kind::Text),
        [MERGE] | ["resultserver" | "tcpdump", MERGE] => Some(Kind::Text),
        ["resultserver", "listen_port"] => Some(Kind::Number),
        ["tcpdump", "enabled"] => Some(Kind::Flag),
        _ => None,
    }
}

fn kind_in_machinery_yaml(path: &[&str]) -> Option<Kind> {
    match path {
        ["machines", _, "tags"] => Some(Kind::Words),
        ["machines", _, "agent_port"] => Some(Kind::Number),
        ["machines", MERGE] => Some(Kind::Text),
        ["machines"] | ["machines", _] => None,
        _ => Some(Kind::Text),
    }
}

fn compare(file: &ConfigFile, kind_of: KindOf, report: &mut Report) {
    let mut position = Position::default();
    for event in Parser::new_from_str(&file.text) {
        // The host's own parser reports text that is not YAML.
        let Ok((event, span)) = event else { return };
        if let Event::Scalar(written, style, _, tag) = &event {
            let is_plain = *style == ScalarStyle::Plain && tag.is_none();
            let scalar = Scalar::new(written, is_plain);
            if let Some(difference) = position.difference(&scalar, kind_of) {
                let key = Some(position.path(&scalar).join("."));
                let place = Place { file: file.path.clone(), line: Some(span.start.line()), key };
                difference.report(&scalar, place, report);
            }
        }
        position.step(&event);
    }
}

/// The collections that are open at an event, outermost first.
#[derive(Default)]
struct Position(Vec<Collection>);

enum Collection {
    List,
    /// A mapping, with the key whose value comes next; `None` where a key comes next.
    Mapping(Option<String>),
}

impl Position {
    fn step(&mut self, event: &Event<'_>) {
        match event {
            Event::MappingStart(..) => self.0.push(Collection::Mapping(None)),
            Event::SequenceStart(..) => self.0.push(Collection::List),
            Event::Scalar(written, ..) => self.end_node(written),
            Event::Alias(_) => self.end_node(""),
            Event::MappingEnd | Event::SequenceEnd => {
                self.0.pop();
                self.end_node("");
            }
            _ => {}
        }
    }

    /// Records the end of a node, which is a key or a value.
    fn end_node(&mut self, written: &str) {
        if let Some(Collection::Mapping(key)) = self.0.last_mut() {
            *key = if key.is_none() { Some(written.to_owned()) } else { None };
        }
    }

    fn is_key(&self) -> bool {
        matches!(self.0.last(), Some(Collection::Mapping(None)))
    }

    /// Returns the keys that lead to this scalar; if the scalar is a key, that key is the last one.
    fn path<'a>(&'a self, scalar: &Scalar<'a>) -> Vec<&'a str> {
        let key = |collection: &'a Collection| match collection {
            Collection::Mapping(key) => key.as_deref(),
            Collection::List => None,
        };
        self.0.iter().filter_map(key).chain(self.is_key().then_some(scalar.written)).collect()
    }

    fn difference(&self, scalar: &Scalar<'_>, kind_of: KindOf) -> Option<Difference> {
        let path = self.path(scalar);
        let key = path.last().copied().unwrap_or_default();
        if self.is_key() {
            return match path[..] {
                ["machines", name] if name != MERGE => scalar.as_name(),
                [.., MERGE] if kind_of(&path).is_some() => Some(Difference::Merged),
                _ => None,
            };
        }
        match kind_of(&path)? {
            Kind::Text => scalar.as_text(key),
            Kind::Words if matches!(self.0.last(), Some(Collection::List)) => scalar.as_element(),
            Kind::Words => scalar.as_only_word(),
            Kind::Number => scalar.as_number(),
            Kind::Flag => scalar.as_flag(),
        }
    }
}

/// A scalar as written, and as Cuckoo3's parser reads it.
struct Scalar<'a> {
    written: &'a str,
    value: Plain,
}

/// The way in which Cuckoo3 reads a scalar differently from the host.
#[derive(Debug, PartialEq)]
enum Difference {
    /// Cuckoo3 uses this text instead.
    Reads(String),
    /// Cuckoo3 reads this text, and the key does not accept it.
    Refuses(String),
    /// Cuckoo3 accepts only this.
    Expects(&'static str),
    /// Cuckoo3 leaves the element out of its list.
    LeavesOut,
    /// Cuckoo3 does not accept an empty value.
    Empty,
    /// Cuckoo3 inserts the keys of another mapping.
    Merged,
}

impl<'a> Scalar<'a> {
    fn new(written: &'a str, is_plain: bool) -> Self {
        Scalar { written, value: if is_plain { Plain::of(written) } else { Plain::Text } }
    }

    /// Returns the value as Python displays it; `None` for null, an error for a value that Cuckoo3 cannot
    /// read.
    fn shown(&self) -> Result<Option<String>, Difference> {
        Ok(Some(match &self.value {
            Plain::Null => return Ok(None),
            Plain::Invalid => return Err(Difference::Refuses("an invalid value".to_owned())),
            Plain::Bool(true) => "True".to_owned(),
            Plain::Bool(false) => "False".to_owned(),
            Plain::Int(Some(number)) => number.to_string(),
            Plain::Int(None) => "a very large number".to_owned(),
            Plain::Float(number) => format!("{number:?}").to_lowercase(),
            Plain::Date { as_written: false } => "a date and time".to_owned(),
            Plain::Date { as_written: true } | Plain::Text => self.written.trim().to_owned(),
        }))
    }

    fn as_text(&self, key: &str) -> Option<Difference> {
        let shown = match self.shown() {
            Ok(Some(shown)) if !shown.is_empty() => shown,
            Ok(_) => return (!MAY_BE_EMPTY.contains(&key)).then_some(Difference::Empty),
            Err(difference) => return Some(difference),
        };
        if shown == self.written.trim() {
            return None;
        }
        Some(if key == "mac_address" { Difference::Refuses(shown) } else { Difference::Reads(shown) })
    }

    /// Cuckoo3 accepts only a text as a list of one. The host, too, refuses a number or a boolean.
    fn as_only_word(&self) -> Option<Difference> {
        matches!(self.value, Plain::Date { .. }).then(|| Difference::Refuses("a date".to_owned()))
    }

    fn as_element(&self) -> Option<Difference> {
        let is_zero = match &self.value {
            Plain::Bool(flag) => !flag,
            Plain::Int(number) => *number == Some(0),
            Plain::Float(number) => *number == 0.0,
            // The host and Cuckoo3 both leave null out.
            Plain::Null => return None,
            _ => false,
        };
        if is_zero { Some(Difference::LeavesOut) } else { self.as_text("tags") }
    }

    /// Numbers that both accept have the same value for the host and for Cuckoo3.
    fn as_number(&self) -> Option<Difference> {
        match &self.value {
            Plain::Null => Some(Difference::Empty),
            Plain::Text if !is_python_int(self.written) => Some(Difference::Expects("a number in decimal")),
            _ => None,
        }
    }

    /// Booleans that both accept have the same value for the host and for Cuckoo3.
    fn as_flag(&self) -> Option<Difference> {
        let words = ["true", "True", "yes", "on", "false", "False", "None", "no", "off"];
        let accepts =
            self.value != Plain::Text || words.contains(&self.written) || is_python_int(self.written);
        (!accepts).then_some(Difference::Expects("true or false"))
    }

    /// Cuckoo3 passes its configuration through JSON, where keys are texts.
    fn as_name(&self) -> Option<Difference> {
        let name = match &self.value {
            Plain::Null => "null".to_owned(),
            Plain::Bool(flag) => flag.to_string(),
            Plain::Date { .. } => return Some(Difference::Refuses("a date".to_owned())),
            Plain::Text => return None,
            _ => match self.shown() {
                Ok(shown) => shown.unwrap_or_default(),
                Err(difference) => return Some(difference),
            },
        };
        (name != self.written).then_some(Difference::Reads(name))
    }
}

/// Reports whether Python's `int()` accepts the text.
fn is_python_int(text: &str) -> bool {
    let text = text.trim();
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    digits.split('_').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Difference {
    fn report(&self, scalar: &Scalar<'_>, place: Place, report: &mut Report) {
        let written = scalar.written;
        let quoted = format!("Put it in quotes: \"{}\"", written.trim());
        let (reason, advice) = match self {
            Difference::Reads(shown) => {
                (format!("Cuckoo3 reads {written} as {shown}, the host as it is written"), quoted)
            }
            Difference::Refuses(shown) => {
                (format!("Cuckoo3 reads {written} as {shown} and refuses it"), quoted)
            }
            Difference::Expects(what) => {
                (format!("Cuckoo3 refuses '{written}'"), format!("Write {what}, without quotes"))
            }
            Difference::LeavesOut => {
                (format!("Cuckoo3 leaves the element {written} out of the list"), quoted)
            }
            Difference::Empty => {
                ("Cuckoo3 refuses an empty value here".to_owned(), "Give a value".to_owned())
            }
            Difference::Merged => (
                "Cuckoo3 inserts the keys of another mapping here, the host does not".to_owned(),
                "Write these keys out".to_owned(),
            ),
        };
        let error = Error::configuration(reason).place(place).advice(advice);
        match self {
            Difference::Reads(_) | Difference::LeavesOut | Difference::Merged => {
                report.warning(error.to_string())
            }
            Difference::Refuses(_) | Difference::Expects(_) | Difference::Empty => report.problem(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, text: &str, kind_of: KindOf) -> Vec<String> {
        let file = ConfigFile { path: format!("/c/{name}").into(), text: text.to_owned() };
        let mut report = Report::default();
        compare(&file, kind_of, &mut report);
        report.findings().iter().map(|finding| format!("{:?} {}", finding.level, finding.text)).collect()
    }

    fn in_machinery(text: &str) -> Vec<String> {
        found("qemu.yaml", text, kind_in_machinery_yaml)
    }

    fn in_cuckoo(text: &str) -> Vec<String> {
        found("cuckoo.yaml", text, kind_in_cuckoo_yaml)
    }

    #[test]
    fn unquoted_mac_address_is_a_problem_when_cuckoo_reads_a_number() {
        assert_eq!(
            in_machinery("machines:\n  win10:\n    ip: 10.0.0.1\n    mac_address: 52:54:00:00:01:01\n"),
            ["Problem /c/qemu.yaml:4: machines.win10.mac_address: Cuckoo3 reads 52:54:00:00:01:01 as \
              41135040061 and refuses it. Put it in quotes: \"52:54:00:00:01:01\"."]
        );
        assert!(in_machinery("machines: {a: {mac_address: 52:54:00:ab:01:01}}\n").is_empty());
        assert!(in_machinery("machines: {a: {mac_address: '52:54:00:00:01:01'}}\n").is_empty());
        assert!(in_machinery("machines: {a: {mac_address: !!str 52:54:00:00:01:01}}\n").is_empty());
    }

    #[test]
    fn value_is_reported_when_cuckoo_reads_it_differently() {
        for (text, expected) in [
            ("machines: {a: {os_version: 18.10}}", "a.os_version: Cuckoo3 reads 18.10 as 18.1, the host"),
            ("machines: {a: {os_version: 010}}", "a.os_version: Cuckoo3 reads 010 as 8,"),
            ("machines: {a: {platform: on}}", "a.platform: Cuckoo3 reads on as True,"),
            ("machines: {a: {snapshot: 2024-01-01T10:00:00}}", "as a date and time,"),
            ("machines: {a: {snapshot: 2024-02-30}}", "as an invalid value and refuses it"),
            ("machines: {a: {tags: [x, 0]}}", "a.tags: Cuckoo3 leaves the element 0 out of the list"),
            ("machines: {a: {tags: [x, 1_0]}}", "a.tags: Cuckoo3 reads 1_0 as 10,"),
            (
                "machines: {a: {tags: 2024-01-01}}",
                "a.tags: Cuckoo3 reads 2024-01-01 as a date and refuses it",
            ),
            ("machines: {a: {agent_port: }}", "a.agent_port: Cuckoo3 refuses an empty value here"),
            ("machines: {a: {agent_port: 0o17500}}", "a.agent_port: Cuckoo3 refuses '0o17500'"),
            ("machines: {a: {architecture: ~}}", "a.architecture: Cuckoo3 refuses an empty value"),
            ("machines: {10_1: {ip: x}}", "machines.10_1: Cuckoo3 reads 10_1 as 101,"),
            ("machines: {a: &a {ip: x}, b: {<<: *a}}", "machines.b.<<: Cuckoo3 inserts the keys"),
            ("interface: 0x10", "interface: Cuckoo3 reads 0x10 as 16,"),
        ] {
            let found = in_machinery(text);
            assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
        }
        for (text, expected) in [
            ("tcpdump: {enabled: 'Yes'}", "tcpdump.enabled: Cuckoo3 refuses 'Yes'"),
            ("resultserver: {listen_ip: 10.10}", "resultserver.listen_ip: Cuckoo3 reads 10.10 as 10.1,"),
            ("x: &x {enabled: no}\ntcpdump: {<<: *x}", "tcpdump.<<: Cuckoo3 inserts the keys"),
            ("machineries: [qemu, off]", "machineries: Cuckoo3 leaves the element off out"),
        ] {
            let found = in_cuckoo(text);
            assert!(found.len() == 1 && found[0].contains(expected), "{text}: {found:?}");
        }
    }

    #[test]
    fn report_is_empty_when_both_read_the_same() {
        let machinery = "\
interface: br0
disposable_copy_dir:
binaries: {qemu_img: /usr/bin/qemu-img}
machines:
  win10_1:
    label: &label win10
    ip: 10.0.0.1
    os_version: 10
    snapshot:
    mac_address: null
    agent_port: 0x1F40
    tags: [dotnet, ' x ', 7, ~]
  ? [odd, key]
  : {label: *label, ip: ' 10.0.0.2 ', agent_port: ' 8_000 ', tags: dotnet, snapshot: 2024-01-01}
";
        assert_eq!(in_machinery(machinery), [""; 0]);
        // Keys that the host does not read concern only Cuckoo3.
        let cuckoo = "\
machineries: [qemu]
tcpdump: {enabled: Yes, path: /usr/bin/tcpdump}
resultserver: {listen_ip: 10.0.0.1, listen_port: '2042'}
submit: &submit {max_file_size: 010, other: [1_0]}
other: {<<: *submit}
";
        assert_eq!(in_cuckoo(cuckoo), [""; 0]);
    }

    #[test]
    fn example_machine_is_found_by_its_name() {
        let file = |text: &str| ConfigFile { path: "/c/qemu.yaml".into(), text: text.to_owned() };
        let text = example_machine("qemu", &file("machines:\n  example1:\n    ip: x\n")).unwrap().to_string();
        assert!(text.starts_with("/c/qemu.yaml:3: machines.example1: this is the example"), "{text}");
        assert!(text.contains("cuckoo machine delete qemu example1"), "{text}");
        assert_eq!(example_machine("qemu", &file("machines: {win10: {ip: x}}\n")), None);
        assert_eq!(example_machine("qemu", &file("machines: [\n")), None);
    }
}
