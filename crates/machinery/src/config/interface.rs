//! Network interfaces that a configuration names.

use std::path::Path;

use super::file::ConfigFile;
use crate::{Error, Result};

const INTERFACES: &str = "/sys/class/net";

const ADVICE: &str = "Create the bridge or tap first, or name another interface";

/// Expects that the network interface `name`, the value under `key` of the file, exists on this computer. The operator
/// creates interfaces; a plugin never does.
///
/// # Errors
/// The interface does not exist; the error lists the existing interfaces.
pub fn expect_interface(file: &ConfigFile, key: &[&str], name: &str) -> Result<()> {
    find_interface(name).map_err(|error| file.error(key, error.reason()).advice(ADVICE))
}

/// Expects that a network interface exists on this computer.
///
/// # Errors
/// The interface does not exist; the error lists the existing interfaces.
pub fn find_interface(name: &str) -> Result<()> {
    let known = !name.is_empty() && !name.contains('/') && Path::new(INTERFACES).join(name).exists();
    if known {
        return Ok(());
    }
    let entries = Path::new(INTERFACES).read_dir().into_iter().flatten().flatten();
    let there: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let reason = format!("the network interface '{name}' does not exist; there are {}", there.join(", "));
    Err(Error::environment(reason).advice(ADVICE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_is_refused_with_a_list_when_it_does_not_exist() {
        let file = ConfigFile { path: "/c/x.yaml".into(), text: "interface: br9\n".into() };
        assert!(expect_interface(&file, &["interface"], "lo").is_ok());
        let text = expect_interface(&file, &["interface"], "br9").unwrap_err().to_string();
        assert!(text.contains("'br9' does not exist") && text.contains("lo"), "{text}");
        assert!(expect_interface(&file, &["interface"], "../net/lo").is_err());
    }
}
