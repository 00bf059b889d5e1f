//! A machinery, loaded for one requirement, and what can be asked and demanded of it.
//!
//! Two kinds of methods: those that *demand* (`does`, `refuses`, `is`, `nothing_is_left`) are the
//! sentences that requirements are written in; those that *ask* (`attempt`, `ask`) hand back the
//! plugin's own answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use machinery::host::Instance;
use machinery::{Capabilities, Deadline, Error, ErrorKind, Reloaded, Setup, State};

use super::Suite;
use super::call::{Call, Silent, bounded};
use super::recorder::Heard;
use super::report::{CheckFailure, Result, demand};
use super::spec::{Answer, BackendSpec, Counts, OfMachine};

/// How late a call may come back after its deadline. Much more than any plugin needs, so that a
/// busy machine is not taken for a bad plugin; much less than for ever.
pub const GRACE: Duration = Duration::from_secs(5);

pub struct Session<'a> {
    suite: &'a Suite<'a>,
    instance: Arc<Instance>,
    /// All machines that the plugin lists, and those of them to try things with.
    listed: Vec<String>,
    machines: Vec<String>,
    /// What was heard before is not about this session.
    mark: usize,
    folder: tempfile::TempDir,
    /// It was shut down before its time, and is called no more.
    ended: AtomicBool,
}

impl<'a> Session<'a> {
    pub fn load(suite: &'a Suite<'a>) -> Result<Self> {
        let folder = tempfile::tempdir().map_err(|error| failed("making a folder to work in", &error))?;
        let mark = suite.recorder.mark();
        let instance = suite.load_with(suite.setup)?.map_err(|error| failed("load", &error))?;
        let (instance, ended) = (Arc::new(instance), AtomicBool::new(false));
        Ok(Session { suite, instance, listed: Vec::new(), machines: Vec::new(), mark, folder, ended })
    }

    /// Learns which machines there are, which is the first thing that any host asks.
    pub fn meet(&mut self) -> Result {
        let infos = self.answer("machines", |instance, _| instance.machines())?;
        self.listed = infos.into_iter().map(|info| info.name).collect();
        let chosen = &self.spec().machines;
        self.machines = if chosen.is_empty() { self.listed.clone() } else { chosen.clone() };
        demand!(!self.machines.is_empty(), "the configuration has no machine to try anything with");
        Ok(())
    }

    pub fn suite(&self) -> &'a Suite<'a> {
        self.suite
    }

