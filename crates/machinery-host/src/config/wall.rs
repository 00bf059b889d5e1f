//! The keys of the wall: its address, its token, and the names under which a proxy serves it.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use machinery::config::ConfigFile;
use machinery::{Error, Result};
use serde::Deserializer;

use super::place::place;

/// The values of the keys `web_…`. By default, no wall is served.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wall {
    /// The place at which the wall is served.
    pub listen: Option<Listen>,
    /// The file with the token, if it is another one than the CWD's.
    pub token_file: Option<PathBuf>,
    /// True if the page can act on machines.
    pub actions: bool,
    /// The origins under which a proxy serves the wall, such as `https://wall.example.org`.
    pub origins: Vec<String>,
    /// The folder of noVNC.
    pub novnc: Option<PathBuf>,
    /// The group that may connect to a Unix socket: that of the proxy.
    pub socket_group: Option<String>,
}

/// The place at which the wall is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An IP address and a port.
    Address(SocketAddr),
    /// A Unix socket, for a proxy.
    Socket(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Address(address) => write!(f, "http://{address}"),
            Listen::Socket(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Reads `web_listen`.
pub(super) fn listen<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Listen>, D::Error> {
    place(deserializer, |text| match text.parse() {
        Ok(address) => Ok(Listen::Address(address)),
        Err(_) if text.starts_with('/') => absolute(text).map(Listen::Socket),
        Err(_) => Err(format!(
            "'{text}' is neither an IP address with a port, such as 127.0.0.1:8899, nor the absolute path of a socket"
        )),
    })
}

/// Reads `web_token_file` and `web_novnc`.
pub(super) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    place(deserializer, absolute)
}

/// Returns an absolute path. Its folder may be made later, such as by systemd: a wall that fails does not end the host.
fn absolute(text: &str) -> Result<PathBuf, String> {
    match Path::new(text) {
        path if path.is_absolute() && path.file_name().is_some() => Ok(path.to_owned()),
        _ => Err(format!("'{text}' is not the absolute path of a file")),
    }
}

/// Returns the values of `web_origins`, in lowercase.
pub(super) fn origins(file: Option<&ConfigFile>, words: &[String], problems: &mut Vec<Error>) -> Vec<String> {
    let mut origins = Vec::new();
    for word in words {
        let origin = word.to_lowercase();
        match authority(&origin) {
            Some(_) => origins.push(origin),
            None => problems.extend(file.map(|file| {
                file.error(&["web_origins"], format!("'{word}' is not an origin"))
                    .advice("Write a scheme and a name, such as https://wall.example.org, without a path")
            })),
        }
    }
    origins
}

/// Returns the name and the port of an origin, as a browser sends them in `Host`.
pub fn authority(origin: &str) -> Option<&str> {
    let name = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"))?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
    (!name.is_empty() && name.chars().all(is_name)).then_some(name)
}

#[cfg(test)]
mod tests {
    use serde_yaml::Deserializer;

    use super::*;

    #[test]
    fn listen_is_an_address_or_the_path_of_a_socket() {
        let read = |yaml: &str| {
            listen(Deserializer::from_str(yaml)).map(Option::unwrap).map_err(|error| error.to_string())
        };
        assert_eq!(read("127.0.0.1:8899").unwrap().to_string(), "http://127.0.0.1:8899");
        assert_eq!(read("'[::1]:8899'").unwrap().to_string(), "http://[::1]:8899");
        assert_eq!(read("/tmp/wall.sock").unwrap(), Listen::Socket("/tmp/wall.sock".into()));
        for bad in ["8899", "localhost:8899", "wall.sock"] {
            assert!(read(bad).unwrap_err().contains("127.0.0.1:8899"), "{bad}");
        }
        assert_eq!(read("/none/wall.sock").unwrap(), Listen::Socket("/none/wall.sock".into()));
        assert!(read("/none/..").unwrap_err().contains("absolute path"));
    }

    #[test]
    fn path_is_absolute() {
        let error = path(Deserializer::from_str("token")).unwrap_err();
        assert!(error.to_string().contains("absolute"), "{error}");
    }

    #[test]
    fn origin_is_a_scheme_and_a_name() {
        assert_eq!(authority("https://wall.example.org"), Some("wall.example.org"));
        assert_eq!(authority("http://lab:8080"), Some("lab:8080"));
        for bad in ["wall.example.org", "ftp://x", "https://", "https://x/", "https://a b", "https://u@x"] {
            assert_eq!(authority(bad), None, "{bad}");
        }
    }
}
