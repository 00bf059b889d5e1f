//! Commands of a task.
//!
//! A command that fails has reported the reason itself. The task therefore adds nothing, and exits with the
//! command's code.

use std::env;
use std::fmt::{self, Display};
use std::os::unix::process::ExitStatusExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

/// The workspace's folder.
pub const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The reason why a task failed.
#[derive(Debug)]
pub enum Failure {
    /// A command failed with this code, and has reported the reason.
    Step(u8),
    /// A message to report.
    Message(String),
}

/// A result with a [`Failure`].
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// Reports the message, if there is one, and returns the exit code.
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

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(code) => write!(f, "a command failed with code {code}"),
            Self::Message(message) => f.write_str(message),
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

/// Adds the failed operation to an error.
pub trait Context<T> {
    /// Turns the error into "`what`: the error".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::Message(format!("{}: {error}", what())))
    }
}

/// Returns cargo in the workspace's folder: the one that runs this task, or the one in `$PATH`.
pub fn cargo<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args).current_dir(CHECKOUT);
    cargo
}

/// Returns cargo's arguments for a task of this program.
pub fn xtask_arguments<'a>(task: &[&'a str]) -> Vec<&'a str> {
    [&["xtask"], task].concat()
}

/// Keeps the panic of a print quiet whose reader has closed the pipe, such as `head`: it has read enough.
pub fn be_quiet_on_closed_pipes() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if !message.starts_with("failed printing to stdout: Broken pipe") {
            report(panic);
        }
    }));
}

/// Reports progress on standard error, beside results on standard output.
pub fn note(text: &str) {
    eprintln!("  {text}");
}

/// Shows `command` and runs it, with its output.
pub fn step(command: &mut Command) -> Result<()> {
    step_as(&line(command), command)
}

/// Runs a step like [`step`], with a better name than the command line.
pub fn step_as(name: &str, command: &mut Command) -> Result<()> {
    eprintln!("\n==> {name}");
    let status = command.status().context(|| format!("cannot run `{}`", line(command)))?;
    if status.success() { Ok(()) } else { Err(Failure::Step(code(status))) }
}

/// Returns the output of `command`; its failure contains its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context(|| format!("cannot run `{}`", line(command)))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{}` failed with {}: {}", line(command), output.status, said.trim()).into())
}

/// Reports whether `command` runs and succeeds. Discards its output.
pub fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Reports whether this process runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns the user's cache folder for `name`.
pub fn cache(name: &str) -> Result<PathBuf> {
    let home = || env::home_dir().map(|home| home.join(".cache"));
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    let cache = cache.ok_or_else(|| format!("there is no place to keep {name}: set XDG_CACHE_HOME"))?;
    Ok(cache.join("cuckoo-machinery").join(name))
}

/// Returns the command line.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Returns a shell's exit code: 128 and the signal for a killed program.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
