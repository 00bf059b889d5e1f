//! The configuration of the host: a few keys of Cuckoo's `cuckoo.yaml`, and `machinery-host.yaml`.

mod export;
mod place;
mod timeouts;
mod wall;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use machinery::config::{ConfigFile, checked, empty_as_none, flag, null_as_default, port, words};
use machinery::trust::expect_trusted;
use machinery::{Error, FreeSpaceReserve, Result, parse_bytes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use crate::capture;
use crate::capture::space::DEFAULT_LIMIT;
use crate::cwd::Cwd;
use crate::plugin::checksum::AllowList;
pub use export::Export;
pub use timeouts::Timeouts;
pub use wall::{Listen, Wall, authority};

/// The content of both files.
#[derive(Debug, Clone)]
pub struct Config {
    /// The machineries to load, as listed.
    pub machineries: Vec<String>,
    /// The time limits of the calls into plugins.
    pub timeouts: Timeouts,
    /// The number of restores that may run at the same time.
    pub max_parallel_restores: NonZeroUsize,
    /// The group whose members may use the socket, in addition to the host's user and root.
    pub socket_group: Option<String>,
    /// The plugin files that may be loaded. Without a list, every trusted file may be loaded.
    pub plugin_hashes: Option<AllowList>,
    /// The space that stays free on each file system that runs and captures write to.
    pub free_space_reserve: FreeSpaceReserve,
    /// True if the host adopts the runs of an earlier one.
    pub adopts: bool,
    /// The consequence of a failure that may pass by itself.
    pub heal: Heal,
    /// The longest time that a run may last.
    pub max_run: Option<Duration>,
    /// The address to which guests send their results.
    pub result_server: Option<SocketAddr>,
    /// The settings of captures, or `None` if traffic is not captured.
    pub capture: Option<capture::Settings>,
    /// The places at which the metrics are exported.
    pub export: Export,
    /// The web page of the machines.
    pub wall: Wall,
    /// The file `machinery-host.yaml`, if it exists. Each plugin reads its section.
    pub host_file: Option<ConfigFile>,
}

/// The value of `heal`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Heal {
    /// A machine that fails by an accident is tried again, until it works.
    #[default]
    Auto,
    /// A machine that fails is disabled.
    Off,
}

/// The largest value of `max_run`, in seconds: a year.
const MAX_MAX_RUN: f64 = 31_536_000.0;

fn max_run<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    checked(deserializer, |text| {
        if matches!(text.trim(), "" | "~" | "null") {
            return Ok(None);
        }
        let seconds = text.parse().ok().filter(|seconds| *seconds > 0.0 && *seconds <= MAX_MAX_RUN);
        seconds.map(|seconds| Some(Duration::from_secs_f64(seconds))).ok_or_else(|| {
            format!(
                "{text} is not the length of a run: give seconds, more than 0 and at most 31536000 (a year)"
            )
        })
    })
}

/// The keys of `cuckoo.yaml` that the host reads.
#[derive(Debug, Deserialize)]
struct CuckooFile {
    #[serde(default, deserialize_with = "words")]
    machineries: Vec<String>,
    #[serde(default, deserialize_with = "null_as_default")]
    tcpdump: TcpdumpKeys,
    #[serde(default, deserialize_with = "null_as_default")]
    resultserver: ResultServerKeys,
}

/// The section `tcpdump`. Cuckoo3 demands it; the host captures nothing without it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TcpdumpKeys {
    #[serde(deserialize_with = "flag")]
    enabled: bool,
    #[serde(deserialize_with = "empty_as_none")]
    path: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ResultServerKeys {
    #[serde(deserialize_with = "empty_as_none")]
    listen_ip: Option<String>,
    #[serde(deserialize_with = "port")]
    listen_port: Option<u16>,
}

impl ResultServerKeys {
    /// Returns the address, unless the file has a name in its place, or none.
    fn address(&self) -> Option<SocketAddr> {
        Some(SocketAddr::new(self.listen_ip.as_ref()?.parse().ok()?, self.listen_port?))
    }
}

/// Cuckoo3's default for `tcpdump.path`.
const DEFAULT_TCPDUMP: &str = "/usr/bin/tcpdump";

