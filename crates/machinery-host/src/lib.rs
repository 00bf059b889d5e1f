//! The machinery host: loads machinery plugins and serves Cuckoo's socket.
//!
//! A request passes through these modules, and its reply and events go back to the connection:
//!
//! ```text
//! socket ─▶ server::connection ─▶ server::dispatch ─▶ manager ─▶ actions::worker ─▶ actions::executor
//!                  ▲                     │                                                │
//!                  └── reply, events ────┘                            plugin ◀── plugin::call
//! ```
//!
//! A module imports only modules below it, in this order:
//!
//! | module | content |
//! | --- | --- |
//! | [`cli`] | the command line |
//! | [`serve`] | the life of the host: load, serve, shut down |
//! | [`commands`] | the commands that need no running host |
//! | [`server`] | the socket and its protocol |
//! | [`exporter`] | the metrics for Prometheus |
//! | [`wall`] | the web page of the machines |
//! | [`manager`] | the shared state, and a method for each request |
//! | [`watchdog`] | proves to systemd that the host answers |
//! | [`reload`] | a new configuration while the host serves |
//! | [`actions`] | the actions on machines, with a worker for each machine |
//! | [`load`] | from the configuration to a fleet of loaded machineries |
//! | [`fleet`] | the machines of all machineries, with their states and locks |
//! | [`config`] | the configuration of the host |
//! | [`plugin`] | search, trust and opening of plugins, and the bounded calls into them |
//! | [`capture`] | the capture of a machine's traffic |
//! | [`client_file`] | the files that clients pass or name |
//! | [`cuckoo`] | the values that Cuckoo3 reads differently from the host |
//! | [`events`] | the events for subscribers |
//! | `http` | the HTTP server of the exporter and of the wall |
//! | [`client`] | the blocking client of the socket |
//! | [`cwd`], [`cwd_lock`] | the paths in Cuckoo's working directory, and its lock |
//! | `jail` | the confinement of the host's own programs |
//! | [`exit`] | plugins that call `exit()` |
//! | [`service_manager`] | the notifications to systemd |
//! | `limits`, [`logging`] | the limit of open files, and the log |

pub mod actions;
pub mod capture;
pub mod cli;
pub mod client;
pub mod client_file;
pub mod commands;
pub mod config;
pub mod cuckoo;
pub mod cwd;
pub mod cwd_lock;
pub mod events;
pub mod exit;
pub mod exporter;
pub mod fleet;
mod http;
mod jail;
mod limits;
pub mod load;
pub mod logging;
pub mod manager;
pub mod origin;
pub mod plugin;
pub mod reload;
pub mod serve;
pub mod server;
pub mod service_manager;
pub mod wall;
pub mod watchdog;
