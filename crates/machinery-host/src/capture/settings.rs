//! The settings of a capture: the program, the interface, the filter and the file.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::{Error, FreeSpaceReserve};
use serde::Deserialize;

/// The longest time that the kernel keeps a packet before tcpdump gets it.
///
/// The kernel hands packets over when a block is full, and after a second at the latest, because tcpdump asks
/// libpcap for that. `--immediate-mode` would avoid the wait. But then the buffer of an interface with
/// offloads, such as a guest's, holds only a few dozen packets, and a burst is lost.
pub const MAX_PACKET_DELAY: Duration = Duration::from_millis(1200);

/// The option whose value marks a tcpdump of the host with the file of its capture. tcpdump uses the value only with
/// `-C` or `-G`. Source: `tcpdump.c` of tcpdump 4.99 and 5.0.
pub const MARK: &str = "-z";

/// The advice for a host without tcpdump.
pub const MISSING_ADVICE: &str =
    "Install tcpdump, or correct `tcpdump.path` in cuckoo.yaml, or set `tcpdump.enabled: false`";

/// Returns the advice for a tcpdump that may not capture.
pub fn permission_advice(tcpdump: &Path) -> String {
    let program = tcpdump.display();
    format!("Run the host as root, or give tcpdump the right: setcap cap_net_raw,cap_net_admin=eip {program}")
}

/// The value of `capture_jail`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Jail {
    /// Confined where that is possible.
    #[default]
    Auto,
    /// Not at all: for a program in tcpdump's place that starts others.
    Off,
}

/// The settings that all machines share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `tcpdump.path` of `cuckoo.yaml`.
    pub tcpdump: PathBuf,
    /// The address and port of `resultserver` in `cuckoo.yaml`. Their traffic is left out.
    pub result_server: Option<(String, u16)>,
    /// The size of a capture, in bytes, at most. Without it, nothing limits a capture.
    pub limit: Option<u64>,
    /// The space that captures leave free.
    pub reserve: FreeSpaceReserve,
    /// The confinement of tcpdump.
    pub jail: Jail,
}

impl Settings {
    /// Returns the failure of a tcpdump that cannot be started for this reason.
    pub fn cannot_start(&self, error: &io::Error) -> Error {
        Error::environment(format!("cannot start {}: {error}", self.tcpdump.display()))
            .advice(format!("{MISSING_ADVICE}. Then run `cuckoo-machinery reload`"))
    }
}

/// The traffic of one machine, and the name of the file that gets it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The network interface.
    pub interface: String,
    /// The filter, in the syntax of pcap-filter(7).
    pub filter: String,
    /// The file, for messages and for [`end_leftovers`](super::end_leftovers). tcpdump does not open it.
    pub pcap: PathBuf,
}

/// Returns the filter for all traffic of the machine, except with these addresses and ports.
pub fn filter(ip: &str, ignored: &[&(String, u16)]) -> String {
    let mut filter = format!("host {ip}");
    for (ip, port) in ignored {
        for direction in ["dst", "src"] {
            filter += &format!(" and not ({direction} host {ip} and {direction} port {port})");
        }
    }
    filter
}

/// Reports whether [`filter`] may have made this filter. Every filter of the host ignores the agent, so it
/// has an exception.
pub fn is_host_filter(filter: &str) -> bool {
    filter.starts_with("host ") && filter.contains(" and not (dst host ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_leaves_out_both_directions() {
        let filter = filter("10.0.0.2", &[&("10.0.0.1".into(), 2042), &("10.0.0.2".into(), 8000)]);
        assert!(is_host_filter(&filter));
        assert_eq!(
            filter,
            "host 10.0.0.2 \
             and not (dst host 10.0.0.1 and dst port 2042) and not (src host 10.0.0.1 and src port 2042) \
             and not (dst host 10.0.0.2 and dst port 8000) and not (src host 10.0.0.2 and src port 8000)"
        );
    }
}
