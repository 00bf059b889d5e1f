//! Applies a new configuration while machines run.
//!
//! A machinery keeps its machines in a [`MachineSet`]. A reload first compares the new configuration with the current
//! machines, and makes a [`ReloadPlan`], which changes nothing. The machinery then creates the new machines and
//! discards the standbys of the old ones. Only the commit replaces the list, in one step.
//!
//! ```text
//!                    │ unchanged │ changed      │ removed      │ new
//!   in use           │ kept      │ kept for now │ kept for now │ –
//!   powered off      │ kept      │ replaced     │ removed      │ added
//! ```

use std::fmt::Display;
use std::sync::{Arc, PoisonError, RwLock};

use machinery::config::ConfigFile;
use machinery::{Deadline, Error, MachineInfo, Reloaded, Result};

/// The complete configuration of one machine. A reload replaces a machine whose keys have changed.
pub trait MachineKeys: PartialEq {
    /// Returns the machine's description.
    fn info(&self) -> &MachineInfo;

    /// Returns the values that must be unique among the machines, as (key, value). A machine in use keeps its
    /// values, even if the new configuration gives them to another machine.
    fn unique(&self) -> Vec<(&'static str, Option<&str>)> {
        self.info().unique()
    }

    /// Reports whether this machine and another one may have the same value under a key of [`unique`](MachineKeys::unique).
    fn may_share(&self, _other: &Self, _key: &str, _value: &str) -> bool {
        false
    }
}

/// A machine in a [`MachineSet`].
pub trait Reloadable {
    /// The machine's complete configuration.
    type Keys: MachineKeys;

    /// Returns the keys that the machine was created with.
    fn keys(&self) -> &Self::Keys;

    /// Returns the machine's description.
    fn info(&self) -> &MachineInfo {
        self.keys().info()
    }

    /// Returns the machine's name.
    fn name(&self) -> &str {
        &self.info().name
    }
}

/// Expects that a key is unchanged which only [`load`](machinery::Machinery::load) can apply. `now` is its current value,
/// `wanted` its value in the new configuration. `file` is the file of the new value, if there is one.
///
/// # Errors
/// The value has changed. The error contains both values.
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
    let reason = format!("{name} stays {now} as long as the host runs, and the new value is {wanted}");
    let error = match file {
        Some(file) => file.error(key, reason),
        None => Error::configuration(reason),
    };
    Err(error.advice(format!("Restart the host to change it, or set it to {now} again")))
}

/// The machines of a machinery, in the order of the configuration.
#[derive(Debug)]
pub struct MachineSet<M>(RwLock<Vec<Arc<M>>>);

/// The next list of machines, and its differences from the current one.
#[derive(Debug)]
pub struct ReloadPlan<M> {
    machines: Vec<Arc<M>>,
    /// The new machines, which the machinery still has to create.
    pub added: Vec<Arc<M>>,
    /// The machines that are no longer in the list. They are powered off, but may have a standby.
    pub removed: Vec<Arc<M>>,
    /// The result for the previous machines.
    pub outcome: Reloaded,
}

impl<M: Reloadable> MachineSet<M> {
    /// Creates a set of these machines.
    pub fn new(machines: Vec<Arc<M>>) -> Self {
        MachineSet(RwLock::new(machines))
    }

    /// Returns all machines.
    pub fn all(&self) -> Vec<Arc<M>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the machine of that name.
    ///
    /// # Errors
    /// [`ErrorKind::NoSuchMachine`](machinery::ErrorKind::NoSuchMachine) if there is none.
    pub fn find(&self, name: &str) -> Result<Arc<M>> {
        let machines = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let machine = machines.iter().find(|machine| machine.name() == name);
        machine.cloned().ok_or_else(|| Error::no_such_machine(name))
    }

    /// Compares the wanted machines, from that file, with the current ones. `make` creates a machine, and must not
    /// change any other.
    ///
    /// # Errors
    /// A new machine would have a unique value of a machine in use.
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
            let found = old.iter().position(|machine| machine.name() == keys.info().name);
            match found.map(|at| old.remove(at)) {
                Some(machine) if *machine.keys() == keys => plan.machines.push(machine),
                Some(machine) if is_in_use(&machine) => plan.keep(machine),
                other => plan.make(other, make(keys)),
            }
        }
        for machine in old {
            if is_in_use(&machine) { plan.keep(machine) } else { plan.removed.push(machine) }
        }
        plan.expect_unique(file)?;
        Ok(plan)
    }

    /// Replaces the list by that of the plan. After the deadline, the list must not change: the host may have given
    /// the machines to a task by then.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`](machinery::ErrorKind::Timeout) if the deadline has passed.
    pub fn commit(&self, plan: ReloadPlan<M>, deadline: Deadline) -> Result<Reloaded> {
        deadline.check("the new configuration to be applied")?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = plan.machines;
        Ok(plan.outcome)
    }
}

impl<M: Reloadable> ReloadPlan<M> {
    /// Returns all machines of the next list.
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

    /// Keeps a machine in use that changes later.
    fn keep(&mut self, machine: Arc<M>) {
        self.outcome.later.push(machine.name().to_owned());
        self.machines.push(machine);
    }

