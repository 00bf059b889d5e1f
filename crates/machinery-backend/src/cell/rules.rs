//! The rules of nftables: those of a cell, and those of the host about all cells of a folder. Source: nft(8).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Seek, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::Stdio;
use std::sync::Mutex;

use machinery::{Deadline, Error, Result};
use rustix::fs::{MemfdFlags, memfd_create};

use super::generation::Generation;
use super::links::Mac;
use super::spec::{CellSpec, INTERFACES, UPLINK};
use super::support;
use crate::process::output_for;
use crate::sync::lock;

/// Networks that no guest reaches: this network, loopback, link-local with the metadata of most clouds, multicast,
/// broadcast; and the metadata of Alibaba, Azure and Oracle, which is elsewhere. Sources: the IANA IPv4 Special-Purpose
/// Address Registry; the clouds' documentation of their instance metadata.
const NEVER: &str = "{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3, 100.100.100.200, 168.63.129.16, \
                     192.0.0.192 }";

/// Returns the rules inside a cell. `host` is the list of the host's addresses. Frames for a hardware address that the
/// guest knows from its snapshot are given to the bridge.
pub fn inside(spec: &CellSpec, host: &[Ipv4Addr], bridge_mac: Mac) -> String {
    let CellSpec { address, guest, bridge, .. } = spec;
    let mac = bridge_mac.map(|byte| format!("{byte:02x}")).join(":");
    let host: BTreeSet<&Ipv4Addr> = host.iter().chain([address]).collect();
    let host: Vec<String> = host.into_iter().map(Ipv4Addr::to_string).collect();
    let host = host.join(", ");
    let server = spec.result_server.map(accepted).unwrap_or_default();
    format!(
        r#"
table ip cell {{
  set host {{
    type ipv4_addr
    elements = {{ {host} }}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat
    iifname "{UPLINK}" ip daddr {address} dnat to {guest}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    oifname "{UPLINK}" ip saddr {guest} snat to {address}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop
    ct state invalid drop
    ct state established,related accept
    iifname "{UPLINK}" oifname "{bridge}" ip daddr {guest} ct original ip daddr {address} accept
    iifname "{bridge}" oifname "{UPLINK}" ip saddr {guest} goto leaving
  }}
  chain leaving {{
    {server}
    ip daddr {NEVER} drop
    ip daddr @host drop
    accept
  }}
  chain input {{
    type filter hook input priority filter; policy drop
    iif lo accept
  }}
  chain output {{
    type filter hook output priority filter; policy drop
    oif lo accept
  }}
}}
table bridge cell {{
  chain prerouting {{
    type filter hook prerouting priority dstnat
    meta pkttype other ether daddr set {mac} meta pkttype set unicast
  }}
}}
"#
    )
}

fn accepted(server: SocketAddrV4) -> String {
    format!("ip daddr {} tcp dport {} accept", server.ip(), server.port())
}

/// Returns the rules of the host about the cells of a folder. They replace those of the same table in one step, and
/// keep the result servers that are known. `prefix` begins the names of the cells' interfaces.
fn of_host(prefix: &str, server: Option<SocketAddrV4>) -> String {
    let table = table(prefix);
    let server = server.map_or(String::new(), |server| {
        format!("add element {table} servers {{ {} . {} }}", server.ip(), server.port())
    });
    format!(
        r#"
add table {table}
flush table {table}
table {table} {{
  set servers {{
    type ipv4_addr . inet_service
  }}
  chain input {{
    type filter hook input priority filter; policy accept
    iifname "{prefix}-*" goto arriving
  }}
  chain arriving {{
    meta nfproto ipv6 drop
    ct state established,related accept
    ip daddr . tcp dport @servers accept
    drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept
    iifname "{prefix}-*" goto leaving
  }}
  chain leaving {{
    meta nfproto ipv6 drop
    oifname "{INTERFACES}*" drop
    ip daddr {NEVER} drop
  }}
}}
{server}
"#
    )
}

/// The tables of the host that this process has written, with their result servers, and the generation of all rules since
/// then. One thread at a time writes: transactions at the same time would fail and be tried anew, all of them.
static WRITTEN: Mutex<BTreeMap<Table, Generation>> = Mutex::new(BTreeMap::new());

type Table = (String, Option<SocketAddrV4>);

/// Writes the rules of the host for the cells whose interfaces have that prefix, unless they are as this process has
/// written them.
///
/// # Errors
/// See [`apply`].
pub fn write_on_host(prefix: &str, server: Option<SocketAddrV4>, deadline: Deadline) -> Result<()> {
    let mut written = lock(&WRITTEN);
    let key = (prefix.to_owned(), server);
    let before = Generation::now().ok();
    if before.is_some() && written.get(&key) == before.as_ref() {
        return Ok(());
    }
    apply(&of_host(prefix, server), deadline)?;
    let after = Generation::now().ok();
    written.remove(&key);
    if let Some((before, after)) = before.zip(after).filter(|(before, after)| after.is_next_of(*before)) {
        // Nobody else has changed a rule meanwhile.
        written.values_mut().filter(|known| **known == before).for_each(|known| *known = after);
        written.insert(key, after);
    }
    Ok(())
}

/// Removes the host's table, if it exists.
///
/// # Errors
/// See [`apply`].
pub fn remove_from_host(prefix: &str, deadline: Deadline) -> Result<()> {
    let mut written = lock(&WRITTEN);
    let table = table(prefix);
    written.retain(|(other, _), _| other != prefix);
    apply(&format!("add table {table}\ndelete table {table}\n"), deadline)
}

fn table(prefix: &str) -> String {
    format!("inet cuckoo_machinery_{prefix}")
}

/// Applies the rules in this thread's namespace, all or none.
///
/// # Errors
/// There is no program `nft`; it refuses the rules, or the deadline passes.
pub fn apply(rules: &str, deadline: Deadline) -> Result<()> {
    let nft = support::nft()?;
    let failed = |why: &str| Error::environment(format!("cannot set the rules of nftables: {why}"));
    let input = || {
        let mut file = File::from(memfd_create("rules", MemfdFlags::CLOEXEC)?);
        file.write_all(rules.as_bytes())?;
        file.rewind()?;
        std::io::Result::Ok(Stdio::from(file))
    };
    let input = input().map_err(|error| failed(&error.to_string()))?;
    let mut command = machinery::command(&nft);
    command.args(["-f", "-"]);
    let output = output_for(command, input, deadline)?;
    if output.status.success() {
        return Ok(());
    }
    let why = format!("{}: {}", nft.display(), String::from_utf8_lossy(&output.stderr).trim());
    Err(failed(&why).advice("Check that the kernel has nf_tables with NAT and the bridge family"))
}
