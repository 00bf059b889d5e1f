//! Templates: a machine's snapshot in the form that makes a restore instant, whatever the size of its RAM.
//!
//! A template consists of the guest's RAM as a file, which a restore only maps, and of the state of its
//! devices, which a restore loads. The RAM is mapped copy-on-write, so its file never changes. The devices
//! are less than a megabyte. QEMU's migration capability `x-ignore-shared` writes and reads this form.
//!
//! ```text
//! <instant_dir>/<name>.template/ram              as large as the guest's RAM, sparse where that is zero
//!                                  devices       a migration stream without RAM
//!                                  record.json   the template's identity, and the identities of its files
//! <instant_dir>/<name>.unfinished/               a template that is being built; renamed when complete
//! <instant_dir>/templates.lock                   locked by the host that owns the templates
//!
//! (none) ── build ──▶ unfinished ── fsync, rename ──▶ complete ──▶ used by each restore
//!                       │ failure                        │ its identity or one of its files has changed,
//!                       ▼                                ▼ or QEMU cannot load it
//!                     (none)                           (none)
//! ```
//!
//! Each template belongs to one [`Identity`], which is checked before each use. A template that does not
//! match is never used. Without a template a machine is restored plainly.
//!
//! Machines with the same files have one template, of the name of the first such machine in `qemu.yaml` and of a checksum of
//! their configuration. One of them builds it, and the others wait. After a reload, a machine in use keeps its earlier
//! configuration, and with it the earlier template.
//!
//! The operator may have chosen a folder that holds other files. The plugin therefore removes only files of
//! these names in folders of these names.
//!
//! | module | content |
//! | --- | --- |
//! | `layout` | the names of the files, and their removal |
//! | `store` | all templates of a host: find, remove, keep |
//! | `space` | the disk space of the templates: limit and reservations |
//! | `build`, `sparse_copy`, `unfinished` | building a template |
//! | `shared_template`, `turn` | everything that the machines of a template share; the turn to build it |
//! | `sealed_ram` | the RAM in memory, for an older QEMU and several machines |
//! | `memory` | the memory that templates need for a while |
//! | `template_failures` | the failures after which a template is not tried again |
//! | `identity` | everything that a template depends on |
//! | `unavailable_reason` | machines that cannot have a template |

mod build;
mod identity;
mod layout;
mod memory;
mod opener;
mod sealed_ram;
mod shared_template;
mod space;
mod sparse_copy;
mod store;
mod template_failures;
mod turn;
mod unavailable_reason;
mod unfinished;

pub use build::{Build, BuildError, build};
pub use identity::Identity;
#[cfg(test)]
pub use identity::tests::identity as identity_of_a_test;
pub use opener::Opener;
pub use shared_template::{SharedTemplate, SharedTemplates};
pub use store::{Template, Templates};
pub use template_failures::TemplateFailures;
pub use unavailable_reason::unavailable_reason;
