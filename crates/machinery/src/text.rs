//! Limits on the texts that cross the interface.

/// The maximum length of a text that the host keeps, in bytes. Longer texts are cut and marked.
pub(crate) const MAX_KEPT: usize = 8 * 1024;

/// The maximum length of a text that the host reports once and does not keep, in bytes, such as the list of all
/// faults in a configuration.
pub(crate) const MAX_REPORTED: usize = 16 * MAX_KEPT;

/// Cuts the text to at most `max` bytes, and adds a note to a text that was cut.
pub(crate) fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let length = text.len();
        text.truncate(text.floor_char_boundary(max));
        text.shrink_to_fit();
        text += &format!("… (cut, it had {length} bytes)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_between_letters_when_it_is_too_long() {
        let kept = cut("é".repeat(MAX_KEPT), MAX_KEPT);
        assert!(kept.starts_with("éé") && kept.ends_with("é… (cut, it had 16384 bytes)"), "{kept}");
        assert!(kept.len() < MAX_KEPT + 100);
        assert_eq!(cut("short".to_owned(), 5), "short");
    }
}
