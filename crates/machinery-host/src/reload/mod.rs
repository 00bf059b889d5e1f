//! A new configuration while the host serves.
//!
//! ```text
//! SIGHUP, `reload` ─▶ read the files ─▶ pause the workers of free machines ─▶ each plugin applies its files
//!                         ─▶ names are unique ─▶ commit: fleet, state file, queues ─▶ resume the workers
//!                         └▶ a plugin refuses ─▶ roll back: the plugins apply the old files
//! ```
//!
//! A reload is all or nothing: a fault in any step is reported, and the plugins that have applied the new
//! configuration apply the old one again. Requests for paused machines, and requests that allocate machines,
//! wait for the end of the reload.
//!
//! A machine in use stays as it is, with a *pending change*. Once idle, the machine is reloaded with the
//! configuration read earlier, so that a half-written file cannot interfere.
//!
//! The list of machineries, the plugin files and a few keys are read only at the start of the host. A reload
//! reports their changes.

mod plugins;
mod roster;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Reloaded, RestoreReadiness, Result};
use tokio::sync::{Mutex, RwLock, RwLockReadGuard};
use tokio::time::timeout;

use crate::actions::context::ActionSettings;
use crate::actions::diagnose::diagnose_all;
use crate::actions::message::Paused;
use crate::actions::queues::Queues;
use crate::config::Config;
use crate::cwd::Cwd;
use crate::events::{Event, Events, ReloadSummary};
use crate::fleet::state_file::StateStore;
use crate::fleet::{Fleet, Roster};
use crate::plugin::search::PluginSearch;

use plugins::{AbandonedCalls, Answer, PluginReload, Setups, setups};

/// The time that a preparation has to end when its worker is to pause. A machine that takes longer counts as in
/// use.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Paused workers, by the names of their machines.
type PausedWorkers = HashMap<String, Paused>;

/// Applies a new configuration.
pub struct Reloader {
    cwd: Cwd,
    search: PluginSearch,
    fleet: Arc<Fleet>,
    queues: Arc<Queues>,
    state: Arc<StateStore>,
    events: Events,
    /// The configuration at the start of the host. Some of it holds until the host ends.
    started: Config,
    /// Held to read while a machine is allocated to a task, and to write while a configuration is applied.
    allocation: RwLock<()>,
    applied: Mutex<Applied>,
}

/// The configuration that holds.
struct Applied {
    setups: Setups,
    abandoned: AbandonedCalls,
}

impl Reloader {
    /// Returns a reloader of the machineries that were loaded with this configuration.
    ///
    /// # Errors
    /// The file of a machinery has vanished.
    pub fn new(
        cwd: Cwd,
        search: PluginSearch,
        started: Config,
        fleet: Arc<Fleet>,
        queues: Arc<Queues>,
        state: Arc<StateStore>,
        events: Events,
    ) -> Result<Self> {
        let setups = setups(&cwd, &started, &fleet.roster())?;
        let applied = Mutex::new(Applied { setups, abandoned: AbandonedCalls::new() });
        let allocation = RwLock::default();
        Ok(Reloader { cwd, search, fleet, queues, state, events, started, allocation, applied })
    }

