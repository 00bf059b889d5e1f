//! The machinery `example-process`: each machine is a process.
//!
//! Its hypervisor is a small program in `guest/`. To make the machinery a backend, remove that program, and replace
//! `hypervisor` by the command line and the words of the real one. The toolkit's [`Adapter`] calls the other modules.
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the YAML of this machinery, as types |
//! | `hypervisor` | one process: its command line, its console, its files: replace it |
//! | `machine` | one machine: check the state, act, wait, report |
//! | `shared` | everything that the machines share |
//! | `adapter` | the machinery: its name, its configuration, its checks |

mod adapter;
mod config;
mod hypervisor;
mod machine;
mod shared;

use machinery_backend::Adapter;

machinery::export_machinery!(Adapter<shared::ExampleProcess>);
