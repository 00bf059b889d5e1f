//! A new configuration while the host serves.
//!
//! ```text
//! SIGHUP, `reload` ─▶ files read ─▶ machines that are free rest ─▶ each plugin takes over
//!                                       ─▶ names still unique ─▶ fleet, books, workers ─▶ rest is over
//! ```
//!
//! All or nothing: what is wrong in any step is told, and the plugins that took over by then take the old
//! configuration back. Who asks for an action on a machine at rest, or for a machine, waits for the end.
//!
//! A machine in use stays as it is, and is *outdated* if the new configuration says otherwise. When it is
//! free, the same way is gone once more, with what was read then: a file that is half written meanwhile
//! harms nobody.
//!
//! What is only read at the start (the list of machineries, the plugin files, a few keys) stays as it was,
//! and is told.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, ErrorKind, MachineInfo, Reloaded, RestoreReadiness, Result, Setup};
use serde::Serialize;
use serde_yaml::Value;
use tokio::sync::{Mutex, RwLock, RwLockReadGuard};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::actions::call::{self, Called};
use crate::actions::diagnose::diagnose_all;
use crate::actions::rules::Settings;
use crate::actions::worker::Resting;
use crate::config::{Config, Timeouts};
use crate::cwd::Cwd;
use crate::events::Event;
use crate::fleet::{Machine, Machinery, Roll};
use crate::loader::{self, Search};
use crate::server::Shared;

/// How long a machine that is prepared may take to give that up. One that does not counts as in use.
const COMING_TO_REST: Duration = Duration::from_secs(10);

/// Takes over a new configuration.
pub struct Reloader {
    cwd: Cwd,
    search: Search,
    /// What the host was started with; some of it holds until it ends.
    started: Config,
    /// Held to read while a machine is given to a task, to write while a configuration is taken over.
    giving: RwLock<()>,
    applied: Mutex<Applied>,
}

/// The configuration that holds.
struct Applied {
    setups: Setups,
    lost: Lost,
}

/// What each machinery is given, by its name.
type Setups = HashMap<String, Setup>;

/// What a new configuration has come to.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Taken {
    /// Machines that are new.
    pub added: Vec<String>,
    /// Machines that are otherwise now.
    pub changed: Vec<String>,
    /// Machines that are no more.
    pub removed: Vec<String>,
    /// Machines in use: what is new for them holds when they are free.
    pub later: Vec<String>,
    /// Keys of the host's own configuration whose new values apply to later actions.
    pub settings: Vec<String>,
    /// What takes a restart of the host.
    pub notes: Vec<String>,
}

/// What a plugin has made of it.
struct Answered {
    reloaded: Reloaded,
    infos: Vec<MachineInfo>,
}

impl Reloader {
    /// A reloader of what was just loaded with that configuration.
    ///
    /// # Errors
    /// A machinery's file is not there any more.
    pub fn new(cwd: Cwd, search: Search, config: Config, roll: &Roll) -> Result<Self> {
        let setups = setups(&cwd, &config, roll)?;
        let applied = Mutex::new(Applied { setups, lost: Lost::new() });
        Ok(Reloader { cwd, search, started: config, giving: RwLock::default(), applied })
    }

