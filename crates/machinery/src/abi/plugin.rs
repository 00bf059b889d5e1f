//! The plugin's side of the border: from the vtable into a plain [`Machinery`].

use std::mem::ManuallyDrop;
use std::path::Path;
use std::time::Duration;

use abi_stable::library::{
    __call_root_module_loader as call_module_loader, CheckTypeLayout, LibHeader, RootModuleResult,
};
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_trait::TD_Opaque;
use abi_stable::std_types::{RStr, RString};

use super::guard::{guarded, guarded_quiet};
use super::json::{Manifest, ManifestConflict, ReloadRequest, Reply, from_json, to_json};
use super::logging;
use super::sanitize::text;
use super::services::host_of;
use super::vtable::{MachineryAbi, MachineryAbi_TO, MachineryObject, Module, ModuleRef, ServicesObject};
use crate::{Deadline, Host, Machinery, Report, Result, Setup};

/// What the export macro knows about the plugin's package.
pub trait Packaged {
    /// The package's version.
    const VERSION: &'static str;
    /// The package's licence, as SPDX.
    const LICENSE: &'static str;
}

/// The header that the plugin's library exports.
pub const fn header<M: Machinery + Packaged>() -> LibHeader {
    // SAFETY: `construct` returns what `__call_root_module_loader` made of a `ModuleRef`, so the
    // erased module is a `ModuleRef`, as `from_constructor::<ModuleRef>` demands.
    unsafe { LibHeader::from_constructor::<ModuleRef>(construct::<M>, CheckTypeLayout::Yes) }
}

extern "C" fn construct<M: Machinery + Packaged>() -> RootModuleResult {
    call_module_loader(module::<M>)
}

fn module<M: Machinery + Packaged>() -> ModuleRef {
    Module { manifest: manifest::<M>, check: check::<M>, load: load::<M> }.leak_into_prefix()
}

extern "C" fn manifest<M: Machinery + Packaged>() -> Reply<RString> {
    guarded(M::NAME, || {
        let owned = |conflict: &crate::Conflict| ManifestConflict {
            with: conflict.with.to_owned(),
            why: conflict.why.to_owned(),
        };
        to_json(&Manifest {
            name: M::NAME.to_owned(),
            version: M::VERSION.to_owned(),
            license: M::LICENSE.to_owned(),
            conflicts: M::CONFLICTS.iter().map(owned).collect(),
        })
    })
}

extern "C" fn check<M: Machinery>(setup: RStr<'_>, services: ServicesObject) -> Reply<RString> {
    guarded(M::NAME, || {
        enter(services);
        let setup: Setup = from_json(setup.as_rslice().as_slice(), "setup")?;
        let mut report = Report::default();
        M::check(&setup, &mut report);
        to_json(&report)
    })
}

extern "C" fn load<M: Machinery>(setup: RStr<'_>, services: ServicesObject) -> Reply<MachineryObject> {
    guarded(M::NAME, || {
        let host = enter(services);
        let setup: Setup = from_json(setup.as_rslice().as_slice(), "setup")?;
        let machinery = M::load(&setup, host)?;
        Ok(MachineryAbi_TO::from_value(Exported(ManuallyDrop::new(machinery)), TD_Opaque))
    })
}

fn enter(services: ServicesObject) -> Host {
    let host = host_of(services);
    logging::send_to(host.services());
    host
}

struct Exported<M>(ManuallyDrop<M>);

impl<M> Drop for Exported<M> {
    fn drop(&mut self) {
        // A panic must not cross the border here either.
        // SAFETY: this is the only place that drops it, and it runs once.
        guarded_quiet((), || unsafe { ManuallyDrop::drop(&mut self.0) });
    }
}

impl<M: Machinery> MachineryAbi for Exported<M> {
    fn version(&self, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || self.0.version(after(deadline)).map(RString::from))
    }

    fn capabilities(&self) -> Reply<RString> {
        guarded(M::NAME, || to_json(&self.0.capabilities()))
    }

    fn machines(&self) -> Reply<RString> {
        guarded(M::NAME, || to_json(&self.0.machines()))
    }

    fn state(&self, machine: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || self.0.state(named(machine)?, after(deadline)).map(|state| state.as_str().into()))
    }

    fn restore_start(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.restore_start(named(machine)?, after(deadline)))
    }

    fn norestore_start(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.norestore_start(named(machine)?, after(deadline)))
    }

    fn stop(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.stop(named(machine)?, after(deadline)))
    }

    fn acpi_stop(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.acpi_stop(named(machine)?, after(deadline)))
    }

    fn dump_memory(&self, machine: RStr<'_>, path: RStr<'_>, format: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || {
            let format = text(format, "memory dump format")?;
            let format = serde_json::from_value(format.into())
                .map_err(|_| crate::Error::unsupported(&format!("the memory dump format '{format}'")))?;
            self.0.dump_memory(named(machine)?, path_of(path)?, format, after(deadline))
        })
    }

    fn screenshot(&self, machine: RStr<'_>, path: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.screenshot(named(machine)?, path_of(path)?, after(deadline)))
    }

    fn prepare(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.prepare(named(machine)?, after(deadline)))
    }

    fn shutdown(&self, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.shutdown(after(deadline)))
    }

    fn reload(&self, request: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || {
            let ReloadRequest { setup, in_use } = from_json(request.as_bytes(), "new configuration")?;
            to_json(&self.0.reload(&setup, &in_use, after(deadline))?)
        })
    }

    fn diagnose(&self, machines: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || {
            let machines: Vec<String> = from_json(machines.as_bytes(), "list of machines")?;
            to_json(&self.0.diagnose(&machines, after(deadline))?)
        })
    }

    fn prepare_automatically(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.prepare_automatically(named(machine)?, after(deadline)))
    }
}

fn named(machine: RStr<'_>) -> Result<&str> {
    text(machine, "machine's name")
}

fn path_of(path: RStr<'_>) -> Result<&Path> {
    text(path, "path").map(Path::new)
}

fn after(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds))
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
