//! Explains why QEMU refuses a snapshot, from its messages.
//!
//! A snapshot is the state of one machine, device by device. QEMU loads it only into the same machine: of the
//! same type, with the same amount of RAM, and with the same devices, none of them older. Sources: QEMU's
//! migration/savevm.c and migration/ram.c, softmmu/physmem.c, migration/vmstate.c.

use std::path::Path;

use machinery::{Error, format_bytes};

use crate::snapshot::Format;

/// The meaning of QEMU's message about a snapshot that it has not loaded.
pub enum Refusal {
    /// QEMU refuses the snapshot for a known reason.
    Known(Error),
    /// The stream ended before the end of the snapshot.
    EndsEarly,
    /// QEMU refuses the snapshot for an unknown reason.
    Unknown(Error),
}

/// Interprets QEMU's message about a snapshot that it has not loaded.
pub fn refused(path: &Path, format: Format, words: &str) -> Refusal {
    let reason = format!("QEMU refuses the {format} snapshot {}", path.display());
    let refused = if is_accident(words) { Error::failed(reason) } else { Error::configuration(reason) };
    if let Some((why, advice)) = cause(words) {
        return Refusal::Known(refused.detail(&why).advice(advice));
    }
    if words.contains(ENDS_EARLY) {
        return Refusal::EndsEarly;
    }
    Refusal::Unknown(refused.advice(format!(
        "It was probably taken with other start_args, or with a newer QEMU: use those, or {ANEW}. If the file is damaged, \
         restore it from a backup"
    )))
}

/// Reports whether QEMU's message is about the computer and not about the snapshot: another try may work. Sources:
/// strerror(3), and `qemu_kill_report` in QEMU's softmmu/runstate.c.
fn is_accident(words: &str) -> bool {
    ["Cannot allocate memory", "No space left on device", "terminating on signal "]
        .iter()
        .any(|said| words.contains(said))
}

/// QEMU's message when a file ends in the middle of a snapshot.
const ENDS_EARLY: &str = "load of migration failed: Input/output error";
const ANEW: &str = "take the snapshot anew";
const DEVICES: &str =
    "Give start_args the devices that the snapshot was taken with, or take the snapshot anew";

/// Returns the cause and the advice; `None` for messages without a known meaning.
fn cause(words: &str) -> Option<(String, String)> {
    machine_type(words)
        .or_else(|| size(words))
        .or_else(|| missing_device(words))
        .or_else(|| newer(words))
        .or_else(|| other_device(words))
}

fn machine_type(words: &str) -> Option<(String, String)> {
    let theirs = between(words, "Machine type received is '", "'")?;
    let ours = between(words, "and local is '", "'")?;
    let why = format!("it is of the machine type {theirs}, and start_args now make a {ours}");
    Some((why, format!("Write `-M {theirs}` in start_args, or {ANEW}")))
}

fn size(words: &str) -> Option<(String, String)> {
    let (block, sizes) = between(words, "Size mismatch: ", ": Invalid argument")?.split_once(": ")?;
    let (theirs, ours) = sizes.split_once(" != ")?;
    let bytes = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let (theirs, ours) = (bytes(theirs)?, bytes(ours)?);
    // QEMU names a device's memory after the device's place on its bus.
    if block.contains('/') {
        let why =
            format!("its device {block} has {} of memory, not {}", format_bytes(theirs), format_bytes(ours));
        return Some((why, DEVICES.to_owned()));
    }
    let why =
        format!("its guest has {} of RAM, and start_args give {}", format_bytes(theirs), format_bytes(ours));
    Some((why, format!("Write `-m {}M` in start_args, or {ANEW}", theirs >> 20)))
}

fn missing_device(words: &str) -> Option<(String, String)> {
    let block = between(words, "Unknown ramblock \"", "\"");
    let device = block.or_else(|| between(words, "Unknown savevm section or instance '", "'"))?;
    Some((format!("it has the device {device}, and start_args do not"), DEVICES.to_owned()))
}

fn newer(words: &str) -> Option<(String, String)> {
    let says = ["unsupported version ", "is too new for local", "State blob version"];
    says.iter().any(|said| words.contains(said)).then(|| {
        let advice = format!("Use the QEMU that it was taken with, or {ANEW}");
        ("a newer QEMU took it".to_owned(), advice)
    })
}

