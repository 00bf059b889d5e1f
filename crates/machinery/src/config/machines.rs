//! Reads the `machines` mapping of a machinery's configuration file: the shared keys, and the machinery's own keys.

use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::file::ConfigFile;
use super::values;
use crate::Error;

/// The keys of a machine that all machineries share. Source: Cuckoo3's `machineries/config.py`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MachineConfig {
    /// The static address configured inside the guest.
    pub ip: String,
    /// The operating system's family, such as `windows`; lowercase.
    #[serde(deserialize_with = "values::lowercase")]
    pub platform: String,
    /// The operating system's version. It is always a text: a YAML `10` becomes "10".
    pub os_version: String,
    /// The processor architecture, in lowercase. The default is `amd64`.
    #[serde(default = "amd64", deserialize_with = "values::lowercase")]
    pub architecture: String,
    /// The network interface for captures of the machine's traffic, if it is not the machinery's.
    #[serde(default, deserialize_with = "values::empty_as_none")]
    pub interface: Option<String>,
    /// The TCP port of Cuckoo's agent in the guest. The default is 8000.
    #[serde(default = "agent_port", deserialize_with = "agent_port_in")]
    pub agent_port: u16,
    /// The MAC address, in lowercase: `aa:bb:cc:dd:ee:ff`.
    #[serde(default, deserialize_with = "mac_address")]
    pub mac_address: Option<String>,
    /// The software that is installed in the guest.
    #[serde(default, deserialize_with = "values::words")]
    pub tags: Vec<String>,
}

const SHARED_KEYS: [&str; 8] =
    ["ip", "platform", "os_version", "architecture", "interface", "agent_port", "mac_address", "tags"];

/// One machine: its name, the shared keys, and the machinery's own keys `T`.
#[derive(Debug, Clone)]
pub struct Configured<T> {
    /// Unique over all machineries.
    pub name: String,
    /// The shared keys.
    pub shared: MachineConfig,
    /// The machinery's own keys. Give `T` `#[serde(deny_unknown_fields)]`.
    pub own: T,
}

/// All machines of a file, in its order. A duplicate name is an error.
#[derive(Debug, Clone)]
pub struct Machines<T>(Vec<Configured<T>>);

impl<T> Machines<T> {
    /// Returns the machines, in the file's order.
    pub fn iter(&self) -> std::slice::Iter<'_, Configured<T>> {
        self.0.iter()
    }

    /// Returns an error for each duplicate among values that must be unique. `values` returns the values of a machine
    /// as (key, value); a `None` is not compared.
    pub fn duplicates<'a>(
        &'a self,
        file: &ConfigFile,
        values: impl Fn(&'a Configured<T>) -> Vec<(&'static str, Option<&'a str>)>,
    ) -> Vec<Error> {
        let mut seen: HashMap<(&str, &str), &str> = HashMap::new();
        let mut errors = Vec::new();
        for machine in self.iter() {
            for (key, value) in values(machine) {
                let Some(value) = value else { continue };
                match seen.get(&(key, value)) {
                    Some(other) => errors.push(
                        file.error(
                            &["machines", &machine.name, key],
                            format!("'{value}' is already the {key} of machine '{other}'"),
                        )
                        .advice(format!("Give each machine its own {key}")),
                    ),
                    None => {
                        seen.insert((key, value), &machine.name);
                    }
                }
            }
        }
        errors
    }
}

impl<T> IntoIterator for Machines<T> {
    type Item = Configured<T>;
    type IntoIter = std::vec::IntoIter<Configured<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T> Default for Machines<T> {
    fn default() -> Self {
        Machines(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Machines<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MachinesVisitor(PhantomData))
    }
}

struct MachinesVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for MachinesVisitor<T> {
    type Value = Machines<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping from machine names to machines")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Machines::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut machines: Vec<Configured<T>> = Vec::new();
        while let Some(MachineName(name)) = map.next_key()? {
            let first = machines.iter().all(|machine| machine.name != name);
            let Keys { shared, own } = map.next_value_seed(KeysOf { first, keys: PhantomData })?;
            machines.push(Configured { name, shared, own });
        }
        Ok(Machines(machines))
    }
}

/// The maximum length of a machine's name, in bytes: file names may have 255 bytes on most file systems, 143
/// on some.
const MAX_NAME: usize = 100;

/// Reports whether a machine can have that name. It becomes part of file and socket names, so it must not be a path.
pub fn is_machine_name(name: &str) -> bool {
    let plain = |c: char| c.is_alphanumeric() || "-_.@+ ".contains(c);
    !name.is_empty() && name.len() <= MAX_NAME && !name.starts_with('.') && name.chars().all(plain)
}

/// The name of a machine.
struct MachineName(String);

impl<'de> Deserialize<'de> for MachineName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        values::checked(deserializer, |name| {
            if is_machine_name(name) {
                return Ok(MachineName(name.to_owned()));
            }
            let length = name.len();
            Err(match length > MAX_NAME {
                true => format!(
                    "'{name}' cannot be a machine's name: it has {length} bytes, and may have {MAX_NAME} (a letter \
                     beyond ASCII has two or more)"
                ),
                false => format!(
                    "'{name}' cannot be a machine's name: use up to {MAX_NAME} bytes of letters, digits, '-', '_', '.', \
                     '@', '+' and space, not starting with '.'"
                ),
            })
        })
    }
}

