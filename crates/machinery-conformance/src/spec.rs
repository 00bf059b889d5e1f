//! What an author tells of the backend: what the suite cannot know and will not believe the plugin.

use std::error::Error;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::Instance;

/// What an author's own code comes to; any error will do.
pub type Answer<T> = Result<T, Box<dyn Error + Send + Sync>>;

pub(super) type OfMachine<T> = Arc<dyn Fn(&Instance, &str) -> Answer<T> + Send + Sync>;
type Leftovers = Arc<dyn Fn() -> Answer<Vec<String>> + Send + Sync>;
type Act = Box<dyn Fn() -> Answer<()> + Send + Sync>;

/// A backend to be put to the requirements. What it leaves out, its requirements are not tried for.
pub struct BackendSpec {
    pub(super) machines: Vec<String>,
    pub(super) counts: Option<Counts>,
    pub(super) alive: Option<OfMachine<()>>,
    pub(super) leftovers: Leftovers,
    pub(super) breakage: Option<Breakage>,
    pub(super) death: Option<Death>,
    pub(super) rounds: usize,
    pub(super) timeout: Duration,
    pub(super) skip: Vec<(String, String)>,
}

/// How to tell where a run began.
pub(super) struct Counts {
    pub restored: RangeInclusive<u32>,
    pub look: OfMachine<u32>,
}

/// A machine whose next restore can be made to fail.
pub(super) struct Breakage {
    pub machine: String,
    pub spoil: Act,
    pub mend: Act,
}

/// A machine that can be made to end by itself.
pub(super) struct Death {
    pub machine: String,
    pub kill: Act,
}

impl BackendSpec {
    /// A backend with these machines, which are powered off: one will do, four are better, in the
    /// order of the configuration, which may have more. None at all stands for all that the plugin lists.
    pub fn new(machines: &[&str]) -> Self {
        BackendSpec {
            machines: machines.iter().map(|&name| name.to_owned()).collect(),
            counts: None,
            alive: None,
            leftovers: Arc::new(|| Ok(Vec::new())),
            breakage: None,
            death: None,
            rounds: 3,
            timeout: Duration::from_secs(60),
            skip: Vec::new(),
        }
    }

    /// How to tell where a run began, for machines that count: `look` gives the first count that is to
    /// be had of the run that a machine is in, and `restored` is where it lies when the run began at the
    /// snapshot. After a cold start it lies elsewhere. Without it the suite has to believe the plugin
    /// that a machine is at its snapshot.
    #[must_use]
    pub fn counts(
        mut self,
        restored: RangeInclusive<u32>,
        look: impl Fn(&Instance, &str) -> Answer<u32> + Send + Sync + 'static,
    ) -> Self {
        self.counts = Some(Counts { restored, look: Arc::new(look) });
        self
    }

    /// How to wait for a further sign of life of a running machine. Without it the suite has to
    /// believe the plugin that a machine runs on.
    #[must_use]
    pub fn alive(mut self, alive: impl Fn(&Instance, &str) -> Answer<()> + Send + Sync + 'static) -> Self {
        self.alive = Some(Arc::new(alive));
        self
    }

    /// How to find what belongs to the machines on this host: processes, sockets, disks. There may
    /// be none when all machines are powered off.
    #[must_use]
    pub fn leftovers(mut self, find: impl Fn() -> Answer<Vec<String>> + Send + Sync + 'static) -> Self {
        self.leftovers = Arc::new(find);
        self
    }

    /// How to make restores of `machine` fail, and how to mend it again. It may be one of the
    /// suite's machines or another.
    #[must_use]
    pub fn breakage(
        mut self,
        machine: &str,
        spoil: impl Fn() -> Answer<()> + Send + Sync + 'static,
        mend: impl Fn() -> Answer<()> + Send + Sync + 'static,
    ) -> Self {
        let machine = machine.to_owned();
        self.breakage = Some(Breakage { machine, spoil: Box::new(spoil), mend: Box::new(mend) });
        self
    }

    /// How to end the running `machine` behind the plugin's back. It may be one of the suite's
    /// machines or another.
    #[must_use]
    pub fn death(mut self, machine: &str, kill: impl Fn() -> Answer<()> + Send + Sync + 'static) -> Self {
        self.death = Some(Death { machine: machine.to_owned(), kill: Box::new(kill) });
        self
    }

    /// A requirement that is not tried, and why: what the backend cannot do is said, not passed over.
    #[must_use]
    pub fn skip(mut self, requirement: &str, why: &str) -> Self {
        self.skip.push((requirement.to_owned(), why.to_owned()));
        self
    }

    /// How often a requirement that may hold by luck is tried; 3 unless given, and once at least.
    #[must_use]
    pub fn rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds.max(1);
        self
    }

    /// The deadline of calls that ought to succeed; 60 seconds unless given. A good plugin never
    /// needs it, so it costs time only where something is wrong.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Why this requirement is not to be tried, if so.
    pub(super) fn left_out(&self, requirement: &str) -> Option<&str> {
        self.skip.iter().find(|(name, _)| name == requirement).map(|(_, why)| why.as_str())
    }
}
