//! Shell commands as the author's functions, for a plugin without its source.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::spec::{Answer, BackendSpec, Breakage, Death, Hook, LeftoverSearch, Pause};

/// Shell commands that replace functions of a [`BackendSpec`]. The environment of each has the name of the machine in
/// `MACHINERY_MACHINE`, and the folder with the plugin's folders in `MACHINERY_SCRATCH`.
#[derive(Debug, Clone, Default)]
pub struct Commands {
    /// Ends the running machine without the plugin.
    pub kill: Option<String>,
    /// Make restores of the machine fail, and repair it again.
    pub breakage: Option<[String; 2]>,
    /// Pause the running machine without the plugin, and resume it.
    pub pause: Option<[String; 2]>,
    /// Prints each leftover as a line.
    pub leftovers: Option<String>,
    /// The folder with the plugin's folders.
    pub scratch: PathBuf,
}

impl BackendSpec {
    /// Sets functions that run these commands. They act on the first machine.
    #[must_use]
    pub fn commands(mut self, commands: &Commands) -> Self {
        let machine = None;
        let hook = |text: &str| commands.hook(text);
        if let Some(kill) = &commands.kill {
            self.death = Some(Death { machine: machine.clone(), kill: hook(kill) });
        }
        if let Some([break_restore, repair]) = &commands.breakage {
            let (break_restore, repair) = (hook(break_restore), hook(repair));
            self.breakage = Some(Breakage { machine: machine.clone(), break_restore, repair });
        }
        if let Some([pause, resume]) = &commands.pause {
            self.pause = Some(Pause { machine, pause: hook(pause), resume: hook(resume) });
        }
        if let Some(find) = &commands.leftovers {
            self.leftovers = commands.search(find);
        }
        self
    }
}

impl Commands {
    fn hook(&self, text: &str) -> Hook {
        let (text, scratch) = (text.to_owned(), self.scratch.clone());
        Box::new(move |machine| {
            let mut command = shell(&text, &scratch);
            let status = command.env("MACHINERY_MACHINE", machine).stdout(Stdio::null()).status()?;
            if status.success() { Ok(()) } else { Err(format!("`{text}` ended with {status}").into()) }
        })
    }

    fn search(&self, text: &str) -> LeftoverSearch {
        let (text, scratch) = (text.to_owned(), self.scratch.clone());
        Arc::new(move || -> Answer<Vec<String>> {
            let output = shell(&text, &scratch).stderr(Stdio::inherit()).output()?;
            // Searches such as `pgrep` return 1 if they find nothing.
            if !matches!(output.status.code(), Some(0 | 1)) {
                return Err(format!("`{text}` ended with {}", output.status).into());
            }
            let lines = String::from_utf8_lossy(&output.stdout);
            Ok(lines.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect())
        })
    }
}

fn shell(text: &str, scratch: &std::path::Path) -> Command {
    let mut command = machinery::command("sh");
    command.args(["-c", text]).env("MACHINERY_SCRATCH", scratch).stdin(Stdio::null());
    command
}
