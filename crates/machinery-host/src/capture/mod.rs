//! Network capture: tcpdump writes the traffic of a machine into the file of the task.
//!
//! ```text
//! start of a locked machine ─▶ tcpdump listens ─▶ the machine runs ─▶ … ─▶ stop: all packets read, file complete
//!                                     └─ tcpdump dies: reported at once, the machine goes on
//! ```
//!
//! ```text
//! network ─▶ tcpdump, as a user without rights ─▶ pipe ─▶ the host copies whole packets ─▶ file
//! ```
//!
//! `actions::capture` begins and ends the capture of a machine. [`tcpdump`] runs one process, `user` chooses its user, and
//! `jail` confines it. `stderr` reads and interprets its messages, and [`writer`] copies its output up to the limit.
//! `space` ends a capture when its disk is nearly full. `leftovers` ends the processes of a host that was killed.

mod jail;
mod leftovers;
mod settings;
pub mod space;
mod stderr;
pub mod tcpdump;
mod user;
pub mod writer;

pub use leftovers::end_leftovers;
pub use settings::{Jail, MISSING_ADVICE, Settings, Target, filter, permission_advice};
