//! The places at which the metrics are exported: an address for HTTP, and a file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use machinery::Result;
use serde::Deserializer;

use super::place::{in_existing_folder, place};

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
    place(deserializer, |text| {
        text.parse().map_err(|_| {
            format!(
                "'{text}' is not an IP address with a port: write one such as 127.0.0.1:9464, or [::1]:9464"
            )
        })
    })
}

/// Reads `metrics_textfile`.
pub(super) fn text_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    place(deserializer, |text| {
        let path = Path::new(text);
        match path.is_absolute() && path.extension().is_some_and(|suffix| suffix == "prom") {
            true => in_existing_folder(text),
            false => Err(format!(
                "'{text}' is not the absolute path of a file `*.prom`, which node_exporter reads"
            )),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_yaml::Deserializer;

    use super::*;

    #[test]
    fn address_needs_a_port() {
        let read = |yaml: &str| address(Deserializer::from_str(yaml)).map_err(|error| error.to_string());
        for good in ["127.0.0.1:9464", "'[::1]:9464'", "0.0.0.0:1"] {
            assert!(read(good).unwrap().is_some(), "{good}");
        }
        for bad in ["9464", "127.0.0.1", "localhost:9464", "127.0.0.1:99999"] {
            assert!(read(bad).unwrap_err().contains("127.0.0.1:9464"), "{bad}");
        }
    }

    #[test]
    fn text_file_is_one_that_node_exporter_reads() {
        let read = |yaml: &str| text_file(Deserializer::from_str(yaml)).map_err(|error| error.to_string());
        assert_eq!(read("/tmp/cuckoo.prom").unwrap(), Some("/tmp/cuckoo.prom".into()));
        for bad in ["cuckoo.prom", "/tmp/cuckoo", "/tmp/.prom/"] {
            assert!(read(bad).unwrap_err().contains("*.prom"), "{bad}");
        }
        assert!(read("/none/cuckoo.prom").unwrap_err().contains("does not exist"));
    }
}