    /// Waits until machines can be given to tasks.
    pub async fn giving(&self) -> RwLockReadGuard<'_, ()> {
        self.giving.read().await
    }

    /// Reads the configuration anew and takes it over.
    ///
    /// # Errors
    /// Everything that is wrong; then nothing has changed.
    pub async fn reload(&self, shared: &Shared) -> Result<Taken> {
        let taken = self.read_and_take(shared).await;
        match &taken {
            Ok(Taken { added, changed, removed, later, settings, notes }) => {
                tracing::info!(?added, ?changed, ?removed, ?later, ?settings, "configuration reloaded");
                notes.iter().for_each(|note| tracing::warn!("{note}"));
            }
            Err(error) => tracing::error!(%error, "configuration not reloaded: nothing has changed"),
        }
        taken
    }

    async fn read_and_take(&self, shared: &Shared) -> Result<Taken> {
        let mut applied = self.applied.lock().await;
        if let Some(closing) = shared.workers.closing() {
            return Err(Error::failed(closing));
        }
        let config = Config::read(&self.cwd)?;
        expect_same_machineries(&self.started, &config)?;
        let setups = setups(&self.cwd, &config, &shared.fleet.roll())?;
        let Applied { setups: old, lost, .. } = &mut *applied;
        let notes = self.notes(&config, &shared.fleet.roll());
        let settings = Settings { timeouts: config.timeouts, capture: config.capture };
        let own = Taken { settings: shared.workers.house().differing(&settings), notes, ..Taken::default() };
        let taken = self.take_over(shared, lost, old, &setups, own).await?;
        shared.workers.house().set(settings);
        applied.setups = setups;
        Ok(taken)
    }

    /// Takes over what was read before, for machines that have become free since.
    pub async fn catch_up(&self, shared: &Shared) {
        let mut applied = self.applied.lock().await;
        if shared.workers.closing().is_some() {
            return;
        }
        let Applied { setups, lost, .. } = &mut *applied;
        match self.take_over(shared, lost, setups, setups, Taken::default()).await {
            Ok(Taken { changed, removed, later, .. }) => {
                tracing::info!(?changed, ?removed, ?later, "what was new for machines in use holds now");
            }
            Err(error) => {
                tracing::error!(%error, "what was new for machines in use is given up: reload once more");
                let roll = shared.fleet.roll();
                // Those in use try it once more when they are free.
                let free = roll.machines().iter().filter(|machine| machine.status().is_free());
                free.for_each(|machine| machine.set_outdated(false));
            }
        }
    }

    /// Waits for the end of what is under way.
    pub async fn is_done(&self) {
        drop(self.applied.lock().await);
    }

    /// Applies the new configuration. `own` holds the changes of the host itself, made if the plugins accept
    /// theirs.
    async fn take_over(
        &self,
        shared: &Shared,
        lost: &mut Lost,
        old: &Setups,
        new: &Setups,
        own: Taken,
    ) -> Result<Taken> {
        let _nothing_is_given = self.giving.write().await;
        let roll = shared.fleet.roll();
        let resting = rest(shared, &roll).await;
        let in_use = roll.machines().iter().filter(|machine| !resting.contains_key(machine.name()));
        let mut asking = Asking {
            machineries: roll.machineries(),
            in_use: in_use.collect(),
            limit: shared.workers.house().timeouts().reload,
            lost,
        };
        let (answers, failed) = match asking.all(old, new).await {
            Ok(answers) => (answers, None),
            // What waited for machines that are free by now has been taken over all the same.
            Err((error, Some(back))) => (back, Some(error)),
            Err((error, None)) => return Err(error),
        };
        let (reloaded, infos): (Vec<_>, Vec<_>) =
            answers.into_iter().map(|answer| (answer.reloaded, answer.infos)).unzip();
        let next = next_roll(shared, &roll, infos).await;
        diagnose_all(&next, shared.workers.house().timeouts().reload).await;
        let mut taken = if failed.is_none() { own } else { Taken::default() };
        for (machinery, Reloaded { changed, later }) in roll.machineries().iter().zip(reloaded) {
            taken.changed.extend(machines_of(machinery, changed, &next));
            let later = machines_of(machinery, later, &next).into_iter();
            // What is free has nothing to wait for, whatever a plugin says.
            taken.later.extend(later.filter(|name| !resting.contains_key(name)));
        }
        settle(shared, &roll, next, resting, &mut taken);
        if failed.is_none() || taken != Taken::default() {
            shared.events.send(Event::Reloaded(taken.clone()));
        }
        if let Err(error) = shared.books.save().await {
            tracing::error!(%error, "who has which machine is not on disk as it is now");
        }
        failed.map_or(Ok(taken), Err)
    }

    /// What of the new configuration takes a restart.
    fn notes(&self, new: &Config, roll: &Roll) -> Vec<String> {
        let mut notes = Vec::new();
        let keys = [
            ("max_parallel_restores", self.started.max_parallel_restores != new.max_parallel_restores),
            ("socket_group", self.started.socket_group != new.socket_group),
        ];
        for (key, _) in keys.iter().filter(|(_, differs)| *differs) {
            notes.push(format!(
                "{key} in machinery-host.yaml has changed: it holds from the next start of the host on"
            ));
        }
        for machinery in roll.machineries() {
            if !machinery.plugin.is_current(&machinery.name, &self.search) {
                notes.push(format!(
                    "the plugin of '{}' is not the file any more that was loaded from {}: the new one is used from \
                     the next start of the host on",
                    machinery.name,
                    machinery.plugin.path.display()
                ));
            }
            let listed = new
                .plugin_hashes
                .as_ref()
                .map(|list| list.expect(&machinery.name, &machinery.plugin.path, &machinery.plugin.sha256));
            notes.extend(listed.and_then(Result::err).map(|error| format!("at the next start: {error}")));
        }
        notes
    }
}

