//! Writes the configuration of another sandbox from the machines of the running host.
//!
//! CAPE's `hosted.conf` is an INI file: a section `[hosted]`, and one for each machine, whose name is the machine's.
//! CAPE reads `0`, `yes` and the like as numbers and flags, and `%%` as `%`. Source: `lib/cuckoo/common/config.py` and
//! `lib/cuckoo/common/abstracts.py` of CAPEv2.

use std::fmt::Write;
use std::path::Path;

use machinery::config::ConfigFile;
use machinery::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::cwd::Cwd;

/// The port on which CAPE expects each agent.
const CAPE_AGENT_PORT: u64 = 8000;

/// Names of sections that mean something else to CAPE.
const TAKEN_NAMES: [&str; 12] = [
    "default",
    "false",
    "fullconfig",
    "get",
    "get_config",
    "hosted",
    "no",
    "off",
    "on",
    "refresh",
    "true",
    "yes",
];

/// The result server in `cuckoo.yaml`.
#[derive(Debug, Clone, Deserialize)]
struct ResultServer {
    listen_ip: String,
    listen_port: u16,
}

/// Returns the text of CAPE's `hosted.conf` for these machines of the host's `list`.
///
/// # Errors
/// `cuckoo.yaml` cannot be read; there is no machine; a machine's name means something else to CAPE.
pub fn cape(cwd: &Cwd, machines: &[Value]) -> Result<String> {
    let file = ConfigFile::read(&cwd.cuckoo_yaml())?;
    let result_server: Option<ResultServer> = file.parse_at(&["resultserver"])?;
    hosted_conf(&cwd.manager_socket(), result_server.as_ref(), machines)
}

fn hosted_conf(socket: &Path, result_server: Option<&ResultServer>, machines: &[Value]) -> Result<String> {
    let names: Vec<&str> = machines.iter().map(|machine| text(machine, "name")).collect();
    let Some(first) = machines.first() else {
        return Err(Error::configuration("the host has no machine to export"));
    };
    Error::all(names.iter().filter_map(|name| unusable_name(name)).collect()).map_or(Ok(()), Err)?;
    let mut conf = String::from(
        "# Made by `cuckoo-machinery export cape`. Make it anew after a change of the machines.\n",
    );
    section(
        &mut conf,
        "hosted",
        &[
            ("machines", names.join(",")),
            ("interface", text(first, "interface").to_owned()),
            ("socket", socket.display().to_string()),
        ],
    );
    for machine in machines {
        warn_of_agent_port(machine);
        let mut keys = vec![("label", text(machine, "name").to_owned())];
        keys.extend(["platform", "ip"].map(|key| (key, text(machine, key).to_owned())));
        keys.push(("arch", cape_architecture(text(machine, "architecture")).to_owned()));
        keys.push(("tags", tags(machine).join(",")));
        keys.extend(["interface", "snapshot"].map(|key| (key, text(machine, key).to_owned())));
        if let Some(ResultServer { listen_ip, listen_port }) =
            result_server.filter(|server| is_reachable(server))
        {
            keys.push(("resultserver_ip", listen_ip.clone()));
            keys.push(("resultserver_port", listen_port.to_string()));
        }
        section(&mut conf, text(machine, "name"), &keys);
    }
    Ok(conf)
}

/// Appends a section with the keys that have a value.
fn section(conf: &mut String, name: &str, keys: &[(&str, String)]) {
    // Writing to a string cannot fail.
    let _ = writeln!(conf, "\n[{name}]");
    for (key, value) in keys.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(conf, "{key} = {}", value.replace('%', "%%"));
    }
}

fn text<'a>(machine: &'a Value, key: &str) -> &'a str {
    machine[key].as_str().unwrap_or("")
}

/// Reports whether a guest can reach the address: a wildcard is none.
fn is_reachable(server: &ResultServer) -> bool {
    !matches!(server.listen_ip.as_str(), "" | "0.0.0.0" | "::")
}

/// Returns CAPE's word for an architecture. It shares all words but one with Cuckoo3.
fn cape_architecture(architecture: &str) -> &str {
    if architecture == "amd64" { "x64" } else { architecture }
}

