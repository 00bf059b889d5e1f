//! The values that the operator gives for an import, because the source does not have them.

use std::str::FromStr;

use clap::Args;
use machinery::{Error, Result};
use serde_yaml::Value;

use super::entry::Machine;

/// The options, one for each key. A value without a name is that of all machines.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Values that the source lacks")]
pub struct Given {
    /// Address of a guest; can be repeated
    #[arg(long, value_name = "NAME=ADDRESS")]
    ip: Vec<Assignment>,
    /// Operating system, such as windows; without NAME= that of all machines
    #[arg(long, value_name = "[NAME=]PLATFORM")]
    platform: Vec<Assignment>,
    /// Version of the operating system, such as 10
    #[arg(long, value_name = "[NAME=]VERSION")]
    os_version: Vec<Assignment>,
    /// Snapshot to restore
    #[arg(long, value_name = "[NAME=]SNAPSHOT")]
    snapshot: Vec<Assignment>,
    /// Network interface
    #[arg(long, value_name = "[NAME=]INTERFACE")]
    interface: Vec<Assignment>,
    /// Port of Cuckoo's agent
    #[arg(long, value_name = "[NAME=]PORT")]
    agent_port: Vec<Assignment>,
    /// Tags
    #[arg(long, value_name = "[NAME=]TAG,TAG")]
    tags: Vec<Assignment>,
}

/// A value for a machine, or for all.
#[derive(Debug, Clone)]
pub struct Assignment {
    pub machine: Option<String>,
    pub value: String,
}

impl FromStr for Assignment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (machine, value) = match text.split_once('=') {
            Some((machine, value)) => (Some(machine.trim().to_owned()), value),
            None => (None, text),
        };
        match value.trim() {
            "" => Err("there is no value".to_owned()),
            value => Ok(Assignment { machine, value: value.to_owned() }),
        }
    }
}

impl Given {
    /// Returns these values of one machine.
    pub fn of(machine: &str, values: &[(&str, String)]) -> Given {
        let mut given = Given::default();
        values.iter().for_each(|(key, value)| given.complete(machine, key, value));
        given
    }

    fn all(&self) -> [(&'static str, &[Assignment]); 7] {
        [
            ("snapshot", &self.snapshot),
            ("ip", &self.ip),
            ("platform", &self.platform),
            ("os_version", &self.os_version),
            ("interface", &self.interface),
            ("agent_port", &self.agent_port),
            ("tags", &self.tags),
        ]
    }

    /// Returns the value of the key: the one for this machine, or else the one for all.
    pub fn value(&self, key: &str, machine: &str) -> Option<&str> {
        let all = self.all();
        let (_, given) = all.iter().find(|(own, _)| *own == key)?;
        let last = |wanted: Option<&str>| given.iter().rfind(|one| one.machine.as_deref() == wanted);
        last(Some(machine)).or_else(|| last(None)).map(|given| given.value.as_str())
    }

    /// Adds a value of a machine, unless the operator has given one.
    pub fn complete(&mut self, machine: &str, key: &str, value: &str) {
        if value.is_empty() || self.value(key, machine).is_some() {
            return;
        }
        let list = match key {
            "snapshot" => &mut self.snapshot,
            "ip" => &mut self.ip,
            "platform" => &mut self.platform,
            "os_version" => &mut self.os_version,
            "interface" => &mut self.interface,
            "agent_port" => &mut self.agent_port,
            "tags" => &mut self.tags,
            _ => return,
        };
        list.push(Assignment { machine: Some(machine.to_owned()), value: value.to_owned() });
    }

    /// Sets the machine's keys to the given values, which replace those of the source.
    pub fn apply(&self, machine: &mut Machine) {
        for (key, _) in self.all() {
            let value = self.value(key, &machine.name).map(|value| typed(key, value));
            machine.set(key, value);
        }
    }

    /// Expects that each named machine is one of these.
    ///
    /// # Errors
    /// An option names another machine.
    pub fn expect_names<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        let mut given = self.all().into_iter().flat_map(|(key, all)| all.iter().map(move |one| (key, one)));
        let unknown = given.find_map(|(key, one)| {
            let machine = one.machine.as_ref()?;
            (!names.clone().any(|name| name == machine)).then_some((key, machine))
        });
        let Some((key, machine)) = unknown else { return Ok(()) };
        let option = key.replace('_', "-");
        let reason = format!("--{option} names the machine '{machine}', which is not imported");
        let known: Vec<&str> = names.collect();
        Err(Error::configuration(reason).advice(format!("The machines are {}", known.join(", "))))
    }
}

/// Returns the value as it is written.
fn typed(key: &str, value: &str) -> Value {
    match key {
        "agent_port" => value.parse::<u16>().map_or_else(|_| value.into(), Value::from),
        "tags" => value.split(',').map(|tag| tag.trim().to_owned()).collect::<Vec<String>>().into(),
        "platform" => value.to_lowercase().into(),
        _ => value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::Origin;
    use super::*;

    fn given(arguments: &[&str]) -> Given {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            given: Given,
        }
        let arguments = ["import"].iter().chain(arguments);
        <Command as clap::Parser>::try_parse_from(arguments).unwrap().given
    }

    #[test]
    fn given_value_replaces_that_of_the_source_for_one_machine_or_all() {
        let given =
            given(&["--platform=Windows", "--platform=b=linux", "--agent-port=9000", "--tags=a=x, y"]);
        for (name, platform, tags) in [("a", "windows", true), ("b", "linux", false)] {
            let mut machine = Machine::new(name, Origin::default());
            machine.set("platform", Some("darwin"));
            given.apply(&mut machine);
            let entry = machine.entry();
            assert_eq!(
                (entry["platform"].as_str(), entry["agent_port"].as_u64()),
                (Some(platform), Some(9000))
            );
            assert_eq!(entry.get("tags").is_some(), tags, "{name}");
        }
    }

    #[test]
    fn given_value_is_refused_when_no_machine_has_the_name() {
        let given = given(&["--os-version=c=7", "--ip=a=10.0.0.1"]);
        let error = given.expect_names(["a", "b"].into_iter()).unwrap_err().to_string();
        assert!(
            error.contains("--os-version names the machine 'c'") && error.contains("are a, b"),
            "{error}"
        );
        assert!("a=".parse::<Assignment>().is_err());
    }
}