fn setups(cwd: &Cwd, config: &Config, roll: &Roll) -> Result<Setups> {
    let setup = |machinery: &Arc<Machinery>| {
        Ok((machinery.name.clone(), loader::setup(&machinery.name, cwd, config)?))
    };
    roll.machineries().iter().map(setup).collect()
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

/// Those of the names that are machines of that machinery, each once: a plugin can say anything.
fn machines_of(machinery: &Arc<Machinery>, mut names: Vec<String>, roll: &Roll) -> Vec<String> {
    let mut seen = HashSet::new();
    names.retain(|name| {
        let its_own = roll.find(name).filter(|machine| is_of(machinery, machine));
        its_own.is_some_and(|machine| seen.insert(machine.name().to_owned()))
    });
    names
}

/// Has the fleet, the books and the workers be as the plugins are, and ends the rest.
fn settle(shared: &Shared, old: &Roll, next: Roll, mut resting: HashMap<String, Resting>, taken: &mut Taken) {
    for gone in old.machines().iter().filter(|machine| !next.is_member(machine)) {
        shared.workers.forget(gone);
        resting.remove(gone.name()).into_iter().for_each(Resting::dismiss);
        taken.removed.push(gone.name().to_owned());
    }
    let machines = next.machines().to_vec();
    shared.books.set_fleet(next);
    let [changed, later] =
        [&taken.changed, &taken.later].map(|names| names.iter().cloned().collect::<HashSet<_>>());
    for machine in &machines {
        machine.set_outdated(later.contains(machine.name()));
        if changed.contains(machine.name()) {
            machine.set_ready(&RestoreReadiness::default());
        }
        if !old.is_member(machine) {
            taken.added.push(machine.name().to_owned());
            shared.workers.start(machine);
        }
    }
}

/// Sends all machines to rest that are free.
async fn rest(shared: &Shared, roll: &Roll) -> HashMap<String, Resting> {
    let sent: Vec<_> =
        roll.machines().iter().filter_map(|machine| Some((machine, shared.workers.rest(machine)?))).collect();
    let mut resting = HashMap::new();
    for (machine, sent) in sent {
        if let Ok(Some(rest)) = timeout(COMING_TO_REST, sent.reached()).await
            && machine.status().is_free()
        {
            resting.insert(machine.name().to_owned(), rest);
        }
    }
    resting
}

/// The plugins, while they are asked to take over.
struct Asking<'a> {
    machineries: &'a [Arc<Machinery>],
    in_use: Vec<&'a Arc<Machine>>,
    /// How long each may take.
    limit: Duration,
    /// Those that have not come back, ever.
    lost: &'a mut Lost,
}

type Lost = HashMap<String, JoinHandle<()>>;

impl Asking<'_> {
    /// Has all of them take over. If one does not, or they do not get along, all have the old
    /// configuration in the end.
    /// Then, if each of them has, what they have made of that is told with the reason.
    async fn all(
        &mut self,
        old: &Setups,
        new: &Setups,
    ) -> Result<Vec<Answered>, (Error, Option<Vec<Answered>>)> {
        let mut answers = Vec::new();
        let mut failed = None;
        for machinery in self.machineries {
            match self.one(machinery, old, new).await {
                Ok(answer) => answers.push(answer),
                Err(error) => {
                    failed = Some(error.action(format!("reloading the machinery '{}'", machinery.name)));
                    break;
                }
            }
        }
        let Some(error) = failed.or_else(|| Error::all(clashes(self.machineries, &answers))) else {
            return Ok(answers);
        };
        // Also the one that failed: it may have come half of the way.
        let mut back = Vec::new();
        for machinery in self.machineries {
            match self.one(machinery, new, old).await {
                Ok(answer) => back.push(answer),
                Err(error) => {
                    tracing::error!(machinery = machinery.name, %error, "does not take the old configuration back");
                }
            }
        }
        Err((error, (back.len() == self.machineries.len()).then_some(back)))
    }

    async fn one(&mut self, machinery: &Arc<Machinery>, old: &Setups, new: &Setups) -> Result<Answered> {
        let name = &machinery.name;
        if self.lost.get(name).is_some_and(|call| !call.is_finished()) {
            return Err(Error::failed("an earlier reload has not come back from its plugin")
                .advice("Restart the host to get the machinery back"));
        }
        let (Some(before), Some(setup)) = (old.get(name), new.get(name).cloned()) else {
            return Err(Error::failed(
                "it was not there when the host was started: this is a bug of the host",
            ));
        };
        let unchanged = is_same(name, before, &setup);
        let used = self.in_use.iter().filter(|machine| machine.machinery.name == *name);
        let used: Vec<String> = used.map(|machine| machine.name().to_owned()).collect();
        let called = call::ask(machinery, "reload", self.limit, move |machinery, deadline| {
            let reloaded = match machinery.instance.reload(&setup, &used, deadline) {
                Err(error) if error.kind() == ErrorKind::Unsupported => not_reloading(unchanged)?,
                reloaded => reloaded?,
            };
            Ok(Answered { reloaded, infos: machinery.instance.machines()? })
        });
        match called.await {
            Called::Returned(answer) => answer,
            Called::Lost(call) => {
                self.lost.insert(name.clone(), call);
                let reason = format!("it did not come back from the plugin within {:?}", self.limit);
                Err(Error::timeout(reason).advice("Restart the host to get the machinery back"))
            }
        }
    }
}

