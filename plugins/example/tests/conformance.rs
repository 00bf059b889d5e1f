//! The example keeps every promise of a machinery, and the conformance suite notices where a
//! machinery does not: the example's configured faults are what it is tested with.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::Instance;
use machinery::{Deadline, DumpFormat, Setup};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::{self, Answer, Report, Subject, Unmet};

const MACHINES: [&str; 4] = ["example1", "example2", "example3", "example4"];
const SNAPSHOT: u32 = 1_000_000;
const PATIENCE: Duration = Duration::from_secs(30);

/// The four machines of the suite, the first one with `faults`; one that fails to start once, and
/// one that goes off by itself.
fn yaml(faults: &str) -> String {
    let machine = |number: usize, name: &str, keys: &str| {
        format!(
            "  {name}: {{label: {name}, ip: 10.0.0.{number}, platform: windows, os_version: 10, \
             snapshot: {SNAPSHOT}, {keys}}}\n"
        )
    };
    let mut text = "interface: lo\nmachines:\n".to_owned();
    for (number, name) in MACHINES.iter().enumerate() {
        let own = if number == 0 { faults } else { "" };
        text += &machine(number + 1, name, &format!("delays_ms: {{restore_start: 100, stop: 10}}, {own}"));
    }
    text += &machine(5, "stillborn", "faults: {restore_start: fail}, fault_times: 1");
    text += &machine(6, "mortal", "dies_after_ms: 2000");
    text
}

fn setup(folder: &Path, text: String) -> Setup {
    let config = ConfigFile { path: folder.join("example.yaml"), text };
    let [sockets_dir, state_dir, cache_dir] = ["sockets", "state", "cache"].map(|name| folder.join(name));
    Setup { config, host_config: None, sockets_dir, state_dir, cache_dir }
}

/// The counter goes on from the snapshot, twenty times a second, and is dumped some time later.
fn subject() -> Subject {
    // The fault and the end come by configuration.
    let nothing = || Ok(());
    Subject::new(&MACHINES, SNAPSHOT + 1..=2 * SNAPSHOT, dumped_counter)
        .alive(|example, machine| dumped_counter(example, machine).map(drop))
        .breakage("stillborn", nothing, nothing)
        .death("mortal", nothing)
        .patience(PATIENCE)
}

fn dumped_counter(example: &Instance, machine: &str) -> Answer<u32> {
    let folder = tempfile::tempdir()?;
    let dump = folder.path().join("dump");
    example.dump_memory(machine, &dump, DumpFormat::Elf, Deadline::after(PATIENCE))?;
    let text = std::fs::read_to_string(&dump)?;
    let counter = text.trim().strip_prefix("counter ").ok_or("the dump has no counter")?;
    Ok(counter.parse()?)
}

/// What the promises come to when the first machine has these faults.
fn tried(names: &[&str], keys: &str, subject: &Subject) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let plugin = artifacts::plugin("example").unwrap();
    conformance::run_some(&plugin, &setup(folder.path(), yaml(keys)), subject, names)
}

/// Demands that this promise is found broken, and in what words.
fn is_broken(name: &str, keys: &str, words: &str) {
    let report = tried(&[name], keys, &subject());
    assert_eq!(report.broken(), [name], "{report}");
    assert!(report.to_string().contains(words), "{report}");
}

#[test]
fn the_example_keeps_every_promise() {
    let folder = tempfile::tempdir().unwrap();
    let setup = setup(folder.path(), "capabilities: {prepare: true}\n".to_owned() + &yaml(""));
    let plugin = artifacts::plugin("example").unwrap();
    let report = conformance::run_some(&plugin, &setup, &subject(), &conformance::names());
    println!("{report}");
    assert!(report.all_kept(), "{report}");
    assert!(report.not_tried().is_empty(), "{report}");
}

#[test]
fn what_the_example_is_configured_not_to_do_it_refuses_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let text = "capabilities: {acpi_stop: false, norestore_start: false, screenshot: false}\n";
    let setup = setup(folder.path(), text.to_owned() + &yaml(""));
    let plugin = artifacts::plugin("example").unwrap();
    let names = ["capabilities", "unknown_machine", "acpi_stop", "norestore_start", "screenshot"];
    let report = conformance::run_some(&plugin, &setup, &subject(), &names);
    assert!(report.all_kept(), "{report}");
    assert_eq!(report.not_tried(), ["norestore_start", "acpi_stop", "screenshot"], "{report}");
}

#[test]
fn a_start_that_only_says_so_is_found_out() {
    is_broken("restore_start", "faults: {restore_start: lie}", "ought to be running");
    is_broken("norestore_start", "faults: {norestore_start: lie}", "ought to be running");
}

#[test]
fn a_stop_that_only_says_so_is_found_out() {
    is_broken("stop", "faults: {stop: lie}, fault_times: 1", "ought to be poweroff");
    is_broken("acpi_stop", "faults: {acpi_stop: lie}", "ought to be poweroff");
}

