//! Save images, from which a restore is faster than from its snapshot.
//!
//! | module | content |
//! | --- | --- |
//! | `image` | the image of one machine, and its source |
//! | `disks` | the disks of a domain, which `qemu-img` reverts |
//! | `folders` | the folders of the images, which belong to one host |
//! | `save` | libvirt's call that saves a domain to a file |

mod disks;
mod folders;
mod image;
mod save;

pub use folders::ImageFolders;
pub use image::{Image, InstantMode, Source};