/// What a plugin comes to that was built when there was no reloading.
fn not_reloading(unchanged: bool) -> Result<Reloaded> {
    if unchanged {
        return Ok(Reloaded::default());
    }
    Err(Error::unsupported("a new configuration while it runs").advice("Restart the host to use it"))
}

/// Whether the machinery's own files say the same.
fn is_same(name: &str, old: &Setup, new: &Setup) -> bool {
    // What is no YAML was refused before.
    let section = |setup: &Setup| setup.section::<Value>(name).ok();
    old.config.text == new.config.text && section(old) == section(new)
}

/// What no two machines may share: a name over all machineries; what a guest is known by, within one. It
/// happens where a machine that is in use gives way to another.
fn clashes(machineries: &[Arc<Machinery>], answers: &[Answered]) -> Vec<Error> {
    let infos = |answer: &Answered| answer.infos.clone();
    let all: Vec<_> = machineries.iter().cloned().zip(answers.iter().map(infos)).collect();
    let mut found = loader::doubles(&all);
    for (_, infos) in &all {
        let mut first = HashMap::new();
        for info in infos {
            let shared = info.unique().into_iter().filter_map(|(what, mark)| {
                let other: &str = first.entry((what, mark?)).or_insert(info.name.as_str());
                (other != info.name).then_some((what, other))
            });
            // To its end, so that each of them is known.
            if let Some((what, other)) = shared.collect::<Vec<_>>().first() {
                let reason = format!("it has the {what} of machine '{other}', which is in use");
                found.push(
                    Error::configuration(reason).machine(&info.name).advice("Reload when that one is off"),
                );
            }
        }
    }
    found
}

/// The fleet as the plugins have it now: machines that stay are the same.
async fn next_roll(shared: &Shared, roll: &Roll, answers: Vec<Vec<MachineInfo>>) -> Roll {
    let mut machines = Vec::new();
    for (machinery, infos) in roll.machineries().iter().zip(answers) {
        let known =
            |info: &MachineInfo| roll.find(&info.name).filter(|machine| is_of(machinery, machine)).cloned();
        let new = infos.iter().filter(|info| known(info).is_none()).cloned().collect();
        let mut new = new_machines(shared, machinery, new).await.into_iter();
        for info in infos {
            match known(&info) {
                Some(machine) => {
                    machine.set_info(info);
                    machines.push(machine);
                }
                None => machines.extend(new.next()),
            }
        }
    }
    Roll::new(roll.machineries().to_vec(), machines)
}

fn is_of(machinery: &Arc<Machinery>, machine: &Machine) -> bool {
    Arc::ptr_eq(&machine.machinery, machinery)
}

/// Machines that come are made as those at the start, and have the time of a reload for it.
async fn new_machines(
    shared: &Shared,
    machinery: &Arc<Machinery>,
    infos: Vec<MachineInfo>,
) -> Vec<Arc<Machine>> {
    let (machinery, events) = (Arc::clone(machinery), shared.events.clone());
    let Timeouts { state, reload, .. } = shared.workers.house().timeouts();
    let made =
        tokio::task::spawn_blocking(move || loader::machines(&machinery, infos, state, reload, &events));
    made.await.unwrap_or_else(|error| {
        tracing::error!(%error, "machines that are new are left out: this is a bug of the host");
        Vec::new()
    })
}
