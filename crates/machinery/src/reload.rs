//! A new configuration while machines run.
//!
//! A machinery keeps its machines in a [`MachineSet`]. A reload *plans* first: what the new configuration
//! says is put beside the machines there are, and nothing changes. Only when all that is new has been
//! made, and all that is old let go, does the plan take the place of the old list, all at once.
//!
//! ```text
//!                    │ as it was │ otherwise, or gone │ new
//!   in use           │ kept      │ kept, for later    │ –
//!   powered off      │ kept      │ made anew, dropped │ made
//! ```

use std::fmt::Display;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::config::ConfigFile;
use crate::{Deadline, Error, Result};

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

/// A machine in a [`MachineSet`].
pub trait Reloadable {
    /// All that its configuration says of it.
    type Keys: PartialEq;

    /// Its name, in its keys.
    fn key_name(keys: &Self::Keys) -> &str;

    /// What no two machines may have in common, as (key, value). A machine in use keeps its own also
    /// where the new configuration gives them to another one.
    fn unique(keys: &Self::Keys) -> Vec<(&'static str, Option<&str>)>;

    /// What it was made of.
    fn keys(&self) -> &Self::Keys;

    /// Its name.
    fn name(&self) -> &str {
        Self::key_name(self.keys())
    }
}

/// Expects that a key which only [`load`](crate::Machinery::load) can apply is as it was; the error names
/// both values. `file` is where the new one stands, if there is such a file.
///
/// # Errors
/// It is not.
pub fn expect_unchanged(
    file: Option<&ConfigFile>,
    key: &[&str],
    now: impl Display,
    wanted: impl Display,
) -> Result<()> {
    let (now, wanted) = (now.to_string(), wanted.to_string());
    if now == wanted {
        return Ok(());
    }
    let name = key.last().copied().unwrap_or_default();
    let reason = format!("{name} is {now} as long as the host runs, and would be {wanted} now");
    let error = match file {
        Some(file) => file.error(key, reason),
        None => Error::configuration(reason),
    };
    Err(error.advice(format!("Restart the host to have it changed, or set it to {now} again")))
}

/// The machines of a machinery, in the order of the configuration.
#[derive(Debug)]
pub struct MachineSet<M>(RwLock<Vec<Arc<M>>>);

/// A roster to be, and what that means for the one there is.
#[derive(Debug)]
pub struct ReloadPlan<M> {
    machines: Vec<Arc<M>>,
    /// Machines that are made for it.
    pub added: Vec<Arc<M>>,
    /// Machines that are not in it any more. They are powered off, but may stand by.
    pub removed: Vec<Arc<M>>,
    /// What became of those there were.
    pub outcome: Reloaded,
}

impl<M: Reloadable> MachineSet<M> {
    /// A roster of these machines.
    pub fn new(machines: Vec<Arc<M>>) -> Self {
        MachineSet(RwLock::new(machines))
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
        let machine = machines.iter().find(|machine| machine.name() == name);
        machine.cloned().ok_or_else(|| Error::no_such_machine(name))
    }

    /// Puts what is wanted, of that file, beside what there is; `make` makes a machine, and must leave all
    /// others alone.
    ///
    /// # Errors
    /// A new machine would have what one in use still has.
    pub fn plan(
        &self,
        file: &ConfigFile,
        wanted: Vec<M::Keys>,
        in_use: &[String],
        mut make: impl FnMut(M::Keys) -> Arc<M>,
    ) -> Result<ReloadPlan<M>> {
        let mut old = self.all();
        let mut plan = ReloadPlan {
            machines: Vec::new(),
            added: Vec::new(),
            removed: Vec::new(),
            outcome: Reloaded::default(),
        };
        let is_in_use = |machine: &Arc<M>| in_use.iter().any(|used| used == machine.name());
        for keys in wanted {
            let found = old.iter().position(|machine| machine.name() == M::key_name(&keys));
            match found.map(|at| old.remove(at)) {
                Some(machine) if *machine.keys() == keys => plan.machines.push(machine),
                Some(machine) if is_in_use(&machine) => plan.keep(machine),
                other => plan.make(other, make(keys)),
            }
        }
        for machine in old {
            if is_in_use(&machine) { plan.keep(machine) } else { plan.removed.push(machine) }
        }
        plan.expect_apart(file)?;
        Ok(plan)
    }

    /// Puts the plan in the place of the old list, unless it is too late for that: the host may have given
    /// the machines to somebody else by then.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) when the deadline has passed.
    pub fn commit(&self, plan: ReloadPlan<M>, deadline: Deadline) -> Result<Reloaded> {
        deadline.check("the new configuration to be taken over")?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = plan.machines;
        Ok(plan.outcome)
    }
}

impl<M: Reloadable> ReloadPlan<M> {
    /// All machines that there will be.
    pub fn machines(&self) -> &[Arc<M>] {
        &self.machines
    }

    fn make(&mut self, old: Option<Arc<M>>, machine: Arc<M>) {
        if let Some(old) = old {
            self.outcome.changed.push(old.name().to_owned());
            self.removed.push(old);
        }
        self.added.push(Arc::clone(&machine));
        self.machines.push(machine);
    }

    /// One in use, which is to be otherwise later.
    fn keep(&mut self, machine: Arc<M>) {
        self.outcome.later.push(machine.name().to_owned());
        self.machines.push(machine);
    }

