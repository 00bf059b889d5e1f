//! Where log lines go: standard error, for people or as JSON.

use clap::ValueEnum;
use machinery::{LogLevel, LogRecord};
use serde_json::Value;
use tracing::level_filters::LevelFilter;

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
    let lines = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr);
    // Fails only where a subscriber is set already, as in a test; then that one stays.
    let _ = match format {
        Format::Human => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            tracing::subscriber::set_global_default(lines.with_ansi(colours).with_target(false).finish())
        }
        Format::Json => tracing::subscriber::set_global_default(lines.json().flatten_event(true).finish()),
    };
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
