//! Looking at a text that has crossed the border, before it is believed and kept.
//!
//! Its type says that it is UTF-8, but that was for the other side to see to, and one that is not
//! must not become a `str` here. And a text costs whoever keeps it, so what a plugin tells is cut to
//! a length that can be kept for every machine.

use std::borrow::Cow;

use abi_stable::std_types::RStr;
use serde_json::{Map, Value};

use crate::{Error, LogRecord, Result};

/// The longest text of a plugin that is kept, in bytes. Longer ones are cut, and say so.
pub(crate) const LONGEST: usize = 8 * 1024;

/// The same for what is told once and not kept: all that is wrong with a configuration.
pub(crate) const LONGEST_TOLD_ONCE: usize = 16 * LONGEST;

/// The most fields of a log record; `tracing` allows no more.
const FIELDS: usize = 32;

/// The text, if it is one.
pub(crate) fn text<'a>(arrived: RStr<'a>, what: &str) -> Result<&'a str> {
    let bytes = arrived.as_rslice().as_slice();
    std::str::from_utf8(bytes)
        .map_err(|error| Error::misbehaved(format!("the {what} is no text ({error}): {}", start_of(bytes))))
}

/// The text as it can be kept, whatever it is: for what nobody waits for an answer to.
pub(crate) fn kept(arrived: RStr<'_>) -> Cow<'_, str> {
    let bytes = arrived.as_rslice().as_slice();
    match std::str::from_utf8(bytes) {
        Ok(text) if text.len() <= LONGEST => Cow::Borrowed(text),
        Ok(text) => Cow::Owned(cut(text.to_owned(), LONGEST)),
        Err(_) => Cow::Owned(start_of(bytes)),
    }
}

/// The first of these bytes, to be looked at.
pub(crate) fn start_of(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(80)];
    format!("\"{}\"", start.escape_ascii())
}

/// The text with at most `longest` bytes and a note that it was cut, if it was.
pub(crate) fn cut(mut text: String, longest: usize) -> String {
    if text.len() > longest {
        let length = text.len();
        text.truncate(text.floor_char_boundary(longest));
        text.shrink_to_fit();
        text += &format!("… (cut, it had {length} bytes)");
    }
    text
}

/// The record with all of its parts cut.
pub(crate) fn cut_record(record: LogRecord) -> LogRecord {
    let fields = record.fields.into_iter().take(FIELDS);
    LogRecord {
        level: record.level,
        target: cut(record.target, LONGEST),
        message: cut(record.message, LONGEST),
        fields: fields.map(|(name, value)| (cut(name, LONGEST), cut_value(value))).collect::<Map<_, _>>(),
    }
}

fn cut_value(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(cut(text, LONGEST)),
        Value::Array(_) | Value::Object(_) => Value::String(cut(value.to_string(), LONGEST)),
        simple => simple,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ErrorKind, LogLevel};

    /// A text that is none, as a library in another language may send it.
    fn no_text() -> RStr<'static> {
        // SAFETY: wrong on purpose, and only its bytes are looked at.
        unsafe { RStr::from_raw_parts(b"caf\xe9".as_ptr(), 4) }
    }

    #[test]
    fn what_is_no_text_is_told_by_its_bytes() {
        let error = text(no_text(), "plugin's version").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginMisbehaved);
        assert!(error.to_string().contains("the plugin's version is no text"), "{error}");
        assert!(error.to_string().contains(r#""caf\xe9""#), "{error}");
        assert_eq!(kept(no_text()), r#""caf\xe9""#);
        assert_eq!(text("café".into(), "name").unwrap(), "café");
    }

    #[test]
    fn a_long_text_is_cut_between_letters_and_says_so() {
        let long = "é".repeat(LONGEST);
        let kept = kept(long.as_str().into());
        assert!(kept.starts_with("éé") && kept.ends_with("é… (cut, it had 16384 bytes)"), "{kept}");
        assert!(kept.len() < LONGEST + 100);
        assert_eq!(cut("short".to_owned(), 5), "short");
    }

    #[test]
    fn a_record_is_cut_in_all_of_its_parts() {
        let long = "x".repeat(1 << 20);
        let mut fields = Map::new();
        for index in 0..50 {
            fields.insert(format!("{index}{long}"), Value::from(vec![long.clone()]));
        }
        let record = LogRecord { level: LogLevel::Info, target: long.clone(), message: long.clone(), fields };
        let size = serde_json::to_string(&cut_record(record)).unwrap().len();
        assert!(size < 70 * (LONGEST + 100), "{size}");
    }
}
