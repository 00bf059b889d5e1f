//! The programs of Cuckoo3, in its environment.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, iter};

use crate::error::Context;
use crate::{Result, artifacts};

/// The package by which Cuckoo3 uses the host. It is not installed in the environment.
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../integrations/cuckoo3");

/// The machinery manager of a Cuckoo3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manager {
    /// The machinery host: `cuckoo-hosted`.
    Host,
    /// Cuckoo3's own: `cuckoo`.
    Cuckoo,
}

/// The programs of an environment, for a CWD.
pub struct Programs {
    /// The Python of the environment.
    pub python: PathBuf,
    /// The CWD.
    pub cwd: PathBuf,
}

impl Programs {
    /// Returns the command of the main process with its own node, on that manager.
    pub fn main(&self, manager: Manager) -> Result<Command> {
        let mut command = match manager {
            Manager::Cuckoo => self.command("cuckoo.main", "main"),
            Manager::Host => self.command("cuckoo_machinery.commands", "cuckoo"),
        };
        let plugins = artifacts::folder()?;
        command.env("PYTHONPATH", fs::canonicalize(ADAPTER).context(|| format!("opening {ADAPTER}"))?);
        command.env("CUCKOO_MACHINERY", artifacts::program()?);
        command.env("CUCKOO_MACHINERY_OPTIONS", format!("-v --plugin-dir '{}'", plugins.display()));
        command.arg("-d");
        Ok(command)
    }

    /// Returns the command of a program: a function of a module.
    pub fn command(&self, module: &str, function: &str) -> Command {
        let program =
            format!("import sys; from {module} import {function}; sys.argv[0] = 'cuckoo'; {function}()");
        let mut command = Command::new(&self.python);
        command.args(["-c", &program]).env("PYTHONDONTWRITEBYTECODE", "1");
        // Cuckoo3 runs programs of its environment.
        let programs = self.python.parent().unwrap_or(Path::new("")).to_path_buf();
        let path = env::var_os("PATH").unwrap_or_default();
        if let Ok(path) = env::join_paths(iter::once(programs).chain(env::split_paths(&path))) {
            command.env("PATH", path);
        }
        command.arg("--cwd").arg(&self.cwd);
        command
    }
}
