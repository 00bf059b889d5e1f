//! The machinery `example`.
//!
//! Its machines exist in memory only, so it needs no hypervisor. To make it a backend, replace `hypervisor` by the real
//! one, and adapt the other modules. The toolkit's [`Adapter`] calls them.
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the YAML of this machinery, as types |
//! | `hypervisor` | the simulated hypervisor: replace it |
//! | `shared` | the machinery: its name, its configuration, and everything that its machines share |
//! | `machine` | one machine: check the state, act, wait, report |

mod config;
mod hypervisor;
mod machine;
mod shared;

use machinery_backend::Adapter;

machinery::export_machinery!(Adapter<shared::Example>);