/// The value of `adopt`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Adoption {
    /// It adopts those of machineries that support it.
    #[default]
    Auto,
    /// It ends them.
    Off,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostFile {
    #[serde(default, deserialize_with = "null_as_default")]
    timeouts: Timeouts,
    #[serde(default)]
    max_parallel_restores: Option<NonZeroUsize>,
    #[serde(default)]
    heal: Heal,
    #[serde(default, deserialize_with = "max_run")]
    max_run: Option<Duration>,
    #[serde(default, deserialize_with = "export::address")]
    metrics_listen: Option<SocketAddr>,
    #[serde(default, deserialize_with = "export::text_file")]
    metrics_textfile: Option<PathBuf>,
    #[serde(default, deserialize_with = "wall::listen")]
    web_listen: Option<Listen>,
    #[serde(default, deserialize_with = "wall::path")]
    web_token_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "wall::path")]
    web_novnc: Option<PathBuf>,
    #[serde(default, deserialize_with = "empty_as_none")]
    web_socket_group: Option<String>,
    #[serde(default, deserialize_with = "flag")]
    web_actions: bool,
    #[serde(default, deserialize_with = "words")]
    web_origins: Vec<String>,
    #[serde(default)]
    socket_group: Option<String>,
    #[serde(default, deserialize_with = "present")]
    plugin_hashes: Option<serde_yaml::Mapping>,
    #[serde(default)]
    free_space_reserve: FreeSpaceReserve,
    #[serde(default)]
    adopt: Adoption,
    #[serde(default, deserialize_with = "parse_bytes")]
    capture_size_limit: Option<u64>,
    #[serde(default)]
    capture_jail: capture::Jail,
    /// The sections that the plugins read.
    #[serde(default, deserialize_with = "null_as_default")]
    machineries: serde_yaml::Mapping,
}

/// Reads a key without a value as an empty list, not as a missing one.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<serde_yaml::Mapping>, D::Error> {
    null_as_default(deserializer).map(Some)
}

impl Config {
    /// Returns the sum of the limits of loading: for each machinery its file, its load, the adoption and the states, and
    /// for all together the lock of the CWD and the diagnosis.
    pub fn loading_limit(&self) -> Duration {
        let steps =
            u32::try_from(self.machineries.len()).unwrap_or(u32::MAX).saturating_mul(4).saturating_add(2);
        self.timeouts.load.saturating_mul(steps)
    }

    /// Reads both files.
    ///
    /// # Errors
    /// Every fault of the files, with file, line and key. Other users could change a file, or tcpdump.
    pub fn read(cwd: &Cwd) -> Result<Config> {
        let mut problems = Vec::new();
        let cuckoo_file = ConfigFile::read_trusted(&cwd.cuckoo_yaml())?;
        let cuckoo = parse::<CuckooFile>(&cuckoo_file, &mut problems);
        let host_file = match cwd.host_yaml() {
            // A dangling link is an error, and not a missing file.
            path if path.symlink_metadata().is_ok() => Some(ConfigFile::read_trusted(&path)?),
            _ => None,
        };
        let host =
            host_file.as_ref().and_then(|file| parse::<HostFile>(file, &mut problems)).unwrap_or_default();
        let result_server = cuckoo.as_ref().and_then(|cuckoo| cuckoo.resultserver.address());
        let (machineries, capture) = match cuckoo {
            Some(cuckoo) => {
                check_names(&cuckoo_file, &cuckoo.machineries, &mut problems);
                let capture = capture_settings(&cuckoo_file, &cuckoo, &host, &mut problems);
                (cuckoo.machineries, capture)
            }
            None => (Vec::new(), None),
        };
        let mut plugin_hashes = None;
        if let Some(file) = &host_file {
            warn_of_unlisted_sections(file, &host, &machineries);
            plugin_hashes = host.plugin_hashes.map(|list| AllowList::read(file, &list, &mut problems));
        }
        let wall = Wall {
            origins: wall::origins(host_file.as_ref(), &host.web_origins, &mut problems),
            listen: host.web_listen,
            token_file: host.web_token_file,
            actions: host.web_actions,
            novnc: host.web_novnc,
            socket_group: host.web_socket_group,
        };
        match Error::all(problems) {
            None => Ok(Config {
                machineries,
                timeouts: host.timeouts,
                max_parallel_restores: host.max_parallel_restores.unwrap_or_else(cores),
                socket_group: host.socket_group,
                plugin_hashes,
                free_space_reserve: host.free_space_reserve,
                adopts: host.adopt == Adoption::Auto,
                heal: host.heal,
                max_run: host.max_run,
                export: Export { listen: host.metrics_listen, textfile: host.metrics_textfile },
                wall,
                result_server,
                capture,
                host_file,
            }),
            Some(problems) => Err(problems),
        }
    }
}

fn parse<T: DeserializeOwned>(file: &ConfigFile, problems: &mut Vec<Error>) -> Option<T> {
    file.parse().map_err(|error| problems.push(error)).ok()
}

fn cores() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

fn check_names(file: &ConfigFile, names: &[String], problems: &mut Vec<Error>) {
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
}

