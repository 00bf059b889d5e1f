//! Prints where viewers connect to a machine's console.

use serde_json::{Value, json};

use super::output::reply;
use crate::commands::shell_word;

/// Prints the socket of a console, and the commands of viewers that can connect to it.
pub fn console(answer: &Value, json: bool) {
    match answer["path"].as_str().filter(|_| !json && answer["success"] == json!(true)) {
        Some(path) => println!("{path}\n\nConnect a viewer:\n{}", commands(path)),
        None => reply(answer, json),
    }
}

/// Returns the commands of viewers that take the path of a Unix socket, one a line.
fn commands(path: &str) -> String {
    let path = shell_word(path);
    ["xtigervncviewer", "gvncviewer"].map(|viewer| format!("  {viewer} {path}")).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_one_word_of_the_shell() {
        let shown = commands("/c/it's/win 10.sock");
        let words = |line: &str| {
            std::process::Command::new("sh")
                .args(["-c", &format!("set -- {line}; printf %s \"$2\"")])
                .output()
        };
        for line in shown.lines() {
            assert_eq!(words(line).unwrap().stdout, b"/c/it's/win 10.sock", "{line}");
        }
    }
}
