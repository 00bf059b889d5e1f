//! The plugins' part of a reload: each applies its files, or all apply the old ones again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, ErrorKind, MachineInfo, Reloaded, Result, Setup};
use serde_yaml::Value;

use crate::config::Config;
use crate::cwd::Cwd;
use crate::fleet::{Machine, Machinery, Roster};
use crate::load;
use crate::plugin::call::{AbandonedCall, CallResult};

/// The setups of all machineries, by name.
pub type Setups = HashMap<String, Setup>;

/// The calls that have not returned, by machinery.
pub type AbandonedCalls = HashMap<String, AbandonedCall>;

/// Reads the setups of all machineries.
///
/// # Errors
/// A file cannot be read.
pub fn setups(cwd: &Cwd, config: &Config, roster: &Roster) -> Result<Setups> {
    let setup =
        |machinery: &Arc<Machinery>| Ok((machinery.name.clone(), load::setup(&machinery.name, cwd, config)?));
    roster.machineries().iter().map(setup).collect()
}

/// A plugin's answer to a reload.
pub struct Answer {
    /// The machines that have changed, and those that are deferred.
    pub reloaded: Reloaded,
    /// All its machines.
    pub infos: Vec<MachineInfo>,
}

/// One reload of all plugins.
pub struct PluginReload<'a> {
    /// The machineries.
    pub machineries: &'a [Arc<Machinery>],
    /// The machines that must stay as they are.
    pub in_use: Vec<&'a Arc<Machine>>,
    /// The time that each plugin has.
    pub limit: Duration,
    /// The calls of earlier reloads that have not returned.
    pub abandoned: &'a mut AbandonedCalls,
}

impl PluginReload<'_> {
    /// Has all plugins apply the new setups.
    ///
    /// # Errors
    /// A plugin refuses, or two plugins disagree. All plugins apply the old setups then. If each of them does,
    /// the error comes with their answers.
    pub async fn apply(
        &mut self,
        old: &Setups,
        new: &Setups,
    ) -> Result<Vec<Answer>, (Error, Option<Vec<Answer>>)> {
        let mut answers = Vec::new();
        let mut failed = None;
        for machinery in self.machineries {
            match self.reload(machinery, old, new).await {
                Ok(answer) => answers.push(answer),
                Err(error) => {
                    failed = Some(error.action(format!("reloading the machinery '{}'", machinery.name)));
                    break;
                }
            }
        }
        match failed.or_else(|| Error::all(conflicts(self.machineries, &answers))) {
            Some(error) => Err((error, self.roll_back(old, new).await)),
            None => Ok(answers),
        }
    }

    /// Has all plugins apply the old setups, also the one that failed: it may have applied a part. Returns their
    /// answers, if each has one.
    async fn roll_back(&mut self, old: &Setups, new: &Setups) -> Option<Vec<Answer>> {
        let mut answers = Vec::new();
        for machinery in self.machineries {
            match self.reload(machinery, new, old).await {
                Ok(answer) => answers.push(answer),
                Err(error) => {
                    tracing::error!(machinery = machinery.name, %error, "does not apply the old configuration again");
                }
            }
        }
        (answers.len() == self.machineries.len()).then_some(answers)
    }

    async fn reload(&mut self, machinery: &Arc<Machinery>, old: &Setups, new: &Setups) -> Result<Answer> {
        let name = &machinery.name;
        if self.abandoned.get(name).is_some_and(|call| !call.is_finished()) {
            return Err(Error::failed("an earlier reload has not returned from its plugin")
                .advice("Restart the host to get the machinery back"));
        }
        let (Some(before), Some(setup)) = (old.get(name), new.get(name).cloned()) else {
            return Err(Error::failed(
                "it was not there when the host was started: this is a bug of the host",
            ));
        };
        let unchanged = is_same(name, before, &setup);
        let in_use = self.in_use.iter().filter(|machine| machine.machinery.name == *name);
        let in_use: Vec<String> = in_use.map(|machine| machine.name().to_owned()).collect();
        let called = machinery.call("reload", self.limit, move |machinery, deadline| {
            let reloaded = match machinery.instance.reload(&setup, &in_use, deadline) {
                Err(error) if error.kind() == ErrorKind::Unsupported => without_reload(unchanged)?,
                reloaded => reloaded?,
            };
            Ok(Answer { reloaded, infos: machinery.instance.machines()? })
        });
        match called.await {
            CallResult::Returned(answer) => answer,
            CallResult::Abandoned(call) => {
                self.abandoned.insert(name.clone(), call);
                let reason = format!("it did not return from the plugin within {:?}", self.limit);
                Err(Error::timeout(reason).advice("Restart the host to get the machinery back"))
            }
        }
    }
}