    /// Waits until machines may be allocated to tasks, and keeps a reload from being applied meanwhile.
    pub async fn allocation_guard(&self) -> RwLockReadGuard<'_, ()> {
        self.allocation.read().await
    }

    /// Reads the configuration again and applies it.
    ///
    /// # Errors
    /// The configuration has a fault, or a plugin refuses it; nothing has changed then.
    pub async fn reload(&self) -> Result<ReloadSummary> {
        let summary = self.read_and_apply().await;
        match &summary {
            Ok(ReloadSummary { added, changed, removed, deferred, settings, restart_required }) => {
                tracing::info!(?added, ?changed, ?removed, ?deferred, ?settings, "configuration reloaded");
                restart_required.iter().for_each(|change| tracing::warn!("{change}"));
            }
            Err(error) => tracing::error!(%error, "configuration not reloaded: nothing has changed"),
        }
        summary
    }

    async fn read_and_apply(&self) -> Result<ReloadSummary> {
        let mut applied = self.applied.lock().await;
        if let Some(closing) = self.queues.closing() {
            return Err(Error::failed(closing));
        }
        let config = Config::read(&self.cwd)?;
        expect_same_machineries(&self.started, &config)?;
        let roster = self.fleet.roster();
        let setups = setups(&self.cwd, &config, &roster)?;
        let context = self.queues.context();
        let settings = ActionSettings::of(&config);
        let own = ReloadSummary {
            settings: context.differing(&settings),
            restart_required: self.restart_required(&config, &roster),
            ..ReloadSummary::default()
        };
        let Applied { setups: old, abandoned } = &mut *applied;
        let summary = self.apply(abandoned, old, &setups, own).await?;
        context.apply(settings, &self.fleet.roster()).await;
        applied.setups = setups;
        Ok(summary)
    }

    /// Applies the configuration that was read before to machines that have become free since.
    pub async fn apply_pending_changes(&self) {
        let mut applied = self.applied.lock().await;
        if self.queues.closing().is_some() {
            return;
        }
        let Applied { setups, abandoned } = &mut *applied;
        match self.apply(abandoned, setups, setups, ReloadSummary::default()).await {
            Ok(ReloadSummary { changed, removed, deferred, .. }) => {
                tracing::info!(?changed, ?removed, ?deferred, "pending changes applied");
            }
            Err(error) => {
                tracing::error!(%error, "pending changes dropped: reload once more");
                let roster = self.fleet.roster();
                // Machines in use try it once more when they are free.
                let free = roster.machines().iter().filter(|machine| machine.status().is_free());
                free.for_each(|machine| machine.set_pending_change(false));
            }
        }
    }

    /// Waits for the end of a reload under way.
    pub async fn idle(&self) {
        drop(self.applied.lock().await);
    }

    /// Applies the new setups. `own` has the changes of the host itself, which are made if the plugins accept
    /// theirs.
    async fn apply(
        &self,
        abandoned: &mut AbandonedCalls,
        old: &Setups,
        new: &Setups,
        own: ReloadSummary,
    ) -> Result<ReloadSummary> {
        let _no_allocation = self.allocation.write().await;
        let roster = self.fleet.roster();
        let limit = self.queues.context().timeouts().reload;
        let paused = self.pause_free_machines(&roster).await;
        let in_use = roster.machines().iter().filter(|machine| !paused.contains_key(machine.name()));
        let mut reload =
            PluginReload { machineries: roster.machineries(), in_use: in_use.collect(), limit, abandoned };
        let (answers, failed) = match reload.apply(old, new).await {
            Ok(answers) => (answers, None),
            // The roll back has applied the pending changes of machines that are free by now.
            Err((error, Some(rolled_back))) => (rolled_back, Some(error)),
            Err((error, None)) => return Err(error),
        };
        let (reloaded, infos): (Vec<_>, Vec<_>) =
            answers.into_iter().map(|Answer { reloaded, infos }| (reloaded, infos)).unzip();
        let next = roster::next(&roster, infos, &self.queues.context().settings(), &self.events).await;
        diagnose_all(&next, limit).await;
        let mut summary = if failed.is_none() { own } else { ReloadSummary::default() };
        for (machinery, Reloaded { changed, later }) in roster.machineries().iter().zip(reloaded) {
            summary.changed.extend(roster::machines_of(machinery, changed, &next));
            let deferred = roster::machines_of(machinery, later, &next).into_iter();
            // A free machine has nothing to wait for, whatever its plugin reports.
            summary.deferred.extend(deferred.filter(|name| !paused.contains_key(name)));
        }
        self.commit(&roster, next, paused, &mut summary);
        if failed.is_none() || summary != ReloadSummary::default() {
            self.events.send(Event::Reloaded(summary.clone()));
        }
        if let Err(error) = self.state.save().await {
            tracing::error!(%error, "the locks of machines on disk are old");
        }
        failed.map_or(Ok(summary), Err)
    }

    /// Pauses the workers of all free machines.
    async fn pause_free_machines(&self, roster: &Roster) -> PausedWorkers {
        let pausing: Vec<_> = roster
            .machines()
            .iter()
            .filter_map(|machine| Some((machine, self.queues.pause(machine)?)))
            .collect();
        let mut paused = PausedWorkers::new();
        for (machine, pausing) in pausing {
            if let Ok(Some(pause)) = timeout(PAUSE_TIMEOUT, pausing.reached()).await
                && machine.status().is_free()
            {
                paused.insert(machine.name().to_owned(), pause);
            }
        }
        paused
    }

    /// Makes the fleet, the state file and the queues agree with the plugins, and resumes the workers.
    fn commit(&self, old: &Roster, next: Roster, mut paused: PausedWorkers, summary: &mut ReloadSummary) {
        for removed in old.machines().iter().filter(|machine| !next.has(machine)) {
            self.queues.remove(removed);
            paused.remove(removed.name()).into_iter().for_each(Paused::retire);
            summary.removed.push(removed.name().to_owned());
        }
        let machines = next.machines().to_vec();
        self.state.replace_roster(next);
        let [changed, deferred] =
            [&summary.changed, &summary.deferred].map(|names| names.iter().cloned().collect::<HashSet<_>>());
        for machine in &machines {
            machine.set_pending_change(deferred.contains(machine.name()));
            if changed.contains(machine.name()) {
                machine.set_ready(&RestoreReadiness::default());
                machine.restart_quarantine();
            }
            if !old.has(machine) {
                summary.added.push(machine.name().to_owned());
                self.queues.add(machine);
            }
        }
    }

    /// Returns the changes that need a restart of the host.
    fn restart_required(&self, new: &Config, roster: &Roster) -> Vec<String> {
        let keys = [
            ("max_parallel_restores", self.started.max_parallel_restores != new.max_parallel_restores),
            ("socket_group", self.started.socket_group != new.socket_group),
        ];
        let mut changes: Vec<String> = keys
            .iter()
            .filter(|(_, differs)| *differs)
            .map(|(key, _)| {
                format!(
                    "{key} in machinery-host.yaml has changed: it holds from the next start of the host on"
                )
            })
            .collect();
        for machinery in roster.machineries() {
            let (name, plugin) = (&machinery.name, &machinery.plugin);
            if !plugin.is_current(name, &self.search) {
                changes.push(format!(
                    "the plugin of '{name}' is not the file any more that was loaded from {}: the new one is used from \
                     the next start of the host on",
                    plugin.path.display()
                ));
            }
            let hashes = new.plugin_hashes.as_ref();
            let expected = hashes.map(|list| list.expect(name, &plugin.path, &plugin.sha256));
            changes.extend(expected.and_then(Result::err).map(|error| format!("at the next start: {error}")));
        }
        changes
    }
}

