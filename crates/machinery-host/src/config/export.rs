//! The places at which the metrics are exported: an address for HTTP, and a file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use machinery::Result;
use machinery::config::checked;
use serde::Deserializer;

/// The values of `metrics_listen` and `metrics_textfile`. By default, nothing is exported.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Export {
    /// The address at which `GET /metrics` is answered.
    pub listen: Option<SocketAddr>,
    /// The file for the textfile collector of node_exporter.
    pub textfile: Option<PathBuf>,
}

/// Reads `metrics_listen`.
pub(super) fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    checked(deserializer, |text| {
        optional(text, |text| {
            text.parse().map_err(|_| {
            format!("'{text}' is not an IP address with a port: write one such as 127.0.0.1:9464, or [::1]:9464")
        })
        })
    })
}

/// Reads `metrics_textfile`.
pub(super) fn text_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    checked(deserializer, |text| {
        optional(text, |text| {
            let path = Path::new(text);
            if !path.is_absolute() || path.extension().is_none_or(|suffix| suffix != "prom") {
                return Err(format!(
                    "'{text}' is not the absolute path of a file `*.prom`, which node_exporter reads"
                ));
            }
            match path.parent() {
                Some(folder) if folder.is_dir() => Ok(path.to_owned()),
                _ => Err(format!("the folder of '{text}' does not exist: create it, or correct the path")),
            }
        })
    })
}

/// Parses a value, unless it is empty.
pub(super) fn optional<T>(
    text: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, String> {
    match text.trim() {
        "" | "~" | "null" => Ok(None),
        text => parse(text).map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, serde::Deserialize)]
    #[serde(default)]
    struct Keys {
        #[serde(deserialize_with = "address")]
        listen: Option<SocketAddr>,
        #[serde(deserialize_with = "text_file")]
        file: Option<PathBuf>,
    }

    fn read(yaml: &str) -> Result<Keys, String> {
        serde_yaml::from_str(yaml).map_err(|error| error.to_string())
    }

    #[test]
    fn export_is_off_without_a_value() {
        for yaml in ["{}", "listen:\nfile:\n", "listen: ''\nfile: ''\n"] {
            let keys = read(yaml).unwrap();
            assert_eq!((keys.listen, keys.file), (None, None), "{yaml}");
        }
    }

    #[test]
    fn address_needs_a_port() {
        for good in ["127.0.0.1:9464", "'[::1]:9464'", "0.0.0.0:1"] {
            assert!(read(&format!("listen: {good}")).unwrap().listen.is_some(), "{good}");
        }
        for bad in ["9464", "127.0.0.1", "localhost:9464", "127.0.0.1:99999"] {
            assert!(read(&format!("listen: {bad}")).unwrap_err().contains("127.0.0.1:9464"), "{bad}");
        }
    }

    #[test]
    fn text_file_is_one_that_node_exporter_reads() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("cuckoo.prom");
        assert_eq!(read(&format!("file: {}", file.display())).unwrap().file, Some(file));
        for bad in ["cuckoo.prom", "/tmp/cuckoo", "/tmp/.prom/"] {
            assert!(read(&format!("file: {bad}")).unwrap_err().contains("*.prom"), "{bad}");
        }
        let missing = format!("file: {}/none/cuckoo.prom", folder.path().display());
        assert!(read(&missing).unwrap_err().contains("does not exist"));
    }
}
