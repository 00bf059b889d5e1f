//! Devices that reach beyond QEMU, in its jail: a bridge, a screen for VNC clients, UEFI variables.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::time::Duration;

use machinery_testkit::capture;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{Lab, TestNetwork};
use machinery_testkit::requirement;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
const BRIDGE: &str = "br66";
/// The address of the screen, and its display's number.
const SCREEN: (&str, u16) = ("127.0.0.1", 66);

/// Makes a lab with a machine on a bridge, with a screen; none for a user who may not do that.
fn lab() -> Option<Lab> {
    let lab = Lab::with_network("m", SnapshotFormat::Lz4).unwrap()?;
    lab.network().add_bridge(BRIDGE).unwrap();
    change_args(&lab, &[]);
    Some(lab)
}

fn change_args(lab: &Lab, more: &[String]) {
    lab.change_start_args("m", |args| {
        let netdev = args.iter_mut().find(|arg| arg.starts_with("tap,")).unwrap();
        *netdev = format!("bridge,id=net0,br={BRIDGE}");
        let dump = format!("filter-dump,id=dump0,netdev=net0,file={}", lab.dumped("m").display());
        args.extend(["-object".to_owned(), dump]);
        let (ip, display) = SCREEN;
        args.extend(["-vnc".to_owned(), format!("{ip}:{display}")]);
        args.extend_from_slice(more);
    })
    .unwrap();
}

/// Returns the arguments of firmware with variables.
fn firmware(lab: &Lab) -> Vec<String> {
    let [code, vars] = ["code.fd", "vars.fd"].map(|name| lab.folder("m").dir.join(name));
    fs::copy("/usr/share/seabios/bios-256k.bin", &code).unwrap();
    fs::write(&vars, vec![0; 256 << 10]).unwrap();
    let units = [(0, "on", &code), (1, "off", &vars)].map(|(unit, readonly, path)| {
        format!("if=pflash,unit={unit},format=raw,readonly={readonly},file={}", path.display())
    });
    units.into_iter().flat_map(|unit| ["-drive".to_owned(), unit]).collect()
}

/// Starts a host that may use the bridge.
fn host(lab: &Lab, name: &str) -> RunningHost {
    let network = lab.network();
    RunningHost::start_with(lab.cwd(), |command| {
        network.attach(command);
        let scratch = lab.cwd().root().join(name);
        fs::create_dir(&scratch).unwrap();
        network.allow_bridge(command, BRIDGE, &scratch).unwrap();
    })
    .unwrap()
}

/// Returns the first bytes of the screen's server.
fn greeting(network: &TestNetwork) -> String {
    let (ip, display) = SCREEN;
    let connect = || TcpStream::connect((ip, 5900 + display)).unwrap();
    let mut greeting = [0; 12];
    network.inside(connect).unwrap().read_exact(&mut greeting).unwrap();
    String::from_utf8_lossy(&greeting).into_owned()
}

/// Waits until the guest has sent packets since the start of its run.
fn talks(lab: &Lab) {
    capture::wait_for(&lab.dumped("m"), SOON, |packets| packets.len() > 2).unwrap();
}

#[test]
fn machine_has_bridge_screen_and_variables_in_its_jail() {
    let Some(lab) = requirement::NETWORK.or_skip(lab()) else { return };
    let network = lab.network();
    for (ahead, mode) in
        [("instant: off, standby: off", "plain"), ("standby: off", "instant"), ("standby: auto", "standby")]
    {
        lab.ahead(ahead).unwrap();
        let mut host = host(&lab, mode);
        let mut client = host.client().unwrap();
        client.perform("prepare", "m");
        let machine = client.machine("m").unwrap();
        assert_eq!(machine["ready"]["mode"], mode, "{machine}");
        assert!(machine["jail"].as_str().unwrap().starts_with("A+B"), "{machine}");
        client.perform("restore_start", "m");
        talks(&lab);
        assert_eq!(network.members(BRIDGE).unwrap().lines().count(), 1);
        assert_eq!(greeting(network), "RFB 003.008\n");
        client.perform("stop", "m");
        assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
        assert!(host.terminate().unwrap().success());
        assert_eq!(network.members(BRIDGE).unwrap(), "");
        lab.assert_clean();
    }
    change_args(&lab, &firmware(&lab));
    lab.ahead("instant: off, standby: off").unwrap();
    let mut host = host(&lab, "firmware");
    let mut client = host.client().unwrap();
    client.perform("norestore_start", "m");
    talks(&lab);
    client.perform("stop", "m");
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}
