//! Traffic of a machine: datagrams that its address sends over the loopback interface.

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use machinery_testkit::capture;

use crate::run::{Context, Result};

/// The number of datagrams that are enough for a look at the capture.
const DATAGRAMS: usize = 5;

/// Sends datagrams with that text from the address, and waits until the capture has them. A datagram that comes while
/// a capture begins anew may be missing, so that more are sent until then.
pub fn talk(ip: &str, pcap: &Path, text: &str) -> Result<()> {
    let what = || format!("cannot send datagrams from {ip}");
    let from = UdpSocket::bind((ip, 0)).context(what)?;
    let to = UdpSocket::bind(("127.0.0.1", 0)).context(what)?;
    let to = to.local_addr().context(what)?;
    let mut last = Ok(());
    for _ in 0..10 {
        for _ in 0..DATAGRAMS {
            from.send_to(text.as_bytes(), to).context(what)?;
        }
        let has_come = |packets: &[capture::Packet]| {
            packets.iter().filter(|packet| packet.payload == text.as_bytes()).count() >= DATAGRAMS
        };
        last = capture::wait_for(pcap, Duration::from_secs(3), has_come).map(drop);
        if last.is_ok() {
            return Ok(());
        }
    }
    Ok(last?)
}
