//! Where log lines go: standard error, for people or as JSON.
//!
//! A line is a line: what comes from plugins, guests and clients stands in it with its control
//! characters escaped, so that it can neither pass for another line nor command a terminal.

use std::borrow::Cow;

use clap::ValueEnum;
use machinery::{LogLevel, LogRecord};
use serde_json::Value;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::format::debug_fn;

/// What a log line looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A line for people.
    Human,
    /// A JSON object a line.
    Json,
}

/// Starts logging. `verbosity`: 0 shows information, each step above or below one level more or less.
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
    // Fails only where a subscriber is set already, as in a test; then that one stays.
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

/// The text with its control characters escaped.
pub fn on_one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return text.into();
    }
    let escape = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    text.chars().map(escape).collect::<String>().into()
}

/// The level up to which plugins need to make records.
pub fn max_level() -> LogLevel {
    match LevelFilter::current().into_level() {
        None | Some(tracing::Level::ERROR) => LogLevel::Error,
        Some(tracing::Level::WARN) => LogLevel::Warn,
        Some(tracing::Level::INFO) => LogLevel::Info,
        Some(tracing::Level::DEBUG) => LogLevel::Debug,
        Some(tracing::Level::TRACE) => LogLevel::Trace,
    }
}

/// A line of a plugin's log. Names of fields are fixed when this program is compiled, so of a
/// plugin's fields `machine` keeps its own name and the others stand together.
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
    fn a_text_cannot_leave_its_line() {
        assert_eq!(on_one_line("plain, naïve"), "plain, naïve");
        assert_eq!(on_one_line("a\nb\r\t\u{1b}[2J\u{7f}\u{9b}\0"), "a\\nb\\r\\t\\u{1b}[2J\\u{7f}\\u{9b}\\0");
    }
}
