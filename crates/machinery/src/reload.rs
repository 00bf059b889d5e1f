//! A new configuration while machines run.
//!
//! A machinery keeps its machines in a [`Roster`]. A reload *plans* first: what the new configuration
//! says is put beside the machines there are, and nothing changes. Only when all that is new has been
//! made, and all that is old let go, does the plan take the place of the old list, all at once.
//!
//! ```text
//!                    │ as it was │ otherwise, or gone │ new
//!   in use           │ kept      │ kept, for later    │ –
//!   powered off      │ kept      │ made anew, dropped │ made
//! ```

use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, Setup};

/// What became of the machines that there were.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reloaded {
    /// Those that are otherwise now.
    pub changed: Vec<String>,
    /// Those that are in use, and that the new configuration changes or removes. They stay as they are;
    /// the host asks once more when they are free.
    pub later: Vec<String>,
}

/// What a plugin is asked, as it crosses the interface.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReloadRequest {
    pub setup: Setup,
    pub in_use: Vec<String>,
}

/// A machine in a [`Roster`].
pub trait Member {
    /// All that its configuration says of it.
    type Keys: PartialEq;

    /// Its name, in its keys.
    fn name_in(keys: &Self::Keys) -> &str;

    /// What it was made of.
    fn keys(&self) -> &Self::Keys;
}

/// The machines of a machinery, in the order of the configuration.
#[derive(Debug)]
pub struct Roster<M>(RwLock<Vec<Arc<M>>>);

/// A roster to be, and what that means for the one there is.
#[derive(Debug)]
pub struct Plan<M> {
    machines: Vec<Arc<M>>,
    /// Machines that are made for it.
    pub fresh: Vec<Arc<M>>,
    /// Machines that are not in it any more. They are powered off, but may stand by.
    pub gone: Vec<Arc<M>>,
    /// What became of those there were.
    pub outcome: Reloaded,
}

impl<M: Member> Roster<M> {
    /// A roster of these machines.
    pub fn new(machines: Vec<Arc<M>>) -> Self {
        Roster(RwLock::new(machines))
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<M>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The machine of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NoSuchMachine`](crate::ErrorKind::NoSuchMachine) if there is none.
    pub fn find(&self, name: &str) -> Result<Arc<M>> {
        let machines = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let machine = machines.iter().find(|machine| M::name_in(machine.keys()) == name);
        machine.cloned().ok_or_else(|| Error::no_such_machine(name))
    }

    /// Puts what is wanted beside what there is; `make` makes a machine, and must leave all others alone.
    pub fn plan(
        &self,
        wanted: Vec<M::Keys>,
        in_use: &[String],
        mut make: impl FnMut(M::Keys) -> Arc<M>,
    ) -> Plan<M> {
        let mut old = self.all();
        let mut plan =
            Plan { machines: Vec::new(), fresh: Vec::new(), gone: Vec::new(), outcome: Reloaded::default() };
        let is_in_use = |name: &str| in_use.iter().any(|used| used == name);
        for keys in wanted {
            let name = M::name_in(&keys).to_owned();
            let found = old.iter().position(|machine| M::name_in(machine.keys()) == name);
            let machine = match found.map(|at| old.remove(at)) {
                Some(machine) if *machine.keys() == keys => machine,
                Some(machine) if is_in_use(&name) => {
                    plan.outcome.later.push(name);
                    machine
                }
                other => plan.make(other, &name, keys, &mut make),
            };
            plan.machines.push(machine);
        }
        let (kept, gone) = old.into_iter().partition(|machine| is_in_use(M::name_in(machine.keys())));
        plan.keep(kept);
        plan.gone.extend::<Vec<_>>(gone);
        plan
    }

    /// Puts the plan in the place of the old list.
    pub fn follow(&self, plan: Plan<M>) -> Reloaded {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = plan.machines;
        plan.outcome
    }
}

impl<M: Member> Plan<M> {
    fn make(
        &mut self,
        old: Option<Arc<M>>,
        name: &str,
        keys: M::Keys,
        make: impl FnOnce(M::Keys) -> Arc<M>,
    ) -> Arc<M> {
        if let Some(old) = old {
            self.outcome.changed.push(name.to_owned());
            self.gone.push(old);
        }
        let machine = make(keys);
        self.fresh.push(Arc::clone(&machine));
        machine
    }

    /// Machines in use that are not wanted any more.
    fn keep(&mut self, machines: Vec<Arc<M>>) {
        let names = machines.iter().map(|machine| M::name_in(machine.keys()).to_owned());
        self.outcome.later.extend(names);
        self.machines.extend(machines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Keys = (String, u32);

    struct Machine(Keys);

    impl Member for Machine {
        type Keys = Keys;

        fn name_in(keys: &Keys) -> &str {
            &keys.0
        }

        fn keys(&self) -> &Keys {
            &self.0
        }
    }

    fn keys(text: &str) -> Vec<Keys> {
        let one = |word: &str| (word[..1].to_owned(), word[1..].parse().unwrap());
        text.split_whitespace().map(one).collect()
    }

    fn roster(text: &str) -> Roster<Machine> {
        Roster::new(keys(text).into_iter().map(|keys| Arc::new(Machine(keys))).collect())
    }

    fn text(machines: &[Arc<Machine>]) -> String {
        machines.iter().map(|machine| format!("{}{} ", machine.0.0, machine.0.1)).collect()
    }

    #[test]
    fn what_is_in_use_stays_and_all_else_is_as_wanted() {
        let roster = roster("a1 b1 c1 d1 e1 f1");
        let in_use = ["b", "d", "f"].map(str::to_owned);
        let kept = roster.find("a").unwrap();
        let plan = roster.plan(keys("g1 f1 b2 a1 c2"), &in_use, |keys| Arc::new(Machine(keys)));
        assert_eq!(text(&roster.all()), "a1 b1 c1 d1 e1 f1 ", "a plan changes nothing");
        assert_eq!((text(&plan.fresh), text(&plan.gone)), ("g1 c2 ".into(), "c1 e1 ".into()));
        let outcome = roster.follow(plan);
        assert_eq!(text(&roster.all()), "g1 f1 b1 a1 c2 d1 ");
        assert_eq!(outcome, Reloaded { changed: vec!["c".into()], later: vec!["b".into(), "d".into()] });
        assert!(Arc::ptr_eq(&kept, &roster.find("a").unwrap()));
        assert!(roster.find("e").is_err());
    }
}
