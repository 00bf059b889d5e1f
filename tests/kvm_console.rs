//! The console of real domains: libvirtd connects viewers to a VNC server that listens nowhere.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::KvmLab;
use machinery_testkit::viewer::{self, Viewer};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const GRAPHICS: &str = "<graphics type='vnc' sharePolicy='ignore'><listen type='none'/></graphics>";

fn good() -> Value {
    json!({"success": true})
}

/// Makes a lab with the machine `m`, whose domain and snapshot have a VNC server.
fn lab_with_graphics() -> KvmLab {
    let lab = KvmLab::new(&[("m", Guest::Micro)]).unwrap();
    let with = |text: &str| text.replace("<video>", &format!("{GRAPHICS}<video>"));
    lab.change_domain(&lab.machine("m").label, with).unwrap();
    lab
}

fn served(lab: &KvmLab, kvm: &str) -> (RunningHost, Client) {
    lab.cwd().host_yaml(&format!("machineries: {{kvm: {{{kvm}}}}}\n")).unwrap();
    let host = lab.host().unwrap();
    let client = host.client().unwrap();
    (host, client)
}

/// Returns the socket of the running machine's console.
fn console(client: &mut Client) -> PathBuf {
    let answer = client.act("console", "m").unwrap();
    answer["path"].as_str().unwrap_or_else(|| panic!("{answer}")).into()
}

/// Connects a viewer that sees the screen of the restored guest.
fn viewer(client: &mut Client) -> Viewer {
    Viewer::of_screen(&console(client), viewer::is_text).unwrap()
}

#[test]
fn viewers_see_the_screen_of_a_domain_until_its_run_ends() {
    let lab = lab_with_graphics();
    for prepared in ["instant: off", "standby: on"] {
        let (mut host, mut client) = served(&lab, &format!("console: true, {prepared}"));
        if prepared.starts_with("standby") {
            assert_eq!(client.act("prepare", "m").unwrap(), good());
            assert_eq!(client.machine("m").unwrap()["ready"]["mode"], "standby");
            let refused = client.act("console", "m").unwrap();
            assert!(refused["reason"].as_str().unwrap().contains("because it is poweroff"), "{refused}");
        }
        assert_eq!(client.act("restore_start", "m").unwrap(), good(), "{}", host.log());
        let (mut first, mut second) = (viewer(&mut client), viewer(&mut client));
        first.is_served().unwrap();
        second.press(0x6b).unwrap();
        second.is_served().unwrap();
        assert_eq!(client.act("stop", "m").unwrap(), good());
        first.wait_for_close().unwrap();
        second.wait_for_close().unwrap();
        assert_eq!(client.act("norestore_start", "m").unwrap(), good());
        Viewer::connect(&console(&mut client)).unwrap().greeting().unwrap();
        assert_eq!(client.act("stop", "m").unwrap(), good());
        assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
        lab.assert_clean();
    }
}

#[test]
fn viewer_is_disconnected_when_the_qemu_of_a_domain_is_killed() {
    let lab = lab_with_graphics();
    let (_host, mut client) = served(&lab, "instant: off, console: true");
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    let mut viewer = viewer(&mut client);
    kill_process(lab.qemu_of("m").unwrap(), Signal::KILL).unwrap();
    viewer.wait_for_close().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    Viewer::of_screen(&console(&mut client), viewer::is_text).unwrap();
}

#[test]
fn domain_without_a_server_is_refused_with_the_remedy() {
    let lab = KvmLab::new(&[("m", Guest::Micro)]).unwrap();
    let (host, mut client) = served(&lab, "instant: off, machines: {m: {console: true}}");
    let warnings = client.machine("m").unwrap()["warnings"].to_string();
    assert!(warnings.contains("no VNC server") && warnings.contains("lab-m"), "{warnings}");
    assert_eq!(client.act("restore_start", "m").unwrap(), good());
    Viewer::connect(&console(&mut client)).unwrap().wait_for_close().unwrap();
    let line = host.wait_for_log(&["a viewer was refused"]).unwrap();
    assert!(line.contains("has no VNC server") && line.contains("<listen type='none'/>"), "{line}");
    assert_eq!(client.machine("m").unwrap()["disabled"], json!(false));
}
