//! The size of a guest's memory, by the machine's arguments.
//!
//! A QEMU that runs the code of malware reports any size, so the limit of a dump comes from the arguments. Source: `-m` in
//! QEMU's qemu-options.hx, and its default in hw/core/machine.c.

use crate::machineinfo::StartArgs;
use crate::options::Options;

/// The memory of a guest whose arguments name no size, in bytes.
const DEFAULT: u64 = 128 << 20;
/// The memory that a dump may have beside that of the guest: the headers, the firmware, and the memory of graphics
/// cards, of which QXL has most (64 MiB for each of two banks by default).
const OVERHEAD: u64 = 256 << 20;
/// The limit of a dump whose guest has an unknown size, in bytes.
const UNKNOWN: u64 = 256 << 30;

/// Returns the size of a dump of that machine, in bytes, at most.
pub fn max_dump(args: &StartArgs) -> u64 {
    // A file of `-readconfig` may have the size.
    if args.options().any(|(name, _)| name == "readconfig") {
        return UNKNOWN;
    }
    let size = |value: &str| {
        let options = Options::parse(value, "size");
        let sizes = ["size", "maxmem"].into_iter().filter_map(|key| options.get(key));
        sizes.map(bytes).try_fold(0, |most: u64, bytes| Some(most.max(bytes?))).filter(|bytes| *bytes > 0)
    };
    let sizes: Option<Vec<u64>> =
        args.options().filter(|(name, _)| *name == "m").map(|(_, value)| size(value)).collect();
    match sizes {
        Some(sizes) => sizes.into_iter().max().unwrap_or(DEFAULT).saturating_add(OVERHEAD).min(UNKNOWN),
        None => UNKNOWN,
    }
}

/// Parses a size; a number without a unit is in MiB.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = match text.find(|c: char| c.is_ascii_alphabetic()) {
        Some(at) => text.split_at(at),
        None => (text, "M"),
    };
    let shift = match unit {
        "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return None,
    };
    let number: f64 = number.parse().ok().filter(|number: &f64| *number >= 0.0)?;
    Some((number * (1_u64 << shift) as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(args: &[&str]) -> u64 {
        max_dump(&StartArgs::from_args(args.iter().map(|arg| (*arg).to_owned())))
    }

    #[test]
    fn limit_is_the_memory_in_the_arguments_and_some_more() {
        for (args, mib) in [
            (&["-m", "2048"][..], 2048),
            (&["-m", "2G"], 2048),
            (&["-m", "size=1.5g"], 1536),
            (&["-m", "size=512M,slots=2,maxmem=4G"], 4096),
            (&["-smp", "2"], 128),
        ] {
            assert_eq!(limit(args), (mib << 20) + OVERHEAD, "{args:?}");
        }
    }

    #[test]
    fn limit_is_large_when_the_memory_is_unknown() {
        for args in [&["-m", "much"][..], &["-m", "9999T"], &["-readconfig", "x", "-m", "1"]] {
            assert_eq!(limit(args), UNKNOWN, "{args:?}");
        }
    }
}
