//! The kinds of guests.

/// A guest of a test machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guest {
    /// A boot sector that counts: see [`micro`](super::micro).
    Micro,
    /// The micro guest on the machine that VMCloak makes, with its sound card and other devices. For QEMU
    /// only.
    Vmcloak,
    /// Linux with an agent: see [`linux`](super::linux).
    Linux {
        /// RAM, in MiB; 256 is enough for a guest without noise.
        ram_mib: u32,
        /// The amount of RAM that is filled with incompressible noise, in MiB.
        noise_mib: u32,
    },
    /// The guest of CAPE's analyses: see [`cape`](super::cape). For QEMU only.
    Cape {
        /// The number of the machine in its [`TestNetwork`](crate::lab::TestNetwork).
        number: u8,
    },
    /// Linux on a [`TestNetwork`](crate::lab::TestNetwork), which sends traffic without end: see
    /// [`linux`](super::linux). For QEMU only.
    TrafficSource,
    /// Linux with an agent that runs samples: see [`analysis`](super::analysis). For QEMU only.
    Analysis {
        /// The number of the machine in its [`TestNetwork`](crate::lab::TestNetwork).
        number: u8,
        /// The agent.
        agent: super::agent::Agent,
    },
}
