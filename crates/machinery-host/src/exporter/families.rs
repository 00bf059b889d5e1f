//! Writes families of metrics, each with its description and all its samples.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry;

use crate::actions::metrics::{Key, Tally};

/// The labels of a sample.
pub type Labels = Vec<(&'static str, String)>;

/// The beginning of each name.
const PREFIX: &str = "cuckoo_machinery_";

/// The unit of a gauge, which is a part of its name.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// A number.
    None,
    Seconds,
    Bytes,
}

impl Unit {
    fn registered(self) -> Option<registry::Unit> {
        match self {
            Unit::None => None,
            Unit::Seconds => Some(registry::Unit::Seconds),
            Unit::Bytes => Some(registry::Unit::Bytes),
        }
    }
}

/// Writes families. The name of each gets the prefix, its unit, and the suffix of its type.
pub struct Families<'a>(pub DescriptorEncoder<'a>);

impl Families<'_> {
    /// Writes gauges.
    pub fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Unit,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> fmt::Result {
        let (name, unit) = (format!("{PREFIX}{name}"), unit.registered());
        let mut family = self.0.encode_descriptor(&name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in samples {
            match labels.is_empty() {
                true => family.encode_gauge(&value)?,
                false => family.encode_family(&labels)?.encode_gauge(&value)?,
            }
        }
        Ok(())
    }

    /// Writes counters, since the start of the host.
    pub fn counter(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let name = format!("{PREFIX}{name}");
        let mut family = self.0.encode_descriptor(&name, help, None, MetricType::Counter)?;
        for (labels, value) in samples {
            match labels.is_empty() {
                true => family.encode_counter::<NoLabelSet, u64, f64>(&value, None)?,
                false => {
                    family.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(&value, None)?
                }
            }
        }
        Ok(())
    }

    /// Writes texts, as labels.
    pub fn info(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Labels>) -> fmt::Result {
        let name = format!("{PREFIX}{name}");
        let mut family = self.0.encode_descriptor(&name, help, None, MetricType::Info)?;
        samples.into_iter().try_for_each(|labels| family.encode_info(&labels))
    }

    fn durations<'t>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels, &'t Tally)>,
    ) -> fmt::Result {
        let (name, unit) = (format!("{PREFIX}{name}"), registry::Unit::Seconds);
        let mut family = self.0.encode_descriptor(&name, help, Some(&unit), MetricType::Histogram)?;
        for (labels, Tally { durations, .. }) in samples {
            let (sum, count, buckets) =
                (durations.total.as_secs_f64(), durations.count(), durations.buckets());
            family.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

/// Writes the durations of actions and their steps.
pub fn actions(families: &mut Families<'_>, entries: &BTreeMap<Key, Tally>) -> fmt::Result {
    let actions = || entries.iter().filter(|(key, _)| key.step.is_none());
    let help =
        "Durations of actions, with the wait of a restore for its permit. The mode is that of a restore.";
    families.durations("action_duration", help, actions().map(|(key, tally)| (labels(key), tally)))?;
    let failures = actions().map(|(key, tally)| (labels(key), tally.failed));
    families.counter("action_failures", "Actions that have failed.", failures)?;
    let steps = entries.iter().filter(|(key, _)| key.step.is_some());
    let steps = steps.map(|(key, tally)| (labels(key), tally));
    families.durations("step_duration", "Durations of the steps that a plugin reports of an action.", steps)
}

fn labels(key: &Key) -> Labels {
    let Key { machinery, action, mode, step } = key;
    let mut labels = vec![("machinery", machinery.clone()), ("action", (*action).to_owned())];
    labels.extend(mode.map(|mode| ("mode", mode.to_string())));
    labels.extend(step.clone().map(|step| ("step", step)));
    labels
}
