//! Plugin files: search, trust, opening, and bounded calls.
//!
//! ```text
//! name ─▶ file (searched in folders) ─▶ trusted ─▶ checksum listed ─▶ opened ─▶ has the same name
//! ```

pub mod call;
pub mod checksum;
pub mod open;
pub mod search;
pub mod trust;
