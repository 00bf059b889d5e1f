//! The guests there are.

/// What runs in a test machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guest {
    /// A boot sector that counts: see [`micro`](super::micro).
    Micro,
    /// The same guest on the machine that VMCloak makes, with its sound card and other devices. For QEMU
    /// only.
    Vmcloak,
    /// Linux with an agent: see [`linux`](super::linux).
    Linux {
        /// RAM, in MiB; 256 is enough for a guest without noise.
        ram_mib: u32,
        /// How much of it is filled with what does not compress, in MiB.
        noise_mib: u32,
    },
    /// The same on a [`TestNetwork`](crate::lab::Wire), where it talks without end: see [`linux`](super::linux). For QEMU only.
    TrafficSource,
}
