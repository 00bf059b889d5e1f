//! What a plugin writes for its caller: memory dumps and screenshots.
//!
//! The interface requirements that such a file belongs to the caller, that it appears whole, and that a
//! failure leaves nothing. An [`Output`] keeps that requirement for any hypervisor: one that is handed a
//! descriptor, and one that opens a path by itself. A screen that comes as PPM becomes the PNG that
//! the interface requirements.
//!
//! Plugins may use this crate or not; it is no part of the interface.

#![warn(missing_docs)]

mod output;
mod picture;

pub use output::Output;
pub use picture::{is_ppm, ppm_to_png};
