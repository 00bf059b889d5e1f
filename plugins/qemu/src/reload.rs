//! The values that a new configuration cannot change while the host runs.

use std::path::Path;

use machinery::{Error, Result, Setup};
use machinery_backend::expect_unchanged as expect_key_unchanged;

use crate::config::Config;
use crate::shared::Qemu;

/// Checks that the values which all machines share are unchanged.
///
/// # Errors
/// A value has changed. The error contains all changes.
pub fn expect_unchanged(qemu: &Qemu, setup: &Setup, config: &Config) -> Result<()> {
    let (binaries, file) = (&config.binaries, Some(&setup.config));
    let program = &binaries.qemu_system_x86_64;
    let checks = [
        (file, &["binaries", "qemu_img"][..], qemu.qemu_img.program(), &*binaries.qemu_img),
        (file, &["binaries", "qemu_system_x86_64"], qemu.program.path(), program),
        (
            setup.host_config.as_ref(),
            &["machineries", "qemu", "instant_dir"],
            &qemu.instant_dir,
            &config.instant_dir,
        ),
    ];
    let expect = |(file, key, now, wanted): (_, &[&str], &Path, &Path)| {
        expect_key_unchanged(file, key, now.display(), wanted.display()).err()
    };
    Error::all(checks.into_iter().filter_map(expect).collect()).map_or(Ok(()), Err)
}
