use super::*;
use crate::config::addresses;
use crate::config::keys::QemuFile;
use crate::config::section::Section;
use machinery::config::ConfigFile;
use std::net::{IpAddr, SocketAddr};

/// The machines `a` and `b`, with files of their own.
const YAML: &str = "\
interface: lo
binaries: {qemu_img: /q, qemu_system_x86_64: /q}
machines:
  a: {qcow2_path: /a/d, snapshot_path: /a/s, machineinfo_path: /a/m, ip: 10.0.0.1, platform: l, os_version: 1}
  b: {qcow2_path: /b/d, snapshot_path: /b/s, machineinfo_path: /b/m, ip: 10.0.0.2, platform: l, os_version: 1}
";

/// The result server.
const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 3, 1)), 2042);

/// The machines of a configuration, as `name=address`, and its problems.
struct Read {
    wanted: Vec<Wanted>,
    warnings: Vec<String>,
    problems: Vec<String>,
}

impl Read {
    /// Reads the text of `qemu.yaml`, and the lines of the section's machines in `machinery-host.yaml`, which begin with
    /// line 4.
    fn of(yaml: &str, machines: &str) -> Read {
        let text = format!("machineries:\n  qemu:\n    machines:\n{machines}\n");
        let host = ConfigFile { path: "/c/machinery-host.yaml".into(), text };
        let file = ConfigFile { path: "/c/qemu.yaml".into(), text: yaml.to_owned() };
        let section: Section = match host.parse_at(&["machineries", "qemu"]) {
            Ok(section) => section.unwrap_or_default(),
            Err(error) => {
                let problems = vec![error.to_string()];
                return Read { wanted: Vec::new(), warnings: Vec::new(), problems };
            }
        };
        let qemu: QemuFile = file.parse().unwrap();
        let mut problems = Vec::new();
        let mut validator = Validator { file: &file, problems: &mut problems };
        let files = Files { own: &file, host: Some(&host), section: &section };
        let wanted = validator.wanted(&files, &qemu.machines);
        validator.duplicates(&files, &wanted, &qemu.machines);
        validator.addresses(&files, &wanted, Some(SERVER));
        let warnings = addresses::warnings(&files, &wanted, Some(SERVER));
        Read { wanted, warnings, problems: problems.iter().map(ToString::to_string).collect() }
    }

    fn machines(&self) -> Vec<String> {
        let machine = |wanted: &Wanted| format!("{}={}", wanted.machine.name, wanted.machine.shared.ip);
        self.wanted.iter().map(machine).collect()
    }
}

/// Reads the section with `a: {…}`, for which everything is in order.
fn machines(section: &str) -> Vec<String> {
    let read = Read::of(YAML, &format!("      a: {{{section}}}"));
    assert_eq!(read.problems, [""; 0]);
    read.machines()
}

/// Returns the only problem of the section with `a: {…}`.
#[track_caller]
fn problem(section: &str) -> String {
    one_problem(YAML, &format!("      a: {{{section}}}"))
}

#[track_caller]
fn one_problem(yaml: &str, section: &str) -> String {
    let problems = Read::of(yaml, section).problems;
    let [problem] = &problems[..] else { panic!("one problem: {problems:?}") };
    problem.clone()
}

#[test]
fn clones_replace_their_machine() {
    assert_eq!(
        machines("clones: 3, clone_ips: 10.0.1.9-11"),
        ["a-1=10.0.1.9", "a-2=10.0.1.10", "a-3=10.0.1.11", "b=10.0.0.2"]
    );
    // The address inside may be the address of a clone.
    assert_eq!(machines("clones: 1, clone_ips: 10.0.0.1-1"), ["a-1=10.0.0.1", "b=10.0.0.2"]);
    assert_eq!(
        machines("clones: 2, clone_ips: 10.0.1.255-10.0.2.9"),
        ["a-1=10.0.1.255", "a-2=10.0.2.0", "b=10.0.0.2"]
    );
    assert_eq!(
        machines("clones: 2, clone_ips: [10.0.1.7, 10.0.1.5]"),
        ["a-1=10.0.1.7", "a-2=10.0.1.5", "b=10.0.0.2"]
    );
    assert_eq!(
        machines("clones: [{name: x, ip: 10.0.1.7}, {name: y, ip: 10.0.1.5}]"),
        ["x=10.0.1.7", "y=10.0.1.5", "b=10.0.0.2"]
    );
}