fn expect_same_machineries(old: &Config, new: &Config) -> Result<()> {
    if old.machineries == new.machineries {
        return Ok(());
    }
    let list = |config: &Config| config.machineries.join(", ");
    let reason =
        format!("the list of machineries is now {}; the host was started with {}", list(new), list(old));
    Err(Error::configuration(reason).advice("Restart the host to use other machineries"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actions::lab::{Lab, configuration};
    use crate::actions::message::Responder;
    use crate::actions::{Action, Ending};
    use crate::fleet::availability::TaskLock;
    use crate::fleet::fake_plugin::info;
    use machinery::{MachineInfo, Readiness};
    use std::pin::pin;
    use tokio::sync::oneshot;

    /// Returns a reloader of the lab's fleet, with a worker of each machine. The plugin lists the same machine again.
    fn reloader(lab: &Lab) -> Reloader {
        let conf = lab.folder.path().join("conf");
        std::fs::create_dir_all(conf.join("machineries")).unwrap();
        std::fs::write(conf.join("machineries/fake.yaml"), "machines: {}\n").unwrap();
        lab.plugin.set_machines(vec![info("m")], Reloaded::default());
        let queues = Arc::new(Queues::new(Arc::clone(&lab.context)));
        queues.add(&lab.machine);
        let search = PluginSearch { folders: Vec::new(), allow_insecure: false };
        let started = Config::read(&lab.cwd()).unwrap();
        let (fleet, state) = (Arc::clone(&lab.fleet), Arc::clone(&lab.state));
        Reloader::new(lab.cwd(), search, started, fleet, queues, state, lab.events.clone()).unwrap()
    }

    /// Has the plugin answer the next reloads with these machines.
    fn answer(lab: &Lab, infos: &[&str], changed: &[&str], later: &[&str]) {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let reloaded = Reloaded { changed: names(changed), later: names(later) };
        lab.plugin.set_machines(infos.iter().map(|name| info(name)).collect(), reloaded);
    }

    async fn stop(reloader: &Reloader, machine: &crate::fleet::Machine) -> Result<(), String> {
        let (sender, result) = oneshot::channel();
        let responder = Responder::new(|result| drop(sender.send(result)));
        reloader.queues.submit(machine, Action::Stop, responder);
        result.await.unwrap()
    }

    #[tokio::test]
    async fn machines_are_added_and_removed_with_their_workers() {
        let lab = Lab::new("");
        let (reloader, mut events) = (reloader(&lab), lab.events.subscribe());
        answer(&lab, &["new"], &[], &[]);
        let summary = reloader.reload().await.unwrap();
        assert_eq!((summary.added, summary.removed), (vec!["new".to_owned()], vec!["m".to_owned()]));
        let sent = std::iter::from_fn(|| events.try_recv().ok());
        assert_eq!(sent.filter(|event| matches!(event, Event::Reloaded(_))).count(), 1);
        assert!(lab.fleet.find("m").is_none());
        let reason = stop(&reloader, &lab.machine).await.unwrap_err();
        assert!(reason.contains("removed"), "{reason}");
        let new = lab.fleet.find("new").unwrap();
        stop(&reloader, &new).await.unwrap();
        new.lock(&TaskLock::default()).unwrap();
        lab.state.save().await.unwrap();
        assert!(lab.saved().contains("new"));
    }

    #[tokio::test]
    async fn changed_machine_is_not_ready_any_more_and_works_again_after_the_reload() {
        let lab = Lab::new("");
        let reloader = reloader(&lab);
        lab.machine.set_ready(&RestoreReadiness { mode: Readiness::Standby, ..RestoreReadiness::default() });
        answer(&lab, &["m"], &["m", "x"], &["m"]);
        let summary = reloader.reload().await.unwrap();
        assert_eq!((summary.changed, summary.deferred), (vec!["m".to_owned()], Vec::<String>::new()));
        assert_eq!(lab.machine.status().ready, Some(RestoreReadiness::default()));
        assert!(!lab.machine.has_pending_change(), "a free machine waits for nothing");
        stop(&reloader, &lab.machine).await.unwrap();
    }

    #[tokio::test]
    async fn change_of_a_locked_machine_waits_until_the_machine_is_free() {
        let lab = Lab::new("");
        let reloader = reloader(&lab);
        lab.machine.lock(&TaskLock::default()).unwrap();
        answer(&lab, &["m"], &[], &["m"]);
        let summary = reloader.reload().await.unwrap();
        assert!(summary.deferred == ["m"] && lab.machine.has_pending_change());
        lab.machine.unlock(None).unwrap();
        lab.plugin.fail("reload", Error::failed("no such disk"));
        reloader.apply_pending_changes().await;
        assert!(!lab.machine.has_pending_change(), "it is not tried again and again");
        lab.machine.set_pending_change(true);
        answer(&lab, &["m"], &["m"], &[]);
        reloader.apply_pending_changes().await;
        assert!(!lab.machine.has_pending_change());
    }

    #[tokio::test]
    async fn refused_reload_changes_nothing() {
        let lab = Lab::new("");
        let (reloader, mut events) = (reloader(&lab), lab.events.subscribe());
        configuration(&lab.folder, "max_run: 60");
        answer(&lab, &["m", "new"], &[], &[]);
        for _ in 0..2 {
            lab.plugin.fail("reload", Error::failed("no such disk"));
        }
        reloader.reload().await.unwrap_err();
        assert_eq!((lab.context.settings().max_run, lab.fleet.roster().machines().len()), (None, 1));
        let reloads = std::iter::from_fn(|| events.try_recv().ok());
        assert_eq!(reloads.filter(|event| matches!(event, Event::Reloaded(_))).count(), 0);
        assert_eq!(reloader.reload().await.unwrap().settings, ["max_run"]);
        assert_eq!(lab.context.settings().max_run, Some(Duration::from_secs(60)));
    }

    #[tokio::test]
    async fn changes_that_a_rollback_applies_are_sent() {
        let lab = Lab::new("");
        let (reloader, mut events) = (reloader(&lab), lab.events.subscribe());
        let mut reloads = || {
            let events = std::iter::from_fn(|| events.try_recv().ok());
            events.filter(|event| matches!(event, Event::Reloaded(_))).count()
        };
        lab.plugin.fail("reload", Error::failed("no such disk"));
        reloader.reload().await.unwrap_err();
        assert_eq!(reloads(), 0, "nothing has changed");
        lab.plugin.fail("reload", Error::failed("no such disk"));
        answer(&lab, &["m"], &["m"], &[]);
        reloader.reload().await.unwrap_err();
        assert_eq!(reloads(), 1);
        answer(&lab, &["m"], &[], &[]);
        reloader.reload().await.unwrap();
        assert_eq!(reloads(), 1, "a reload without changes is an event too");
    }

    #[tokio::test]
    async fn restart_is_required_for_what_only_a_start_of_the_host_reads() {
        let lab = Lab::new("");
        let reloader = reloader(&lab);
        let restart_required = async |host_yaml: &str| {
            configuration(&lab.folder, host_yaml);
            reloader.reload().await.unwrap().restart_required
        };
        let plugin_only = restart_required("").await;
        assert!(
            matches!(&plugin_only[..], [change] if change.contains("the plugin of 'fake'")),
            "{plugin_only:?}"
        );
        let permits = restart_required("max_parallel_restores: 1").await;
        assert!(permits.len() == 2 && permits[0].contains("max_parallel_restores"), "{permits:?}");
    }

    #[test]
    fn reload_refuses_another_list_of_machineries() {
        let folder = tempfile::tempdir().unwrap();
        let old = configuration(&folder, "");
        expect_same_machineries(&old, &old).unwrap();
        let new = Config { machineries: vec!["other".into()], ..old.clone() };
        let error = expect_same_machineries(&old, &new).unwrap_err().to_string();
        assert!(error.contains("is now other") && error.contains("started with fake"), "{error}");
    }

    #[tokio::test]
    async fn machine_that_is_started_while_its_worker_pauses_is_in_use() {
        let lab = Lab::new("");
        let reloader = reloader(&lab);
        lab.start_own_run();
        assert!(reloader.pause_free_machines(&lab.fleet.roster()).await.is_empty());
        lab.machine.set_state(machinery::State::Poweroff);
        assert_eq!(reloader.pause_free_machines(&lab.fleet.roster()).await.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn reloader_is_idle_when_no_reload_runs_and_refuses_one_when_the_host_ends() {
        let lab = Lab::new("");
        let reloader = reloader(&lab);
        let release = lab.plugin.block("reload");
        let mut reload = pin!(reloader.reload());
        tokio::select! {
            // The reload begins before the others are polled.
            biased;
            result = &mut reload => panic!("{result:?}"),
            () = reloader.idle() => panic!("a reload runs"),
            () = lab.plugin.called("reload") => {}
        }
        assert!(reloader.allocation.try_read().is_err(), "no machine is allocated meanwhile");
        release.send(()).unwrap();
        reload.await.unwrap();
        reloader.idle().await;
        drop(reloader.allocation_guard().await);
        reloader.queues.close(Ending::Stop);
        reloader.reload().await.unwrap_err();
        reloader.apply_pending_changes().await;
        assert_eq!(lab.plugin.take_calls().iter().filter(|call| *call == "reload").count(), 1);
    }

    #[tokio::test]
    async fn machine_that_stays_gets_its_new_description_and_diagnosis() {
        let lab = Lab::new("");
        let reloader = reloader(&lab);
        let changed = MachineInfo { ip: "10.0.0.9".into(), ..info("m") };
        lab.plugin.set_machines(vec![changed], Reloaded::default());
        lab.plugin.set_unusable("m", Some("no disk"));
        reloader.reload().await.unwrap();
        assert_eq!(lab.machine.info().ip, "10.0.0.9");
        assert!(lab.disabled_reason().unwrap().contains("no disk"));
    }
}
