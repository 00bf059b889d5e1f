//! The errors of opening a plugin file.

use std::fmt;

use crate::Error;
use crate::abi::InterfaceVersion;

/// The reason why a file could not be opened as a plugin.
#[derive(Debug)]
pub enum OpenError {
    /// The dynamic linker refused the file.
    NotALibrary(String),
    /// The file is valid, but it needs a library that is not installed.
    LibraryMissing {
        /// The library that the dynamic linker did not find, such as `libvirt.so.0`. There may be more.
        library: String,
    },
    /// The file is a library, but exports no machinery.
    NotAPlugin,
    /// The plugin was built for another version of the interface.
    InterfaceVersion {
        /// The plugin's, as `major.minor`.
        plugin: String,
        /// The host's, as `major.minor`.
        host: String,
    },
    /// The versions fit, but the layouts do not.
    Layout {
        /// The plugin's, as `major.minor`.
        plugin: String,
        /// The difference between the layouts.
        why: String,
    },
    /// The plugin was opened, but failed to return its manifest.
    Manifest(Error),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenError::NotALibrary(why) => write!(
                f,
                "it cannot be loaded as a shared library ({why}). Check that the file is whole, built for this \
                 machine, and that the libraries it needs are new enough (`ldd` lists them)"
            ),
            OpenError::LibraryMissing { library } => write!(
                f,
                "it needs the shared library {library}, which is not installed on this host. Install the package \
                 that contains it (on Debian, `apt-file search {library}` finds it); `ldd` on this file lists every \
                 missing library"
            ),
            OpenError::NotAPlugin => f.write_str(
                "it is a shared library, but not a machinery plugin: it does not export MACHINERY_INTERFACE. \
                 A plugin is built as a cdylib with `machinery::export_machinery!`",
            ),
            OpenError::InterfaceVersion { plugin, host } => write!(
                f,
                "it was built for machinery interface {plugin}, this host speaks {host}. Use a plugin built for \
                 {host}, or a host of the plugin's version"
            ),
            OpenError::Layout { plugin, why } => write!(
                f,
                "it states machinery interface {plugin}, which this host of {} accepts, but its layout does \
                 not fit. Rebuild the plugin against the released interface crate. The mismatch: {why}",
                InterfaceVersion::OURS
            ),
            OpenError::Manifest(why) => write!(f, "it was opened, but its manifest cannot be read: {why}"),
        }
    }
}

impl std::error::Error for OpenError {}