fn capture_settings(
    file: &ConfigFile,
    cuckoo: &CuckooFile,
    host: &HostFile,
    problems: &mut Vec<Error>,
) -> Option<capture::Settings> {
    if !cuckoo.tcpdump.enabled {
        return None;
    }
    let result_server = &cuckoo.resultserver;
    let ip = result_server.listen_ip.as_deref();
    // The address becomes a part of tcpdump's filter.
    if let Some(ip) = ip.filter(|ip| !ip.chars().all(|c| c.is_ascii_alphanumeric() || ".:-".contains(c))) {
        let error = file.error(&["resultserver", "listen_ip"], format!("'{ip}' is not an address"));
        problems.push(error.advice("Give the IP address that guests send their results to"));
    }
    let tcpdump = cuckoo.tcpdump.path.clone().unwrap_or_else(|| Path::new(DEFAULT_TCPDUMP).into());
    if let Err(untrusted) = expect_trusted(&tcpdump) {
        problems.push(file.error(&["tcpdump", "path"], untrusted.to_string()));
    }
    Some(capture::Settings {
        tcpdump,
        result_server: ip.map(str::to_owned).zip(result_server.listen_port),
        jail: host.capture_jail,
        limit: Some(host.capture_size_limit.unwrap_or(DEFAULT_LIMIT)).filter(|limit| *limit > 0),
        reserve: host.free_space_reserve,
    })
}

