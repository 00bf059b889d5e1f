//! Network capture: tcpdump writes the traffic of a machine into the file of the task.
//!
//! ```text
//! start of a locked machine ─▶ tcpdump listens ─▶ the machine runs ─▶ … ─▶ stop: all packets read, file complete
//!                                     └─ tcpdump dies: reported at once, the machine goes on
//! ```
//!
//! `actions::capture` begins and ends the capture of a machine. [`tcpdump`] runs one process, and `stderr`
//! interprets its messages. `space` ends a capture that is too large. `leftovers` ends the processes of a host that was killed.

mod leftovers;
mod settings;
pub mod space;
mod stderr;
pub mod tcpdump;

pub use leftovers::end_leftovers;
pub use settings::{MISSING_ADVICE, Settings, Target, filter, permission_advice};
