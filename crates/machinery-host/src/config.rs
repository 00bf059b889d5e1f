//! What the host itself reads: a few keys of Cuckoo's `cuckoo.yaml`, and `machinery-host.yaml`.

use std::time::Duration;

use machinery::config::{ConfigFile, checked, null_as_default};
use machinery::{Error, Result};
use serde::{Deserialize, Deserializer};

use crate::cwd::Cwd;

/// Everything the host's files say.
#[derive(Debug, Clone)]
pub struct Config {
    /// The machineries to load, as listed.
    pub machineries: Vec<String>,
    /// How long each action may take.
    pub timeouts: Timeouts,
    /// `machinery-host.yaml`, if there is one; plugins read their sections of it.
    pub host_file: Option<ConfigFile>,
}

/// How long each action may take; in the file, in seconds. The defaults are Cuckoo3's for its four
/// actions.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// For [`Machinery::restore_start`](machinery::Machinery::restore_start).
    #[serde(deserialize_with = "seconds")]
    pub restore_start: Duration,
    /// For [`Machinery::norestore_start`](machinery::Machinery::norestore_start).
    #[serde(deserialize_with = "seconds")]
    pub norestore_start: Duration,
    /// For [`Machinery::stop`](machinery::Machinery::stop).
    #[serde(deserialize_with = "seconds")]
    pub stop: Duration,
    /// For [`Machinery::acpi_stop`](machinery::Machinery::acpi_stop).
    #[serde(deserialize_with = "seconds")]
    pub acpi_stop: Duration,
    /// For [`Machinery::dump_memory`](machinery::Machinery::dump_memory).
    #[serde(deserialize_with = "seconds")]
    pub dump_memory: Duration,
    /// For [`Machinery::screenshot`](machinery::Machinery::screenshot).
    #[serde(deserialize_with = "seconds")]
    pub screenshot: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            restore_start: Duration::from_secs(180),
            norestore_start: Duration::from_secs(60),
            stop: Duration::from_secs(60),
            acpi_stop: Duration::from_secs(120),
            dump_memory: Duration::from_secs(3600),
            screenshot: Duration::from_secs(30),
        }
    }
}

/// The longest limit that can be given: a day.
const LONGEST: f64 = 86_400.0;

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    checked(deserializer, |text| {
        let seconds = text.parse().ok().filter(|seconds| *seconds > 0.0 && *seconds <= LONGEST);
        seconds.map(Duration::from_secs_f64).ok_or_else(|| {
            format!("{text} is not a time limit: give seconds, more than 0 and at most 86400 (a day)")
        })
    })
}

/// The part of `cuckoo.yaml` that is read; all other keys are Cuckoo's.
#[derive(Debug, Deserialize)]
struct CuckooFile {
    #[serde(default, deserialize_with = "null_as_default")]
    machineries: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostFile {
    #[serde(default, deserialize_with = "null_as_default")]
    timeouts: Timeouts,
    /// Read by the plugins.
    #[serde(default, deserialize_with = "null_as_default")]
    machineries: serde_yaml::Mapping,
}

impl Config {
    /// Reads both files.
    ///
    /// # Errors
    /// Everything that is wrong in them, with file, line and key.
    pub fn read(cwd: &Cwd) -> Result<Config> {
        let mut problems = Vec::new();
        let machineries = machineries(&ConfigFile::read(&cwd.cuckoo_yaml())?, &mut problems);
        let host_file = match cwd.host_yaml() {
            // A link into nothing is a mistake, and no missing file.
            path if path.symlink_metadata().is_ok() => Some(ConfigFile::read(&path)?),
            _ => None,
        };
        let timeouts = match &host_file {
            Some(file) => timeouts(file, &machineries, &mut problems),
            None => Timeouts::default(),
        };
        match Error::all(problems) {
            None => Ok(Config { machineries, timeouts, host_file }),
            Some(problems) => Err(problems),
        }
    }
}

fn machineries(file: &ConfigFile, problems: &mut Vec<Error>) -> Vec<String> {
    let names = match file.parse::<CuckooFile>() {
        Ok(file) => file.machineries,
        Err(error) => {
            problems.push(error);
            return Vec::new();
        }
    };
    let wrong = |reason: String, advice: &str| file.error(&["machineries"], reason).advice(advice);
    if names.is_empty() {
        problems.push(wrong("no machinery is listed".into(), "List at least one, such as `- qemu`"));
    }
    for (index, name) in names.iter().enumerate() {
        let lowercase = name.to_lowercase();
        if *name != lowercase {
            problems.push(wrong(
                format!("'{name}' is not a machinery's name: names are lowercase"),
                &format!("Write '{lowercase}'"),
            ));
        } else if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
        {
            problems.push(wrong(
                format!("'{name}' is not a machinery's name"),
                "Use the plugin's name: letters, digits, '_' and '-'",
            ));
        } else if names[..index].contains(name) {
            problems.push(wrong(format!("'{name}' is listed twice"), "List each machinery once"));
        }
    }
    names
}

fn timeouts(file: &ConfigFile, machineries: &[String], problems: &mut Vec<Error>) -> Timeouts {
    let host: HostFile = match file.parse() {
        Ok(host) => host,
        Err(error) => {
            problems.push(error);
            return Timeouts::default();
        }
    };
    for name in host.machineries.keys().filter_map(serde_yaml::Value::as_str) {
        if !machineries.iter().any(|listed| listed == name) {
            tracing::warn!(machinery = name, file = %file.path.display(), "has a section, but is not listed in cuckoo.yaml");
        }
    }
    host.timeouts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cwd(cuckoo: &str, host: Option<&str>) -> (tempfile::TempDir, Cwd) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("conf")).unwrap();
        std::fs::write(folder.path().join(".cuckoocwd"), "").unwrap();
        std::fs::write(folder.path().join("conf/cuckoo.yaml"), cuckoo).unwrap();
        if let Some(host) = host {
            std::fs::write(folder.path().join("conf/machinery-host.yaml"), host).unwrap();
        }
        let cwd = Cwd::find(Some(folder.path())).unwrap();
        (folder, cwd)
    }

    fn error(cuckoo: &str, host: Option<&str>) -> String {
        let (_folder, cwd) = cwd(cuckoo, host);
        Config::read(&cwd).unwrap_err().to_string()
    }

    #[test]
    fn other_keys_are_cuckoos_and_ignored() {
        let (_folder, cwd) = cwd("machineries:\n- qemu\n- kvm\nremote_storage: {x: [1]}\n", None);
        let config = Config::read(&cwd).unwrap();
        assert_eq!(config.machineries, ["qemu", "kvm"]);
        assert_eq!(config.timeouts.restore_start, Duration::from_secs(180));
    }

    #[test]
    fn names_are_lowercase_and_the_error_shows_how() {
        let text = error("a: 1\nmachineries: [QEMU]\n", None);
        assert!(
            text.contains("cuckoo.yaml:2: machineries: 'QEMU'") && text.contains("Write 'qemu'"),
            "{text}"
        );
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let text = error("machineries: [qemu, qemu, '../x']\n", Some("timeouts: {stop: -1}\n"));
        for expected in ["listed twice", "'../x' is not", "timeouts.stop: -1 is not"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(error("x: 1\n", None).contains("no machinery is listed"));
        assert!(error("machineries: [\n", None).contains("cuckoo.yaml:"));
        let text = error("machineries: [qemu]\n", Some("timeouts: {restore: 1}\n"));
        assert!(text.contains("machinery-host.yaml:1: timeouts: unknown field `restore`"), "{text}");
    }
}
