//! `check`: checks configuration, plugins and environment, and reports all problems at once.
//!
//! The command changes nothing and needs no running host.

mod addresses;
pub mod content;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;

use machinery::config::ConfigFile;
use machinery::{Error, Report, Setup};
use rustix::fs::{Access, access, getxattr};
use rustix::process::geteuid;
use serde_yaml::{Mapping, Value};

use addresses::check_addresses;
use content::check_with_plugin;

use crate::capture;
use crate::commands::machine;
use crate::config::Config;
use crate::cuckoo;
use crate::cwd::{Cwd, expect_own_state};
use crate::load;
use crate::plugin::open::{OpenedPlugin, conflicts, open};
use crate::plugin::search::PluginSearch;
use crate::server::peers::Peers;
use crate::wall;

/// Checks the CWD, its configuration and its plugins. `on_step` gets the name of each step that may last.
pub fn check(cwd: &Cwd, search: &PluginSearch, on_step: impl Fn(&str)) -> Report {
    let mut report = Report::default();
    report.good(format!("the CWD is {}", cwd.root().display()));
    check_sockets(cwd, &mut report);
    report.keep(expect_own_state(cwd));
    check_kvm(Path::new("/dev/kvm"), &mut report);
    let config = report.keep(Config::read(cwd));
    cuckoo::check(cwd, config.as_ref().map_or(&[], |config| &config.machineries), &mut report);
    if let Some(config) = config {
        report.good(format!("cuckoo.yaml lists {}", config.machineries.join(", ")));
        report.keep(Peers::new(config.socket_group.as_deref()));
        check_tcpdump(config.capture.as_ref(), &mut report);
        wall::check(&config, cwd, &mut report);
        let mut plugins = Vec::new();
        for name in &config.machineries {
            on_step(&format!("checking '{name}'"));
            let opened = open(name, search, config.plugin_hashes.as_ref(), config.timeouts.load);
            if let Some(opened) = report.keep(opened.map_err(Error::from)) {
                check_machinery(&opened, cwd, &config, &mut report);
                plugins.push(opened);
            }
        }
        for conflict in conflicts(&plugins) {
            report.problem(&conflict);
        }
        machine::check_installed_disks(cwd, &config.machineries, &mut report);
        check_names(cwd, &config, &mut report);
        check_addresses(cwd, &config, &mut report);
    }
    report
}

fn check_sockets(cwd: &Cwd, report: &mut Report) {
    let socket = cwd.manager_socket();
    if socket.as_os_str().len() > 107 {
        report.warning(format!(
            "{} is longer than the 107 bytes of a socket address: this program can use it, Cuckoo's own client cannot. \
             Move the CWD to a shorter path",
            socket.display()
        ));
    }
    // The folder may not exist yet; then its nearest existing parent counts.
    let existing = socket.ancestors().skip(1).find(|folder| folder.exists());
    if let Some(folder) = existing
        && access(folder, Access::WRITE_OK).is_err()
    {
        report.problem(
            &Error::environment(format!("{} is not writable for this user", folder.display()))
                .advice("Run as the user that owns the CWD"),
        );
    }
}

fn check_kvm(device: &Path, report: &mut Report) {
    if !device.exists() {
        report.warning(
            "there is no /dev/kvm: guests run in software, many times slower. Enable virtualisation in the \
             firmware, or nested virtualisation where this is a virtual machine itself",
        );
        return;
    }
    // The device file can exist without a driver behind it.
    match File::options().read(true).write(true).open(device) {
        Ok(_) => report.good("/dev/kvm can be opened"),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => report.warning(
            "/dev/kvm is there, but this user may not use it: guests with -enable-kvm will not start. Add the \
             user to the group `kvm`",
        ),
        Err(error) => report.warning(format!(
            "/dev/kvm is there, but cannot be opened ({error}): guests with -enable-kvm will not start. Load the module \
             kvm_intel or kvm_amd, and enable virtualisation in the firmware"
        )),
    }
}

/// Checks that traffic can be captured, if the configuration demands it.
fn check_tcpdump(capture: Option<&capture::Settings>, report: &mut Report) {
    let Some(program) = capture.map(|settings| &settings.tcpdump) else {
        return report.good("traffic is not captured: tcpdump.enabled in cuckoo.yaml is not true");
    };
    let runs = access(program, Access::EXEC_OK).map_err(|error| error.to_string());
    let runs = runs.and_then(|()| if program.is_file() { Ok(()) } else { Err("it is no file".to_owned()) });
    if let Err(why) = runs {
        let reason = format!("cannot run {}: {why}", program.display());
        return report.problem(&Error::environment(reason).advice(capture::MISSING_ADVICE));
    }
    let has_rights = getxattr(program, "security.capability", &mut [0_u8; 64]).is_ok();
    if !geteuid().is_root() && !has_rights {
        report.warning(format!("this user may not capture traffic. {}", capture::permission_advice(program)));
    } else {
        report.good(format!("traffic is captured with {}", program.display()));
    }
}

fn check_machinery(
    OpenedPlugin { plugin, sha256 }: &OpenedPlugin,
    cwd: &Cwd,
    config: &Config,
    report: &mut Report,
) {
    let name = plugin.name();
    report.good(format!(
        "{name}: plugin {} of interface {} from {}, sha256 {sha256}",
        plugin.version(),
        plugin.interface(),
        plugin.path().display()
    ));
    let Some(setup) = report.keep(load::setup(name, cwd, config)) else { return };
    check_folders(&setup, report);
    if let Some(found) = report.keep(check_with_plugin(plugin, setup, config)) {
        report.append(found);
    }
}

fn check_folders(setup: &Setup, report: &mut Report) {
    for folder in [&setup.sockets_dir, &setup.state_dir, &setup.cache_dir] {
        if folder.exists() && access(folder.as_path(), Access::WRITE_OK).is_err() {
            report.problem(
                &Error::environment(format!("{} is not writable for this user", folder.display()))
                    .advice("Run as the user that owns the CWD"),
            );
        }
    }
}

/// Reports machine names that two machineries share: each plugin knows only its own machines.
fn check_names(cwd: &Cwd, config: &Config, report: &mut Report) {
    let mut seen: HashMap<String, &str> = HashMap::new();
    for machinery in &config.machineries {
        // The plugin has reported a file that cannot be read.
        let Ok(file) = ConfigFile::read(&cwd.machinery_yaml(machinery)) else { continue };
        let Ok(Some(machines)) = file.parse_at::<Mapping>(&["machines"]) else { continue };
        for name in machines.keys().filter_map(Value::as_str) {
            if let Some(other) = seen.insert(name.to_owned(), machinery) {
                let error =
                    file.error(&["machines", name], format!("'{other}' has a machine of this name too"));
                report.problem(
                    &error.machine(name).advice("Give each machine its own name, over all machineries"),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_device_causes_a_warning_when_it_has_no_driver() {
        let folder = tempfile::tempdir().unwrap();
        let device = folder.path().join("kvm");
        let _socket = std::os::unix::net::UnixListener::bind(&device).unwrap();
        let mut report = Report::default();
        check_kvm(&device, &mut report);
        let [finding] = report.findings() else { panic!("one finding") };
        assert_eq!(finding.level, machinery::Level::Warning);
        assert!(finding.text.contains("cannot be opened (No such device"), "{}", finding.text);
    }
}
