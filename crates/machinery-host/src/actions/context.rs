//! The context of all executors: settings, permits, and the record of failures.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, ErrorKind, FreeSpaceReserve, Result};
use tokio::sync::{Notify, OwnedSemaphorePermit, watch};

use super::CLOSING;
use super::message::InFlightGuard;
use super::metrics::Metrics;
use super::permits::Permits;
use super::prepare_permits::PreparePermit;
use crate::capture;
use crate::capture::space::Captures;
use crate::client_file::Folders;
use crate::config::{Config, Export, Heal, Timeouts, Wall};
use crate::fleet::run_marks::RunMarks;
use crate::fleet::state_file::StateStore;
use crate::fleet::{Machine, Roster};

/// The settings, permits and records that all executors share.
pub struct ActionContext {
    settings: watch::Sender<ActionSettings>,
    permits: Permits,
    waiting_restores: watch::Sender<usize>,
    /// The captures under way.
    pub captures: Arc<Captures>,
    /// Counts and durations of actions.
    pub metrics: Arc<Metrics>,
    state: Arc<StateStore>,
    /// The runs of tasks.
    pub run_marks: RunMarks,
    /// The folders that the files of clients may be in.
    pub folders: Folders,
    /// Notified when a machine with a pending change is free.
    pub pending_change: Notify,
}

/// The configuration of all actions.
#[derive(Debug, Clone)]
pub struct ActionSettings {
    /// The timeouts of the actions.
    pub timeouts: Timeouts,
    /// How to capture traffic, if it is to be captured.
    pub capture: Option<capture::Settings>,
    /// The space that stays free. The machineries have it from the same file.
    reserve: FreeSpaceReserve,
    /// The consequence of a failure that may pass by itself.
    pub heal: Heal,
    /// The longest time that a run may last.
    pub max_run: Option<Duration>,
    /// The places at which the metrics are exported.
    pub export: Export,
    /// The web page of the machines.
    pub wall: Wall,
}

impl ActionSettings {
    /// Returns the settings in this configuration.
    pub fn of(config: &Config) -> Self {
        ActionSettings {
            timeouts: config.timeouts,
            capture: config.capture.clone(),
            reserve: config.free_space_reserve,
            heal: config.heal,
            max_run: config.max_run,
            export: config.export.clone(),
            wall: config.wall.clone(),
        }
    }

    /// Returns the configuration keys whose values differ in `new`.
    fn differing(&self, new: &ActionSettings) -> Vec<String> {
        let (old_capture, new_capture) = (self.capture.as_ref(), new.capture.as_ref());
        let both = old_capture.zip(new_capture);
        let keys = [
            ("timeouts", self.timeouts != new.timeouts),
            ("tcpdump.enabled", old_capture.is_some() != new_capture.is_some()),
            ("tcpdump.path", both.is_some_and(|(old, new)| old.tcpdump != new.tcpdump)),
            ("capture_size_limit", both.is_some_and(|(old, new)| old.limit != new.limit)),
            ("capture_jail", both.is_some_and(|(old, new)| old.jail != new.jail)),
            ("heal", self.heal != new.heal),
            ("max_run", self.max_run != new.max_run),
            ("metrics_listen", self.export.listen != new.export.listen),
            ("metrics_textfile", self.export.textfile != new.export.textfile),
            ("web_listen", self.wall.listen != new.wall.listen),
            ("web_token_file", self.wall.token_file != new.wall.token_file),
            ("web_actions", self.wall.actions != new.wall.actions),
            ("web_novnc", self.wall.novnc != new.wall.novnc),
            ("web_socket_group", self.wall.socket_group != new.wall.socket_group),
            ("web_origins", self.wall.origins != new.wall.origins),
            (FreeSpaceReserve::KEY, self.reserve != new.reserve),
            ("resultserver", both.is_some_and(|(old, new)| old.result_server != new.result_server)),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
    }
}

/// The settings as reloads change them.
#[derive(Clone)]
pub struct Reloads(watch::Receiver<ActionSettings>);

impl Reloads {
    /// Returns a copy of the settings. A later wait is for later ones.
    pub fn settings(&mut self) -> ActionSettings {
        self.0.borrow_and_update().clone()
    }

