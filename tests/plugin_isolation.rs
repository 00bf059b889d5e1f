//! Two plugins in one host that have the same code, incompatible versions of a library, and a C function of
//! the same name. Each has its own copy of all of them.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use machinery_testkit::host::RunningHost;
use machinery_testkit::scratch::ScratchCwd;
use serde_json::json;

/// Returns the text of a twin's configuration.
fn twin(steps: u32, machine: &str) -> String {
    format!("steps: {steps}\nmachines:\n  {machine}: {{ip: 10.9.0.1, platform: linux, os_version: 1}}\n")
}

#[test]
fn plugins_have_separate_libraries_statics_and_hooks_when_their_code_is_the_same() {
    let twins = [("twin-older", twin(3, "old")), ("twin-newer", twin(40, "new"))];
    // Cargo replaces `-` with `_` in library names; both are accepted.
    let cwd = ScratchCwd::new(&twins.each_ref().map(|(name, text)| (*name, text.as_str()))).unwrap();
    for (name, _) in &twins {
        cwd.install_plugin(name).unwrap();
    }
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    let versions = client.ask(json!({"action": "version"})).unwrap()["machineries"].clone();
    let expected = json!({
        "twin-older": "shlex 1 quotes \"'\\0'\"; number 1; steps 3, 3",
        "twin-newer": "shlex 2 says Err(Nul); number 2; steps 40, 40",
    });
    assert_eq!(versions, expected);
    for (machine, name) in [("old", "twin-older"), ("new", "twin-newer")] {
        let answer = client.act("restore_start", machine).unwrap();
        assert!(answer["reason"].as_str().unwrap().contains(&format!("{name} starts nothing")), "{answer}");
        let log = host.log();
        for said in ["says this", "panics"] {
            let lines: Vec<_> = log.lines().filter(|line| line.contains(&format!("{name} {said}"))).collect();
            assert_eq!(lines.len(), 1, "{log}");
            assert!(lines[0].contains(&format!("machinery=\"{name}\"")), "{}", lines[0]);
        }
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}
