//! The keys of the wall: its address, its token, and the names under which a proxy serves it.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, checked};
use machinery::{Error, Result};
use serde::Deserializer;

use super::export::optional;

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
    checked(deserializer, |text| {
        optional(text, |text| match text.parse() {
            Ok(address) => Ok(Listen::Address(address)),
            Err(_) if text.starts_with('/') => existing_folder(text).map(Listen::Socket),
            Err(_) => Err(format!(
                "'{text}' is neither an IP address with a port, such as 127.0.0.1:8899, nor the absolute path of a socket"
            )),
        })
    })
}

/// Reads `web_token_file` and `web_novnc`.
pub(super) fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    checked(deserializer, |text| {
        optional(text, |text| match text.starts_with('/') {
            true => existing_folder(text),
            false => Err(format!("'{text}' is not an absolute path")),
        })
    })
}

fn existing_folder(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    match path.parent() {
        Some(folder) if folder.is_dir() && path.file_name().is_some() => Ok(path.to_owned()),
        _ => Err(format!("the folder of '{text}' does not exist: create it, or correct the path")),
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
    use super::*;

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default)]
    struct Keys {
        #[serde(deserialize_with = "listen")]
        listen: Option<Listen>,
        #[serde(deserialize_with = "path")]
        file: Option<PathBuf>,
    }

    fn read(yaml: &str) -> Result<Keys, String> {
        serde_yaml::from_str(yaml).map_err(|error| error.to_string())
    }

    #[test]
    fn wall_is_off_without_a_value() {
        for yaml in ["{}", "listen:\nfile:\n", "listen: ''\nfile: ~\n"] {
            let keys = read(yaml).unwrap();
            assert_eq!((keys.listen, keys.file), (None, None), "{yaml}");
        }
    }

    #[test]
    fn listen_is_an_address_or_the_path_of_a_socket() {
        let listen = |yaml: &str| read(&format!("listen: {yaml}")).map(|keys| keys.listen.unwrap());
        assert_eq!(listen("127.0.0.1:8899").unwrap().to_string(), "http://127.0.0.1:8899");
        assert_eq!(listen("'[::1]:8899'").unwrap().to_string(), "http://[::1]:8899");
        assert_eq!(listen("/tmp/wall.sock").unwrap(), Listen::Socket("/tmp/wall.sock".into()));
        for bad in ["8899", "localhost:8899", "wall.sock"] {
            assert!(listen(bad).unwrap_err().contains("127.0.0.1:8899"), "{bad}");
        }
        assert!(listen("/none/wall.sock").unwrap_err().contains("does not exist"));
        assert!(read("file: token").unwrap_err().contains("absolute"));
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