    pub fn spec(&self) -> &'a BackendSpec {
        self.suite.spec
    }

    /// The machine to try things with where one is enough.
    pub fn machine(&self) -> &str {
        self.machines.first().map_or("", String::as_str)
    }

    pub fn machines(&self) -> impl Iterator<Item = &str> {
        self.machines.iter().map(String::as_str)
    }

    /// A path at which nothing is, in a folder that is there.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn timeout(&self) -> Duration {
        self.spec().timeout
    }

    pub fn capabilities(&self) -> Result<Capabilities> {
        self.answer("capabilities", |instance, _| instance.capabilities())
    }

    /// Ends the session: every machine is stopped, and nothing may be left, nor have been told that
    /// makes no sense.
    pub fn close(self) -> Result {
        if self.suite.hung.get().is_some() {
            // The plugin must not be called beside the call that it is still in. That call also
            // holds the machinery, so it is not dropped under it.
            return Ok(());
        }
        let ended = if self.ended.load(Ordering::Relaxed) { Ok(()) } else { self.end() };
        let (suite, instance) = (self.suite, self.instance);
        ended.and(suite.ask("dropping the machinery", GRACE, move || drop(instance)))?;
        suite.nothing_is_left("after shutdown")?;
        suite.events_are_valid(self.mark, &self.listed)
    }

    /// Stops all machines and shuts the machinery down, as a host does before it ends.
    pub fn end(&self) -> Result {
        self.ended.store(true, Ordering::Relaxed);
        let stopped = self.stop_all();
        // Also after a machine that could not be stopped: it may be the last way to be rid of it.
        stopped.and(self.answer("shutdown", Instance::shutdown))
    }

    fn stop_all(&self) -> Result {
        self.listed.iter().try_for_each(|machine| self.settle(machine))
    }

    /// Stops a machine of which it is not known whether it runs.
    pub fn settle(&self, machine: &str) -> Result {
        match self.attempt(&Call::Stop, machine, self.timeout())? {
            Err(error) if error.kind() != ErrorKind::StateReached => Err(failed("stop", &error)),
            _ => self.is(machine, State::Poweroff),
        }
    }

    /// What the plugin says to a call on a machine with that much time for it.
    pub fn attempt(&self, call: &Call, machine: &str, limit: Duration) -> Result<machinery::Result<()>> {
        let (call, machine) = (call.clone(), machine.to_owned());
        let what = format!("{} of {machine} with a deadline of {limit:?}", call.name());
        self.ask(&what, limit, move |instance, deadline| call.run(instance, &machine, deadline))
    }

    /// What the plugin says to a call that is not about a machine, or that has an answer.
    pub fn ask<T: Send + 'static>(
        &self,
        what: &str,
        limit: Duration,
        call: impl FnOnce(&Instance, Deadline) -> machinery::Result<T> + Send + 'static,
    ) -> Result<machinery::Result<T>> {
        let instance = Arc::clone(&self.instance);
        let work = move || call(&instance, Deadline::after(limit));
        let answer = self.suite.ask(what, limit + GRACE, work)?;
        match &answer {
            Err(error) if is_nonsense(error) => Err(failed(what, error)),
            _ => Ok(answer),
        }
    }

    /// Demands an answer to a call.
    pub fn answer<T: Send + 'static>(
        &self,
        what: &str,
        call: impl FnOnce(&Instance, Deadline) -> machinery::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.ask(what, self.timeout(), call)?.map_err(|error| failed(what, &error))
    }

    /// Demands that the call succeeds.
    pub fn does(&self, call: &Call, machine: &str) -> Result {
        let answer = self.attempt(call, machine, self.timeout())?;
        answer.map_err(|error| failed(&format!("{} of {machine}", call.name()), &error))
    }

    /// Demands that the call is refused, and why.
    pub fn refuses(&self, call: &Call, machine: &str, kind: ErrorKind) -> Result {
        let error = self.fails(call, machine)?;
        let name = call.name();
        demand!(
            error.kind() == kind,
            "{name} of {machine} ought to be refused with {kind:?}, it said: {error:?}"
        );
        Ok(())
    }

    /// Demands that the call fails with something to say, and hands that on.
    pub fn fails(&self, call: &Call, machine: &str) -> Result<Error> {
        let name = call.name();
        match self.attempt(call, machine, self.timeout())? {
            Ok(()) => Err(CheckFailure::Failed(format!(
                "{name} of {machine} says it succeeded, and it cannot have"
            ))),
            Err(error) => {
                demand!(!error.reason().trim().is_empty(), "{name} of {machine} failed with nothing to say");
                Ok(error)
            }
        }
    }

    /// What the plugin says to the text as its new configuration, while machines are in use.
    pub fn reload(&self, text: &str, in_use: &[&str]) -> Result<machinery::Result<Reloaded>> {
        let mut setup = self.suite.setup.clone();
        setup.config.text = text.to_owned();
        let in_use: Vec<String> = in_use.iter().map(|&name| name.to_owned()).collect();
        let reload = move |instance: &Instance, deadline| instance.reload(&setup, &in_use, deadline);
        self.ask("reload", self.timeout(), reload)
    }

    /// The machines there are now, by name.
    pub fn names(&self) -> Result<Vec<String>> {
        let infos = self.answer("machines", |instance, _| instance.machines())?;
        Ok(infos.into_iter().map(|info| info.name).collect())
    }

    /// Demands that the machine is in that state.
    pub fn is(&self, machine: &str, state: State) -> Result {
        let name = machine.to_owned();
        let said = self.answer("state", move |instance, deadline| instance.state(&name, deadline))?;
        demand!(said == state, "the state of {machine} ought to be {state}, it is {said}");
        Ok(())
    }

    /// Restores the machine, and demands that it runs, from its snapshot if that can be seen.
    pub fn restore(&self, machine: &str) -> Result {
        self.does(&Call::RestoreStart, machine)?;
        self.is(machine, State::Running)?;
        if let Some(Counts { restored, look }) = &self.spec().counts {
            let count = self.count(machine, look)?;
            demand!(restored.contains(&count), "{machine} was restored and counts {count}, not {restored:?}");
        }
        Ok(())
    }

    /// Stops the running machine, and demands that it is off.
    pub fn stop(&self, machine: &str) -> Result {
        self.does(&Call::Stop, machine)?;
        self.is(machine, State::Poweroff)
    }

    /// Demands that the running machine does not run from its snapshot, if that can be seen.
    pub fn is_cold(&self, machine: &str) -> Result {
        if let Some(Counts { restored, look }) = &self.spec().counts {
            let count = self.count(machine, look)?;
            demand!(
                !restored.contains(&count),
                "{machine} was started cold and counts {count}, as if restored"
            );
        }
        Ok(())
    }

    fn count(&self, machine: &str, look: &OfMachine<u32>) -> Result<u32> {
        self.probe("looking at the count", machine, look)
    }

    /// Demands that the machine runs, and does not only say so.
    pub fn lives(&self, machine: &str) -> Result {
        self.is(machine, State::Running)?;
        match &self.spec().alive {
            Some(alive) => self.probe("waiting for a sign of life", machine, alive),
            None => Ok(()),
        }
    }

    /// Demands that nothing of the machines is left on this host.
    pub fn nothing_is_left(&self, when: &str) -> Result {
        self.suite.nothing_is_left(when)
    }

    /// Demands that there is nothing at the path, which is in the session's folder, nor anything
    /// beside it with a longer name: half a file under another name is still half a file.
    pub fn nothing_is_at(&self, path: &Path) -> Result {
        let wanted = path.file_name().unwrap_or_default().to_string_lossy();
        let entries =
            self.folder.path().read_dir().map_err(|error| failed("looking into a folder", &error))?;
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let left: Vec<String> = names.filter(|name| name.contains(&*wanted)).collect();
        demand!(left.is_empty(), "beside or at {} was left: {}", path.display(), left.join(", "));
        Ok(())
    }

    /// Does an author's own deed.
    pub fn act(&self, what: &str, machine: &str, deed: &dyn Fn() -> Answer<()>) -> Result {
        deed().map_err(|error| failed(&format!("{what} {machine}"), error.as_ref()))
    }

    /// Waits for something to be heard in this session, or that has been.
    pub fn wait_to_hear<T>(&self, find: impl Fn(&Heard) -> Option<T>) -> Option<T> {
        self.suite.recorder.wait(self.mark, self.timeout(), find)
    }

    /// Demands that all that was ever told makes sense.
    pub fn events_are_valid(&self) -> Result {
        self.suite.events_are_valid(0, &self.listed)
    }

    /// What has been heard in this session so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.suite.recorder.since(self.mark)
    }

    fn probe<T: Send + 'static>(&self, what: &str, machine: &str, look: &OfMachine<T>) -> Result<T> {
        let what = format!("{what} of {machine}");
        let (instance, name, look) = (Arc::clone(&self.instance), machine.to_owned(), Arc::clone(look));
        let seen = self.suite.ask(&what, self.timeout() + GRACE, move || look(&instance, &name))?;
        seen.map_err(|error| failed(&what, error.as_ref()))
    }
}

