//! The safe arguments of a machine: a list of options, kinds and keys. Everything else is refused.
//!
//! VMCloak's folders come from anywhere, and QEMU's options can run programs, read and write any file, and connect to
//! anything. Only options that do none of that pass. The operator accepts others for one machine by
//! `unsafe_start_args: true`.
//!
//! | module | content |
//! | --- | --- |
//! | `table` | the list |
//! | `dangers` | the reasons for refusals |
//! | `values` | values and keys, as QEMU reads them |
//! | `area` | the places of a machine, in which its arguments may name files |

mod area;
mod dangers;
mod table;
mod values;

use std::fmt;

use serde_json::Value;

use crate::options::{self, Options, is_flag, walk};
use crate::tpm;
use dangers::{Danger, find};
use table::Form;
use values::{
    Checked, Class, DEFAULT_SCRIPTS, FORMATS, base_type, block_key, class_in, expect, has, image_name,
    is_number, is_word, parse,
};

pub use area::Area;

/// A refused argument, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    argument: String,
    why: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.argument, self.why)
    }
}

impl Refusal {
    /// Creates the refusal of a file that the arguments name, because the guest could read the whole file.
    pub fn of_file(path: &std::path::Path) -> Refusal {
        let why = "the guest could read this file, which is outside of the machine's folder and of /usr";
        Refusal { argument: path.display().to_string(), why: why.to_owned() }
    }
}

/// The name of the machinery's own monitor among QEMU's character devices.
const MONITOR: &str = "cuckoo-monitor";

/// The keys of a VNC server.
const VNC: &str = "password password-secret websocket to share lossy non-adaptive key-delay-ms connections ipv4 ipv6 \
                   head display power-control audiodev";

/// The keys of a character device in the old spelling.
const CHARACTER: &str = "server wait nodelay to ipv4 ipv6";

/// Returns the refused arguments.
pub fn refusals(args: &[String], area: &Area) -> Vec<Refusal> {
    let checker = Checker { area };
    let refused = walk(args).filter_map(|(index, name, value)| {
        let (option, shown) = match index.checked_sub(1).and_then(|before| args.get(before)) {
            Some(option) if options::name_of(option) == Some(name) => {
                (option.as_str(), shown(option, name, value))
            }
            // An image without an option.
            _ => ("-hda", value.to_owned()),
        };
        let checked = match option.trim_start_matches('-') == name {
            // The monitor that the machinery appends.
            true if names_monitor(value) && !is_flag(name) => Err(Danger::ControlsQemu.describe().to_owned()),
            true if is_flag(name) || index < args.len() => checker.option(name, value),
            true => Err("its value is missing".to_owned()),
            false => Err("QEMU knows no option in this spelling".to_owned()),
        };
        checked.err().map(|why| Refusal { argument: shown, why })
    });
    refused.collect()
}

/// Reports whether the value names the machinery's own monitor, also with JSON's escapes.
fn names_monitor(value: &str) -> bool {
    let json = || serde_json::from_str::<Value>(value).map(|json| json.to_string()).unwrap_or_default();
    value.contains(MONITOR) || value.starts_with('{') && json().contains(MONITOR)
}

fn shown(option: &str, name: &str, value: &str) -> String {
    if is_flag(name) || value.is_empty() { option.to_owned() } else { format!("{option} {value}") }
}

struct Checker<'a> {
    area: &'a Area,
}

