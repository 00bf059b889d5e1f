//! The plugin's side of the border: exports a [`Machinery`], and calls it through the vtable.

use std::mem::ManuallyDrop;
use std::os::fd::IntoRawFd;
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

/// The facts about the plugin's package that the export macro adds.
pub trait Packaged {
    /// The package's version.
    const VERSION: &'static str;
    /// The package's licence, as SPDX.
    const LICENSE: &'static str;
}

/// Creates the header that the plugin's library exports.
pub const fn header<M: Machinery, P: Packaged>() -> LibHeader {
    // SAFETY: `construct` returns the result of `__call_root_module_loader` for a `ModuleRef`, so the
    // erased module is a `ModuleRef`, as `from_constructor::<ModuleRef>` demands.
    unsafe { LibHeader::from_constructor::<ModuleRef>(construct::<M, P>, CheckTypeLayout::Yes) }
}

extern "C" fn construct<M: Machinery, P: Packaged>() -> RootModuleResult {
    call_module_loader(module::<M, P>)
}

fn module<M: Machinery, P: Packaged>() -> ModuleRef {
    Module { manifest: manifest::<M, P>, check: check::<M>, load: load::<M> }.leak_into_prefix()
}

extern "C" fn manifest<M: Machinery, P: Packaged>() -> Reply<RString> {
    guarded(M::NAME, || {
        let owned = |conflict: &crate::Conflict| ManifestConflict {
            with: conflict.with.to_owned(),
            why: conflict.why.to_owned(),
        };
        to_json(&Manifest {
            name: M::NAME.to_owned(),
            version: P::VERSION.to_owned(),
            license: P::LICENSE.to_owned(),
            conflicts: M::CONFLICTS.iter().map(owned).collect(),
        })
    })
}

extern "C" fn check<M: Machinery>(setup: RStr<'_>, services: ServicesObject) -> Reply<RString> {
    guarded(M::NAME, || {
        connect(services);
        let setup: Setup = from_json(setup.as_rslice().as_slice(), "setup")?;
        let mut report = Report::default();
        M::check(&setup, &mut report);
        to_json(&report)
    })
}

extern "C" fn load<M: Machinery>(setup: RStr<'_>, services: ServicesObject) -> Reply<MachineryObject> {
    guarded(M::NAME, || {
        let host = connect(services);
        let setup: Setup = from_json(setup.as_rslice().as_slice(), "setup")?;
        M::load(&setup, host).map(object)
    })
}

/// Returns the object by which a host calls the machinery.
pub(crate) fn object<M: Machinery>(machinery: M) -> MachineryObject {
    MachineryAbi_TO::from_value(Exported(ManuallyDrop::new(machinery)), TD_Opaque)
}

/// Sends this library's log to the host, and returns the host's services.
fn connect(services: ServicesObject) -> Host {
    let host = host_of(services);
    logging::send_to(host.services());
    host
}

struct Exported<M>(ManuallyDrop<M>);

impl<M> Drop for Exported<M> {
    fn drop(&mut self) {
        // A panic must not cross the border here either.
        // SAFETY: only this function drops the value, and it runs once.
        guarded_quiet((), || unsafe { ManuallyDrop::drop(&mut self.0) });
    }
}

