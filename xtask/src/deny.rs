//! `cargo xtask deny`: checks the dependencies by the rules in `deny.toml`.
//!
//! The tool `cargo-deny` takes a minute to build on two cores, so it is built once, into the user's cache folder. Its
//! debug build is fast enough.
//!
//! The database of advisories is on the network. Where it cannot be reached, the advisories alone are skipped.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{CHECKOUT, Failure, Result, cache, cargo, output, step, succeeds};

/// Options of `cargo xtask deny`.
#[derive(clap::Args)]
pub struct Options {}

/// The checks that need no database.
const WITHOUT_DATABASE: [&str; 3] = ["bans", "licenses", "sources"];

/// The environment variable that has `cargo xtask test` install the tool.
pub const VARIABLE: &str = "XTASK_DENY";

/// Installs the tool if it is missing, and checks the dependencies.
pub fn run(_: &Options) -> Result<()> {
    let tool = match installed() {
        Some(tool) => tool,
        None => install()?,
    };
    check(&tool)
}

/// Checks the dependencies if the tool is installed, or if `$XTASK_DENY` is `install` and it can be.
pub fn run_if_installed() -> Result<()> {
    let is_wanted = env::var_os(VARIABLE).is_some_and(|wanted| wanted == "install");
    let tool = installed().or_else(|| is_wanted.then(install)?.map_err(|failure| failure.report()).ok());
    if let Some(tool) = tool {
        return check(&tool);
    }
    warn(&format!(
        "cargo-deny is not installed, so the DEPENDENCIES ARE NOT CHECKED. `cargo xtask deny` installs it, and so does \
         {VARIABLE}=install"
    ));
    Ok(())
}

/// Returns the installed tool: that in `$PATH`, or that of an earlier run.
fn installed() -> Option<PathBuf> {
    let own = folder().ok().map(|folder| program(&folder));
    let places = [Some(PathBuf::from("cargo-deny")), own].into_iter().flatten();
    places.into_iter().find(|tool| succeeds(Command::new(tool).arg("--version")))
}

fn folder() -> Result<PathBuf> {
    cache("tools")
}

fn program(folder: &Path) -> PathBuf {
    folder.join("bin/cargo-deny")
}

fn install() -> Result<PathBuf> {
    let folder = folder()?;
    let root = folder.to_string_lossy();
    let mut install = cargo(["install", "--locked", "--debug", "cargo-deny", "--root", &root]);
    // Line tables would double the build's time.
    step(install.env("CARGO_PROFILE_DEV_DEBUG", "0"))?;
    Ok(program(&folder))
}

fn check(tool: &Path) -> Result<()> {
    step(deny(tool).args(["check", "--hide-inclusion-graph"]).args(WITHOUT_DATABASE))?;
    // A mirror that asks for a password is no database.
    if let Err(failure) = output(deny(tool).args(["fetch", "db"]).env("GIT_TERMINAL_PROMPT", "0")) {
        let why = match failure {
            Failure::Message(why) => why,
            Failure::Step(code) => format!("exit code {code}"),
        };
        warn(&format!("the ADVISORIES ARE NOT CHECKED, because their database cannot be fetched: {why}"));
        return Ok(());
    }
    step(deny(tool).args(["--offline", "check", "advisories"]))
}

fn deny(tool: &Path) -> Command {
    let mut deny = Command::new(tool);
    deny.current_dir(CHECKOUT).arg("--workspace");
    deny
}

fn warn(text: &str) {
    let line = "=".repeat(100);
    eprintln!("\n{line}\nWARNING: {text}\n{line}");
}
