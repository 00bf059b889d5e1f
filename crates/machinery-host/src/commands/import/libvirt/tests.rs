//! Tests with the real `virsh` and libvirt's test driver, which reads its domains from a file.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use machinery::config::ConfigFile;
use machinery::{Report, Result};
use tempfile::TempDir;

use super::super::{Import, Imported, import};

const WINDOWS_10: &str = "http://microsoft.com/win/10";

/// A network in which the first card has a reserved address.
const NETWORK: &str =
    "<network><name>lab</name><bridge name='virbr7'/><ip address='10.7.0.1' netmask='255.255.255.0'>
    <dhcp><range start='10.7.0.2' end='10.7.0.9'/><host mac='52:54:00:aa:00:01' ip='10.7.0.101'/></dhcp>
    </ip></network>";

/// A snapshot: its name, the state of the domain at that time, and whether it is the current one.
type Snapshot = (&'static str, &'static str, bool);

/// A folder with the file of libvirt's test driver, and a `kvm.yaml`.
struct Lab(TempDir);

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    import: Import,
}

impl Lab {
    fn new(domains: &[String]) -> Self {
        let lab = Lab(tempfile::tempdir().unwrap());
        let node = format!("<node>{NETWORK}{}</node>", domains.concat());
        fs::write(lab.path("node.xml"), node).unwrap();
        fs::write(lab.yaml(), lab.head()).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn yaml(&self) -> PathBuf {
        self.path("kvm.yaml")
    }

    fn dsn(&self) -> String {
        format!("test://{}", self.path("node.xml").display())
    }

    fn head(&self) -> String {
        format!("# ours\ndsn: {} # of the lab\ninterface: lo\nmachines:\n", self.dsn())
    }

    fn text(&self) -> String {
        fs::read_to_string(self.yaml()).unwrap()
    }

    fn import(&self, arguments: &[&str]) -> Result<Imported> {
        self.import_into(&self.yaml(), arguments, Report::default)
    }

    fn import_into(&self, yaml: &Path, arguments: &[&str], report: fn() -> Report) -> Result<Imported> {
        let arguments = ["import", "libvirt"].iter().chain(arguments);
        import(&Command::parse_from(arguments).import, yaml, &|_: ConfigFile| Ok(report()))
    }

    /// Expects that the import fails and leaves the file unchanged.
    #[track_caller]
    fn fails(&self, arguments: &[&str]) -> String {
        let before = self.text();
        let error = self.import(arguments).unwrap_err().to_string();
        assert_eq!(self.text(), before);
        println!("{error}");
        error
    }
}

/// Describes a domain that is off, with a card whose MAC address ends with the number.
fn domain(name: &str, card: u8, system: &str, snapshots: &[Snapshot]) -> String {
    described(name, card, system, snapshots, "<test:runstate>5</test:runstate>")
}

fn described(name: &str, card: u8, system: &str, snapshots: &[Snapshot], more: &str) -> String {
    let snapshot = |(number, (name, state, is_current)): (usize, &Snapshot)| {
        let active = u8::from(*is_current);
        format!(
            "<test:domainsnapshot><name>{name}</name><creationTime>{}</creationTime><state>{state}</state>\
             <active>{active}</active></test:domainsnapshot>",
            1_700_000_000 + number
        )
    };
    let snapshots: String = snapshots.iter().enumerate().map(snapshot).collect();
    format!(
        "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
         <name>{name}</name><memory>4096</memory>
         <metadata><l:libosinfo xmlns:l='http://libosinfo.org/xmlns/libvirt/domain/1.0'><l:os id='{system}'/></l:libosinfo>
         </metadata><os><type arch='x86_64'>hvm</type></os>
         <devices><interface type='network'><mac address='52:54:00:AA:00:{card:02}'/><source network='lab'/></interface>
         </devices>{more}{snapshots}</domain>"
    )
}

/// A domain that needs no value of the operator.
fn complete() -> String {
    domain("win10", 1, WINDOWS_10, &[("clean", "running", true)])
}

const COMPLETE_ENTRY: &str = "  win10:
    label: win10
    snapshot: clean
    ip: \"10.7.0.101\"
    platform: windows
    os_version: \"10\"
    architecture: amd64
    interface: virbr7
    mac_address: \"52:54:00:aa:00:01\"
";

#[test]
fn domain_is_imported_with_all_that_libvirt_has_and_the_second_run_changes_nothing() {
    let lab = Lab::new(&[complete()]);
    let imported = lab.import(&[]).unwrap();
    assert_eq!((imported.added, imported.notes), (vec!["win10".to_owned()], vec![]));
    let text = lab.text();
    assert_eq!(text, format!("{}{COMPLETE_ENTRY}", lab.head()));
    let again = lab.import(&[]).unwrap();
    assert_eq!((again.added.len(), again.skipped.len()), (0, 1));
    assert!(again.skipped[0].reason.contains("unchanged"), "{again:?}");
    assert_eq!(lab.text(), text);
}

#[test]
fn missing_values_of_all_domains_are_asked_for_in_one_message() {
    let linux = "http://libosinfo.org/linux/2022";
    let lab = Lab::new(&[
        complete(),
        domain("a", 2, "", &[("clean", "running", true)]),
        domain("b", 3, linux, &[("clean", "running", true)]),
        domain("c", 4, WINDOWS_10, &[]),
    ]);
    let error = lab.fails(&[]);
    for expected in [
        "4 problems",
        "machine 'a': libvirt does not have its ip, platform, os_version. Add --ip 'a=ADDRESS' --platform 'a=PLATFORM' \
         --os-version 'a=VERSION'.",
        "machine 'b': libvirt does not have its ip, os_version. Add --ip 'b=ADDRESS' --os-version 'b=VERSION'.",
        "machine 'c': its domain has no snapshot. Start the domain",
        "machine 'c': libvirt does not have its ip",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let values =
        ["a", "b", "win10", "--ip=a=10.7.0.2", "--ip=b=10.7.0.3", "--platform=a=linux", "--os-version=12"];
    assert_eq!(lab.import(&values).unwrap().added, ["a", "b", "win10"]);
    // The file has the values now.
    assert_eq!(lab.import(&["a", "b"]).unwrap().skipped.len(), 2);
}

#[test]
fn snapshot_is_the_current_one_or_the_only_one_and_must_have_memory() {
    let several = [("first", "running", false), ("second", "paused", false)];
    let off = [("first", "running", false), ("off", "shutoff", true)];
    for (snapshots, expected) in [
        (&[("only", "running", false)][..], Ok("only")),
        (&[("first", "running", false), ("second", "paused", true)], Ok("second")),
        (&several, Err("no current snapshot: it has first, second. Add --snapshot 'win10=NAME'")),
        (&off, Err("'off' has no memory")),
        (&off, Err("Add --snapshot 'win10=NAME'; these have memory: first")),
        (&[("off", "shutoff", true)], Err("add --snapshot 'win10=off' to use it nevertheless")),
        (&[], Err("or name only the domains to import")),
    ] {
        let lab = Lab::new(&[domain("win10", 1, WINDOWS_10, snapshots)]);
        match expected {
            Ok(name) => {
                lab.import(&[]).unwrap();
                assert!(lab.text().contains(&format!("    snapshot: {name}\n")), "{}", lab.text());
            }
            Err(words) => assert!(lab.fails(&[]).contains(words), "{words}"),
        }
    }
    let lab = Lab::new(&[domain("win10", 1, WINDOWS_10, &off)]);
    assert!(lab.fails(&["--snapshot=none"]).contains("no snapshot 'none': it has first, off"));
    let imported = lab.import(&["--snapshot=win10=off"]).unwrap();
    assert!(imported.notes[0].contains("machine 'win10': the snapshot 'off' has no memory"), "{imported:?}");
}

#[test]
fn address_of_the_running_guest_is_noted_as_one_that_may_change() {
    let snapshots = [("clean", "running", true)];
    let lab = Lab::new(&[described("win10", 2, WINDOWS_10, &snapshots, "")]);
    let imported = lab.import(&[]).unwrap();
    let [note] = &imported.notes[..] else { panic!("{imported:?}") };
    assert!(note.starts_with("machine 'win10': its ip 10.7.0.") && note.contains("may change"), "{note}");
    let address = note.split_whitespace().find(|word| word.starts_with("10.7.0.")).unwrap();
    assert!(lab.text().contains(&format!("    ip: \"{address}\"\n")), "{}", lab.text());
}

#[test]
fn card_with_a_known_address_is_used_when_there_are_several() {
    let first = "<devices><interface type='bridge'><mac address='52:54:00:aa:00:07'/><source bridge='br7'/></interface>";
    let lab = Lab::new(&[complete().replace("<devices>", first)]);
    lab.import(&[]).unwrap();
    assert_eq!(lab.text(), format!("{}{COMPLETE_ENTRY}", lab.head()));
    // Without an address, it is the first one.
    let unknown = complete().replace("AA:00:01", "AA:00:08").replace("<devices>", first);
    let lab = Lab::new(&[unknown]);
    lab.import(&["--ip=win10=10.7.0.9"]).unwrap();
    assert!(
        lab.text().contains("    interface: br7\n    mac_address: \"52:54:00:aa:00:07\"\n"),
        "{}",
        lab.text()
    );
}

#[test]
fn note_names_the_domain_that_boots_by_uefi() {
    let firmware = "hvm</type><loader readonly='yes' type='pflash'>/f/code</loader><nvram>/f/vars</nvram>";
    let lab = Lab::new(&[complete().replace("hvm</type>", firmware)]);
    assert_eq!(lab.import(&[]).unwrap().notes, ["machine 'win10': its domain boots by UEFI"]);
}

#[test]
fn entry_of_the_domain_is_recognized_under_another_name_and_compared() {
    let lab = Lab::new(&[complete()]);
    let entry =
        COMPLETE_ENTRY.replace("  win10:\n", "  mine: # by hand\n").replace("    interface: virbr7\n", "");
    fs::write(lab.yaml(), lab.head() + &entry).unwrap();
    let imported = lab.import(&[]).unwrap();
    assert!(imported.skipped[0].reason.contains("as the machine 'mine', unchanged"), "{imported:?}");
    fs::write(lab.yaml(), lab.head() + &entry.replace("10.7.0.101", "10.7.0.9")).unwrap();
    let error = lab.fails(&[]);
    assert!(error.contains("kvm.yaml:6: machines.mine: ") && error.contains("another ip. Remove"), "{error}");
}

#[test]
fn new_file_gets_the_libvirt_and_the_interface_of_the_import() {
    let lab = Lab::new(&[complete()]);
    fs::remove_file(lab.yaml()).unwrap();
    lab.import(&["--dsn", &lab.dsn()]).unwrap();
    let text = lab.text();
    assert!(text.starts_with("# The KVM machinery") && text.ends_with(COMPLETE_ENTRY), "{text}");
    let file = ConfigFile { path: "kvm.yaml".into(), text };
    let yaml: serde_yaml::Value = file.parse().unwrap();
    assert_eq!(
        (yaml["dsn"].as_str(), yaml["interface"].as_str()),
        (Some(lab.dsn().as_str()), Some("virbr7"))
    );
}

#[test]
fn domain_of_another_libvirt_gets_the_address_of_that_libvirt() {
    let lab = Lab::new(&[complete()]);
    let text = lab.text().replace(&lab.dsn(), "qemu:///system");
    fs::write(lab.yaml(), &text).unwrap();
    lab.import(&["--dsn", &lab.dsn()]).unwrap();
    let label = "    label: win10\n";
    let entry = COMPLETE_ENTRY.replace(label, &format!("{label}    dsn: \"{}\"\n", lab.dsn()));
    assert_eq!(lab.text(), text.clone() + &entry);
    let again = lab.import(&["--dsn", &lab.dsn()]).unwrap();
    assert!(again.skipped[0].reason.contains("has this machine already, unchanged"), "{again:?}");
    // The name is that of a machine of another libvirt.
    fs::write(lab.yaml(), text + COMPLETE_ENTRY).unwrap();
    let error = lab.fails(&["--dsn", &lab.dsn()]);
    assert!(error.contains("the file has this machine already, with another dsn"), "{error}");
}

#[test]
fn import_is_refused_when_a_name_is_no_domain() {
    let lab = Lab::new(&[complete()]);
    let error = lab.fails(&["win10", "win11"]);
    assert!(error.contains("no domain 'win11'. It has win10"), "{error}");
    assert!(
        lab.fails(&["--ip=win7=10.0.0.1"]).contains("'win7', which is not imported. The machines are win10")
    );
}

#[test]
fn import_is_refused_when_the_plugin_refuses_a_machine() {
    let lab = Lab::new(&[complete()]);
    let before = lab.text();
    let refused = lab.import_into(&lab.yaml(), &[], || {
        let mut report = Report::default();
        report.problem(&machinery::Error::environment("it is external").machine("win10"));
        report
    });
    assert!(refused.unwrap_err().to_string().contains("machine 'win10': it is external"));
    assert_eq!(lab.text(), before);
    // A problem of another machine does not refuse this one.
    let other = lab.import_into(&lab.yaml(), &[], || {
        let mut report = Report::default();
        report.problem(
            &machinery::Error::environment("the disk of machine 'win10' is shared").machine("other"),
        );
        report
    });
    let other = other.unwrap();
    assert_eq!(other.added, ["win10"]);
    let note =
        "`check` reports another problem of kvm: machine 'other': the disk of machine 'win10' is shared";
    assert_eq!(other.notes, [note]);
}

#[test]
fn domain_whose_name_no_machine_can_have_is_skipped_or_has_an_entry_by_hand() {
    let old = domain("win (old)", 2, WINDOWS_10, &[("clean", "running", true)]);
    let lab = Lab::new(&[complete(), old]);
    let imported = lab.import(&[]).unwrap();
    assert_eq!(imported.added, ["win10"]);
    let [skipped] = &imported.skipped[..] else { panic!("{imported:?}") };
    assert!(skipped.name == "win (old)" && skipped.reason.contains("by hand"), "{skipped:?}");
    let entry =
        "  win_old:\n    label: win (old)\n    ip: 10.7.0.2\n    platform: windows\n    os_version: 10\n";
    fs::write(lab.yaml(), lab.text() + entry).unwrap();
    let reasons: Vec<String> =
        lab.import(&[]).unwrap().skipped.into_iter().map(|skipped| skipped.reason).collect();
    let is_old = |reason: &String| reason.contains("as the machine 'win_old', unchanged");
    assert!(reasons.len() == 2 && reasons.iter().any(is_old), "{reasons:?}");
}

#[test]
fn address_that_may_change_is_no_difference_to_the_entry() {
    let snapshots = [("clean", "running", true)];
    let lab = Lab::new(&[described("win10", 2, WINDOWS_10, &snapshots, "")]);
    lab.import(&[]).unwrap();
    let text = lab.text();
    let address = text.lines().find_map(|line| line.strip_prefix("    ip: ")).unwrap();
    fs::write(lab.yaml(), text.replace(address, "10.7.0.250")).unwrap();
    let imported = lab.import(&[]).unwrap();
    let [skipped] = &imported.skipped[..] else { panic!("{imported:?}") };
    let words = format!("unchanged. Its guest has the address {}", address.trim_matches('"'));
    assert!(skipped.reason.contains(&words), "{skipped:?}");
    // An address that the operator gives is compared.
    assert!(lab.fails(&["--ip=10.7.0.3"]).contains("another ip"));
}

#[test]
fn advice_has_the_domain_as_one_word_of_the_shell() {
    let name = "win 10";
    let lab = Lab::new(&[domain(name, 1, WINDOWS_10, &[])]);
    let error = lab.fails(&["--ip=10.7.0.4", name]);
    let command = error.split('`').nth(1).unwrap();
    let printed = std::process::Command::new("sh")
        .args(["-c", &command.replacen("virsh", "printf '%s\\n'", 1)])
        .output()
        .unwrap();
    let words = String::from_utf8(printed.stdout).unwrap();
    assert_eq!(
        words.lines().collect::<Vec<_>>(),
        ["snapshot-create-as", "--domain", name, "--name", "clean"]
    );
}
