//! Sends a plugin's log and panics to its host. Each plugin contains its own copy of `std` and of `tracing`, and
//! therefore has its own panic hook and dispatcher.
//!
//! Only events with their own fields reach the host; spans do not.

use std::fmt;
use std::sync::{Arc, Once, PoisonError, RwLock};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::{HostServices, LogLevel, LogRecord};

/// The receiver of this library's log: the services of the latest host that loaded it.
static SINK: RwLock<Option<Arc<dyn HostServices>>> = RwLock::new(None);
static INSTALL: Once = Once::new();

/// Sends this library's events and panics to `services` from now on.
pub(super) fn send_to(services: &Arc<dyn HostServices>) {
    *SINK.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(services));
    let level = services.max_level();
    INSTALL.call_once(|| {
        // If a dispatcher is already set, the plugin's author has set it on purpose.
        let _ = tracing::subscriber::set_global_default(ToHost { level });
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            let text = panic.payload_as_str().unwrap_or("(no message)");
            let thread = std::thread::current().name().unwrap_or("?").to_owned();
            let mut fields = Map::new();
            fields.insert("at".to_owned(), place.into());
            fields.insert("thread".to_owned(), thread.into());
            send(LogRecord {
                level: LogLevel::Error,
                target: "panic".to_owned(),
                message: format!("the plugin panicked: {text}"),
                fields,
            });
        }));
    });
}

fn send(record: LogRecord) {
    let sink = SINK.read().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(services) = sink {
        services.log(record);
    }
}

struct ToHost {
    level: LogLevel,
}

impl Subscriber for ToHost {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        level_of(*metadata.level()) <= self.level
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        send(LogRecord {
            level: level_of(*event.metadata().level()),
            target: event.metadata().target().to_owned(),
            message: fields.message,
            fields: fields.others,
        });
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn level_of(level: Level) -> LogLevel {
    match level {
        Level::ERROR => LogLevel::Error,
        Level::WARN => LogLevel::Warn,
        Level::INFO => LogLevel::Info,
        Level::DEBUG => LogLevel::Debug,
        Level::TRACE => LogLevel::Trace,
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.others.insert(field.name().to_owned(), value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" { self.message = text } else { self.put(field, text.into()) }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.put(field, value.into());
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}
