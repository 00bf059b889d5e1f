//! The vtables on both sides of the interface, and the module that a plugin's library exports.

use abi_stable::library::RootModule;
use abi_stable::package_version_strings;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::std_types::RBox;

pub(crate) use sabi::{MachineryAbi, MachineryAbi_TO, ServicesAbi, ServicesAbi_TO};

pub(crate) type MachineryObject = MachineryAbi_TO<'static, RBox<()>>;
pub(crate) type ServicesObject = ServicesAbi_TO<'static, RBox<()>>;

// `abi_stable`'s macros predate these lints.
#[allow(non_local_definitions, non_camel_case_types, missing_docs, clippy::all, clippy::pedantic)]
mod sabi {
    use abi_stable::sabi_trait;
    use abi_stable::std_types::{RStr, RString};

    use crate::abi::json::{Reply, unsupported};

    /// [`Machinery`](crate::Machinery) at the border. Deadlines are milliseconds from now.
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
        /// The last method of interface 1.0. A new method is added at the end, with a default that returns
        /// `Unsupported`: the host calls the default for a plugin without the method.
        #[sabi(last_prefix_field)]
        fn shutdown(&self, deadline: u64) -> Reply<()>;
        /// Since 1.1. Takes a `ReloadRequest`, and returns a `Reloaded`.
        fn reload(&self, request: RStr<'_>, deadline: u64) -> Reply<RString> {
            let _ = (request, deadline);
            unsupported("reload")
        }
        /// Since 1.1. Takes the names of machines, and returns a list of `Diagnosis`.
        fn diagnose(&self, machines: RStr<'_>, deadline: u64) -> Reply<RString> {
            let _ = (machines, deadline);
            unsupported("diagnose")
        }
        /// Since 1.1. For a plugin without this function, the host calls `prepare`.
        fn prepare_automatically(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
            self.prepare(machine, deadline)
        }
        /// Since 1.1. Returns whether there was a run.
        fn adopt(&self, machine: RStr<'_>, deadline: u64) -> Reply<RString> {
            let _ = (machine, deadline);
            unsupported("adopt")
        }
        /// Since 1.1.
        fn hand_over(&self, deadline: u64) -> Reply<()> {
            let _ = deadline;
            unsupported("hand_over")
        }
        /// Since 1.1. Returns the number of a descriptor, which belongs to the caller from then on.
        fn console(&self, machine: RStr<'_>, deadline: u64) -> Reply<i32> {
            let _ = (machine, deadline);
            unsupported("console")
        }
        /// Since 1.1.
        fn open_network(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
            let _ = (machine, deadline);
            unsupported("open_network")
        }
        /// Since 1.1.
        fn close_network(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
            let _ = (machine, deadline);
            unsupported("close_network")
        }
        /// Since 1.1.
        fn save(&self, machine: RStr<'_>, memory: RStr<'_>, disk: RStr<'_>, deadline: u64) -> Reply<()> {
            let _ = (machine, memory, disk, deadline);
            unsupported("save")
        }
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
        /// The last method of interface 1.0. A new method is added at the end, with a default that does nothing.
        #[sabi(last_prefix_field)]
        fn preparation_invalidated(&self, machine: RStr<'_>, reason: RStr<'_>);
        /// Since 1.1.
        fn preparation_wanted(&self, machine: RStr<'_>, reason: RStr<'_>) {
            let _ = (machine, reason);
        }
    }
}

/// The module that a plugin's library exports.
#[allow(non_camel_case_types, non_local_definitions)]
mod module {
    use abi_stable::StableAbi;
    use abi_stable::std_types::{RStr, RString};

    use super::{MachineryObject, ServicesObject};
    use crate::abi::json::Reply;

    #[repr(C)]
    #[derive(StableAbi)]
    #[sabi(kind(Prefix(prefix_ref = ModuleRef)))]
    #[sabi(missing_field(panic))]
    pub struct Module {
        /// Returns name, version, licence and conflicts: a [`Manifest`](crate::abi::json::Manifest).
        pub(crate) manifest: extern "C" fn() -> Reply<RString>,
        /// [`Machinery::check`](crate::Machinery::check): takes a `Setup`, and returns a `Report`.
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
