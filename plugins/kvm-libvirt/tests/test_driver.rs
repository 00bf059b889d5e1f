//! The plugin on libvirt's test driver: a domain in memory, without a hypervisor and without libvirtd.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use machinery::host::{Instance, Plugin};
use machinery::{Deadline, ErrorKind, State};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::NullHost;
use machinery_testkit::scratch::ScratchCwd;

/// The test driver has one domain, `test`, which runs.
const YAML: &str = "\
dsn: test:///default
interface: lo
machines:
  m: {label: test, ip: 10.0.0.1, platform: linux, os_version: 1}
";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

fn loaded(cwd: &ScratchCwd) -> machinery::Result<Instance> {
    let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
    plugin.load(&cwd.setup("kvm").unwrap(), Arc::new(NullHost))
}

#[test]
fn domain_of_the_test_driver_is_driven_without_a_hypervisor() {
    let cwd = ScratchCwd::new(&[("kvm", YAML)]).unwrap();
    let kvm = loaded(&cwd).unwrap();
    println!("{}", kvm.version(soon()).unwrap());
    assert_eq!(kvm.machines().unwrap()[0].label, "test");
    assert_eq!(kvm.state("m", soon()).unwrap(), State::Running);
    assert_eq!(kvm.restore_start("m", soon()).unwrap_err().kind(), ErrorKind::UnexpectedState);
    kvm.stop("m", soon()).unwrap();
    assert_eq!(kvm.stop("m", soon()).unwrap_err().kind(), ErrorKind::StateReached);
    assert_eq!(kvm.state("m", soon()).unwrap(), State::Poweroff);
    let error = kvm.restore_start("m", soon()).unwrap_err().to_string();
    assert!(error.contains("has no current snapshot"), "{error}");
    kvm.norestore_start("m", soon()).unwrap();
    assert_eq!(kvm.state("m", soon()).unwrap(), State::Running);
    kvm.acpi_stop("m", soon()).unwrap();
    assert_eq!(kvm.state("m", soon()).unwrap(), State::Poweroff);
    kvm.shutdown(soon()).unwrap();
    let error = kvm.state("m", soon()).unwrap_err().to_string();
    assert!(error.contains("has been shut down"), "{error}");
}

/// Each host has a CWD of its own, and a machine of the same name, whose image would have the same path.
#[test]
fn host_is_refused_when_another_host_uses_its_image_folder() {
    let images = tempfile::tempdir().unwrap();
    let cwd = || {
        let cwd = ScratchCwd::new(&[("kvm", YAML)]).unwrap();
        let section = format!("instant: on, standby: off, instant_dir: {}", images.path().display());
        cwd.host_yaml(&format!("machineries: {{kvm: {{{section}}}}}\n")).unwrap();
        cwd
    };
    let (own, other) = (cwd(), cwd());
    let first = loaded(&own).unwrap();
    let error = loaded(&other).err().unwrap().to_string();
    assert!(error.contains("another host keeps its save images in"), "{error}");
    first.shutdown(soon()).unwrap();
    let second = loaded(&other).unwrap();
    second.shutdown(soon()).unwrap();
}