impl Checker<'_> {
    fn option(&self, name: &str, value: &str) -> Checked {
        let found = table::OPTIONS.iter().find(|(names, _)| has(names, name));
        let Some((_, form)) = found else { return Err(find(dangers::OPTIONS, name).describe().to_owned()) };
        match form {
            Form::Flag | Form::Text | Form::Read => Ok(()),
            Form::Word => expect(is_word(value), "its value is not a single word"),
            Form::Words(words) => {
                expect(has(words, value), "only these values are in the list of safe options: ")
                    .map_err(|why| why + words)
            }
            Form::Keys(implied, keys) => self.keys(&parse(name, value, implied)?, keys),
            Form::Drive => self.keys(&parse(name, value, "")?, &format!("{} {}", table::DRIVE, table::BLOCK)),
            Form::Kinds if name == "chardev" && tpm::is_socket(&Options::parse(value, "backend")) => {
                self.keys(&parse(name, value, "backend")?, "backend id path")
            }
            Form::Kinds => self.kinds(name, value),
            Form::Image => self.value(Class::Image, "its value", &value.into()),
            Form::Write => self.value(Class::Write, "its value", &value.into()),
            Form::Character => self.character(value),
            Form::Global => self.global(value),
            Form::Display => match value.strip_prefix("vnc=") {
                Some(vnc) => self.vnc(vnc),
                None => expect(value == "none", Danger::UsesDesktop.describe()),
            },
            Form::Vnc => self.vnc(value),
        }
    }

    /// Checks an option whose keys depend on its kind, such as a device's type.
    fn kinds(&self, name: &str, value: &str) -> Checked {
        let key = table::KIND_KEYS.iter().find(|(names, _)| has(names, name)).map_or("", |(_, key)| key);
        let options = parse(name, value, key)?;
        let mut given = options.pairs().filter(|(name, _)| *name == key).map(|(_, value)| value);
        let kind = match (given.next().and_then(Value::as_str), given.next()) {
            (Some(kind), None) => kind,
            (None, _) => return Err(format!("its {key} is missing")),
            (Some(_), Some(_)) => return Err(format!("its {key} is given twice")),
        };
        let known = base_type(kind);
        let lists = table::KINDS.iter().filter(|(names, kinds, _)| has(names, name) && has(kinds, known));
        let mut lists: Vec<&str> = lists.map(|(.., keys)| *keys).collect();
        if lists.is_empty() {
            let why = match find(dangers::KINDS, kind) {
                Danger::Unlisted => format!("the {key} '{kind}' is not in the list of safe ones"),
                danger => format!("{} ({kind})", danger.describe()),
            };
            return Err(why);
        }
        lists.push(key);
        self.keys(&options, &lists.join(" "))
    }

    fn keys(&self, options: &Options, list: &str) -> Checked {
        options.pairs().try_for_each(|(key, value)| self.key(key, value, list))?;
        let mut needed = list.split_whitespace().filter_map(|entry| entry.strip_prefix('+'));
        needed.try_for_each(|key| {
            expect(options.is_on(key), &format!("{} without {key}=on", Danger::Connects.describe()))
        })
    }

    fn key(&self, key: &str, value: &Value, list: &str) -> Checked {
        let plain = block_key(key, list);
        let class = class_in(list, plain);
        match class {
            Some(class) => self.value(class, key, value),
            None if has(list, "*")
                && is_number(value)
                && !plain.ends_with("fd")
                && !plain.ends_with("fds") =>
            {
                Ok(())
            }
            None => Err(match find(dangers::KEYS, plain) {
                Danger::Unlisted => format!("its key '{key}' is not in the list of safe keys"),
                danger => format!("{} ({key}=)", danger.describe()),
            }),
        }
    }

    fn value(&self, class: Class, key: &str, value: &Value) -> Checked {
        let text = match value {
            _ if matches!(class, Class::Any) => return Ok(()),
            Value::Null => "",
            Value::String(text) => text,
            _ => return Err(format!("{key} is not a text")),
        };
        match class {
            Class::Any | Class::Read => Ok(()),
            Class::Write => {
                let why = "is not a new or own .log, .txt, .out, .pcap, .pid, .sock, .socket or .console in the \
                           machine's folder";
                expect(
                    self.area.may_write(text),
                    &format!("{}: {text} {why}", Danger::WritesFiles.describe()),
                )
            }
            Class::Image => image_name(text),
            Class::Format => {
                expect(has(FORMATS, text), &format!("{} ({text})", Danger::ReadsFiles.describe()))
            }
            Class::NoScript => {
                let is_none = ["", "no", DEFAULT_SCRIPTS[0], DEFAULT_SCRIPTS[1]].contains(&text);
                expect(is_none, &format!("{} ({key}={text})", Danger::RunsCode.describe()))
            }
            Class::Random => {
                let is_random = ["/dev/urandom", "/dev/random"].contains(&text);
                expect(is_random, &format!("{} ({text})", Danger::ReadsFiles.describe()))
            }
            Class::Accelerator => {
                let is_listed = text.split(':').all(|accelerator| has("kvm tcg", accelerator));
                expect(is_listed, &format!("only kvm and tcg are safe accelerators, and not {text}"))
            }
            Class::Null => expect(text.is_empty(), &format!("{} ({key}=)", Danger::ReadsFiles.describe())),
        }
    }

    /// Checks the old spelling of a character device. Source: `qemu_chr_parse_compat` in QEMU's chardev/char.c.
    fn character(&self, value: &str) -> Checked {
        if value.starts_with("mon:") {
            return Err(Danger::ControlsQemu.describe().to_owned());
        }
        // All text after `file:` is the path.
        if let Some(path) = value.strip_prefix("file:") {
            return self.value(Class::Write, "file", &path.into());
        }
        let options = parse("serial", value, "backend")?;
        let backend = options.get("backend").unwrap_or_default();
        let is_server = options.is_on("server");
        match backend.split_once(':') {
            None if has("none null stdio vc pty msmouse", backend) => self.keys(&options, "backend"),
            Some(("vc", size)) if is_word(size) => self.keys(&options, "backend"),
            Some(("chardev", id)) if is_word(id) => self.keys(&options, "backend"),
            Some(("tcp" | "telnet" | "tn3270" | "websocket", _)) if is_server => {
                self.keys(&options, &format!("backend {CHARACTER}"))
            }
            Some(("unix", path)) if is_server => {
                self.value(Class::Write, "unix", &path.into())?;
                self.keys(&options, &format!("backend {CHARACTER}"))
            }
            Some(("tcp" | "telnet" | "tn3270" | "websocket" | "unix" | "udp", _)) => {
                Err(Danger::Connects.describe().to_owned())
            }
            _ => Err(format!("{} ({backend})", Danger::SharesHost.describe())),
        }
    }

    fn vnc(&self, value: &str) -> Checked {
        let options = parse("vnc", value, "vnc")?;
        for (_, display) in options.pairs().filter(|(key, _)| *key == "vnc") {
            if let Some(path) = display.as_str().and_then(|display| display.strip_prefix("unix:")) {
                self.value(Class::Write, "unix", &path.into())?;
            }
        }
        self.keys(&options, &format!("vnc {VNC}"))
    }

    /// Checks a property of all devices of a type. Source: `qemu_global_option` in QEMU's util/qemu-config.c.
    fn global(&self, value: &str) -> Checked {
        let property = value.split_once('.').filter(|(driver, _)| is_word(driver));
        let Some((property, value)) = property.and_then(|(_, rest)| rest.split_once('=')) else {
            return Err("it has to be DRIVER.PROPERTY=VALUE".to_owned());
        };
        // The files of other options are part of a template's identity, and this one would not be.
        if class_in(table::DEVICE, property) == Some(Class::Read) {
            return Err(format!("{} ({property}=)", Danger::ReadsFiles.describe()));
        }
        self.key(property, &value.into(), table::DEVICE)
    }
}

#[cfg(test)]
mod tests;
