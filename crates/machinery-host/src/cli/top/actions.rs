//! The actions of the operator that the host has not answered yet.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use machinery::Result;
use serde_json::{Value, json};

use super::model::Action;
use crate::cli::file::NewFile;
use crate::client::Requests;

/// An action under way.
struct Pending {
    /// The action and the machine, for people.
    what: String,
    begun: Instant,
    /// The file of a screenshot.
    file: Option<NewFile>,
}

/// The actions under way, by the `id` of their request.
#[derive(Default)]
pub struct Actions {
    pending: HashMap<u64, Pending>,
    next: u64,
}

impl Actions {
    /// Requests the action, and returns a notice about it.
    ///
    /// # Errors
    /// The file of a screenshot cannot be created, or the connection was lost.
    pub fn begin(&mut self, action: Action, machine: &str, requests: &mut Requests) -> Result<String> {
        let path = || free_path(Path::new(""), machine);
        let file = (action == Action::Screenshot).then(|| NewFile::at(&path())).transpose()?;
        let mut request = action.request(machine);
        request["id"] = json!(self.next);
        requests.send(&request, file.as_ref().map(NewFile::file))?;
        let what = format!("{} {machine}", action.verb());
        let notice = format!("{what} …");
        self.pending.insert(self.next, Pending { what, begun: Instant::now(), file });
        self.next += 1;
        Ok(notice)
    }

    /// Returns a notice about the action that this message answers, if it answers one.
    pub fn end(&mut self, message: &Value) -> Option<String> {
        let Pending { what, begun, file } = self.pending.remove(&message["id"].as_u64()?)?;
        if message["success"] != json!(true) {
            let reason = message["reason"].as_str().unwrap_or("the host gave no reason");
            return Some(format!("{what} failed: {reason}"));
        }
        let Some(file) = file else { return Some(format!("{what}: done in {:.1?}", begun.elapsed())) };
        let path = file.path().display().to_string();
        Some(match file.finish() {
            Ok(()) => format!("{what}: written to {path}"),
            Err(error) => format!("{what} failed: {error}"),
        })
    }

    /// Forgets all actions of a lost connection, and returns a notice about them, if there are any.
    pub fn abandon(&mut self) -> Option<String> {
        let what: Vec<String> = self.pending.drain().map(|(_, pending)| pending.what).collect();
        (!what.is_empty()).then(|| format!("the results are unknown of: {}", what.join(", ")))
    }
}

/// Returns the first path for a picture of the machine at which nothing exists.
fn free_path(folder: &Path, machine: &str) -> PathBuf {
    let name = machine.replace('/', "_");
    let numbered = (2..).map(|number| format!("{name}-{number}.png"));
    let mut names = std::iter::once(format!("{name}.png")).chain(numbered).map(|name| folder.join(name));
    let fallback = folder.join(format!("{name}.png"));
    names.find(|path| path.symlink_metadata().is_err()).unwrap_or(fallback)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_a_picture_is_the_first_free_one() {
        let folder = tempfile::tempdir().unwrap();
        let free =
            |machine| free_path(folder.path(), machine).strip_prefix(folder.path()).unwrap().to_owned();
        assert_eq!(free("m").to_str(), Some("m.png"));
        for taken in ["m.png", "m-2.png"] {
            std::fs::write(folder.path().join(taken), "").unwrap();
        }
        assert_eq!((free("m").to_str(), free("../m").to_str()), (Some("m-3.png"), Some(".._m.png")));
    }

    #[test]
    fn answer_to_no_action_is_no_notice() {
        let mut actions = Actions::default();
        assert_eq!(actions.end(&json!({"id": "list"})), None);
        assert_eq!((actions.end(&json!({"id": 0, "success": true})), actions.abandon()), (None, None));
    }
}
