//! `cargo xtask fresh`: runs the README's commands as on a machine without any dependencies.
//!
//! The task makes a minimal Debian in a folder, with only a Rust toolchain and a C compiler in it. The
//! commands run with that folder as their root, in a clone of this checkout. A package that they fail to
//! install is therefore missing, even if the surrounding system has it.
//!
//! ```text
//! <cache>/fresh/<release>/base/       what debootstrap makes, once
//!                         root/       a copy of it for each run, removed after it
//!                         archives/   packages that apt has downloaded there
//!                         cache/      the user's cache folder there, with the test guests
//! ```

mod root;

use clap::ValueEnum;

pub use self::root::Root;
use crate::run::{Failure, Result, cargo, step, xtask_arguments};

/// The README's commands, without `cargo xtask`.
const README: [&[&str]; 3] = [&["demo"], &["demo", "--machinery", "kvm"], &["test"]];

/// Options of `cargo xtask fresh`.
#[derive(clap::Args)]
pub struct Options {
    /// The release of Debian
    #[arg(long, value_enum, default_value = "bookworm")]
    release: Release,
    /// Run the task on this system where no such root can be made
    #[arg(long)]
    or_here: bool,
    /// A task of `cargo xtask`, with its arguments [default: the commands of the README, one by one]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    task: Vec<String>,
}

/// A release of Debian.
#[derive(Clone, Copy, ValueEnum)]
pub enum Release {
    /// Debian 12
    Bookworm,
    /// Debian 13
    Trixie,
}

impl Release {
    /// Returns the name that Debian's archive has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// Runs the tasks in a fresh root.
pub fn run(options: &Options) -> Result<()> {
    let tasks = tasks(&options.task);
    let release = options.release.name();
    match Root::new(release).map_err(|failure| cannot_make(release, &failure)) {
        Ok(root) => tasks.iter().try_for_each(|task| root.run(task)),
        Err(why) if options.or_here => {
            warn(&why);
            tasks.iter().try_for_each(|task| step(&mut cargo(xtask_arguments(task))))
        }
        Err(why) => Err(why.into()),
    }
}

fn tasks(chosen: &[String]) -> Vec<Vec<&str>> {
    if chosen.is_empty() {
        return README.iter().map(|task| task.to_vec()).collect();
    }
    vec![chosen.iter().map(String::as_str).collect()]
}

fn cannot_make(release: &str, failure: &Failure) -> String {
    let why = match failure {
        Failure::Message(why) => why,
        Failure::Step(_) => "the last command failed",
    };
    format!("cannot make a fresh root of Debian {release}: {why}")
}

fn warn(why: &str) {
    let line = "=".repeat(100);
    eprintln!(
        "\n{line}\nWARNING: {why}\nThe same runs on this system instead. It may have by chance what \
         these commands forget to install.\n{line}"
    );
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn task_of(words: &[&str]) -> Vec<String> {
        Line::try_parse_from([&["fresh"], words].concat()).unwrap().options.task
    }

    #[test]
    fn task_keeps_its_own_options_when_it_follows_with_or_without_dashes() {
        let wanted = ["test", "--backports", "--", "-E", "test(x)"];
        assert_eq!(task_of(&wanted), wanted);
        assert_eq!(task_of(&[&["--release", "trixie", "--"], &wanted[..]].concat()), wanted);
    }

    #[test]
    fn readme_commands_are_the_tasks_when_none_is_chosen() {
        let readme = include_str!("../../../README.md");
        for task in tasks(&[]) {
            let command = format!("cargo {}", xtask_arguments(&task).join(" "));
            assert!(readme.contains(&command), "{command}");
        }
    }
}
