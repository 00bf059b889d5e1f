//! Save images, from which a restore is faster than from its snapshot, and leaves the domain's disks as they are.
//!
//! | module | content |
//! | --- | --- |
//! | `image` | the image of one machine |
//! | `source` | the origin of an image |
//! | `disks` | the disks of a domain, and the overlays of a run |
//! | `overlaid` | a domain's description with overlays |
//! | `folders` | the folders of the images, which belong to one host |
//! | `save` | libvirt's call that saves a domain to a file |

mod disks;
mod folders;
mod image;
mod overlaid;
mod save;
mod source;

pub use folders::ImageFolders;
pub use image::{Image, InstantMode};
pub use source::Source;