    /// The configuration's own check for what is given twice knows nothing of those that stay as they were.
    fn expect_apart(&self, file: &ConfigFile) -> Result<()> {
        let kept = |machine: &&Arc<M>| self.outcome.later.iter().any(|later| later == machine.name());
        let kept: Vec<_> = self.machines.iter().filter(kept).collect();
        let clashes = |new: &Arc<M>| kept.iter().filter_map(|old| clash(file, new, old)).collect::<Vec<_>>();
        Error::all(self.added.iter().flat_map(clashes).collect()).map_or(Ok(()), Err)
    }
}

/// What the new machine would have of one that stays as it is.
fn clash<M: Reloadable>(file: &ConfigFile, new: &Arc<M>, old: &Arc<M>) -> Option<Error> {
    let taken = M::unique(old.keys());
    let is_taken = |value: &(_, Option<_>)| value.1.is_some() && taken.contains(value);
    let (key, value) = M::unique(new.keys()).into_iter().find(is_taken)?;
    let (value, old) = (value.unwrap_or_default(), old.name());
    let reason = format!("'{value}' is in use as the {key} of machine '{old}'");
    let error = file.error(&["machines", new.name(), key], reason);
    Some(error.advice(format!("Reload again when '{old}' is free: until then it stays as it is")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    type Keys = (String, String);

    #[derive(Debug)]
    struct Machine(Keys);

    impl Reloadable for Machine {
        type Keys = Keys;

        fn key_name(keys: &Keys) -> &str {
            &keys.0
        }

        fn unique(keys: &Keys) -> Vec<(&'static str, Option<&str>)> {
            vec![("label", Some(&keys.1)), ("mac_address", None)]
        }

        fn keys(&self) -> &Keys {
            &self.0
        }
    }

    fn keys(text: &str) -> Vec<Keys> {
        let one = |word: &str| (word[..1].to_owned(), word[1..].to_owned());
        text.split_whitespace().map(one).collect()
    }

    fn roster(text: &str) -> MachineSet<Machine> {
        MachineSet::new(keys(text).into_iter().map(|keys| Arc::new(Machine(keys))).collect())
    }

    fn plan(roster: &MachineSet<Machine>, wanted: &str, in_use: &[&str]) -> Result<ReloadPlan<Machine>> {
        let file = ConfigFile { path: "/c/m.yaml".into(), text: "machines:\n  x:\n    label: 1\n".into() };
        let in_use: Vec<String> = in_use.iter().map(|name| (*name).to_owned()).collect();
        roster.plan(&file, keys(wanted), &in_use, |keys| Arc::new(Machine(keys)))
    }

    fn text(machines: &[Arc<Machine>]) -> String {
        machines.iter().map(|machine| format!("{}{} ", machine.0.0, machine.0.1)).collect()
    }

    #[test]
    fn what_is_in_use_stays_and_all_else_is_as_wanted() {
        let roster = roster("a1 b2 c3 d4 e5 f6");
        let kept = roster.find("a").unwrap();
        let plan = plan(&roster, "g7 f6 b8 a1 c9", &["b", "d", "f"]).unwrap();
        assert_eq!(text(&roster.all()), "a1 b2 c3 d4 e5 f6 ", "a plan changes nothing");
        assert_eq!((text(&plan.added), text(&plan.removed)), ("g7 c9 ".into(), "c3 e5 ".into()));
        let outcome = roster.commit(plan, Deadline::after(Duration::from_secs(60))).unwrap();
        assert_eq!(text(&roster.all()), "g7 f6 b2 a1 c9 d4 ");
        assert_eq!(outcome, Reloaded { changed: vec!["c".into()], later: vec!["b".into(), "d".into()] });
        assert!(Arc::ptr_eq(&kept, &roster.find("a").unwrap()));
        assert!(roster.find("e").is_err());
    }

    #[test]
    fn nothing_is_taken_from_a_machine_in_use() {
        let roster = roster("a1 b2");
        for wanted in ["x1 b2", "a3 x1 b2"] {
            let text = plan(&roster, wanted, &["a"]).unwrap_err().to_string();
            let told =
                "/c/m.yaml:3: machines.x.label: '1' is in use as the label of machine 'a'. Reload again";
            assert!(text.starts_with(told), "{text}");
        }
        assert!(plan(&roster, "x1 b2", &["b"]).is_ok());
        assert!(plan(&roster, "x3 b2", &["a"]).is_ok());
    }

    #[test]
    fn what_only_a_start_can_change_is_told_with_both_values() {
        let file = ConfigFile { path: "/c/m.yaml".into(), text: "a: 1\ndsn: b\n".into() };
        assert_eq!(expect_unchanged(Some(&file), &["dsn"], "b", "b"), Ok(()));
        let text = expect_unchanged(Some(&file), &["dsn"], "a", "b").unwrap_err().to_string();
        assert!(
            text.starts_with("/c/m.yaml:2: dsn: dsn is a as long as the host runs, and would be b"),
            "{text}"
        );
        assert!(text.contains("Restart the host"), "{text}");
        let text = expect_unchanged(None, &["x", "dir"], "a", "b").unwrap_err().to_string();
        assert!(text.starts_with("dir is a as long"), "{text}");
    }
}
