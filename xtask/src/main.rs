//! `cargo xtask`: the tasks of developers and CI.
//!
//! Each task works on a bare computer: it installs system packages ([`system_packages`]), builds, and then does its
//! work. It shows every command that it runs, and exits with the code of the one that failed.

mod backports;
mod bench;
mod cape_env;
mod cuckoo3_env;
mod debian;
mod demo;
mod deny;
mod fresh;
mod install;
mod leftovers;
mod package;
mod process;
mod prose;
mod run;
mod skips;
mod soak;
mod system_packages;
mod test;
mod tracked;

use std::process::ExitCode;

use clap::Parser;

/// The tasks of this repository
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
enum Task {
    /// Run all checks and tests, as CI does; installs the system packages they need
    Test(test::Options),
    /// Show the machinery host at work with a real machine; installs and builds what it needs
    Demo(demo::Options),
    /// Build the program and its plugins for a release, and install them
    Install(install::Options),
    /// Make packages for Debian, a wheel for Cuckoo3's environment, and a tarball for other distributions
    Package(package::Options),
    /// Run tasks on a fresh Debian: a minimal root with only a Rust toolchain and a C compiler in it
    Fresh(fresh::Options),
    /// Measure restores beside the hypervisor alone, in one run
    Bench(bench::Options),
    /// Cause faults in every phase of machines, and check that nothing is lost and nothing is left
    Soak(soak::Options),
    /// Check the dependencies by the rules in deny.toml; installs cargo-deny if it is missing
    Deny(deny::Options),
    /// Make a Python environment with Cuckoo3, from the checkout that $CUCKOO3_SOURCE names
    Cuckoo3Env(cuckoo3_env::Options),
    /// Find phrases that the rules for prose forbid in comments, documents, messages and names of tests
    Prose(prose::Options),
    /// Make the Python environment of the tests with CAPE; installs the packages they need
    CapeEnv(cape_env::Options),
}

fn main() -> ExitCode {
    run::be_quiet_on_closed_pipes();
    let result = match Task::parse() {
        Task::Test(options) => test::run(&options),
        Task::Demo(options) => demo::run(&options),
        Task::Install(options) => install::run(&options),
        Task::Package(options) => package::run(&options),
        Task::Fresh(options) => fresh::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Deny(options) => deny::run(&options),
        Task::Cuckoo3Env(options) => cuckoo3_env::run(&options),
        Task::Prose(options) => prose::run(&options),
        Task::CapeEnv(options) => cape_env::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
