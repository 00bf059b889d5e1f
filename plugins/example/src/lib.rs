//! The machinery `example`.
//!
//! Its machines exist in memory only, so it needs no hypervisor. To make it a backend, replace `hypervisor` by the real
//! one, and adapt the other modules. The toolkit's [`Adapter`] calls them.
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the YAML of this machinery, as types |
//! | `hypervisor` | the simulated hypervisor: replace it |
//! | `machine` | one machine: check the state, act, wait, report |
//! | `shared` | everything that the machines share |
//! | `adapter` | the machinery: its name, its configuration, its checks |

mod adapter;
mod config;
mod hypervisor;
mod machine;
mod shared;

use machinery_backend::Adapter;

machinery::export_machinery!(Adapter<shared::Example>);
