//! The system packages that tests and demo need.
//!
//! A program counts as installed if it runs, also a QEMU built by hand. Packages of missing programs are
//! installed by apt-get; without it, they are only listed. A C compiler is present, because Rust cannot link
//! without one. Packages that only start services are not needed: the tests start their own libvirtd.

mod needs;

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::run::{Failure, Result, is_root, output, step, succeeds};
use needs::{CAPE_NEEDS, NEEDS, ROOT_NEEDS};

pub use needs::{Need, VERSION};

/// Both packages have one source. Different versions of them do not work together.
const QEMU: [&str; 2] = ["qemu-system-x86", "qemu-utils"];

/// The test guests' kernel. It is downloaded, not installed, but apt must find it.
const KERNEL: &str = "linux-image-cloud-amd64";

/// Older lists may name packages that mirrors have dropped.
const LISTS_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// Installs the missing packages for tests and demo. Afterwards apt's lists of packages are up to date.
pub fn ensure() -> Result<()> {
    let installed = install_missing(&NEEDS)?;
    if !installed && runs("apt-get") { refresh() } else { Ok(()) }
}

/// Installs the missing packages for fresh roots.
pub fn ensure_for_roots() -> Result<()> {
    install_missing(&ROOT_NEEDS).map(drop)
}

/// Installs the missing packages for the tests and benchmarks with CAPE.
pub fn ensure_for_cape() -> Result<()> {
    install_missing(&CAPE_NEEDS).map(drop)
}

/// Installs missing packages; returns whether any were missing.
pub fn install_missing(needs: &[Need]) -> Result<bool> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !need.is_met()).collect();
    match (missing.is_empty(), runs("apt-get")) {
        (true, _) => Ok(false),
        (false, true) => install(&missing).map(|()| true),
        (false, false) => Err(by_other_means(&missing)),
    }
}

fn runs(program: &str) -> bool {
    succeeds(Command::new(program).arg("--version"))
}

/// Updates apt's lists, from which test guests are made, if that needs no password. A failure is not fatal:
/// the guests may exist already.
fn refresh() -> Result<()> {
    let current = !lists_are_old() && succeeds(Command::new("apt-cache").args(["show", KERNEL]));
    if current || !is_root() {
        return Ok(());
    }
    eprintln!("The lists of packages are old: they are updated, as test guests are made from packages.");
    if step(&mut apt_get("env", &["update"])).is_err() {
        eprintln!("That failed. Test guests that are not made yet may not be made now.");
    }
    Ok(())
}

fn lists_are_old() -> bool {
    let updated = fs::metadata("/var/lib/apt/lists/partial").and_then(|folder| folder.modified());
    updated.ok().and_then(|updated| updated.elapsed().ok()).is_none_or(|age| age > LISTS_AGE)
}

fn install(missing: &[&Need]) -> Result<()> {
    eprintln!("These are needed and do not work here, so their packages are installed:");
    for Need { what, packages, why, .. } in missing {
        eprintln!("  {what}, which {why}: {}", packages.join(", "));
    }
    let rights = rights().ok_or_else(|| by_hand(missing))?;
    if rights == "sudo" {
        eprintln!("Installing needs root: sudo is used, and may ask for your password.");
    }
    step(&mut apt_get(rights, &["update"]))?;
    let packages = packages(missing)?;
    let mut args = vec!["install", "-y", "--no-install-recommends", "--allow-downgrades"];
    args.extend(packages.iter().map(String::as_str));
    step(&mut apt_get(rights, &args))?;
    match missing.iter().find(|need| !need.is_met()) {
        Some(need) => Err(format!(
            "installed: {}. Yet `{} {}` fails: run it to see why",
            need.packages.join(", "),
            need.program,
            need.args.join(" ")
        )
        .into()),
        None => Ok(()),
    }
}

/// Returns apt-get's names of the packages: those of QEMU together, with one version.
fn packages(missing: &[&Need]) -> Result<Vec<String>> {
    let (qemu, others): (Vec<&str>, Vec<&str>) =
        missing.iter().flat_map(|need| need.packages).partition(|package| QEMU.contains(package));
    let mut packages: Vec<String> = others.into_iter().map(str::to_owned).collect();
    if !qemu.is_empty() {
        let version = candidate(QEMU[0])?;
        packages.extend(QEMU.map(|package| format!("{package}={version}")));
    }
    Ok(packages)
}

/// Returns the version of `package` that apt would install.
fn candidate(package: &str) -> Result<String> {
    let policy = output(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"))?;
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    version.filter(|version| *version != "(none)").map(str::to_owned).ok_or_else(|| {
        format!("apt knows no package {package}: look at its sources in /etc/apt, or install QEMU by hand")
            .into()
    })
}

/// Returns the program that runs apt-get with the required privileges, if there is one.
fn rights() -> Option<&'static str> {
    match is_root() {
        true => Some("env"),
        false => runs("sudo").then_some("sudo"),
    }
}

/// Returns an apt-get command that asks no questions.
fn apt_get(rights: &str, args: &[&str]) -> Command {
    let mut command = Command::new(rights);
    if rights == "sudo" {
        // sudo keeps no variables, and may refuse new ones.
        command.arg("env");
    }
    // Waits for another apt-get, which often runs after a boot.
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]);
    command.args(args);
    command
}

fn by_hand(missing: &[&Need]) -> Failure {
    let packages: Vec<&str> = missing.iter().flat_map(|need| need.packages).copied().collect();
    format!(
        "installing needs root, and there is no sudo here; run this as root, then try again:\n  \
         apt-get update && apt-get install --no-install-recommends {}",
        packages.join(" ")
    )
    .into()
}

fn by_other_means(missing: &[&Need]) -> Failure {
    let names: Vec<String> =
        missing.iter().map(|need| format!("  {}, which {}", need.what, need.why)).collect();
    format!(
        "these are needed, and do not work here:\n{}\n\
         There is no apt-get to install them with: install them with this system's own tools",
        names.join("\n")
    )
    .into()
}
