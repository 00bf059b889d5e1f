//! The host's services at the border: a vtable in the host, a [`Host`](crate::Host) in the plugin.

use std::sync::Arc;
use std::time::Duration;

use abi_stable::std_types::RStr;

use super::guard::guarded_quiet;
use super::json::{from_json, to_json};
use super::sanitize::{cut_record, kept};
use super::vtable::{ServicesAbi, ServicesAbi_TO, ServicesObject};
use crate::text::{MAX_KEPT, cut};
use crate::{Host, HostServices, LogLevel, LogRecord, RestoreReadiness, State};

/// Wraps the host's services for a plugin. The host calls it.
pub(crate) fn abi_services(services: Arc<dyn HostServices>) -> ServicesObject {
    ServicesAbi_TO::from_value(ServicesOfHost(services), abi_stable::sabi_trait::TD_Opaque)
}

/// Wraps the services that the plugin got from its host. The plugin calls it.
pub(crate) fn host_of(services: ServicesObject) -> Host {
    Host::new(Arc::new(HostOfPlugin(services)))
}

struct ServicesOfHost(Arc<dyn HostServices>);

impl ServicesAbi for ServicesOfHost {
    fn log(&self, record: RStr<'_>) {
        guarded_quiet((), || {
            let record = from_json(record.as_rslice().as_slice(), "log record");
            let record = record.unwrap_or_else(|error| LogRecord {
                level: LogLevel::Warn,
                target: "machinery".to_owned(),
                message: error.to_string(),
                fields: serde_json::Map::new(),
            });
            self.0.log(cut_record(record));
        });
    }

    fn state_changed(&self, machine: RStr<'_>, state: RStr<'_>, reason: RStr<'_>) {
        guarded_quiet((), || {
            // An unknown state comes from a newer plugin.
            let known = kept(state).parse().unwrap_or(State::Error);
            self.0.state_changed(&kept(machine), known, &kept(reason));
        });
    }

    fn progress(&self, machine: RStr<'_>, fraction: f64) {
        // A NaN carries no information.
        if !fraction.is_nan() {
            guarded_quiet((), || self.0.progress(&kept(machine), fraction.clamp(0.0, 1.0)));
        }
    }

    fn max_level(&self) -> u8 {
        guarded_quiet(1, || level_number(self.0.max_level()))
    }

    fn step(&self, machine: RStr<'_>, step: RStr<'_>, milliseconds: f64) {
        let took = Duration::try_from_secs_f64(milliseconds / 1000.0).unwrap_or_default();
        guarded_quiet((), || self.0.step(&kept(machine), &kept(step), took));
    }

    fn ready(&self, machine: RStr<'_>, ready: RStr<'_>) {
        guarded_quiet((), || {
            // An unknown mode comes from a newer plugin; the machine can still be restored.
            let ready: RestoreReadiness =
                from_json(ready.as_rslice().as_slice(), "readiness").unwrap_or_else(|error| {
                    RestoreReadiness { reason: error.to_string(), ..RestoreReadiness::default() }
                });
            let ready = RestoreReadiness { reason: cut(ready.reason, MAX_KEPT), ..ready };
            self.0.ready(&kept(machine), &ready);
        });
    }

    fn preparation_invalidated(&self, machine: RStr<'_>, reason: RStr<'_>) {
        guarded_quiet((), || self.0.preparation_invalidated(&kept(machine), &kept(reason)));
    }

    fn preparation_wanted(&self, machine: RStr<'_>, reason: RStr<'_>) {
        guarded_quiet((), || self.0.preparation_wanted(&kept(machine), &kept(reason)));
    }
}

struct HostOfPlugin(ServicesObject);

impl HostServices for HostOfPlugin {
    fn log(&self, record: LogRecord) {
        if let Ok(json) = to_json(&record) {
            self.0.log(json.as_rstr());
        }
    }

    fn state_changed(&self, machine: &str, state: State, reason: &str) {
        self.0.state_changed(machine.into(), state.as_str().into(), reason.into());
    }

    fn progress(&self, machine: &str, fraction: f64) {
        self.0.progress(machine.into(), fraction);
    }

    fn step(&self, machine: &str, step: &str, took: Duration) {
        self.0.step(machine.into(), step.into(), took.as_secs_f64() * 1000.0);
    }

    fn ready(&self, machine: &str, ready: &RestoreReadiness) {
        if let Ok(json) = to_json(ready) {
            self.0.ready(machine.into(), json.as_rstr());
        }
    }

    fn preparation_invalidated(&self, machine: &str, reason: &str) {
        self.0.preparation_invalidated(machine.into(), reason.into());
    }

    fn preparation_wanted(&self, machine: &str, reason: &str) {
        self.0.preparation_wanted(machine.into(), reason.into());
    }

    fn max_level(&self) -> LogLevel {
        match self.0.max_level() {
            0 | 1 => LogLevel::Error,
            2 => LogLevel::Warn,
            3 => LogLevel::Info,
            4 => LogLevel::Debug,
            _ => LogLevel::Trace,
        }
    }
}

fn level_number(level: LogLevel) -> u8 {
    match level {
        LogLevel::Error => 1,
        LogLevel::Warn => 2,
        LogLevel::Info => 3,
        LogLevel::Debug => 4,
        LogLevel::Trace => 5,
    }
}
