//! The machines of a lab for analyses.

use std::path::Path;

use crate::Result;
use crate::guest::Guest;
use crate::guest::analysis::Agent;
use crate::lab::Lab;
use crate::network::TestNetwork;
use crate::snapshot::SnapshotFormat;

impl Lab {
    /// Makes a lab with [machines of a sandbox](Guest::Analysis), `m1` and so on, in a network of their own. `None` for a
    /// user who may not make one.
    pub fn with_agents(count: u8, agent: Agent) -> Result<Option<Self>> {
        let Some(network) = TestNetwork::new()? else { return Ok(None) };
        network.add_machines(count)?;
        let names: Vec<_> = (1..=count).map(|number| format!("m{number}")).collect();
        let kinds = (1..=count).map(|number| Guest::Analysis { number, agent });
        let machines =
            names.iter().zip(kinds).map(|(name, kind)| (name.as_str(), kind, SnapshotFormat::Plain));
        let mut addresses = (1..=count).map(TestNetwork::machine);
        let address = || addresses.next().unwrap_or(TestNetwork::GUEST).to_string();
        let lab = Self::make(Path::new("cwd"), &machines.collect::<Vec<_>>(), address, Some(network))?;
        lab.change_yaml(
            &format!("interface: {}", TestNetwork::TAP),
            &format!("interface: {}", TestNetwork::BRIDGE),
        )?;
        // Cuckoo3 requires more keys than the host.
        for number in 1..=count {
            let mac = format!("    mac_address: \"52:54:00:42:01:{number:02x}\"\n");
            let keys = "    os_version: \"10\"\n    architecture: amd64\n    tags: []\n".to_owned() + &mac;
            lab.change_yaml("    os_version: 10\n", &keys)?;
        }
        Ok(Some(lab))
    }
}
