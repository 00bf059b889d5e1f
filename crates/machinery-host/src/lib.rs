//! The machinery host.
//!
//! The way of one action, in one direction:
//!
//! ```text
//! socket ─▶ server::connection ─▶ server::protocol ─▶ actions::worker ─▶ actions::rules ─▶ plugin
//!                   ▲                                        │
//!                   └──────────── answer, events ◀───────────┘
//! ```
//!
//! | room | what it holds |
//! | --- | --- |
//! | [`cwd`], [`config`] | where Cuckoo's working directory is, and what its files say |
//! | [`load`] | loads the listed machineries |
//! | [`fleet`] | the machines of all machineries, what is known of each, and who has it |
//! | [`events`] | what subscribers hear |
//! | [`capture`] | the traffic of a task's machine, into the task's file |
//! | [`actions`] | one worker for each machine, and the rules of an action |
//! | [`server`] | the socket and its protocol |
//! | [`serve`] | the life of the host: load, serve, end |
//! | [`reload`] | a new configuration while it serves |
//! | [`client`] | the other end of the socket, for the command line |
//! | [`plugin`], [`exit`] | bounded calls into plugins, and plugins that end the process |
//! | [`cuckoo`] | where Cuckoo3 reads its own files differently |
//! | [`commands`] | commands that need no running host |
//! | [`cli`] | the command line |
//! | [`logging`] | where log lines go |

pub mod actions;
pub mod capture;
pub mod cli;
pub mod client;
pub mod commands;
pub mod config;
pub mod cuckoo;
pub mod cwd;
pub mod events;
pub mod exit;
pub mod fleet;
mod limits;
pub mod load;
pub mod logging;
pub mod manager;
pub mod plugin;
pub mod reload;
pub mod serve;
pub mod server;
