//! The commands that are more than a request: `check`, `clean`, `conformance`, `end-runs`, `export`, `import`,
//! `machine`, `new-plugin`, `shutdown` and `upgrade`.

mod address_range;
pub mod check;
pub mod clean;
pub mod conformance;
pub mod end_runs;
pub mod export;
pub mod import;
pub mod machine;
pub mod new_plugin;
pub mod shutdown;
pub mod upgrade;

/// Returns the text as one word of the shell, for a command that a message shows.
pub fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