#[test]
fn a_machine_that_is_not_at_its_snapshot_is_found_out() {
    let elsewhere = || Subject::new(&MACHINES, 1..=7, dumped_counter).patience(PATIENCE);
    let names = ["restore_start", "clean_every_time", "in_parallel"];
    let report = tried(&names, "", &elsewhere());
    assert_eq!(report.broken(), names, "{report}");
    let cold = Subject::new(&MACHINES, 0..=u32::MAX, dumped_counter).patience(PATIENCE);
    let report = tried(&["norestore_start"], "", &cold);
    assert_eq!(report.broken(), ["norestore_start"], "{report}");
}

#[test]
fn an_action_that_fails_is_told_with_its_words() {
    is_broken("restore_start", "faults: {restore_start: fail}", "configured to fail");
    is_broken("screenshot", "faults: {screenshot: fail}", "configured to fail");
    is_broken("off_after_load", "faults: {state: fail}, fault_times: 1", "configured to fail");
}

#[test]
fn a_dump_that_fails_is_found_out() {
    // A count that is not dumped, for it would meet the fault first.
    let counted = |_: &Instance, _: &str| Ok(SNAPSHOT + 1);
    let subject = Subject::new(&MACHINES, SNAPSHOT + 1..=SNAPSHOT + 1, counted).patience(PATIENCE);
    let report = tried(&["dump_memory"], "faults: {dump_memory: fail}", &subject);
    assert_eq!(report.broken(), ["dump_memory"], "{report}");
}

#[test]
fn a_panic_is_not_taken_for_a_failed_start() {
    let subject = subject().breakage("example1", || Ok(()), || Ok(()));
    let report = tried(&["failed_start"], "faults: {restore_start: panic}, fault_times: 1", &subject);
    assert_eq!(report.broken(), ["failed_start"], "{report}");
    assert!(report.to_string().contains("configured to panic"), "{report}");
}

#[test]
fn a_state_that_is_not_to_be_had_is_found_out() {
    is_broken("state_at_any_time", "faults: {state: fail}", "configured to fail");
}

/// Also the end of the suite: a plugin that hangs in one call is called no more.
#[test]
fn a_start_that_does_not_return_by_its_deadline_is_found_out() {
    let names = ["start_deadlines", "deadlines"];
    let report = tried(&names, "faults: {restore_start: hang}", &subject());
    assert_eq!(report.broken(), ["start_deadlines"], "{report}");
    assert_eq!(report.not_tried(), ["deadlines"], "{report}");
    assert!(report.to_string().contains("has not returned"), "{report}");
}

#[test]
fn a_call_that_does_not_return_by_its_deadline_is_found_out() {
    is_broken("deadlines", "faults: {screenshot: hang}", "has not returned");
}

#[test]
fn a_call_that_fails_in_another_way_when_time_is_short_is_found_out() {
    is_broken("deadlines", "faults: {screenshot: fail}", "ought to time out");
}

#[test]
fn a_death_that_nobody_is_told_of_is_found_out() {
    let subject = subject().death("example1", || Ok(())).patience(Duration::from_secs(2));
    let report = tried(&["death"], "", &subject);
    assert_eq!(report.broken(), ["death"], "{report}");
    assert!(report.to_string().contains("nobody was told"), "{report}");
}

#[test]
fn a_machine_that_ends_in_the_middle_of_its_run_is_found_out() {
    // The sign of life is that it ends: what is told of that comes while the suite looks on.
    let ended = |example: &Instance, machine: &str| {
        example.stop(machine, Deadline::after(PATIENCE))?;
        Ok(())
    };
    let report = tried(&["restore_start", "screenshot"], "", &subject().alive(ended));
    assert_eq!(report.broken(), ["restore_start", "screenshot"], "{report}");
}

#[test]
fn what_is_left_on_the_host_is_found_out() {
    let littering = subject().leftovers(|| Ok(vec!["a disk".to_owned()]));
    let names = ["off_after_load", "stop", "failed_start", "shutdown"];
    let report = tried(&names, "", &littering);
    assert_eq!(report.broken(), ["off_after_load", "stop", "failed_start", "shutdown"], "{report}");
    assert!(report.to_string().contains("a disk"), "{report}");
}

#[test]
fn what_was_not_given_is_not_tried_and_a_wrong_name_is_no_promise() {
    let bare = Subject::new(&MACHINES, SNAPSHOT + 1..=2 * SNAPSHOT, dumped_counter);
    let report = tried(&["death", "failed_start", "no_such_promise"], "", &bare);
    assert_eq!(report.not_tried(), ["failed_start", "death"], "{report}");
    assert_eq!(report.broken(), ["no_such_promise"], "{report}");
}

#[test]
fn a_file_that_is_no_plugin_is_told_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("libmachinery_example.so");
    std::fs::write(&file, "text").unwrap();
    let report = conformance::run(&file, &setup(folder.path(), yaml("")), &subject());
    assert_eq!(report.broken(), ["open"], "{report}");
    assert!(matches!(&report.checks()[0].result, Err(Unmet::Failed(why)) if why.contains("shared library")));
}

#[test]
fn a_file_with_another_name_than_the_machinery_is_found_out() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("libmachinery_other.so");
    std::fs::copy(artifacts::plugin("example").unwrap(), &file).unwrap();
    let report = conformance::run_some(&file, &setup(folder.path(), yaml("")), &subject(), &["identity"]);
    assert_eq!(report.broken(), ["identity"], "{report}");
}
