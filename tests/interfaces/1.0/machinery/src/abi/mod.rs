//! The stable ABI, private to `export_machinery!` and the host.
//!
//! *Methods* are slots of a vtable that `abi_stable` checks field by field when a plugin is opened;
//! new ones are added behind the last. *Records* (a setup, the machines, an error) cross as JSON
//! text; a new field is a new key. So neither breaks plugins that are already built.
//!
//! ```text
//!            host process                        libmachinery_x.so
//!   host::Instance ── MachineryAbi (vtable) ──▶ plugin::Exported<X> ──▶ X: Machinery
//!   HostServices  ◀── ServicesAbi  (vtable) ──  services::HostOfPlugin ◀── machinery::Host
//! ```
//!
//! Every arrow between the two columns ends in a panic guard (`guard`): a panic becomes an
//! [`Error`](crate::Error) and never unwinds across the border, where it would abort the process.

mod guard;
mod logging;
pub mod plugin;
mod records;
mod services;

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::package_version_strings;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::{RBox, RResult, RStr, RString};

pub use abi_stable::library::LibHeader;
pub(crate) use guard::panic_text;
pub(crate) use records::{Manifest, ManifestConflict};
pub(crate) use records::{from_json, to_json};
pub(crate) use services::abi_services;

/// The version of the interface, as plain data that can be read before any code of a plugin runs.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceVersion {
    /// Tells a machinery plugin from other libraries.
    pub magic: [u8; 16],
    /// Two interfaces with different majors do not understand each other.
    pub major: u32,
    /// A host understands plugins of its own minor and all before it.
    pub minor: u32,
}

impl InterfaceVersion {
    /// This crate's version.
    pub const OURS: InterfaceVersion = InterfaceVersion {
        magic: *b"cuckoo-machinery",
        major: number(env!("CARGO_PKG_VERSION_MAJOR")),
        minor: number(env!("CARGO_PKG_VERSION_MINOR")),
    };
}

// At compile time, where a panic is a compile error.
#[allow(clippy::panic)]
const fn number(digits: &str) -> u32 {
    match u32::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("cargo gives versions as numbers"),
    }
}

/// A result that crosses the border; the error is an [`Error`](crate::Error) as JSON.
pub(crate) type Reply<T> = RResult<T, RString>;

pub(crate) use sabi::{MachineryAbi, MachineryAbi_TO, ServicesAbi, ServicesAbi_TO};

pub(crate) type MachineryObject = MachineryAbi_TO<'static, RBox<()>>;
pub(crate) type ServicesObject = ServicesAbi_TO<'static, RBox<()>>;

// `abi_stable`'s macros predate these lints.
#[allow(non_local_definitions, non_camel_case_types, missing_docs, clippy::all, clippy::pedantic)]
mod sabi {
    use super::{RStr, RString, Reply};
    use abi_stable::sabi_trait;

    /// [`Machinery`](crate::Machinery) at the border. Deadlines are in milliseconds from now.
    #[sabi_trait]
    pub trait MachineryAbi: Send + Sync {
        fn version(&self, deadline: u64) -> Reply<RString>;
        fn capabilities(&self) -> Reply<RString>;
        fn machines(&self) -> Reply<RString>;
        fn state(&self, machine: RStr<'_>, deadline: u64) -> Reply<RString>;
        fn restore_start(&self, machine: RStr<'_>, deadline: u64) -> Reply<()>;
        fn norestore_start(&self, machine: RStr<'_>, deadline: u64) -> Reply<()>;
        fn stop(&self, machine: RStr<'_>, deadline: u64) -> Reply<()>;
        fn acpi_stop(&self, machine: RStr<'_>, deadline: u64) -> Reply<()>;
        fn dump_memory(
            &self,
            machine: RStr<'_>,
            path: RStr<'_>,
            format: RStr<'_>,
            deadline: u64,
        ) -> Reply<()>;
        fn screenshot(&self, machine: RStr<'_>, path: RStr<'_>, deadline: u64) -> Reply<()>;
        fn prepare(&self, machine: RStr<'_>, deadline: u64) -> Reply<()>;
        /// New methods are added behind this one, each with a default that answers `Unsupported`.
        #[sabi(last_prefix_field)]
        fn shutdown(&self, deadline: u64) -> Reply<()>;
    }

    /// [`HostServices`](crate::HostServices) at the border. Log record and readiness are JSON.
    #[sabi_trait]
    pub trait ServicesAbi: Send + Sync {
        fn log(&self, record: RStr<'_>);
        fn state_changed(&self, machine: RStr<'_>, state: RStr<'_>, reason: RStr<'_>);
        fn progress(&self, machine: RStr<'_>, fraction: f64);
        fn max_level(&self) -> u8;
        fn step(&self, machine: RStr<'_>, step: RStr<'_>, milliseconds: f64);
        fn ready(&self, machine: RStr<'_>, ready: RStr<'_>);
        /// New methods are added behind this one, each with a default that does nothing.
        #[sabi(last_prefix_field)]
        fn preparation_invalidated(&self, machine: RStr<'_>, reason: RStr<'_>);
    }
}

/// What a plugin's library exports.
#[allow(non_camel_case_types, non_local_definitions)]
mod module {
    use super::{MachineryObject, RStr, RString, Reply, ServicesObject, StableAbi};

    #[repr(C)]
    #[derive(StableAbi)]
    #[sabi(kind(Prefix(prefix_ref = ModuleRef)))]
    #[sabi(missing_field(panic))]
    pub struct Module {
        /// Name, version, licence, conflicts: a [`Manifest`](super::Manifest).
        pub(crate) manifest: extern "C" fn() -> Reply<RString>,
        /// [`Machinery::check`](crate::Machinery::check): takes a `Setup`, gives a `Report`.
        pub(crate) check: extern "C" fn(RStr<'_>, ServicesObject) -> Reply<RString>,
        /// [`Machinery::load`](crate::Machinery::load): takes a `Setup`.
        #[sabi(last_prefix_field)]
        pub(crate) load: extern "C" fn(RStr<'_>, ServicesObject) -> Reply<MachineryObject>,
    }
}

pub(crate) use module::Module;
pub use module::ModuleRef;

impl RootModule for ModuleRef {
    abi_stable::declare_root_module_statics! {ModuleRef}
    const BASE_NAME: &'static str = "machinery";
    const NAME: &'static str = "machinery";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

/// Exports a type that implements [`Machinery`](crate::Machinery) as this library's plugin.
#[macro_export]
macro_rules! export_machinery {
    ($plugin:ty) => {
        const _: () = {
            /// Read by the host before anything else of this library.
            // SAFETY: the symbol is this interface's own name, and no other crate defines it.
            #[unsafe(no_mangle)]
            pub static MACHINERY_INTERFACE: $crate::abi::InterfaceVersion =
                $crate::abi::InterfaceVersion::OURS;

            /// The way in, for a host that accepted the version.
            // SAFETY: as above.
            #[unsafe(no_mangle)]
            pub static MACHINERY_PLUGIN: $crate::abi::LibHeader = $crate::abi::plugin::header::<$plugin>();

            impl $crate::abi::plugin::Packaged for $plugin {
                const VERSION: &'static str = env!("CARGO_PKG_VERSION");
                const LICENSE: &'static str = env!("CARGO_PKG_LICENSE");
            }
        };
    };
}
