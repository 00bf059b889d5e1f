//! The page of metrics: collects all values at the moment of a request, and renders them.
//!
//! Names and units follow OpenMetrics. `docs/monitoring.md` lists them.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, prometheus_text, text};
use prometheus_client::registry::Registry;
use tokio::sync::broadcast;

use super::families::{Families, Labels, Unit};
use super::machines;
use super::probe::Probe;
use crate::events::Event;
use crate::fleet::Machinery;
use crate::manager::Manager;

/// The format of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The text format of Prometheus, which node_exporter reads too.
    Prometheus,
}

impl Format {
    /// Returns the format's media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The page of a host.
pub struct Page {
    manager: Arc<Manager>,
    probe: Arc<Probe>,
    /// Locked while a page is rendered: readers wait for each other, and not for the host.
    registry: Mutex<Registry>,
}

impl Page {
    /// Returns the page of that host.
    pub fn new(manager: Arc<Manager>) -> Self {
        let probe = Arc::<Probe>::default();
        let mut registry = Registry::default();
        let collected = Collected { manager: Arc::clone(&manager), probe: Arc::clone(&probe) };
        registry.register_collector(Box::new(collected));
        Page { manager, probe, registry: Mutex::new(registry) }
    }

    /// Renders the present values. The hypervisors are asked whether they answer, for the next page.
    pub fn text(&self, format: Format) -> String {
        self.probe.ask_all(&self.manager);
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut page = String::new();
        let rendered = match format {
            Format::OpenMetrics => text::encode(&mut page, &registry),
            Format::Prometheus => prometheus_text::encode(&mut page, &registry),
        };
        if let Err(error) = rendered {
            tracing::error!(%error, "the metrics cannot be rendered");
        }
        page
    }

    /// Returns the changes of the page from now on.
    pub fn changes(&self) -> Changes {
        Changes { manager: Arc::clone(&self.manager), events: self.manager.subscribe() }
    }
}

/// The changes of a page.
pub struct Changes {
    manager: Arc<Manager>,
    events: broadcast::Receiver<Event>,
}

impl Changes {
    /// Waits for the next change.
    pub async fn next(&mut self) {
        tokio::select! {
            // A subscriber that has lost events has missed changes.
            _ = self.events.recv() => {}
            () = self.manager.metrics().changed() => {}
        }
    }

    /// Forgets all changes until now.
    pub fn forget(&mut self) {
        self.events = self.events.resubscribe();
    }
}

/// Collects the values of a host.
struct Collected {
    manager: Arc<Manager>,
    probe: Arc<Probe>,
}

impl fmt::Debug for Collected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Collected")
    }
}

impl Collector for Collected {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut families = Families(encoder);
        self.host(&mut families)?;
        self.machineries(&mut families)?;
        machines::gauges(&mut families, &self.manager)?;
        super::families::actions(&mut families, &self.manager.metrics().entries())
    }
}

impl Collected {
    fn host(&self, families: &mut Families) -> fmt::Result {
        let manager = &self.manager;
        let build = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("interface", machinery::host::interface_version().to_string()),
        ];
        families.info(
            "build",
            "The version of the host, and of the interface of its plugins.",
            [build.into()],
        )?;
        let started = manager.origin().started as f64 / 1000.0;
        families.gauge(
            "start_time",
            "The start of the host, in seconds since 1970.",
            Unit::Seconds,
            [(vec![], started)],
        )?;
        let enabled = f64::from(u8::from(manager.is_enabled()));
        families.gauge(
            "enabled",
            "1 if the manager accepts all requests.",
            Unit::None,
            [(vec![], enabled)],
        )?;
        let waiting = manager.queues().context().waiting_restores() as f64;
        families.gauge(
            "waiting_restores",
            "Restores that wait for a permit.",
            Unit::None,
            [(vec![], waiting)],
        )?;
        let (tries, healed) = manager.metrics().tries_and_healed();
        families.counter("heal_tries", "Tries of machines in quarantine.", [(vec![], tries)])?;
        families.counter("heals", "Machines that a try has put back into the pool.", [(vec![], healed)])?;
        let disk = rustix::fs::statvfs(&manager.queues().context().folders.staging).ok();
        let bytes = |blocks: fn(&rustix::fs::StatVfs) -> u64| {
            disk.as_ref().map(|disk| (vec![], blocks(disk) as f64 * disk.f_frsize as f64))
        };
        let (free, size) = (bytes(|disk| disk.f_bavail), bytes(|disk| disk.f_blocks));
        families.gauge(
            "disk_free",
            "Free space where the host has its state and, by default, its templates.",
            Unit::Bytes,
            free,
        )?;
        families.gauge("disk_size", "Size of that file system.", Unit::Bytes, size)
    }

    fn machineries(&self, families: &mut Families) -> fmt::Result {
        let roster = self.manager.roster();
        let of_all = |value: &dyn Fn(&Machinery) -> u64| -> Vec<(Labels, u64)> {
            let one =
                |machinery: &Arc<Machinery>| (vec![("machinery", machinery.name.clone())], value(machinery));
            roster.machineries().iter().map(one).collect()
        };
        let infos = roster.machineries().iter().map(|machinery| {
            vec![("machinery", machinery.name.clone()), ("version", machinery.version.clone())]
        });
        families.info("hypervisor", "The version of the hypervisor.", infos)?;
        let up = of_all(&|machinery| u64::from(self.probe.is_up(machinery)));
        let up = up.into_iter().map(|(labels, up)| (labels, up as f64));
        families.gauge(
            "hypervisor_up",
            "1 if the hypervisor has answered the latest question.",
            Unit::None,
            up,
        )?;
        let captures = of_all(&|machinery| machinery.losses.captures.load(Ordering::Relaxed));
        families.counter("capture_losses", "Captures that have failed or have lost packets.", captures)?;
        let errors = of_all(&|machinery| machinery.losses.run_errors.load(Ordering::Relaxed));
        families.counter(
            "run_errors",
            "Errors of tasks' runs that were lost or not observed as they should be.",
            errors,
        )
    }
}
