//! Running other programs, and failing as they do.
//!
//! A program that fails has said why itself. So nothing is added to it, and what a test runner says
//! last stays last; only its exit code is handed on.

use std::env;
use std::fmt::Display;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

/// The workspace's folder.
pub const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Why a task ended early.
#[derive(Debug)]
pub enum Failure {
    /// A program failed with this code, and said why.
    Step(u8),
    /// Something to say.
    Message(String),
}

/// A result with a [`Failure`].
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// Says what is not said yet.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Step(code) => ExitCode::from(code),
            Self::Message(message) => {
                eprintln!("error: {message}");
                ExitCode::FAILURE
            }
        }
    }
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Message(message)
    }
}

impl From<machinery_testkit::Error> for Failure {
    fn from(error: machinery_testkit::Error) -> Self {
        Self::Message(error.to_string())
    }
}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// Turns the failure into "`what`: the failure".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::Message(format!("{}: {error}", what())))
    }
}

/// Cargo, in the workspace's folder: the one that runs this task, else the one in `$PATH`.
pub fn cargo<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args).current_dir(CHECKOUT);
    cargo
}

/// Returns cargo's arguments for a task of this program.
pub fn xtask_arguments<'a>(task: &[&'a str]) -> Vec<&'a str> {
    [&["xtask"], task].concat()
}

/// Reports progress on standard error, beside results on standard output.
pub fn note(text: &str) {
    eprintln!("  {text}");
}

/// Says `command` and runs it; what it prints is seen as it comes.
pub fn step(command: &mut Command) -> Result<()> {
    step_as(&line(command), command)
}

/// Runs a step like [`step`], for a command that needs a better name than its own words.
pub fn step_as(name: &str, command: &mut Command) -> Result<()> {
    eprintln!("\n==> {name}");
    let status = command.status().context(|| format!("cannot run `{}`", line(command)))?;
    if status.success() { Ok(()) } else { Err(Failure::Step(code(status))) }
}

/// What `command` prints; its failure tells what it printed as errors.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context(|| format!("cannot run `{}`", line(command)))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{}` failed with {}: {}", line(command), output.status, said.trim()).into())
}

/// Whether `command` runs and succeeds. What it prints is of no interest.
pub fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Whether this runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The user's cache folder for `name`.
pub fn cache(name: &str) -> Result<PathBuf> {
    let home = || env::home_dir().map(|home| home.join(".cache"));
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let cache = cache.ok_or_else(|| format!("there is no place to keep {name}: set XDG_CACHE_HOME"))?;
    Ok(cache.join("cuckoo-machinery").join(name))
}

/// The command as one would type it.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// As shells have it: 128 and the signal for a program that was killed.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
