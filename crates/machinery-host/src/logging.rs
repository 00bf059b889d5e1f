//! The log of the host, on standard error, as text or as JSON.
//!
//! Control characters in text from plugins, guests and clients are escaped. So such text can neither forge
//! another line nor control a terminal.

use std::borrow::Cow;

use clap::ValueEnum;
use machinery::{LogLevel, LogRecord};
use serde_json::Value;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::debug_fn;

/// The format of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Text for people.
    Human,
    /// One JSON object in each line.
    Json,
}

/// Starts logging. `verbosity` 0 shows the level INFO; each step up or down shows one level more or less.
pub fn start(format: Format, verbosity: i16) {
    let level = match verbosity {
        ..=-2 => LevelFilter::ERROR,
        -1 => LevelFilter::WARN,
        0 => LevelFilter::INFO,
        1 => LevelFilter::DEBUG,
        2.. => LevelFilter::TRACE,
    };
    let lines = tracing_subscriber::fmt()
        .log_internal_errors(false)
        .with_max_level(level)
        .with_writer(std::io::stderr);
    // Fails only if a subscriber is set already, as in a test.
    let _ = match format {
        Format::Human => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            let fields = debug_fn(|line, field, value| match field.name() {
                "message" => line.write_str(&on_one_line(&format!("{value:?}"))),
                name => write!(line, "{name}={}", on_one_line(&format!("{value:?}"))),
            });
            let lines = lines.fmt_fields(fields.delimited(" "));
            tracing::subscriber::set_global_default(lines.with_ansi(colours).with_target(false).finish())
        }
        Format::Json => tracing::subscriber::set_global_default(lines.json().flatten_event(true).finish()),
    };
}

/// Escapes the control characters of a text.
pub fn on_one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let escape = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    text.chars().map(escape).collect::<String>().into()
}

/// Returns the most detailed level that is logged. Plugins need not make more detailed records.
pub fn max_level() -> LogLevel {
    match LevelFilter::current().into_level() {
        None | Some(tracing::Level::ERROR) => LogLevel::Error,
        Some(tracing::Level::WARN) => LogLevel::Warn,
        Some(tracing::Level::INFO) => LogLevel::Info,
        Some(tracing::Level::DEBUG) => LogLevel::Debug,
        Some(tracing::Level::TRACE) => LogLevel::Trace,
    }
}

/// Logs a record of a plugin. Field names are fixed when this program is compiled. So `machine` keeps its
/// name, and `fields` holds all other fields of the plugin.
pub fn from_plugin(machinery: &str, record: &LogRecord) {
    let machine = record.fields.get("machine").and_then(Value::as_str);
    let others: Vec<String> = record
        .fields
        .iter()
        .filter(|(name, _)| *name != "machine")
        .map(|(name, value)| match value {
            Value::String(text) => format!("{name}={text:?}"),
            other => format!("{name}={other}"),
        })
        .collect();
    let fields = (!others.is_empty()).then(|| others.join(" "));
    let (message, target) = (&record.message, &record.target);
    macro_rules! line {
        ($level:ident) => {
            tracing::event!(
                tracing::Level::$level,
                machinery,
                machine,
                fields = fields.as_deref(),
                module = target,
                "{message}"
            )
        };
    }
    match record.level {
        LogLevel::Error => line!(ERROR),
        LogLevel::Warn => line!(WARN),
        LogLevel::Info => line!(INFO),
        LogLevel::Debug => line!(DEBUG),
        LogLevel::Trace => line!(TRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_one_line_escapes_control_characters() {
        assert_eq!(on_one_line("plain, naïve"), "plain, naïve");
        assert_eq!(on_one_line("a\nb\r\t\u{1b}[2J\u{7f}\u{9b}\0"), "a\\nb\\r\\t\\u{1b}[2J\\u{7f}\\u{9b}\\0");
    }
}
