//! What the tests of the whole workspace stand on.
//!
//! - [`guest`]: analysis machines to test with, made on the spot: a boot sector that is up in a
//!   quarter of a second, and a small Linux with an agent, a disk and a network. No image is kept
//!   in the repository and nothing is installed.
//! - [`snapshot`]: the formats in which a memory snapshot may be stored.

mod error;
pub mod guest;
pub mod snapshot;

pub use error::{Error, Result};
