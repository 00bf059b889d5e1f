//! The disk space that runs and captures leave free.

use serde::Deserialize;

use crate::{Result, Setup, parse_bytes};

/// The space that stays free on each file system that a run or a capture writes to: `free_space_reserve` of
/// `machinery-host.yaml`. It belongs to the host and to all machineries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct FreeSpaceReserve(#[serde(deserialize_with = "parse_bytes")] Option<u64>);

impl FreeSpaceReserve {
    /// The key in `machinery-host.yaml`.
    pub const KEY: &str = "free_space_reserve";
    /// The default reserve, in bytes.
    const DEFAULT: u64 = 2 << 30;
    /// A default reserve is no larger than this part of the file system.
    const PART: u64 = 20;

    /// Reads the key; returns the default if it does not exist.
    ///
    /// # Errors
    /// The value is not a size. The error contains file, line and key.
    pub fn read(setup: &Setup) -> Result<Self> {
        let reserve = setup.host_config.as_ref().map(|file| file.parse_at(&[Self::KEY])).transpose()?;
        Ok(reserve.flatten().unwrap_or_default())
    }

    /// Returns the reserve on a file system of that size, in bytes. 0 means that there is none.
    pub fn on(self, size: u64) -> u64 {
        self.0.unwrap_or_else(|| Self::DEFAULT.min(size / Self::PART))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigFile;

    fn read(text: &str) -> Result<u64> {
        let file = ConfigFile { path: "/c/machinery-host.yaml".into(), text: text.into() };
        let setup = Setup {
            config: file.clone(),
            host_config: Some(file),
            sockets_dir: "/".into(),
            state_dir: "/".into(),
            cache_dir: "/".into(),
            adopts: false,
            result_server: None,
        };
        FreeSpaceReserve::read(&setup).map(|reserve| reserve.on(10 << 30))
    }

    #[test]
    fn reserve_is_as_configured_and_by_default_a_part_of_a_small_file_system() {
        assert_eq!(read("free_space_reserve: 7 GiB\n").unwrap(), 7 << 30);
        assert_eq!(read("free_space_reserve: 0\n").unwrap(), 0);
        assert_eq!(read("free_space_reserve:\n").unwrap(), 512 << 20);
        assert_eq!(read("machineries: {}\n").unwrap(), 512 << 20);
        assert_eq!(FreeSpaceReserve::default().on(1 << 50), 2 << 30);
        let text = read("machineries: {}\nfree_space_reserve: lots\n").unwrap_err().to_string();
        assert!(text.contains("machinery-host.yaml:2: free_space_reserve: 'lots' is not a size"), "{text}");
    }
}
