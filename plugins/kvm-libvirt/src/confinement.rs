//! The confinement that libvirt gives its QEMUs on this host: findings for `check`.
//!
//! Code that escapes from a guest runs inside QEMU, with all of QEMU's rights. libvirt takes rights away by a security
//! driver (SELinux or AppArmor), a user, a seccomp filter, and a mount namespace, as `qemu.conf` says.
//!
//! libvirt names driver and user in its capabilities: a `<secmodel>` for each driver, and the base label of `dac` for the
//! user. It does not name the rest, which only the process of a running domain shows. Sources: libvirt's
//! docs/formatcaps.rst, src/qemu/qemu_security.c and src/qemu/qemu.conf.in; proc(5).

use std::fs;

use machinery::Report;
use machinery_backend::process;
use roxmltree::Document;
use virt::connect::Connect;

use crate::access::{self, User};
use crate::domain;
use crate::dsn;

/// The file with libvirt's settings for QEMU.
const QEMU_CONF: &str = "/etc/libvirt/qemu.conf";

/// A security driver, with its domain of interpretation.
#[derive(Debug, PartialEq, Eq)]
struct SecurityModel {
    name: String,
    doi: String,
}

/// Reports how libvirt confines the domains with these labels.
pub fn check<'a>(connect: &Connect, labels: impl Iterator<Item = &'a str>, report: &mut Report) {
    let Some(uri) = connect.uri().ok().filter(|uri| dsn::driver(uri) == "qemu") else { return };
    if dsn::is_session(&uri) {
        return report.warning(
            "kvm: a session's libvirt runs QEMU with all rights of this user, and without a security driver: code that \
             escapes into QEMU can change every file of this user. Use the dsn qemu:///system",
        );
    }
    let Ok(capabilities) = connect.capabilities() else {
        return report.warning("kvm: libvirt does not say how it confines QEMU");
    };
    check_driver(&security_models(&capabilities), report);
    check_user(access::user_of_qemu(&capabilities), report);
    if let Some(host) = dsn::host(&uri) {
        return report.warning(format!(
            "kvm: QEMU's seccomp filter, capabilities and mount namespace are not known here, because its processes are \
             on {host}. Look there at /proc/PID/status of a running QEMU"
        ));
    }
    let process = labels.filter_map(|label| Some((label, Process::of(connect, label)?))).next();
    match process {
        Some((label, process)) => check_process(label, &process, report),
        None => report.good(
            "kvm: QEMU's seccomp filter, capabilities and mount namespace are not known while no domain runs. Use `check` \
             again while a machine runs",
        ),
    }
}

fn security_models(capabilities: &str) -> Vec<SecurityModel> {
    let Ok(document) = Document::parse(capabilities) else { return Vec::new() };
    let models = document.descendants().filter(|node| node.has_tag_name("secmodel"));
    let text = |model: roxmltree::Node, tag: &str| {
        let found = model.children().find(|node| node.has_tag_name(tag));
        found.and_then(|node| node.text()).unwrap_or_default().trim().to_owned()
    };
    models.map(|model| SecurityModel { name: text(model, "model"), doi: text(model, "doi") }).collect()
}

fn check_driver(models: &[SecurityModel], report: &mut Report) {
    let driver = models.iter().find(|model| !matches!(model.name.as_str(), "none" | "dac" | ""));
    match driver {
        Some(SecurityModel { name, doi }) => {
            report.good(format!("kvm: libvirt's security driver {name} (DOI {doi}) separates domains"));
        }
        None => report.warning(format!(
            "kvm: libvirt has no security driver: code that escapes into QEMU can use every file of QEMU's user, such as \
             the disks of other machines. Set security_driver in {QEMU_CONF} to \"apparmor\" or \"selinux\", whichever \
             this kernel has, and restart libvirtd"
        )),
    }
}

fn check_user(user: Option<User>, report: &mut Report) {
    let Some(User { uid, gid }) = user else {
        return report.warning(format!(
            "kvm: libvirt does not say which user QEMU runs as. Set user and group in {QEMU_CONF}, and \
             dynamic_ownership = 1"
        ));
    };
    if uid == 0 {
        return report.warning(format!(
            "kvm: libvirt runs QEMU as root: code that escapes into QEMU is root. Set user and group in {QEMU_CONF} to a \
             user of its own (libvirt-qemu on Debian, qemu on Fedora), dynamic_ownership = 1, and restart libvirtd"
        ));
    }
    report.good(format!("kvm: libvirt runs all QEMUs as the user {uid} and the group {gid}"));
}

/// The rights of a running QEMU, as far as this user may see them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Process {
    /// The mode of its seccomp filter; 2 is a filter.
    seccomp: Option<String>,
    no_new_privileges: Option<String>,
    /// Its effective capabilities, in hexadecimal.
    capabilities: Option<String>,
    /// True if it has the mount namespace of this process.
    shares_mounts: Option<bool>,
}

