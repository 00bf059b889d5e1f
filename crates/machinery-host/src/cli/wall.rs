//! Prints the address of the running host's wall.

use machinery::{Error, Result};
use serde_json::{Value, json};

use crate::config::Config;
use crate::cwd::Cwd;
use crate::wall::{login_url, token_file};

/// Prints the address to log in, from the host's answer to `version` and the token.
///
/// # Errors
/// The host serves no wall, or this user may not read the token.
pub fn wall(cwd: &Cwd, version: &Value, json: bool) -> Result<()> {
    let Some(address) = version["wall"].as_str() else {
        let error = Error::environment("the host serves no wall");
        return Err(match Config::read(cwd)?.wall.listen {
            None => error.advice("Set `web_listen` in machinery-host.yaml, and reload"),
            Some(listen) => error.advice(format!(
                "Reload if `web_listen` is new; otherwise the host's log has the reason why it does not serve {listen}"
            )),
        });
    };
    let url = match address.starts_with("http:") {
        true => login_url(&reachable(address), &token_file(&Config::read(cwd)?.wall, cwd))?,
        false => address.to_owned(),
    };
    if json {
        println!("{}", json!({"success": true, "url": url}));
    } else {
        println!("{url}");
    }
    Ok(())
}

/// Returns the address under which this computer reaches a wall that listens everywhere.
fn reachable(address: &str) -> String {
    address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_one_that_a_browser_can_open() {
        assert_eq!(reachable("http://0.0.0.0:8899"), "http://127.0.0.1:8899");
        assert_eq!(reachable("http://[::]:1"), "http://[::1]:1");
        assert_eq!(reachable("http://10.0.0.1:8899"), "http://10.0.0.1:8899");
    }
}
