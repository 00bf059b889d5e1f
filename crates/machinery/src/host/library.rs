//! Loads a plugin's library and finds its module.

use std::path::Path;

use abi_stable::abi_stability::StableAbi;
use abi_stable::abi_stability::abi_checking::check_layout_compatibility;
use abi_stable::library::AbiHeaderRef;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::open_error::OpenError;
use crate::abi::{InterfaceVersion, ModuleRef};

/// Loads the library, which is never unloaded again, and returns its module. `interface` is the version that the
/// file states.
///
/// # Errors
/// The dynamic linker refuses the library, or its layout does not fit.
pub fn load(path: &Path, interface: InterfaceVersion) -> Result<ModuleRef, OpenError> {
    // SAFETY: loading a library runs its initialisers; the operator has configured this file to run.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|error| refusal(path, linker_message(&error)))?;
    let module = module_of(&library, interface)?;
    // Threads, thread-locals and the panic hook of the plugin point into the library.
    std::mem::forget(library);
    Ok(module)
}

/// Returns the dynamic linker's message, which the error's own text does not contain.
fn linker_message(error: &libloading::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => error.to_string(),
    }
}

fn refusal(plugin: &Path, message: String) -> OpenError {
    match missing_library(&message) {
        // The plugin file itself can disappear after its header was read.
        Some(library) if Path::new(library) != plugin => {
            OpenError::LibraryMissing { library: library.to_owned() }
        }
        _ => OpenError::NotALibrary(message),
    }
}

/// Returns the file that the dynamic linker did not find, if its message reports that. The text is glibc's. It
/// is always English, because no code of the host sets a locale.
fn missing_library(message: &str) -> Option<&str> {
    message.strip_suffix(": cannot open shared object file: No such file or directory")
}

fn module_of(library: &Library, interface: InterfaceVersion) -> Result<ModuleRef, OpenError> {
    // SAFETY: `export_machinery!` defines this symbol as a `LibHeader`, which starts with the
    // `AbiHeader` behind the reference; `upgrade` checks it before any other access.
    let header = unsafe { library.get::<AbiHeaderRef>(b"MACHINERY_PLUGIN\0") };
    let header: AbiHeaderRef = *header.map_err(|_| OpenError::NotAPlugin)?;
    let mismatch = |why: String| OpenError::Layout { plugin: interface.to_string(), why };
    let header = header.upgrade().map_err(|error| mismatch(error.to_string()))?;
    let Some(theirs) = header.layout() else {
        return Err(mismatch("the plugin was built without a description of its layout".to_owned()));
    };
    // In this direction: a plugin of an older minor version has fewer methods than this host knows.
    check_layout_compatibility(theirs, ModuleRef::LAYOUT).map_err(|error| mismatch(error.to_string()))?;
    // SAFETY: the layout was checked just above.
    let module = unsafe { header.init_root_module_with_unchecked_layout::<ModuleRef>() };
    module.map_err(|error| mismatch(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_library_is_recognised_when_the_linker_reports_one() {
        let plugin = Path::new("/p/libmachinery_x.so");
        let missing = |message: &str| match refusal(plugin, message.to_owned()) {
            OpenError::LibraryMissing { library } => Some(library),
            OpenError::NotALibrary(why) if why == message => None,
            other => panic!("{other}"),
        };
        for library in ["libvirt.so.0", "/opt/lib/liba b.so"] {
            let message = format!("{library}: cannot open shared object file: No such file or directory");
            assert_eq!(missing(&message).as_deref(), Some(library));
        }
        for message in [
            "/p/libmachinery_x.so: cannot open shared object file: No such file or directory",
            "libvirt.so.0: cannot open shared object file: Permission denied",
            "libvirt.so.0: file too short",
            "/lib/libvirt.so.0: version `LIBVIRT_9.0.0' not found (required by /p/libmachinery_x.so)",
            "/p/libmachinery_x.so: undefined symbol: virConnectOpen",
        ] {
            assert_eq!(missing(message), None, "{message}");
        }
    }
}
