//! Looking at a text that has crossed the border, before it is believed and kept.
//!
//! Its type says that it is UTF-8, but that was for the other side to see to, and one that is not
//! must not become a `str` here. And a text costs whoever keeps it, so what a plugin tells is cut to
//! a length that can be kept for every machine.

use std::borrow::Cow;

use abi_stable::std_types::RStr;
use serde_json::{Map, Value};

use crate::text::{MAX_KEPT, cut};
use crate::{Error, LogRecord, Result};

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
        Ok(text) if text.len() <= MAX_KEPT => Cow::Borrowed(text),
        Ok(text) => Cow::Owned(cut(text.to_owned(), MAX_KEPT)),
        Err(_) => Cow::Owned(start_of(bytes)),
    }
}

/// The first of these bytes, to be looked at.
pub(crate) fn start_of(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(80)];
    format!("\"{}\"", start.escape_ascii())
}

/// The record with all of its parts cut.
pub(crate) fn cut_record(record: LogRecord) -> LogRecord {
    let fields = record.fields.into_iter().take(FIELDS);
    LogRecord {
        level: record.level,
        target: cut(record.target, MAX_KEPT),
        message: cut(record.message, MAX_KEPT),
        fields: fields.map(|(name, value)| (cut(name, MAX_KEPT), cut_value(value))).collect::<Map<_, _>>(),
    }
}

fn cut_value(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(cut(text, MAX_KEPT)),
        Value::Array(_) | Value::Object(_) => Value::String(cut(value.to_string(), MAX_KEPT)),
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
    fn kept_text_is_cut_when_it_is_too_long() {
        let long = "é".repeat(MAX_KEPT);
        assert_eq!(kept(long.as_str().into()), cut(long.clone(), MAX_KEPT));
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
        assert!(size < 70 * (MAX_KEPT + 100), "{size}");
    }
}
