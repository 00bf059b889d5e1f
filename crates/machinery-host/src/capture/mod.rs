//! Network capture: what a machine sends and receives during a task goes into the task's file.
//!
//! ```text
//! start of a locked machine ─▶ tcpdump listens ─▶ the machine runs ─▶ … ─▶ stop: all read, file complete
//!                                     └─ dies early: told at once, the machine goes on
//! ```
//!
//! What fails here is told (in the log, as an event, among the machine's errors) and fails nothing
//! else: an analysis without its traffic is worth more than none. The rules are Cuckoo3's
//! (`start_netcapture` in `node/machinery.py`); that tcpdump listens before the machine runs, and has
//! read everything before it is ended, is ours.

mod leftovers;
mod stderr;
pub mod tcpdump;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use leftovers::end_leftovers;

/// The kernel hands packets over when a block is full, and after a second at the latest (tcpdump
/// asks libpcap for that). `--immediate-mode` would spare the wait, but leaves room for a few dozen
/// packets only where an interface has offloads, as a guest's has; then a burst is lost.
const HANDED_OVER: Duration = Duration::from_millis(1200);

/// What to do where there is no tcpdump.
pub const NO_TCPDUMP: &str =
    "Install tcpdump, or correct `tcpdump.path` in cuckoo.yaml, or set `tcpdump.enabled: false`";

/// What to do where tcpdump has not the right to capture.
pub fn no_right(tcpdump: &Path) -> String {
    let program = tcpdump.display();
    format!("Run the host as root, or give tcpdump the right: setcap cap_net_raw,cap_net_admin=eip {program}")
}

/// How to capture, for all machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `tcpdump.path` of `cuckoo.yaml`.
    pub tcpdump: PathBuf,
    /// `resultserver` of `cuckoo.yaml`: its address and port, whose traffic is left out.
    pub result_server: Option<(String, u16)>,
}

/// One machine's traffic, and where it goes.
#[derive(Debug, Clone)]
pub struct Target {
    /// The network interface.
    pub interface: String,
    /// The filter, in the syntax of pcap-filter(7).
    pub filter: String,
    /// The file to write.
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

/// How a filter of ours begins, and what no other has.
const FILTER: [&str; 2] = ["host ", " and not (dst host "];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_leaves_out_both_ways() {
        let filter = filter("10.0.0.2", &[&("10.0.0.1".into(), 2042), &("10.0.0.2".into(), 8000)]);
        assert!(filter.starts_with(FILTER[0]) && filter.contains(FILTER[1]));
        assert_eq!(
            filter,
            "host 10.0.0.2 \
             and not (dst host 10.0.0.1 and dst port 2042) and not (src host 10.0.0.1 and src port 2042) \
             and not (dst host 10.0.0.2 and dst port 8000) and not (src host 10.0.0.2 and src port 8000)"
        );
    }
}