    /// Waits for a reload after which the condition holds.
    pub async fn next(&mut self, is_it: impl Fn(&ActionSettings) -> bool) {
        loop {
            if self.0.changed().await.is_err() {
                return pending().await;
            }
            if is_it(&self.settings()) {
                return;
            }
        }
    }
}

impl ActionContext {
    /// Returns a context for a host with this configuration.
    pub fn new(config: &Config, folders: Folders, metrics: Arc<Metrics>, state: Arc<StateStore>) -> Self {
        ActionContext {
            settings: watch::Sender::new(ActionSettings::of(config)),
            permits: Permits::new(config.max_parallel_restores.get()),
            waiting_restores: watch::Sender::new(0),
            captures: Arc::default(),
            metrics,
            run_marks: RunMarks::new(state.run_marks()),
            state,
            folders,
            pending_change: Notify::new(),
        }
    }

    /// Applies these settings to all later actions, and to the present runs and quarantines of these machines.
    pub async fn apply(&self, settings: ActionSettings, roster: &Roster) {
        self.settings.send_replace(settings);
        self.disable_quarantined(roster).await;
        // Each worker waits anew, for the present end of its machine's run.
        roster.machines().iter().for_each(|machine| machine.notify_idle_work());
    }

    /// Disables all machines in quarantine if `heal` is off.
    pub async fn disable_quarantined(&self, roster: &Roster) {
        if self.settings().heal == Heal::Auto {
            return;
        }
        let disabled = roster.machines().iter().filter(|machine| machine.disable_quarantined());
        if disabled.count() > 0
            && let Err(error) = self.state.save().await
        {
            tracing::error!(%error, "the disabled machines on disk are old");
        }
    }

    /// Returns the configuration keys whose values differ in `settings`.
    pub fn differing(&self, settings: &ActionSettings) -> Vec<String> {
        self.settings().differing(settings)
    }

    /// Returns a copy of the settings.
    pub fn settings(&self) -> ActionSettings {
        self.settings.borrow().clone()
    }

    /// Returns the settings as reloads change them.
    pub fn reloads(&self) -> Reloads {
        Reloads(self.settings.subscribe())
    }

    /// Returns the timeouts of the actions.
    pub fn timeouts(&self) -> Timeouts {
        self.settings().timeouts
    }

    /// Waits for a permit to restore the machine.
    ///
    /// # Errors
    /// The host ends.
    pub async fn restore_permit(&self, machine: &Machine) -> Result<OwnedSemaphorePermit> {
        let _waiting = InFlightGuard::new([&self.waiting_restores]);
        self.permits.restore(machine).await.ok_or_else(|| Error::failed(CLOSING))
    }

    /// Returns the number of restores that wait for a permit.
    pub fn waiting_restores(&self) -> usize {
        *self.waiting_restores.borrow()
    }

    /// Waits for a permit to prepare the machine. Returns `None` when the host ends.
    pub async fn prepare_permit(&self, machine: &Arc<Machine>) -> Option<PreparePermit> {
        self.permits.prepare(machine).await
    }

    /// Refuses all permits from now on.
    pub fn close(&self) {
        self.permits.close();
    }

    /// Takes the machine out of the pool after a failure of this kind, and saves that.
    pub async fn take_out(&self, machine: &Machine, kind: ErrorKind, reason: &str) {
        // A client whose start fails has the reason.
        if machine.status().started_well {
            machine.run_incomplete(reason);
        }
        machine.take_out(kind, reason, self.settings().heal);
        self.save(machine).await;
    }

    /// Records that the machine's run is over, and saves its errors.
    pub async fn run_ended(&self, machine: &Machine) {
        self.run_marks.end(machine);
        if !machine.status().availability.run_errors.is_empty() {
            self.save(machine).await;
        }
    }