/// Returns the answer of a plugin whose interface has no `reload`.
fn without_reload(unchanged: bool) -> Result<Reloaded> {
    if unchanged {
        return Ok(Reloaded::default());
    }
    Err(Error::unsupported("a new configuration while it runs").advice("Restart the host to use it"))
}

/// Reports whether the machinery's own files are the same.
fn is_same(name: &str, old: &Setup, new: &Setup) -> bool {
    // A file that is no YAML was refused before.
    let section = |setup: &Setup| setup.section::<Value>(name).ok();
    old.config.text == new.config.text && section(old) == section(new)
}

/// Returns the conflicts between machines: a name is unique over all machineries, and the addresses of a guest
/// within one. A machine in use keeps its addresses, which the new configuration may give to another one.
fn conflicts(machineries: &[Arc<Machinery>], answers: &[Answer]) -> Vec<Error> {
    let infos = |answer: &Answer| answer.infos.clone();
    let all: Vec<_> = machineries.iter().cloned().zip(answers.iter().map(infos)).collect();
    let mut found = load::duplicate_names(&all);
    for (_, infos) in &all {
        let mut first = HashMap::new();
        for info in infos {
            let shared = info.unique().into_iter().filter_map(|(key, value)| {
                let other: &str = first.entry((key, value?)).or_insert(info.name.as_str());
                (other != info.name).then_some((key, other))
            });
            // Collected, so that every address enters the map.
            if let Some((key, other)) = shared.collect::<Vec<_>>().first() {
                let reason = format!("it has the {key} of machine '{other}', which is in use");
                found.push(
                    Error::configuration(reason).machine(&info.name).advice("Reload when that one is off"),
                );
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use machinery::config::ConfigFile;

    use super::*;
    use crate::fleet::fake_plugin::{FakePlugin, info};

    fn setup(config: &str, host: Option<&str>) -> Setup {
        let file = |text: &str| ConfigFile { path: "/cwd/file.yaml".into(), text: text.into() };
        let folder = || "/cwd".into();
        Setup {
            config: file(config),
            host_config: host.map(file),
            sockets_dir: folder(),
            state_dir: folder(),
            cache_dir: folder(),
            adopts: false,
            result_server: None,
        }
    }

    #[test]
    fn machinery_is_the_same_only_when_its_file_and_its_section_are() {
        let section = |value: u32| format!("machineries:\n  m: {{a: {value}}}\n  other: {{b: 1}}\n");
        let old = setup("x: 1", Some(&section(1)));
        let moved = section(1).replace("b: 1", "b: 2");
        assert!(is_same("m", &old, &setup("x: 1", Some(&moved))), "only another section has changed");
        assert!(!is_same("m", &old, &setup("x: 2", Some(&section(1)))));
        assert!(!is_same("m", &old, &setup("x: 1", Some(&section(2)))));
        assert!(!is_same("m", &old, &setup("x: 1", None)));
    }

    #[test]
    fn plugin_without_reload_refuses_another_configuration() {
        assert_eq!(without_reload(true).unwrap(), Reloaded::default());
        let error = without_reload(false).unwrap_err().to_string();
        assert!(error.contains("Restart the host"), "{error}");
    }

    /// Returns two machineries with their plugins, and setups whose text is this.
    fn machineries() -> ([FakePlugin; 2], Vec<Arc<Machinery>>, impl Fn(&str) -> Setups) {
        let plugins = [FakePlugin::default(), FakePlugin::default()];
        let names = ["a", "b"];
        let machineries = names.iter().zip(&plugins).map(|(name, plugin)| plugin.machinery(name)).collect();
        let setups = move |text: &str| names.map(|name| (name.to_owned(), setup(text, None))).into();
        (plugins, machineries, setups)
    }

    async fn apply(
        machineries: &[Arc<Machinery>],
        old: &Setups,
        new: &Setups,
    ) -> Result<usize, (String, Option<usize>)> {
        let (limit, mut abandoned) = (Duration::from_secs(60), AbandonedCalls::new());
        let mut reload = PluginReload { machineries, in_use: Vec::new(), limit, abandoned: &mut abandoned };
        let applied = reload.apply(old, new).await;
        applied
            .map(|answers| answers.len())
            .map_err(|(error, rolled_back)| (error.to_string(), rolled_back.map(|answers| answers.len())))
    }

    #[tokio::test]
    async fn plugins_apply_the_old_configuration_again_when_one_fails() {
        let (plugins, machineries, setups) = machineries();
        let (old, new) = (setups("old"), setups("new"));
        assert_eq!(apply(&machineries, &old, &new).await, Ok(2));
        plugins[1].fail("reload", Error::failed("no such disk"));
        plugins.iter().for_each(|plugin| drop(plugin.take_calls()));
        let (error, rolled_back) = apply(&machineries, &old, &new).await.unwrap_err();
        assert!(error.contains("no such disk") && error.contains("'b'"), "{error}");
        assert_eq!(rolled_back, Some(2));
        assert_eq!(plugins.map(|plugin| plugin.take_calls().len()), [2, 2]);
    }

    #[tokio::test]
    async fn rollback_has_no_answers_when_a_plugin_does_not_apply_the_old_configuration() {
        let (plugins, machineries, setups) = machineries();
        for _ in 0..2 {
            plugins[0].fail("reload", Error::failed("no such disk"));
        }
        let (_, rolled_back) = apply(&machineries, &setups("old"), &setups("new")).await.unwrap_err();
        assert_eq!(rolled_back, None);
    }

    #[tokio::test]
    async fn plugin_without_reload_accepts_only_the_same_configuration() {
        let (plugins, machineries, setups) = machineries();
        let unsupported = || plugins[0].fail("reload", Error::unsupported("reload"));
        unsupported();
        assert_eq!(apply(&machineries, &setups("old"), &setups("old")).await, Ok(2));
        unsupported();
        let (error, _) = apply(&machineries, &setups("old"), &setups("new")).await.unwrap_err();
        assert!(error.contains("Restart the host"), "{error}");
    }

    #[tokio::test]
    async fn configuration_is_refused_when_two_machines_of_a_machinery_share_an_address() {
        let (plugins, machineries, setups) = machineries();
        let shared = |name: &str| MachineInfo { ip: "10.0.0.1".into(), ..info(name) };
        let conflict = async |[a, b]: [Vec<MachineInfo>; 2]| {
            plugins[0].set_machines(a, Reloaded::default());
            plugins[1].set_machines(b, Reloaded::default());
            apply(&machineries, &setups("old"), &setups("new")).await.err().map(|(error, _)| error)
        };
        assert_eq!(conflict([vec![shared("m"), info("n")], vec![shared("o")]]).await, None);
        let error = conflict([vec![shared("m"), shared("n")], Vec::new()]).await.unwrap();
        assert!(error.contains("ip of machine 'm'"), "{error}");
        let error = conflict([vec![info("m")], vec![info("m")]]).await.unwrap();
        assert!(error.contains("'m'"), "{error}");
    }
}