#[test]
fn clones_share_the_files_and_the_address_inside_of_their_machine() {
    let Read { wanted, problems, .. } = Read::of(YAML, "      a: {clones: 2, clone_ips: 10.0.1.1-9}");
    assert_eq!(problems, [""; 0]);
    let [one, two, b] = &wanted[..] else { panic!("three machines") };
    for clone in [one, two] {
        assert_eq!((clone.entry(), clone.template.as_str(), clone.is_shared), ("a", "a", true));
        assert_eq!((clone.machine.own.qcow2_path.as_str(), clone.guest), ("/a/d", "10.0.0.1".parse().ok()));
    }
    assert_eq!((one.is_first, two.is_first), (true, false));
    assert_eq!((b.entry(), b.template.as_str(), b.is_shared, b.guest), ("b", "b", false, None));
}

#[test]
fn address_inside_is_the_configured_one() {
    let guest = |section: &str| Read::of(YAML, &format!("      b: {{{section}}}")).wanted[1].guest;
    assert_eq!(guest("network: isolated, guest_ip: 10.9.9.9"), "10.9.9.9".parse().ok());
    assert_eq!(guest("network: isolated"), "10.0.0.2".parse().ok());
    assert_eq!(guest("network: operator"), None);
    let clone = Read::of(YAML, "      b: {clones: 1, clone_ips: 10.0.1.1-1, guest_ip: 10.9.9.9}");
    assert_eq!(clone.wanted[1].guest, "10.9.9.9".parse().ok());
}

#[test]
fn number_of_clones_is_refused_when_it_is_zero_or_too_high() {
    for count in ["0", "5000"] {
        let text = problem(&format!("clones: {count}, clone_ips: 10.0.1.1-200"));
        assert!(text.starts_with("/c/machinery-host.yaml:4: machineries.qemu.machines.a.clones: "), "{text}");
        assert!(text.contains(&format!("{count} clones are not possible")), "{text}");
    }
    assert!(problem("clones: []").contains("the list of clones is empty"));
    assert!(problem("clones: many").contains("a number of clones, or a list"));
}

