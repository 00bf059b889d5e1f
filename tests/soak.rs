//! A short soak of each machinery: the task `soak` causes each fault once, in a phase that the seed chooses, and finds
//! nothing that is lost or left.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use machinery_testkit::artifacts;

#[track_caller]
fn assert_passes(arguments: &[&str]) {
    let xtask = artifacts::folder().unwrap().join("xtask");
    let ran = Command::new(xtask).arg("soak").args(arguments).output().unwrap();
    let said = [ran.stdout, ran.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    println!("{said}");
    assert!(ran.status.success(), "{said}");
}

#[test]
fn machine_returns_and_leaves_nothing_after_each_fault() {
    assert_passes(&["--machinery", "qemu", "--quick", "--seed", "17"]);
}

#[test]
fn domain_returns_and_leaves_nothing_when_libvirtd_is_killed() {
    assert_passes(&["--machinery", "kvm", "--only", "libvirtd killed", "--rounds", "3", "--seed", "17"]);
}