/// The keys of one machine, shared and own.
struct Keys<T> {
    shared: MachineConfig,
    own: T,
}

struct KeysOf<T> {
    first: bool,
    keys: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for KeysOf<T> {
    type Value = Keys<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for KeysOf<T> {
    type Value = Keys<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping with the machine's keys")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        if !self.first {
            return Err(de::Error::custom("this machine's name is given twice"));
        }
        let mut shared = serde_yaml::Mapping::new();
        let own = T::deserialize(MapAccessDeserializer::new(OwnKeys { map, shared: &mut shared }))?;
        shared.retain(|_, value| !value.is_null());
        let shared = serde_yaml::from_value(serde_yaml::Value::Mapping(shared)).map_err(de::Error::custom)?;
        Ok(Keys { shared, own })
    }
}

/// A view of a machine's mapping that collects the shared keys and passes on the rest. The machinery's type can thus
/// deny unknown fields, and every error keeps the parser's line.
struct OwnKeys<'a, A> {
    map: A,
    shared: &'a mut serde_yaml::Mapping,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for OwnKeys<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        let mut seed = Some(seed);
        loop {
            match self.map.next_key_seed(Sort(&mut seed))? {
                None => return Ok(None),
                Some(Sorted::Own(key)) => return Ok(Some(key)),
                Some(Sorted::Shared(key)) => {
                    let value = self.map.next_value_seed(SharedValue(key))?;
                    if self.shared.insert(key.into(), value).is_some() {
                        return Err(de::Error::duplicate_field(key));
                    }
                }
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

enum Sorted<V> {
    Shared(&'static str),
    Own(V),
}

struct Sort<'a, K>(&'a mut Option<K>);

impl<'de, K: DeserializeSeed<'de>> DeserializeSeed<'de> for Sort<'_, K> {
    type Value = Sorted<K::Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de, K: DeserializeSeed<'de>> Visitor<'de> for Sort<'_, K> {
    type Value = Sorted<K::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<Self::Value, E> {
        if let Some(shared) = SHARED_KEYS.into_iter().find(|shared| *shared == key) {
            return Ok(Sorted::Shared(shared));
        }
        let seed = self.0.take().ok_or_else(|| E::custom("a key was read twice"))?;
        seed.deserialize(StrDeserializer::new(key)).map(Sorted::Own)
    }
}

/// Checks one shared value during parsing, so that an error has its line.
struct SharedValue(&'static str);

impl<'de> DeserializeSeed<'de> for SharedValue {
    type Value = serde_yaml::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let text = |text: Option<String>| text.map_or(serde_yaml::Value::Null, Into::into);
        Ok(match self.0 {
            "tags" => values::words(deserializer)?.into(),
            "agent_port" => agent_port_in(deserializer)?.into(),
            "mac_address" => text(mac_address(deserializer)?),
            "interface" | "architecture" => text(values::empty_as_none(deserializer)?),
            _ => values::checked(deserializer, required)?.into(),
        })
    }
}

fn required(text: &str) -> Result<String, String> {
    values::stripped(text).map(str::to_owned).ok_or_else(|| "a value is needed here".to_owned())
}

fn agent_port_in<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    Ok(values::port(deserializer)?.unwrap_or_else(agent_port))
}

fn mac_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    values::checked(deserializer, |text| {
        let Some(text) = values::stripped(text) else { return Ok(None) };
        let pairs: Vec<&str> = text.split(':').collect();
        let hex = |pair: &&str| pair.len() == 2 && pair.bytes().all(|byte| byte.is_ascii_hexdigit());
        if pairs.len() == 6 && pairs.iter().all(hex) {
            Ok(Some(text.to_lowercase()))
        } else {
            Err(format!("'{text}' is not a MAC address: write it as aa:bb:cc:dd:ee:ff, in quotes"))
        }
    })
}

fn amd64() -> String {
    "amd64".to_owned()
}

