//! Checks texts from the other side of the border before they are used.
//!
//! The type `RStr` promises UTF-8, but the other side may break the promise. Invalid UTF-8 must not become a `str`.
//! Long texts are cut, so that the host can keep them for every machine.

use std::borrow::Cow;

use abi_stable::std_types::RStr;
use serde_json::{Map, Value};

use crate::text::{MAX_KEPT, cut};
use crate::{Error, LogRecord, Result};

/// The maximum number of fields in a log record; `tracing` has the same limit.
const MAX_FIELDS: usize = 32;

/// Returns the text if it is valid UTF-8.
pub(crate) fn text<'a>(received: RStr<'a>, name: &str) -> Result<&'a str> {
    let bytes = received.as_rslice().as_slice();
    std::str::from_utf8(bytes).map_err(|error| {
        Error::misbehaved(format!("the {name} is not valid UTF-8 ({error}): {}", start_of(bytes)))
    })
}

/// Returns the text, cut and with invalid UTF-8 escaped: for events, which have no reply for an error.
pub(crate) fn kept(received: RStr<'_>) -> Cow<'_, str> {
    let bytes = received.as_rslice().as_slice();
    match std::str::from_utf8(bytes) {
        Ok(text) if text.len() <= MAX_KEPT => Cow::Borrowed(text),
        Ok(text) => Cow::Owned(cut(text.to_owned(), MAX_KEPT)),
        Err(_) => Cow::Owned(start_of(bytes)),
    }
}

/// Returns the first bytes, escaped, for an error message.
pub(crate) fn start_of(bytes: &[u8]) -> String {
    let start = &bytes[..bytes.len().min(80)];
    format!("\"{}\"", start.escape_ascii())
}

/// Cuts every part of the record.
pub(crate) fn cut_record(record: LogRecord) -> LogRecord {
    let fields = record.fields.into_iter().take(MAX_FIELDS);
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

    /// Returns invalid UTF-8, which a library in another language may send.
    fn invalid_text() -> RStr<'static> {
        // SAFETY: it is invalid on purpose; only its bytes are read.
        unsafe { RStr::from_raw_parts(b"caf\xe9".as_ptr(), 4) }
    }

    #[test]
    fn text_is_refused_with_its_bytes_when_it_is_not_utf_8() {
        let error = text(invalid_text(), "plugin's version").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginMisbehaved);
        assert!(error.to_string().contains("the plugin's version is not valid UTF-8"), "{error}");
        assert!(error.to_string().contains(r#""caf\xe9""#), "{error}");
        assert_eq!(kept(invalid_text()), r#""caf\xe9""#);
        assert_eq!(text("café".into(), "name").unwrap(), "café");
    }

    #[test]
    fn kept_text_is_cut_when_it_is_too_long() {
        let long = "é".repeat(MAX_KEPT);
        assert_eq!(kept(long.as_str().into()), cut(long.clone(), MAX_KEPT));
    }

    #[test]
    fn record_is_cut_in_each_part_when_it_is_too_long() {
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