    /// Compares the new machines with the kept ones, which the check of the new configuration does not know.
    fn expect_unique(&self, file: &ConfigFile) -> Result<()> {
        let kept = |machine: &&Arc<M>| self.outcome.later.iter().any(|later| later == machine.name());
        let kept: Vec<_> = self.machines.iter().filter(kept).collect();
        let duplicates =
            |new: &Arc<M>| kept.iter().filter_map(|old| duplicate(file, new, old)).collect::<Vec<_>>();
        Error::all(self.added.iter().flat_map(duplicates).collect()).map_or(Ok(()), Err)
    }
}

/// Returns an error if the new machine has a unique value of the kept one.
fn duplicate<M: Reloadable>(file: &ConfigFile, new: &Arc<M>, old: &Arc<M>) -> Option<Error> {
    let taken = old.keys().unique();
    let is_taken = |value: &(&'static str, Option<&str>)| {
        let may_share = |text: &str| new.keys().may_share(old.keys(), value.0, text);
        taken.contains(value) && value.1.is_some_and(|text| !may_share(text))
    };
    let (key, value) = new.keys().unique().into_iter().find(is_taken)?;
    let (value, old) = (value.unwrap_or_default(), old.name());
    let reason = format!("'{value}' is in use as the {key} of machine '{old}'");
    let error = file.error(&["machines", new.name(), key], reason);
    Some(error.advice(format!("Reload again when '{old}' is free: until then it keeps its configuration")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::config::MachineConfig;
    use std::time::Duration;

    #[derive(Debug, PartialEq)]
    struct Keys(MachineInfo);

    impl MachineKeys for Keys {
        fn info(&self) -> &MachineInfo {
            &self.0
        }
    }

    #[derive(Debug)]
    struct Machine(Keys);

    impl Reloadable for Machine {
        type Keys = Keys;

        fn keys(&self) -> &Keys {
            &self.0
        }
    }

    /// Returns the keys of a machine `a` with the label `1` for the word `a1`.
    fn one(word: &str) -> Keys {
        let config: MachineConfig = serde_yaml::from_str(&format!(
            "{{ip: 10.0.0.{}, platform: linux, os_version: 12}}",
            word.as_bytes()[0]
        ))
        .unwrap();
        Keys(MachineInfo::new(&word[..1], &config, word[1..].to_owned(), None, "lo"))
    }

    fn keys(text: &str) -> Vec<Keys> {
        text.split_whitespace().map(one).collect()
    }

    fn set(text: &str) -> MachineSet<Machine> {
        MachineSet::new(keys(text).into_iter().map(|keys| Arc::new(Machine(keys))).collect())
    }

    fn plan(set: &MachineSet<Machine>, wanted: &str, in_use: &[&str]) -> Result<ReloadPlan<Machine>> {
        let file = ConfigFile { path: "/c/m.yaml".into(), text: "machines:\n  x:\n    label: 1\n".into() };
        let in_use: Vec<String> = in_use.iter().map(|name| (*name).to_owned()).collect();
        set.plan(&file, keys(wanted), &in_use, |keys| Arc::new(Machine(keys)))
    }

    fn text(machines: &[Arc<Machine>]) -> String {
        machines.iter().map(|machine| format!("{}{} ", machine.name(), machine.info().label)).collect()
    }

    #[test]
    fn plan_keeps_machines_in_use_and_applies_the_rest() {
        let set = set("a1 b2 c3 d4 e5 f6");
        let kept = set.find("a").unwrap();
        let plan = plan(&set, "g7 f6 b8 a1 c9", &["b", "d", "f"]).unwrap();
        assert_eq!(text(&set.all()), "a1 b2 c3 d4 e5 f6 ", "a plan changes nothing");
        assert_eq!((text(&plan.added), text(&plan.removed)), ("g7 c9 ".into(), "c3 e5 ".into()));
        let outcome = set.commit(plan, Deadline::after(Duration::from_secs(60))).unwrap();
        assert_eq!(text(&set.all()), "g7 f6 b2 a1 c9 d4 ");
        assert_eq!(outcome, Reloaded { changed: vec!["c".into()], later: vec!["b".into(), "d".into()] });
        assert!(Arc::ptr_eq(&kept, &set.find("a").unwrap()));
        assert!(set.find("e").is_err());
    }

    #[test]
    fn plan_is_refused_when_a_machine_in_use_has_a_unique_value() {
        let set = set("a1 b2");
        for wanted in ["x1 b2", "a3 x1 b2"] {
            let text = plan(&set, wanted, &["a"]).unwrap_err().to_string();
            let expected =
                "/c/m.yaml:3: machines.x.label: '1' is in use as the label of machine 'a'. Reload again";
            assert!(text.starts_with(expected), "{text}");
        }
        assert!(plan(&set, "x1 b2", &["b"]).is_ok());
        assert!(plan(&set, "x3 b2", &["a"]).is_ok());
    }

    #[test]
    fn expect_unchanged_names_both_values_when_a_key_has_changed() {
        let file = ConfigFile { path: "/c/m.yaml".into(), text: "a: 1\ndsn: b\n".into() };
        assert_eq!(expect_unchanged(Some(&file), &["dsn"], "b", "b"), Ok(()));
        let text = expect_unchanged(Some(&file), &["dsn"], "a", "b").unwrap_err().to_string();
        assert!(
            text.starts_with(
                "/c/m.yaml:2: dsn: dsn stays a as long as the host runs, and the new value is b"
            ),
            "{text}"
        );
        assert!(text.contains("Restart the host"), "{text}");
        let text = expect_unchanged(None, &["x", "dir"], "a", "b").unwrap_err().to_string();
        assert!(text.starts_with("dir stays a as long"), "{text}");
    }
}