impl<M: Machinery> MachineryAbi for Exported<M> {
    fn version(&self, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || self.0.version(deadline_in(deadline)).map(RString::from))
    }

    fn capabilities(&self) -> Reply<RString> {
        guarded(M::NAME, || to_json(&self.0.capabilities()))
    }

    fn machines(&self) -> Reply<RString> {
        guarded(M::NAME, || to_json(&self.0.machines()))
    }

    fn state(&self, machine: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || {
            self.0.state(name_of(machine)?, deadline_in(deadline)).map(|state| state.as_str().into())
        })
    }

    fn restore_start(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.restore_start(name_of(machine)?, deadline_in(deadline)))
    }

    fn norestore_start(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.norestore_start(name_of(machine)?, deadline_in(deadline)))
    }

    fn stop(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.stop(name_of(machine)?, deadline_in(deadline)))
    }

    fn acpi_stop(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.acpi_stop(name_of(machine)?, deadline_in(deadline)))
    }

    fn dump_memory(&self, machine: RStr<'_>, path: RStr<'_>, format: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || {
            let format = text(format, "memory dump format")?;
            let format = serde_json::from_value(format.into())
                .map_err(|_| crate::Error::unsupported(&format!("the memory dump format '{format}'")))?;
            self.0.dump_memory(name_of(machine)?, path_of(path)?, format, deadline_in(deadline))
        })
    }

    fn screenshot(&self, machine: RStr<'_>, path: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.screenshot(name_of(machine)?, path_of(path)?, deadline_in(deadline)))
    }

    fn prepare(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.prepare(name_of(machine)?, deadline_in(deadline)))
    }

    fn shutdown(&self, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.shutdown(deadline_in(deadline)))
    }

    fn reload(&self, request: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || {
            let ReloadRequest { setup, in_use } = from_json(request.as_bytes(), "new configuration")?;
            to_json(&self.0.reload(&setup, &in_use, deadline_in(deadline))?)
        })
    }

    fn diagnose(&self, machines: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || {
            let machines: Vec<String> = from_json(machines.as_bytes(), "list of machines")?;
            to_json(&self.0.diagnose(&machines, deadline_in(deadline))?)
        })
    }

    fn prepare_automatically(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.prepare_automatically(name_of(machine)?, deadline_in(deadline)))
    }

    fn adopt(&self, machine: RStr<'_>, deadline: u64) -> Reply<RString> {
        guarded(M::NAME, || to_json(&self.0.adopt(name_of(machine)?, deadline_in(deadline))?))
    }

    fn hand_over(&self, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.hand_over(deadline_in(deadline)))
    }

    fn console(&self, machine: RStr<'_>, deadline: u64) -> Reply<i32> {
        guarded(M::NAME, || {
            self.0.console(name_of(machine)?, deadline_in(deadline)).map(IntoRawFd::into_raw_fd)
        })
    }

    fn open_network(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.open_network(name_of(machine)?, deadline_in(deadline)))
    }

    fn close_network(&self, machine: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || self.0.close_network(name_of(machine)?, deadline_in(deadline)))
    }

    fn save(&self, machine: RStr<'_>, memory: RStr<'_>, disk: RStr<'_>, deadline: u64) -> Reply<()> {
        guarded(M::NAME, || {
            self.0.save(name_of(machine)?, path_of(memory)?, path_of(disk)?, deadline_in(deadline))
        })
    }
}

fn name_of(machine: RStr<'_>) -> Result<&str> {
    text(machine, "machine's name")
}

fn path_of(path: RStr<'_>) -> Result<&Path> {
    text(path, "path").map(Path::new)
}

fn deadline_in(milliseconds: u64) -> Deadline {
    Deadline::after(Duration::from_millis(milliseconds))
}

/// Exports a type that implements [`Machinery`](crate::Machinery) as this library's plugin.
#[macro_export]
macro_rules! export_machinery {
    ($plugin:ty) => {
        const _: () = {
            /// The version of the interface, which the host reads before it loads the library.
            // SAFETY: the symbol is this interface's own name, and no other crate defines it.
            #[unsafe(no_mangle)]
            pub static MACHINERY_INTERFACE: $crate::abi::InterfaceVersion =
                $crate::abi::InterfaceVersion::OURS;

            /// The entry point for a host that accepts the version.
            // SAFETY: as above.
            #[unsafe(no_mangle)]
            pub static MACHINERY_PLUGIN: $crate::abi::LibHeader =
                $crate::abi::plugin::header::<$plugin, Package>();

            // A type of its own, because the plugin's type may belong to another crate.
            pub struct Package;

            impl $crate::abi::plugin::Packaged for Package {
                const VERSION: &'static str = env!("CARGO_PKG_VERSION");
                const LICENSE: &'static str = env!("CARGO_PKG_LICENSE");
            }
        };
    };
}
