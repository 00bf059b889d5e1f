//! The lines that QEMU's programs print to stderr.

use machinery_backend::process::LineKind;

/// Returns the kind of a line. A program's own messages begin with its name. Source: `error_vreport` in QEMU's
/// util/qemu-error.c. All other lines come from libraries.
pub fn kind_of(line: &str) -> LineKind {
    // With `-msg timestamp=on` the time precedes the name.
    if !line.split(' ').take(2).any(|word| word.starts_with("qemu-") && word.ends_with(':')) {
        LineKind::Other
    } else if line.contains(": warning: ") || line.contains(": info: ") {
        LineKind::Warning
    } else {
        LineKind::Failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_is_only_what_qemu_itself_reports() {
        for (line, kind) in [
            ("qemu-system-x86_64: Size mismatch: pc.ram: 0x4000000 != 0x8000000", LineKind::Failure),
            ("2026-11-29T00:58:31.194578Z qemu-system-x86_64: no", LineKind::Failure),
            ("qemu-img: no", LineKind::Failure),
            ("qemu-system-x86_64: warning: nic rtl8139.0 has no peer", LineKind::Warning),
            ("qemu: module audio-audio-pa not found, do you want to install it?", LineKind::Other),
            ("ALSA lib pcm.c:2666:(snd_pcm_open_noupdate) Unknown PCM default", LineKind::Other),
            ("audio: Failed to create voice `adc'", LineKind::Other),
        ] {
            assert_eq!(kind_of(line), kind, "{line}");
        }
    }
}