    /// Saves the machine's place in the pool, and the errors of its run.
    pub async fn save(&self, machine: &Machine) {
        if let Err(error) = self.state.save().await {
            let machine = machine.name();
            tracing::error!(
                machine,
                %error,
                "its place in the pool and the errors of its run are kept only until the host ends"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::{Lab, configuration};
    use super::*;
    use crate::capture::Jail;
    use tokio::time::timeout;

    fn settings(host_yaml: &str) -> ActionSettings {
        ActionSettings::of(&configuration(&tempfile::tempdir().unwrap(), host_yaml))
    }

    #[test]
    fn differing_names_only_the_keys_whose_values_differ() {
        let lab = Lab::new("");
        let differing = |host_yaml: &str| lab.context.differing(&settings(host_yaml));
        assert!(differing("").is_empty());
        assert_eq!(differing("timeouts: {stop: 1}"), ["timeouts"]);
        assert_eq!(differing("heal: off"), ["heal"]);
        assert_eq!(differing("max_run: 5"), ["max_run"]);
        assert_eq!(differing("metrics_listen: 127.0.0.1:9464"), ["metrics_listen"]);
        assert_eq!(differing("metrics_textfile: /tmp/a.prom"), ["metrics_textfile"]);
        assert_eq!(differing("web_listen: 127.0.0.1:8899"), ["web_listen"]);
        assert_eq!(differing("web_actions: true"), ["web_actions"]);
        assert_eq!(differing("web_socket_group: x"), ["web_socket_group"]);
        assert_eq!(differing("web_origins: [https://wall.lab]"), ["web_origins"]);
        assert_eq!(differing("free_space_reserve: 1 GiB"), [FreeSpaceReserve::KEY]);
    }

    #[test]
    fn differing_compares_captures_only_when_both_are_enabled() {
        let capture = |path: &str, port: u16| capture::Settings {
            tcpdump: path.into(),
            result_server: Some(("10.0.0.1".into(), port)),
            limit: None,
            reserve: FreeSpaceReserve::default(),
            jail: Jail::Auto,
        };
        let with = |capture| ActionSettings { capture, ..settings("") };
        let (none, one) = (with(None), with(Some(capture("/a", 1))));
        assert_eq!(none.differing(&one), ["tcpdump.enabled"]);
        assert!(one.differing(&one).is_empty());
        assert_eq!(one.differing(&with(Some(capture("/b", 1)))), ["tcpdump.path"]);
        assert_eq!(one.differing(&with(Some(capture("/a", 2)))), ["resultserver"]);
        let limited = capture::Settings { limit: Some(1), ..capture("/a", 1) };
        assert_eq!(one.differing(&with(Some(limited))), ["capture_size_limit"]);
        let jailed = capture::Settings { jail: Jail::Off, ..capture("/a", 1) };
        assert_eq!(one.differing(&with(Some(jailed))), ["capture_jail"]);
    }

    #[tokio::test(start_paused = true)]
    async fn new_settings_apply_to_present_quarantines_and_runs() {
        let lab = Lab::new("");
        lab.context.apply(settings("timeouts: {stop: 7}"), &lab.fleet.roster()).await;
        assert_eq!(lab.context.timeouts().stop, Duration::from_secs(7));
        let woken = timeout(Duration::ZERO, lab.machine.idle_work()).await;
        assert!(woken.is_ok(), "the worker waits for the new end of the run");
        lab.machine.take_out(ErrorKind::Failed, "killed", Heal::Auto);
        lab.context.disable_quarantined(&lab.fleet.roster()).await;
        assert!(lab.quarantine().is_some(), "heal is auto");
        lab.context.apply(settings("heal: off"), &lab.fleet.roster()).await;
        assert_eq!((lab.quarantine(), lab.disabled_reason().as_deref()), (None, Some("killed")));
        assert!(lab.saved().contains("disabled"));
    }

    #[tokio::test]
    async fn state_file_is_not_written_when_no_machine_is_in_quarantine() {
        let lab = Lab::new("heal: off");
        lab.context.disable_quarantined(&lab.fleet.roster()).await;
        assert_eq!(lab.saved(), "");
    }

    #[tokio::test]
    async fn failure_is_saved_with_its_consequence() {
        let lab = Lab::new("heal: off");
        lab.context.take_out(&lab.machine, ErrorKind::Failed, "killed").await;
        assert!(lab.saved().contains("\"disabled\": \"killed\""), "{}", lab.saved());
    }
}