fn agent_port() -> u16 {
    8000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Own {
        #[serde(deserialize_with = "values::text")]
        label: String,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        machines: Machines<Own>,
    }

    const GOOD: &str = "\
machines:
  win10_1:
    label: w10
    ip: 10.0.0.1
    platform: Windows
    os_version: 10
    mac_address: AA:BB:CC:DD:EE:FF
    interface:
    tags:
  ubuntu:
    ip: 10.0.0.2
    platform: linux
    os_version: 18.10
    architecture: X86
    agent_port: 9000
    interface: br1
    tags: [a, 7]
    label: u18
";

    fn file(text: &str) -> ConfigFile {
        ConfigFile { path: "/c/m.yaml".into(), text: text.into() }
    }

    fn fails(change: &str, by: &str) -> String {
        assert!(GOOD.contains(change), "{change}");
        file(&GOOD.replace(change, by)).parse::<Config>().unwrap_err().to_string()
    }

    #[test]
    fn shared_and_own_keys_mix_in_any_order() {
        let machines = file(GOOD).parse::<Config>().unwrap().machines.0;
        let [win, ubuntu] = &machines[..] else { panic!("two machines") };
        assert_eq!(win.name, "win10_1");
        assert_eq!((win.shared.os_version.as_str(), win.shared.platform.as_str()), ("10", "windows"));
        assert_eq!(win.shared.mac_address.as_deref(), Some("aa:bb:cc:dd:ee:ff"));
        assert_eq!((win.shared.agent_port, win.shared.architecture.as_str()), (8000, "amd64"));
        assert_eq!((&win.shared.interface, win.shared.tags.len()), (&None, 0));
        assert_eq!(ubuntu.own, Own { label: "u18".into() });
        assert_eq!(
            (ubuntu.shared.os_version.as_str(), ubuntu.shared.architecture.as_str()),
            ("18.10", "x86")
        );
        assert_eq!(ubuntu.shared.tags, ["a", "7"]);
    }

    #[test]
    fn error_has_its_line_and_key_when_a_machine_is_wrong() {
        for (change, by, expect) in [
            (
                "    agent_port: 9000",
                "    agent_port: 70000",
                "/c/m.yaml:15: machines.ubuntu.agent_port: 70000",
            ),
            (
                "    mac_address: AA:",
                "    mac_address: AG:",
                "/c/m.yaml:7: machines.win10_1.mac_address: 'AG:",
            ),
            ("    label: w10", "    lable: w10", "/c/m.yaml:3: machines.win10_1: unknown key `lable`"),
            ("    tags: [a, 7]", "    tags: {a: 7}", "/c/m.yaml:17: machines.ubuntu.tags: invalid type"),
            ("    ip: 10.0.0.1\n", "    ip:\n", "/c/m.yaml:4: machines.win10_1.ip: a value is needed"),
            ("  ubuntu:", "  ../u:", "'../u' cannot be a machine's name"),
            ("  ubuntu:", "  win10_1:", "machines.win10_1: this machine's name is given twice"),
            ("    platform: linux\n", "", "machines.ubuntu: missing key `platform`"),
            ("    ip: 10.0.0.2\n", "    ip: 10.0.0.2\n    ip: 10.0.0.3\n", "duplicate field `ip`"),
        ] {
            let text = fails(change, by);
            assert!(text.contains(expect), "{by:?}: {text}");
        }
    }

    #[test]
    fn shared_keys_are_read_as_cuckoo_reads_them() {
        let text = "\
machines:
  win10:
    label: ' w10 '
    ip: ' 10.0.0.1 '
    platform: ' Windows '
    os_version: ' 10 '
    architecture: ' AMD64 '
    mac_address: ' AA:BB:CC:DD:EE:FF '
    interface: ' br0 '
    agent_port: '8001'
    tags: ' dotnet '
";
        let machines = file(text).parse::<Config>().unwrap().machines.0;
        let Configured { shared, own, .. } = &machines[0];
        assert_eq!((shared.ip.as_str(), shared.platform.as_str()), ("10.0.0.1", "windows"));
        assert_eq!((shared.os_version.as_str(), shared.architecture.as_str()), ("10", "amd64"));
        assert_eq!(shared.mac_address.as_deref(), Some("aa:bb:cc:dd:ee:ff"));
        assert_eq!((shared.interface.as_deref(), shared.agent_port), (Some("br0"), 8001));
        assert_eq!((shared.tags.as_slice(), own.label.as_str()), (["dotnet".to_owned()].as_slice(), "w10"));
    }

    #[test]
    fn duplicates_are_reported_with_line_and_machine() {
        let file = file(&GOOD.replace("10.0.0.2", "10.0.0.1"));
        let machines = file.parse::<Config>().unwrap().machines;
        let errors = machines.duplicates(&file, |machine| {
            vec![("ip", Some(&machine.shared.ip)), ("mac_address", machine.shared.mac_address.as_deref())]
        });
        assert_eq!(errors.len(), 1);
        let text = errors[0].to_string();
        assert!(text.starts_with("/c/m.yaml:11: machines.ubuntu.ip: '10.0.0.1' is already"), "{text}");
        assert!(text.contains("win10_1"), "{text}");
    }

    #[test]
    fn name_is_refused_with_its_bytes_when_it_is_too_long() {
        let named = |name: &str| {
            let keys = "{ip: 10.0.0.1, platform: linux, os_version: 1}";
            let text = format!("machines:\n  {name}: {keys}\n");
            file(&text).parse_at::<Machines<serde_yaml::Mapping>>(&["machines"])
        };
        for good in ["n".repeat(100), "ж".repeat(50)] {
            assert!(named(&good).is_ok(), "{good}");
        }
        let text = named(&"ж".repeat(51)).unwrap_err().to_string();
        assert!(text.contains("it has 102 bytes, and may have 100"), "{text}");
    }

    #[test]
    fn machines_are_empty_when_the_key_has_no_value() {
        assert_eq!(file("machines:\n").parse::<Config>().unwrap().machines.iter().count(), 0);
    }
}