impl Process {
    /// Returns the process of a domain, if it runs. libvirt does not name the process, so it is found by the domain's
    /// UUID among its arguments.
    fn of(connect: &Connect, label: &str) -> Option<Process> {
        let uuid = domain::domain(connect, label).ok()?.uuid_string().ok()?;
        let process = process::leftovers().find(|process| {
            let args: Vec<&[u8]> = process.args().collect();
            args.windows(2).any(|pair| pair[0] == b"-uuid" && pair[1] == uuid.as_bytes())
        })?;
        let proc = format!("/proc/{}", process.number());
        let mut found = Process::read(&fs::read_to_string(format!("{proc}/status")).ok()?);
        let mounts = |proc: &str| fs::read_link(format!("{proc}/ns/mnt")).ok();
        found.shares_mounts = mounts(&proc).zip(mounts("/proc/self")).map(|(its, own)| its == own);
        Some(found)
    }

    fn read(status: &str) -> Process {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().to_owned())
        };
        Process {
            seccomp: field("Seccomp"),
            no_new_privileges: field("NoNewPrivs"),
            capabilities: field("CapEff"),
            shares_mounts: None,
        }
    }

    /// Returns the rights that the process should not have, each with the setting that takes it away.
    fn excesses(&self) -> Vec<String> {
        let is = |value: &Option<String>, bad: &str| value.as_deref() == Some(bad);
        let has_rights = |value: &Option<String>| {
            value.as_deref().is_some_and(|value| value.contains(|digit: char| digit != '0'))
        };
        [
            (is(&self.seccomp, "0"), "no seccomp filter (seccomp_sandbox = 1)".to_owned()),
            (
                is(&self.no_new_privileges, "0"),
                "the right to new privileges (seccomp_sandbox = 1)".to_owned(),
            ),
            (
                has_rights(&self.capabilities),
                format!(
                    "the capabilities {} (user other than root, clear_emulator_capabilities = 1)",
                    self.capabilities.as_deref().unwrap_or_default()
                ),
            ),
            (
                self.shares_mounts == Some(true),
                "the mount namespace of the host (namespaces = [ \"mount\" ])".to_owned(),
            ),
        ]
        .into_iter()
        .filter_map(|(is_so, what)| is_so.then_some(what))
        .collect()
    }
}

fn check_process(label: &str, process: &Process, report: &mut Report) {
    let excesses = process.excesses();
    if !excesses.is_empty() {
        report.warning(format!(
            "kvm: the QEMU of {label} has {}. Set these keys in {QEMU_CONF}, restart libvirtd, and start the domain anew",
            excesses.join(", ")
        ));
    } else if process.seccomp.is_none() {
        report.warning(format!(
            "kvm: this user may not see how the QEMU of {label} is confined. Use `check` as root"
        ));
    } else {
        let mounts = if process.shares_mounts.is_some() { ", in a mount namespace of its own" } else { "" };
        report.good(format!("kvm: the QEMU of {label} has a seccomp filter and no capabilities{mounts}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::Level;

    const CAPABILITIES: &str = "<capabilities><host><secmodel><model>apparmor</model><doi>0</doi></secmodel>\
        <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+64056</baselabel></secmodel></host>\
        </capabilities>";

    /// Returns the level and the text of the only finding.
    fn finding(check: impl FnOnce(&mut Report)) -> (Level, String) {
        let mut report = Report::default();
        check(&mut report);
        let [finding] = report.findings() else { panic!("{:?}", report.findings()) };
        (finding.level, finding.text.clone())
    }

    #[test]
    fn driver_causes_a_warning_when_it_is_missing() {
        let (level, text) = finding(|report| check_driver(&security_models(CAPABILITIES), report));
        assert!(level == Level::Good && text.contains("apparmor (DOI 0)"), "{text}");
        for name in ["none", "dac"] {
            let xml = CAPABILITIES.replace("apparmor", name);
            let (level, text) = finding(|report| check_driver(&security_models(&xml), report));
            assert!(level == Level::Warning && text.contains("security_driver"), "{text}");
        }
        assert_eq!(finding(|report| check_driver(&security_models("none"), report)).0, Level::Warning);
    }

    #[test]
    fn user_causes_a_warning_when_it_is_root_or_unknown() {
        let user = access::user_of_qemu(CAPABILITIES);
        let (level, text) = finding(|report| check_user(user, report));
        assert!(level == Level::Good && text.contains("user 64055 and the group 64056"), "{text}");
        let (level, text) = finding(|report| check_user(Some(User { uid: 0, gid: 0 }), report));
        assert!(level == Level::Warning && text.contains("as root"), "{text}");
        assert_eq!(finding(|report| check_user(None, report)).0, Level::Warning);
    }

    #[test]
    fn process_causes_a_warning_with_the_setting_of_each_excess() {
        let status =
            "Name:\tqemu\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        let confined = Process { shares_mounts: Some(false), ..Process::read(status) };
        let (level, text) = finding(|report| check_process("win10", &confined, report));
        assert!(level == Level::Good && text.contains("the QEMU of win10 has a seccomp filter"), "{text}");
        let status = "CapEff:\t000001ffffffffff\nNoNewPrivs:\t0\nSeccomp:\t0\n";
        let free = Process { shares_mounts: Some(true), ..Process::read(status) };
        let (level, text) = finding(|report| check_process("win10", &free, report));
        assert_eq!(level, Level::Warning);
        for key in ["seccomp_sandbox", "clear_emulator_capabilities", "namespaces", "000001ffffffffff"] {
            assert!(text.contains(key), "no {key} in {text}");
        }
        let (level, text) = finding(|report| check_process("win10", &Process::default(), report));
        assert!(level == Level::Warning && text.contains("as root"), "{text}");
    }
}