fn other_device(words: &str) -> Option<(String, String)> {
    let says = ["Failed to load ", "Bad config data", "Missing section footer for "];
    let says = says.iter().any(|said| words.contains(said));
    let device = between(words, " of device '", "'").filter(|device| *device != "ram");
    (says || device.is_some()).then(|| {
        let device = device.map_or(String::new(), |device| format!(" {device}"));
        (format!("its device{device} differs from the one that start_args make"), DEVICES.to_owned())
    })
}

fn between<'a>(words: &'a str, before: &str, after: &str) -> Option<&'a str> {
    words.split_once(before)?.1.split_once(after).map(|(between, _)| between)
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;

    fn explained(words: &str) -> String {
        match refused(Path::new("/s"), Format::Lz4, words) {
            Refusal::Known(error) | Refusal::Unknown(error) => error.to_string(),
            Refusal::EndsEarly => "ends early".to_owned(),
        }
    }

    #[test]
    fn refusal_names_cause_and_cure_when_qemu_says_why() {
        for (words, cause, cure) in [
            (
                "Machine type received is 'pc-q35-7.1' and local is 'pc-q35-7.2'",
                "the machine type pc-q35-7.1",
                "-M pc-q35-7.1",
            ),
            (
                "Size mismatch: pc.ram: 0x4000000 != 0x8000000: Invalid argument",
                "64 MiB of RAM, and start_args give 128 MiB",
                "-m 64M",
            ),
            (
                "Size mismatch: 0000:00:01.0/vga.vram: 0x1000000 != 0x400000: Invalid argument",
                "0000:00:01.0/vga.vram has 16 MiB of memory",
                "Give start_args the devices",
            ),
            (
                "Unknown ramblock \"0000:00:02.0/rtl8139.rom\", cannot accept migration",
                "the device 0000:00:02.0/rtl8139.rom",
                "Give start_args the devices",
            ),
            ("Unknown savevm section or instance 'usb-ptr' 0", "the device usb-ptr", "the devices"),
            ("savevm: unsupported version 9 for 'pckbd' v3", "a newer QEMU", "Use the QEMU"),
            (
                "get_pci_config_device: Bad config data: i=0x10; error while loading state for instance 0x0 of device '0000:00:03.0/e1000'",
                "its device 0000:00:03.0/e1000 differs",
                "the devices",
            ),
        ] {
            let said = format!(
                "qemu-system-x86_64: {words}; qemu-system-x86_64: load of migration failed: Invalid argument"
            );
            let text = explained(&said);
            assert!(text.contains("QEMU refuses the lz4 snapshot /s"), "{text}");
            assert!(text.contains(cause) && text.contains(cure) && !text.contains("corrupt"), "{text}");
        }
    }

    #[test]
    fn refusal_is_an_accident_when_the_computer_is_at_fault() {
        let kind = |words: &str| match refused(Path::new("/s"), Format::Plain, words) {
            Refusal::Known(error) | Refusal::Unknown(error) => error.kind(),
            Refusal::EndsEarly => ErrorKind::Configuration,
        };
        for words in [
            "load of migration failed: Cannot allocate memory",
            "qemu-system-x86_64: terminating on signal 15 from pid 7 (kill)",
        ] {
            assert_eq!(kind(words), ErrorKind::Failed, "{words}");
        }
        for words in
            ["Illegal RAM offset 5a5a5a5a5a5a5000", "savevm: unsupported version 9 for 'pckbd' v3", ""]
        {
            assert_eq!(kind(words), ErrorKind::Configuration, "{words}");
        }
    }

    #[test]
    fn refusal_is_unknown_when_qemu_gives_no_cause() {
        let early =
            "error while loading state section id 2(ram); load of migration failed: Input/output error";
        assert_eq!(explained(early), "ends early");
        let unknown =
            explained("Illegal RAM offset 5a5a5a5a5a5a5000; load of migration failed: Invalid argument");
        assert!(unknown.contains("QEMU refuses") && unknown.contains("backup"), "{unknown}");
    }
}
