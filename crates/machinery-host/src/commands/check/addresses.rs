//! Reports addresses that machines of two machineries have: each plugin knows only its own machines.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use machinery::Report;
use machinery::config::ConfigFile;
use serde_yaml::{Mapping, Value};

use crate::commands::address_range::AddressRange;
use crate::config::Config;
use crate::cwd::Cwd;

/// Reports machines whose address a machine of another machinery has.
pub fn check_addresses(cwd: &Cwd, config: &Config, report: &mut Report) {
    let mut seen: HashMap<String, (&str, String)> = HashMap::new();
    for machinery in &config.machineries {
        // The plugin has reported files that cannot be read.
        let Ok(file) = ConfigFile::read(&cwd.machinery_yaml(machinery)) else { continue };
        let Ok(Some(machines)) = file.parse_at::<Mapping>(&["machines"]) else { continue };
        let sections = config.host_file.as_ref().and_then(|host| {
            host.parse_at::<Mapping>(&["machineries", machinery, "machines"]).ok().flatten()
        });
        for (name, keys) in &machines {
            let section = sections.as_ref().and_then(|sections| sections.get(name)).unwrap_or(&Value::Null);
            let name = name.as_str().unwrap_or_default();
            let own = || keys["ip"].as_str().map(str::to_owned).into_iter().collect();
            for address in clones_of(section).unwrap_or_else(own) {
                let (other, machine) =
                    seen.entry(address.clone()).or_insert_with(|| (machinery, name.to_owned()));
                if *other != machinery {
                    let reason =
                        format!("the machine '{machine}' of '{other}' has the address {address}, too");
                    let error = file.error(&["machines", name, "ip"], reason).machine(name);
                    report.problem(&error.advice("Give each machine its own address, over all machineries"));
                }
            }
        }
    }
}

/// Returns the addresses of a machine's clones, if it has clones.
fn clones_of(section: &Value) -> Option<Vec<String>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match (section.get("clones")?, section.get("clone_ips")) {
        (Value::Sequence(listed), _) => {
            Some(listed.iter().filter_map(|clone| text(clone.get("ip")?)).collect())
        }
        (Value::Number(count), Some(addresses)) => {
            let count = usize::try_from(count.as_u64()?).ok()?;
            let range = |range: AddressRange| {
                range.addresses().map(|ip| Ipv4Addr::to_string(&ip)).take(count).collect()
            };
            Some(match addresses {
                Value::Sequence(listed) => listed.iter().filter_map(text).take(count).collect(),
                other => other.as_str().and_then(|text| text.parse().ok()).map(range).unwrap_or_default(),
            })
        }
        _ => Some(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn address_of_a_machine_of_another_machinery_is_a_problem_also_for_clones() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("conf/machineries")).unwrap();
        fs::write(path(".cuckoocwd"), "").unwrap();
        fs::write(path("conf/cuckoo.yaml"), "machineries: [qemu, kvm]\n").unwrap();
        fs::write(path("conf/machineries/qemu.yaml"), "machines: {q: {ip: 10.0.0.1}, c: {ip: 10.0.0.9}}\n")
            .unwrap();
        fs::write(path("conf/machineries/kvm.yaml"), "machines:\n  k: {ip: 10.0.0.6}\n  l: {ip: 10.0.0.9}\n")
            .unwrap();
        let cwd = Cwd::find(Some(folder.path())).unwrap();
        let found = |section: &str| {
            let text = format!("machineries: {{qemu: {{machines: {{c: {{{section}}}}}}}}}\n");
            fs::write(path("conf/machinery-host.yaml"), text).unwrap();
            let mut report = Report::default();
            check_addresses(&cwd, &Config::read(&cwd).unwrap(), &mut report);
            report.findings().iter().map(|finding| finding.text.clone()).collect::<Vec<_>>()
        };
        let [text] = &found("")[..] else { panic!("one problem") };
        assert!(text.contains("kvm.yaml:3: machines.l.ip: ") && text.contains("'c' of 'qemu'"), "{text}");
        // The address inside is no address of this host's network.
        assert_eq!(found("clones: 2, clone_ips: 10.0.0.4-6"), [""; 0]);
        for clones in [
            "clones: 3, clone_ips: 10.0.0.4-6",
            "clones: 1, clone_ips: [10.0.0.6]",
            "clones: [{name: x, ip: 10.0.0.6}]",
        ] {
            let [text] = &found(clones)[..] else { panic!("one problem of {clones}") };
            assert!(text.contains("machines.k.ip: ") && text.contains("10.0.0.6, too"), "{text}");
        }
    }
}