#[test]
fn range_is_refused_when_it_is_none_or_too_small() {
    let ips = "/c/machinery-host.yaml:4: machineries.qemu.machines.a.clone_ips: ";
    let refused = |range: &str| {
        let text = problem(&format!("clones: 3, clone_ips: {range}"));
        text.strip_prefix(ips).unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    assert!(refused("10.0.1.1-2").starts_with("it has 2 addresses, and there are 3 clones"));
    assert!(refused("[10.0.1.1]").starts_with("it has 1 addresses, and there are 3 clones"));
    assert!(refused("10.0.1.9-2").starts_with("the range '10.0.1.9-2' ends before it begins"));
    for wrong in ["10.0.1.1", "10.0.1-10.0.2", "10.0.1.1-300", "x-y"] {
        let text = refused(wrong);
        assert!(text.contains("is no range of addresses: write FIRST-LAST"), "{text}");
    }
    assert!(problem("clones: 1, clone_ips: [10.0.1.300]").contains("clone_ips"));
}

#[test]
fn keys_of_clones_are_refused_when_they_do_not_fit_together() {
    let key = "/c/machinery-host.yaml:4: machineries.qemu.machines.a.";
    for (section, expected) in [
        ("clones: 2", "clones: 2 clones have no addresses"),
        ("clone_ips: 10.0.1.1-9", "clone_ips: there are no clones"),
        ("clones: [{name: x, ip: 10.0.1.1}], clone_ips: 10.0.1.1-9", "clone_ips: the list `clones` has"),
        (
            "clones: 1, clone_ips: 10.0.1.1-9, network: operator",
            "network: clones have the same address inside",
        ),
        ("guest_ip: 10.0.1.1", "guest_ip: guest_ip is for a machine whose network is isolated"),
        ("clones: [{name: ../x, ip: 10.0.1.1}]", "clones: '../x' cannot be a machine's name"),
    ] {
        let text = problem(section);
        assert!(text.starts_with(&format!("{key}{expected}")), "{text}");
    }
}

#[test]
fn address_is_refused_when_another_machine_has_it() {
    let text = problem("clones: 3, clone_ips: 10.0.0.1-9");
    let expected =
        "/c/qemu.yaml:5: machines.b.ip: '10.0.0.2' is already the ip of machine 'a-2', a clone of 'a'";
    assert!(text.starts_with(expected), "{text}");
    let text = one_problem(YAML, "      b: {clones: 2, clone_ips: 10.0.0.1-9}");
    let expected = "/c/machinery-host.yaml:4: machineries.qemu.machines.b.clone_ips: '10.0.0.1' is already the ip of \
                    machine 'a'";
    assert!(text.starts_with(expected), "{text}");
    let text = problem("clones: 2, clone_ips: [10.0.1.1, 10.0.1.1]");
    assert!(text.contains("clone_ips: '10.0.1.1' is already the ip of machine 'a-1'"), "{text}");
}

#[test]
fn name_is_refused_when_another_machine_has_it() {
    let text = problem("clones: [{name: b, ip: 10.0.1.1}]");
    assert!(text.starts_with("/c/qemu.yaml:5: machines.b"), "{text}");
    assert!(text.contains("'b' is already the name of machine 'b', a clone of 'a'"), "{text}");
    let section = "      b: {clones: [{name: a, ip: 10.0.1.1}]}";
    let text = one_problem(YAML, section);
    let expected = "/c/machinery-host.yaml:4: machineries.qemu.machines.b.clones: 'a' is already the name of machine 'a'";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn address_of_an_isolated_machine_is_refused_when_it_is_none() {
    let yaml = YAML.replace("ip: 10.0.0.1", "ip: guest.local");
    assert_eq!(Read::of(&yaml, "      a: {}").problems, [""; 0]);
    let text = one_problem(&yaml, "      a: {network: isolated}");
    let expected = "/c/qemu.yaml:4: machines.a.ip: 'guest.local' is not an IPv4 address";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn files_may_be_the_same_when_both_machines_are_isolated() {
    let yaml = YAML.replace("/b/", "/a/");
    let isolated =
        "      a: {network: isolated, guest_ip: 10.0.0.9}\n      b: {network: isolated, guest_ip: 10.0.0.9}";
    let Read { wanted, problems, .. } = Read::of(&yaml, isolated);
    assert_eq!(problems, [""; 0]);
    let [a, b] = &wanted[..] else { panic!("two machines") };
    assert_eq!((a.template.as_str(), b.template.as_str()), ("a", "a"));
    assert_eq!((a.is_shared, b.is_shared, a.is_first, b.is_first), (true, true, true, false));
    let problems = Read::of(&yaml, "      a: {network: isolated}").problems;
    assert_eq!(problems.len(), 3);
    for (key, problem) in ["qcow2_path", "snapshot_path", "machineinfo_path"].iter().zip(&problems) {
        assert!(problem.starts_with(&format!("/c/qemu.yaml:5: machines.b.{key}: ")), "{problem}");
        assert!(problem.contains(&format!("is already the {key} of machine 'a'")), "{problem}");
        assert!(problem.contains("set network: isolated for both"), "{problem}");
    }
}

#[test]
fn template_is_common_only_when_all_files_are() {
    let yaml = YAML.replace("/b/d", "/a/d");
    let Read { wanted, problems, .. } =
        Read::of(&yaml, "      a: {network: isolated}\n      b: {network: isolated}");
    assert_eq!(problems, [""; 0]);
    assert_eq!((wanted[0].template.as_str(), wanted[1].template.as_str()), ("a", "b"));
    assert!(wanted.iter().all(|machine| machine.is_shared && machine.is_first));
    // A file is not one of another kind, whatever the networks are.
    let yaml = YAML.replace("/b/d", "/a/s");
    let text = one_problem(&yaml, "      a: {network: isolated}\n      b: {network: isolated}");
    assert!(text.contains("/a/s is already the snapshot_path of machine 'a'"), "{text}");
}

#[test]
fn mac_address_may_be_the_same_when_a_machine_is_isolated() {
    let yaml = YAML.replace("ip: 10", "mac_address: '52:54:00:00:00:01', ip: 10");
    assert!(one_problem(&yaml, "      a: {}").contains("is already the mac_address of machine 'a'"));
    assert_eq!(Read::of(&yaml, "      a: {network: isolated}").problems, [""; 0]);
}

#[test]
fn addresses_that_no_machine_can_have_are_refused_outside_and_inside() {
    let place = "/c/machinery-host.yaml:4: machineries.qemu.machines.a.clone_ips: ";
    for (ip, kind) in [
        ("127.0.0.1", "a loopback address"),
        ("0.0.0.0", "no address of a host"),
        ("169.254.169.254", "a link-local address"),
        ("239.1.2.3", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("10.0.3.1", "the address of the result server"),
    ] {
        let text = problem(&format!("clones: 1, clone_ips: [{ip}]"));
        assert!(text.starts_with(place) && text.contains(&format!("'{ip}' of machine 'a-1'")), "{text}");
        assert!(text.contains(kind), "{text}");
        let text = problem(&format!("network: isolated, guest_ip: {ip}"));
        assert!(text.contains("machines.a.guest_ip: ") && text.contains(kind), "{text}");
        let yaml = YAML.replace("ip: 10.0.0.1", &format!("ip: {ip}"));
        let text = one_problem(&yaml, "      a: {network: isolated}");
        assert!(text.starts_with("/c/qemu.yaml:4: machines.a.ip: ") && text.contains(kind), "{text}");
        // The operator's network may have any address.
        assert_eq!(Read::of(&yaml, "      a: {console: true}").problems, [""; 0]);
    }
}

#[test]
fn addresses_without_a_clone_cause_a_warning_that_names_them() {
    let warning = |ips: &str| Read::of(YAML, &format!("      a: {{clones: 2, clone_ips: {ips}}}")).warnings;
    assert_eq!(warning("10.0.1.1-2"), [""; 0]);
    for (ips, unused) in [
        ("10.0.1.1-3", "10.0.1.3"),
        ("10.0.1.1-9", "10.0.1.3-10.0.1.9"),
        ("[10.0.1.1, 10.0.1.2, 10.0.1.8, 10.0.1.7]", "10.0.1.8, 10.0.1.7"),
    ] {
        let [text] = &warning(ips)[..] else { panic!("one warning") };
        assert!(text.starts_with("/c/machinery-host.yaml:4: "), "{text}");
        assert!(text.contains(&format!("no clone uses {unused}: there are 2 clones")), "{text}");
    }
}

#[test]
fn result_server_that_isolated_machines_cannot_reach_causes_a_warning() {
    let (own, host) = (ConfigFile { path: "/c/q".into(), text: YAML.to_owned() }, None);
    let section = Section::default();
    let wanted = Read::of(YAML, "      a: {network: isolated}").wanted;
    let files = Files { own: &own, host, section: &section };
    let warned = |server: Option<&str>| {
        addresses::warnings(&files, &wanted, server.map(|server| server.parse().unwrap()))
    };
    for server in
        [None, Some("0.0.0.0:2042"), Some("127.0.0.1:2042"), Some("[::]:2042"), Some("[fd00::1]:2042")]
    {
        let [text] = &warned(server)[..] else { panic!("one warning of {server:?}") };
        assert!(text.contains("cannot send their results"), "{text}");
    }
    assert_eq!(warned(Some("10.0.3.1:2042")), [""; 0]);
    let operator = Read::of(YAML, "      a: {network: operator}").wanted;
    assert_eq!(addresses::warnings(&files, &operator, None), [""; 0]);
}
