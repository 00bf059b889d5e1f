//! A Linux whose agent reads and writes the state that a machine keeps outside of its memory and its disk: a variable of
//! UEFI, and a TPM.
//!
//! It boots by OVMF, and writes the variable once before it is ready. Its kernel and its user space are those of the
//! [`linux`] guest.

use std::path::{Path, PathBuf};

use super::cpio::Archive;
use super::linux::{self, Image};
use crate::{Result, cache};

const STATE: &str = include_str!("firmware/state.sh");

/// The module of the file system with the variables of UEFI.
const MODULE: &str = "efivarfs";

/// The place in the init script before which the guest writes its variable.
const BEFORE_AGENT: &str = "httpd -p 8000";

/// Returns the kernel and the initramfs. Makes them if they do not exist, which needs a network.
pub fn boot_files() -> Result<[PathBuf; 2]> {
    let image = image(&cache::open(&cache::default()?)?)?;
    Ok([image.kernel(), image.initramfs()])
}

fn image(cache: &Path) -> Result<Image> {
    let content = cache::fingerprint(&(STATE, linux::init(), MODULE, linux::MODULES));
    let folder = cache::folder(cache, &format!("firmware-image-{content}"), |folder| {
        linux::build_with(folder, initramfs)
    })?;
    Ok(Image::at(folder))
}

fn initramfs(unpacked: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    linux::add_user_space(&mut archive, unpacked)?;
    linux::add_module(&mut archive, unpacked, 99, MODULE)?;
    archive.program("www/cgi-bin/firmware", STATE.as_bytes());
    let written = format!("QUERY_STRING=snapshot /www/cgi-bin/firmware > /dev/null\n{BEFORE_AGENT}");
    archive.program("init", linux::init().replace(BEFORE_AGENT, &written).as_bytes());
    Ok(archive.finish())
}
