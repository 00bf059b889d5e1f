//! The way in which QEMU opens a template.

/// The way in which QEMU opens a template's RAM file.
#[derive(Debug, Clone, Copy, Default)]
pub struct Opener {
    /// The group of the machine's own user, if it has one.
    pub group: Option<u32>,
    /// True if QEMU opens the file for writing, although it maps it privately.
    pub writes: bool,
}

impl Opener {
    /// Returns the rights of the group that the file needs.
    pub fn group_mode(self) -> u32 {
        if self.writes { 0o060 } else { 0o040 }
    }
}