fn warn_of_unlisted_sections(file: &ConfigFile, host: &HostFile, machineries: &[String]) {
    for name in host.machineries.keys().filter_map(serde_yaml::Value::as_str) {
        if !machineries.iter().any(|listed| listed == name) {
            tracing::warn!(machinery = name, file = %file.path.display(), "machinery has a section, but is not listed in cuckoo.yaml");
        }
    }
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
    fn config_ignores_other_keys_of_cuckoo_yaml() {
        let (_folder, cwd) = cwd("machineries:\n- qemu\n- kvm\nremote_storage: {x: [1]}\n", None);
        let config = Config::read(&cwd).unwrap();
        assert_eq!(config.machineries, ["qemu", "kvm"]);
        assert_eq!(config.timeouts.restore_start, Duration::from_secs(180));
    }

    #[test]
    fn capture_is_off_unless_tcpdump_is_enabled() {
        let capture = |cuckoo: &str| {
            let (_folder, cwd) = cwd(&format!("machineries: [qemu]\n{cuckoo}"), None);
            Config::read(&cwd).unwrap().capture
        };
        assert_eq!(capture(""), None);
        assert_eq!(capture("tcpdump: {enabled: false, path: /x}\n"), None);
        let settings =
            capture("tcpdump: {enabled: true}\nresultserver: {listen_ip: 10.0.0.1, listen_port: 2042}\n");
        let expected = capture::Settings {
            tcpdump: "/usr/bin/tcpdump".into(),
            result_server: Some(("10.0.0.1".into(), 2042)),
            limit: Some(1 << 30),
            reserve: FreeSpaceReserve::default(),
            jail: capture::Jail::Auto,
        };
        assert_eq!(settings, Some(expected));
        let text = error(
            "machineries: [qemu]\ntcpdump: {enabled: true}\nresultserver: {listen_ip: '1 or host 2', listen_port: 1}\n",
            None,
        );
        assert!(
            text.contains("cuckoo.yaml:3: resultserver.listen_ip: '1 or host 2' is not an address"),
            "{text}"
        );
    }

    #[test]
    fn config_reads_cuckoo_yaml_as_cuckoo_does() {
        let read = |cuckoo: &str| {
            let (_folder, cwd) = cwd(cuckoo, None);
            Config::read(&cwd).unwrap()
        };
        let config = read(
            "machineries: qemu\ntcpdump: {enabled: yes, path: ' /opt/tcpdump '}\n\
             resultserver: {listen_ip: ' 10.0.0.1 ', listen_port: '2042'}\n",
        );
        assert_eq!(config.machineries, ["qemu"]);
        let expected = capture::Settings {
            tcpdump: "/opt/tcpdump".into(),
            result_server: Some(("10.0.0.1".into(), 2042)),
            limit: Some(1 << 30),
            reserve: FreeSpaceReserve::default(),
            jail: capture::Jail::Auto,
        };
        assert_eq!(config.capture, Some(expected));
        assert_eq!(read("machineries: [' qemu ', ~, kvm]\n").machineries, ["qemu", "kvm"]);
        assert_eq!(read("machineries: [qemu]\ntcpdump: {enabled: 'off'}\n").capture, None);
        let text = error("machineries: [qemu]\ntcpdump:\n  enabled: perhaps\n", None);
        assert!(text.contains("cuckoo.yaml:3: tcpdump.enabled: 'perhaps' is not true or false"), "{text}");
        let text = error("machineries: 7\n", None);
        assert!(text.contains("cuckoo.yaml:1: machineries: invalid type: integer `7`"), "{text}");
    }

    #[test]
    fn max_parallel_restores_defaults_to_the_number_of_cores() {
        let (_folder, cwd1) = cwd("machineries: [qemu]\n", None);
        assert_eq!(Config::read(&cwd1).unwrap().max_parallel_restores, cores());
        let (_folder, cwd2) = cwd("machineries: [qemu]\n", Some("max_parallel_restores: 7\n"));
        assert_eq!(Config::read(&cwd2).unwrap().max_parallel_restores.get(), 7);
        let text = error("machineries: [qemu]\n", Some("max_parallel_restores: 0\n"));
        assert!(text.contains("max_parallel_restores"), "{text}");
    }

    #[test]
    fn plugin_hashes_are_a_list_when_empty() {
        let list = |host: &str| {
            let (_folder, cwd) = cwd("machineries: [qemu]\n", Some(host));
            Config::read(&cwd).unwrap().plugin_hashes
        };
        assert!(list("plugin_hashes:\n").is_some());
        assert!(list("plugin_hashes: {}\n").is_some());
        assert!(list("socket_group: x\n").is_none());
        let text = error("machineries: [qemu]\n", Some("x: 1\nplugin_hashes: {qemu: sha256:12}\n"));
        assert!(text.contains("unknown key `x`"), "{text}");
        let text = error("machineries: [qemu]\n", Some("plugin_hashes: {qemu: sha256:12}\n"));
        assert!(text.contains("machinery-host.yaml:1: plugin_hashes.qemu: 'sha256:12' is not"), "{text}");
        let twice = format!("plugin_hashes:\n  qemu: sha256:{0}\n  qemu: sha256:{0}\n", "0".repeat(64));
        let text = error("machineries: [qemu]\n", Some(&twice));
        assert!(text.contains("duplicate entry with key \"qemu\""), "{text}");
    }

    #[test]
    fn machinery_name_with_capitals_is_refused_with_the_lowercase_name() {
        let text = error("a: 1\nmachineries: [QEMU]\n", None);
        assert!(
            text.contains("cuckoo.yaml:2: machineries: 'QEMU'") && text.contains("Write 'qemu'"),
            "{text}"
        );
    }

    #[test]
    fn config_reports_each_fault_at_once() {
        let text = error("machineries: [qemu, qemu, '../x']\n", Some("timeouts: {stop: -1}\n"));
        for expected in ["listed twice", "'../x' is not", "timeouts.stop: -1 is not"] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        assert!(error("x: 1\n", None).contains("no machinery is listed"));
        assert!(error("machineries: [\n", None).contains("cuckoo.yaml:"));
        let text = error("machineries: [qemu]\n", Some("timeouts: {restore: 1}\n"));
        assert!(text.contains("machinery-host.yaml:1: timeouts: unknown key `restore`"), "{text}");
    }

    #[test]
    fn limits_of_captures_are_read() {
        let read = |host: &str| {
            let (_folder, cwd) = cwd("machineries: [qemu]\ntcpdump: {enabled: true}\n", Some(host));
            let config = Config::read(&cwd).unwrap();
            assert_eq!(config.free_space_reserve, config.capture.clone().unwrap().reserve);
            (config.capture.unwrap().limit, config.free_space_reserve.on(1 << 50))
        };
        assert_eq!(read("capture_size_limit: 5 MiB\nfree_space_reserve: 3 GiB\n"), (Some(5 << 20), 3 << 30));
        assert_eq!(read("capture_size_limit: 0\nfree_space_reserve: 0\n"), (None, 0));
        let text = error("machineries: [qemu]\n", Some("free_space_reserve: 3\n"));
        assert!(text.contains("free_space_reserve: '3' is not a size"), "{text}");
    }

    #[test]
    fn heal_and_max_run_are_read_and_have_defaults() {
        let read = |host: &str| {
            let (_folder, cwd) = cwd("machineries: [qemu]\n", Some(host));
            let config = Config::read(&cwd).unwrap();
            (config.heal, config.max_run)
        };
        assert_eq!(read("socket_group: x\n"), (Heal::Auto, None));
        assert_eq!(read("max_run:\n"), (Heal::Auto, None));
        assert_eq!(read("heal: auto\nmax_run: ~\n"), (Heal::Auto, None));
        assert_eq!(read("heal: off\nmax_run: 0.5\n"), (Heal::Off, Some(Duration::from_millis(500))));
        for (text, expected) in [("heal: perhaps\n", "perhaps"), ("max_run: 0\n", "0 is not the length")] {
            let error = error("machineries: [qemu]\n", Some(text));
            assert!(error.contains(expected), "{error}");
        }
    }
}