/// Returns the machine's tags, and those that CAPE itself expects: the architecture, and the version of Windows.
fn tags(machine: &Value) -> Vec<String> {
    let own = machine["tags"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut tags: Vec<String> = own.map(str::to_owned).collect();
    let mut expected = vec![cape_architecture(text(machine, "architecture")).to_owned()];
    let version = text(machine, "os_version");
    if text(machine, "platform") == "windows" && !version.is_empty() {
        // CAPE has one tag for 8 and 8.1.
        let major = version.split('.').next().unwrap_or(version);
        expected.push(format!("win{}", major.to_lowercase()));
    }
    expected.retain(|tag| !tag.is_empty() && !tags.contains(tag));
    tags.extend(expected);
    tags
}

fn unusable_name(name: &str) -> Option<Error> {
    let is_plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    let is_number = name.parse::<i64>().is_ok();
    if is_plain && !is_number && !TAKEN_NAMES.contains(&name.to_lowercase().as_str()) {
        return None;
    }
    let reason = "CAPE cannot have a machine of this name in hosted.conf".to_owned();
    Some(Error::configuration(reason).machine(name).advice("Rename the machine in its machinery's file"))
}

fn warn_of_agent_port(machine: &Value) {
    if machine["agent_port"].as_u64().is_some_and(|port| port != CAPE_AGENT_PORT) {
        let machine = text(machine, "name");
        tracing::warn!(machine, "its agent has another port than {CAPE_AGENT_PORT}, where CAPE expects it");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machine(name: &str) -> Value {
        json!({"name": name, "label": "/vms/disk.qcow2", "platform": "windows", "os_version": "10", "ip": "10.0.0.2",
            "architecture": "amd64", "tags": ["office"], "interface": "br0", "snapshot": null, "agent_port": 8000})
    }

    fn server(ip: &str) -> ResultServer {
        ResultServer { listen_ip: ip.into(), listen_port: 2042 }
    }

    #[test]
    fn hosted_conf_has_a_section_for_each_machine() {
        let linux = json!({"name": "deb_1", "platform": "linux", "os_version": "12", "ip": "10.0.0.3",
            "architecture": "x86", "tags": ["x86"], "interface": "br1", "snapshot": "50%", "agent_port": 8000});
        let machines = [machine("win10_1"), linux];
        let conf = hosted_conf("/cwd/m.sock".as_ref(), Some(&server("10.0.0.1")), &machines).unwrap();
        let expected = "
[hosted]
machines = win10_1,deb_1
interface = br0
socket = /cwd/m.sock

[win10_1]
label = win10_1
platform = windows
ip = 10.0.0.2
arch = x64
tags = office,x64,win10
interface = br0
resultserver_ip = 10.0.0.1
resultserver_port = 2042

[deb_1]
label = deb_1
platform = linux
ip = 10.0.0.3
arch = x86
tags = x86
interface = br1
snapshot = 50%%
resultserver_ip = 10.0.0.1
resultserver_port = 2042
";
        assert_eq!(conf.split_once('\n').unwrap().1, expected);
    }

    #[test]
    fn result_server_is_left_to_cape_when_it_listens_on_all_addresses() {
        for server in [Some(server("0.0.0.0")), None] {
            let conf = hosted_conf("/m.sock".as_ref(), server.as_ref(), &[machine("a")]).unwrap();
            assert!(!conf.contains("resultserver"), "{conf}");
        }
    }

    #[test]
    fn export_is_refused_when_a_name_means_something_else_to_cape() {
        let export = |names: &[&str]| {
            let machines: Vec<Value> = names.iter().map(|name| machine(name)).collect();
            hosted_conf("/m.sock".as_ref(), None, &machines)
        };
        for name in ["Hosted", "on", "17", "a,b", "a b", "a]"] {
            let error = export(&["fine", name]).unwrap_err().to_string();
            assert!(error.contains(name) && !error.contains("fine"), "{error}");
        }
        assert!(export(&[]).is_err());
        assert!(export(&["win10_1", "win-7.b"]).is_ok());
    }
}
