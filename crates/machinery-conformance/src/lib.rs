//! The requirements of [`Machinery`](machinery::Machinery), as checks for any plugin.
//!
//! The suite opens a plugin from its file, as a host does. It calls the plugin as a host does: from any thread,
//! several machines at a time, with deadlines. It does not trust the plugin's results: *probes* inspect the
//! machine itself, and the suite searches the computer for leftovers.
//!
//! ```text
//!   BackendSpec: the backend's machines,         ┌─ load ─▶ one requirement ─▶ stop all, shutdown ─┐
//!   and how to inspect and how to break them ──▶ │        (for each of them, in order)             │─▶ Report
//!                                                └────────────── no leftovers ─────────────────────┘
//! ```
//!
//! Each requirement has a name and loads the machinery anew, so that a failed one does not affect the others.
//! Each call runs in a thread of its own, so that the suite detects a call that never returns. It then skips the
//! remaining requirements, because the plugin must not be called any more.
//!
//! # Testing a plugin
//!
//! In the plugin's `tests/conformance.rs`, one test for each requirement. Its section `[[test]]` in `Cargo.toml` has
//! `name = "conformance"` and `harness = false`.
//!
//! ```
//! use machinery_conformance::{Answer, Fixture, BackendSpec, artifacts};
//!
//! fn fixture() -> Answer<Fixture> {
//!     let config = "machines: {one: {ip: 10.0.0.1, platform: linux, os_version: 12}}";
//!     Ok(Fixture::new(artifacts::plugin("mine")?, config, BackendSpec::new(&["one"]))?)
//! }
//!
//! machinery_conformance::conformance_main!(fixture);
//! ```
//!
//! This test only knows the names of machines, so it has to trust the plugin for the rest. Each addition to the
//! [`BackendSpec`] replaces trust by a check: the [count](BackendSpec::counts) that shows where a run began, a
//! [sign of life](BackendSpec::alive), [leftovers](BackendSpec::leftovers), a way to [break](BackendSpec::breakage)
//! a start, and ways to [kill](BackendSpec::death) and to [pause](BackendSpec::pause) a machine.
//!
//! `cargo test` builds the plugin's library only with `crate-type = ["cdylib", "rlib"]`.
//!
//! `cuckoo-machinery conformance FILE --config YAML` checks a built plugin without any tests. It runs each
//! requirement in a process of its own.
//!
//! Three requirements need a host in a process of its own. `no_leaks` counts its resources. `killed_host` kills it during
//! a run, and so does `adoption`, which also has it hand over. The process is the test program itself, or another [program](BackendSpec::host_program).
//!
//! If the environment has `MACHINERY_KEEP=1`, the scratch folder of a failed check is kept, and the failure names it.
//!
//! # Where things are
//!
//! | module | content |
//! | --- | --- |
//! | `spec` | the author's description of the backend |
//! | `fixture` | a plugin, its configuration and folders, and the spec: everything that a test needs |
//! | `harness` | the requirements as tests of cargo's |
//! | `commands` | shell commands as the author's functions |
//! | [`artifacts`] | finds the built plugin |
//! | `suite` | checks a plugin against the requirements |
//! | `requirements` | the requirements, by theme, and the list of all |
//! | `session` | a loaded machinery, and the calls and demands that requirements consist of |
//! | `plugin_under_test` | the opened plugin, and the guard around all calls of it |
//! | `call` | the calls as values, and the timeout on each call |
//! | `host_process` | a host in a process of its own |
//! | `folders`, `processes`, `resources` | the files, processes and other resources of the plugin |
//! | `recorder` | the events that the plugin reports to its host |
//! | `report`, `keep` | the results, and the scratch folders of failed checks |

#![warn(missing_docs)]

pub mod artifacts;
mod call;
mod commands;
mod fixture;
mod folders;
mod harness;
mod host_process;
mod keep;
mod plugin_under_test;
mod processes;
mod recorder;
mod report;
mod requirements;
mod resources;
mod session;
mod spec;
mod suite;

pub use commands::Commands;
pub use fixture::{Fixture, setup_in};
pub use harness::main;
pub use host_process::{HOST_PROCESS, run_host_process};
pub use keep::is_requested as keeps_folders;
pub use recorder::NullHost;
pub use report::{Check, CheckFailure, Report};
pub use spec::{Answer, BackendSpec};
pub use suite::{meaning, names, run, run_some};
