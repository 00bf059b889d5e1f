//! The author's description of the backend: facts that the suite cannot know, and does not take from the plugin.

use std::error::Error;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::Instance;

/// The result of an author's own function, with any error.
pub type Answer<T> = Result<T, Box<dyn Error + Send + Sync>>;

pub(super) type MachineProbe<T> = Arc<dyn Fn(&Instance, &str) -> Answer<T> + Send + Sync>;
pub(super) type LeftoverSearch = Arc<dyn Fn() -> Answer<Vec<String>> + Send + Sync>;
/// A function that gets the name of a machine.
pub(super) type Hook = Box<dyn Fn(&str) -> Answer<()> + Send + Sync>;

/// The description of a backend. The suite skips requirements for which the description lacks a function.
pub struct BackendSpec {
    pub(super) machines: Vec<String>,
    pub(super) counts: Option<RunCounts>,
    pub(super) alive: Option<MachineProbe<()>>,
    pub(super) leftovers: LeftoverSearch,
    pub(super) breakage: Option<Breakage>,
    pub(super) death: Option<Death>,
    pub(super) pause: Option<Pause>,
    pub(super) host_program: Option<Program>,
    pub(super) rounds: usize,
    pub(super) timeout: Duration,
    pub(super) skip: Vec<(String, String)>,
}

/// Counts that show where a run began.
pub(super) struct RunCounts {
    pub restored: RangeInclusive<u32>,
    pub read: MachineProbe<u32>,
}

/// A machine whose next restore can be made to fail.
pub(super) struct Breakage {
    /// None is the first machine of the suite; as below.
    pub machine: Option<String>,
    pub break_restore: Hook,
    pub repair: Hook,
}

/// A machine that can be killed.
pub(super) struct Death {
    pub machine: Option<String>,
    pub kill: Hook,
}

/// A machine that can be paused without the plugin.
pub(super) struct Pause {
    pub machine: Option<String>,
    pub pause: Hook,
    pub resume: Hook,
}

/// A program that becomes a host process with a further argument, the path of the request.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub path: PathBuf,
    pub arguments: Vec<OsString>,
}

fn hook(function: impl Fn() -> Answer<()> + Send + Sync + 'static) -> Hook {
    Box::new(move |_| function())
}

impl BackendSpec {
    /// Creates the description of a backend with these machines, in the order of the configuration. All are
    /// powered off. One machine is enough, four are better; the configuration may have more. An empty list means
    /// all machines that the plugin lists.
    pub fn new(machines: &[&str]) -> Self {
        BackendSpec {
            machines: machines.iter().map(|&name| name.to_owned()).collect(),
            counts: None,
            alive: None,
            leftovers: Arc::new(|| Ok(Vec::new())),
            breakage: None,
            death: None,
            pause: None,
            host_program: None,
            rounds: 3,
            timeout: Duration::from_secs(60),
            skip: Vec::new(),
        }
    }

    /// Sets the counts that show where a run began, for machines that count. `read` returns the first available
    /// count of the current run. It is in `restored` if the run began at the snapshot, and outside after a cold
    /// start. Without counts, the suite trusts the plugin that a machine runs from its snapshot.
    #[must_use]
    pub fn counts(
        mut self,
        restored: RangeInclusive<u32>,
        read: impl Fn(&Instance, &str) -> Answer<u32> + Send + Sync + 'static,
    ) -> Self {
        self.counts = Some(RunCounts { restored, read: Arc::new(read) });
        self
    }

    /// Sets the function that waits for another sign of life of a running machine. Without it, the suite trusts
    /// the plugin that a machine still runs.
    #[must_use]
    pub fn alive(mut self, alive: impl Fn(&Instance, &str) -> Answer<()> + Send + Sync + 'static) -> Self {
        self.alive = Some(Arc::new(alive));
        self
    }

    /// Sets the function that finds leftovers of machines on this computer: processes, sockets, disks. It must
    /// find none when all machines are powered off.
    #[must_use]
    pub fn leftovers(mut self, find: impl Fn() -> Answer<Vec<String>> + Send + Sync + 'static) -> Self {
        self.leftovers = Arc::new(find);
        self
    }

    /// Sets the functions that make restores of `machine` fail, and that repair it again. The machine need not be
    /// one of the suite's machines.
    #[must_use]
    pub fn breakage(
        mut self,
        machine: &str,
        break_restore: impl Fn() -> Answer<()> + Send + Sync + 'static,
        repair: impl Fn() -> Answer<()> + Send + Sync + 'static,
    ) -> Self {
        let machine = Some(machine.to_owned());
        self.breakage = Some(Breakage { machine, break_restore: hook(break_restore), repair: hook(repair) });
        self
    }

    /// Sets the function that ends the running `machine` without the plugin, and returns when it has ended or soon
    /// will. The machine need not be one of the suite's machines.
    #[must_use]
    pub fn death(mut self, machine: &str, kill: impl Fn() -> Answer<()> + Send + Sync + 'static) -> Self {
        self.death = Some(Death { machine: Some(machine.to_owned()), kill: hook(kill) });
        self
    }

    /// Sets the functions that pause the running `machine` without the plugin, and that resume it: by the
    /// hypervisor's own tool, or by SIGSTOP and SIGCONT to its process. The machine need not be one of the suite's
    /// machines.
    #[must_use]
    pub fn pause(
        mut self,
        machine: &str,
        pause: impl Fn() -> Answer<()> + Send + Sync + 'static,
        resume: impl Fn() -> Answer<()> + Send + Sync + 'static,
    ) -> Self {
        self.pause =
            Some(Pause { machine: Some(machine.to_owned()), pause: hook(pause), resume: hook(resume) });
        self
    }

    /// Sets the program that becomes a host process of its own with these arguments and the path of a request:
    /// `cuckoo-machinery conformance --host-process`. Tests of
    /// [`conformance_main!`](crate::conformance_main) need none, because the test program itself is used.
    #[must_use]
    pub fn host_program(mut self, path: impl Into<PathBuf>, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(OsString::from).collect();
        self.host_program = Some(Program { path: path.into(), arguments });
        self
    }

    /// Skips a requirement that the backend cannot meet. The report shows the reason.
    #[must_use]
    pub fn skip(mut self, requirement: &str, reason: &str) -> Self {
        self.skip.push((requirement.to_owned(), reason.to_owned()));
        self
    }

    /// Sets the number of rounds of a requirement that may pass by chance. The default is 3, the minimum 1. A hundred
    /// rounds are a soak test.
    #[must_use]
    pub fn rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds.max(1);
        self
    }

    /// Sets the deadline of calls that must succeed. The default is 60 seconds. It takes time only if a call hangs.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Returns the reason to skip the requirement, if there is one.
    pub(super) fn skip_reason(&self, requirement: &str) -> Option<&str> {
        self.skip.iter().find(|(name, _)| name == requirement).map(|(_, reason)| reason.as_str())
    }
}