impl Suite<'_> {
    /// What the plugin says to being loaded.
    pub(super) fn load_with(&self, setup: &Setup) -> Result<machinery::Result<Instance>> {
        let (plugin, setup, recorder) = (self.plugin.clone(), setup.clone(), Arc::clone(&self.recorder));
        self.ask("load", self.spec.timeout + GRACE, move || plugin.load(&setup, recorder))
    }

    /// Does the work with a bound on it; work that goes beyond it is the end of the suite.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        what: &str,
        limit: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        bounded(limit, work).map_err(|silent| match silent {
            Silent::Panicked => CheckFailure::Failed(format!("{what}: the test's own code panicked")),
            Silent::Hangs => {
                let _ = self.hung.set(what.to_owned());
                CheckFailure::Failed(format!("{what} has not returned after {limit:?}"))
            }
        })
    }

    pub(super) fn nothing_is_left(&self, when: &str) -> Result {
        let leftovers = (self.spec.leftovers)();
        let leftovers = leftovers.map_err(|error| failed("looking for leftovers", error.as_ref()))?;
        demand!(leftovers.is_empty(), "{when} there is left: {}", leftovers.join(", "));
        Ok(())
    }

    /// Demands that what was told since the mark is about these machines, and no nonsense.
    fn events_are_valid(&self, mark: usize, machines: &[String]) -> Result {
        for heard in self.recorder.since(mark) {
            let known = machines.iter().any(|name| name == heard.machine());
            demand!(known, "this was told, and no machine has this name: {heard:?}");
            if let Heard::Progress { fraction, .. } = heard {
                demand!((0.0..=1.0).contains(&fraction), "{heard:?} is not within 0 and 1");
            }
        }
        Ok(())
    }
}

/// Whether the error tells of a plugin that is broken, rather than of a call that failed.
fn is_nonsense(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PluginPanicked | ErrorKind::PluginMisbehaved)
}

pub fn failed(what: &str, error: &(impl std::fmt::Display + ?Sized)) -> CheckFailure {
    CheckFailure::Failed(format!("{what}: {error}"))
}
