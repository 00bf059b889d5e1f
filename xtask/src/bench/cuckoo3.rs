//! Cuckoo3's own machinery manager and client, on the same machine as the host.
//!
//! The manager runs in a process of its own Python, driven line by line through the script `cuckoo3.py`. It
//! reads the host's configuration file of the machine. No host runs meanwhile: both use the same socket and
//! address.

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use machinery_testkit::lab::Lab;

use super::answers;
use super::figures::{Figures, Kind, Place, Unit};
use crate::run::{Context, Failure, Result};

/// The duration of a `restore_start`.
pub const RESTORE: Kind = Kind {
    by: "",
    name: "Cuckoo3 restore_start",
    what: "Cuckoo3's own manager: call until return of its own client",
    unit: Unit::Ms,
};
/// The duration of a `stop`.
pub const STOP: Kind = Kind {
    by: "",
    name: "Cuckoo3 stop",
    what: "Cuckoo3's own manager: call until return of its own client",
    unit: Unit::Ms,
};

/// The time until the agent answers after a restore.
pub const ANSWER: Kind = answers::kind("Cuckoo3, agent answers");

const SCRIPT: &str = include_str!("cuckoo3.py");

/// Returns the Python with Cuckoo3, if `$CUCKOO3_PYTHON` names one.
pub fn python() -> Option<String> {
    env::var("CUCKOO3_PYTHON").ok().filter(|python| !python.is_empty())
}

/// Adds the keys that Cuckoo3 requires to the lab's only machine.
pub fn complete(lab: &Lab) -> Result<()> {
    let keys = "    os_version: \"10\"\n    architecture: amd64\n    tags: [bench]\n";
    Ok(lab.change_yaml("    os_version: 10\n", keys)?)
}

/// A manager of a lab's machine `m`.
pub struct Cuckoo3<'a> {
    lab: &'a Lab,
    python: Child,
    /// The manager ends when this is closed.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// The path of the manager's log.
    errors: PathBuf,
}

impl<'a> Cuckoo3<'a> {
    /// Starts the manager and waits until it listens.
    pub fn start(python: &str, lab: &'a Lab) -> Result<Self> {
        let what = || format!("cannot start {python}, which CUCKOO3_PYTHON names");
        let errors = lab.cwd().root().join("cuckoo3.log");
        let mut command = Command::new(python);
        command.args(["-B", "-c", SCRIPT]).arg(lab.cwd().root()).arg("m");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors).context(what)?);
        let mut python = command.spawn().context(what)?;
        let (Some(orders), Some(answers)) = (python.stdin.take(), python.stdout.take()) else {
            return Err("Cuckoo3's pipes are not there".to_owned().into());
        };
        let answers = BufReader::new(answers);
        let mut cuckoo3 = Cuckoo3 { lab, python, orders: Some(orders), answers, errors };
        let said = cuckoo3.answer()?;
        if said == "ready" { Ok(cuckoo3) } else { Err(cuckoo3.failed(&said)) }
    }

    /// Measures restores and stops; the first round does not count.
    pub fn measure(mut self, rounds: usize, place: Place, figures: &mut Figures) -> Result<()> {
        for round in 0..=rounds {
            let restored = self.act("restore_start")?;
            let answered = answers::after(restored, &self.lab.folder("m").probe)?;
            let stopped = self.act("stop")?;
            if round > 0 {
                figures.add(place, RESTORE, restored);
                figures.add(place, ANSWER, answered);
                figures.add(place, STOP, stopped);
            }
        }
        self.end()
    }

    /// Runs an action, and returns the milliseconds.
    fn act(&mut self, action: &str) -> Result<f64> {
        let what = || format!("cannot have Cuckoo3 do {action}");
        if let Some(orders) = &mut self.orders {
            writeln!(orders, "{action}").context(what)?;
        }
        let said = self.answer()?;
        let seconds: f64 = said.parse().map_err(|_| self.failed(&said))?;
        Ok(seconds * 1000.0)
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).context(|| "cannot hear from Cuckoo3".to_owned())?;
        Ok(line.trim().to_owned())
    }

    fn end(mut self) -> Result<()> {
        drop(self.orders.take());
        let status = self.python.wait().context(|| "cannot wait for Cuckoo3".to_owned())?;
        if !status.success() {
            return Err(self.failed(&format!("it ended with {status}")));
        }
        Ok(())
    }

    fn failed(&self, said: &str) -> Failure {
        let log = fs::read_to_string(&self.errors).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(20)..].join("\n  ");
        format!("Cuckoo3's manager does not do what it should ({said:?}); it said:\n  {last}").into()
    }
}

impl Drop for Cuckoo3<'_> {
    fn drop(&mut self) {
        // The manager stops its machine and ends. The lab finds leftovers.
        drop(self.orders.take());
        let _ = self.python.wait();
        let disk = self.lab.disposable("m");
        if let Err(error) = fs::remove_file(&disk)
            && error.kind() != ErrorKind::NotFound
        {
            eprintln!("cannot remove {}, which Cuckoo3 has left: {error}", disk.display());
        }
    }
}
