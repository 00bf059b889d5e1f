//! One machine: the actions on its domain, and the events of it.
//!
//! ```text
//!              prepare                 restore_start
//!        off ──────────▶ standby ──────────────────────▶ running ── stop, its end ──▶ off
//!         ▲                 │                              ▲
//!         └── discarded ◀───┘  restore_start,              │
//!        off ───────────────── norestore_start ────────────┘
//! ```
//!
//! The host sees a standby as a machine that is off: its domain is *hidden*.
//!
//! An action returns when libvirt answers, and libvirt reports by events the changes of the domain. Both
//! arrive in different threads, so an action that ends a run waits for both.
//!
//! | module | content, from the bottom up |
//! | --- | --- |
//! | `state` | the state that the plugin keeps, under one lock |
//! | `base` | the machine: its lock, its operations, its reports to the host |
//! | `run` | an own run: marker, disks, end |
//! | `end` | the ways to end a domain, and calls that timed out |
//! | `conditions` | the conditions of a preparation |
//! | `standby` | the standby: resume, replacement, end |
//! | `image` | the save image |
//! | `prepare`, `start`, `stop`, `query` | the host's actions |
//! | `events` | the events of the domain and of the connection |

mod base;
mod conditions;
mod end;
mod events;
mod image;
mod prepare;
mod query;
mod run;
mod standby;
mod start;
mod state;
mod stop;

pub use base::Machine;
pub use conditions::PrepareTrigger;
