//! Versions in the output of programs.

/// Returns the major and minor number of a version within a text.
pub fn numbers(text: &str) -> Option<(u32, u32)> {
    let version =
        text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(numbers("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)"), Some((1, 97)));
        assert!(numbers("rustc 1.101.0 (x)") > numbers("1.91"));
        assert_eq!(numbers("rustc"), None);
    }
}
