//! The files of clients: memory dumps, screenshots and captures.
//!
//! A client passes an open descriptor with its request, or names a path. The host never opens a path with more rights
//! than the client has:
//!
//! | file | rule |
//! | --- | --- |
//! | a descriptor | a regular file or a pipe, open for writing: the client has opened it with its own rights |
//! | a path of root or of the host's user | any path; a symbolic link at its end is not followed |
//! | a path of another user | only below `storage` in the CWD, without symbolic links and `..`; the file is given to that user |
//!
//! A plugin writes a dump or a screenshot into a private folder. The host checks the file there, and hands it over.
//!
//! ```text
//! stage ─▶ the plugin writes ─▶ check ─▶ hand over: rename, or copy into the descriptor
//! ```
//!
//! | file | content |
//! | --- | --- |
//! | `folders` | the folders in the CWD |
//! | `passed` | descriptors that clients have passed, and how many a user may have |
//! | `named` | paths that clients have named |
//! | `private` | the private folder of a plugin's file, and the checks of its content |
//! | `staged` | the handover |

mod folders;
mod named;
mod passed;
mod private;
mod staged;

pub use folders::Folders;
pub use named::{Existing, NamedFile, Owner};
#[cfg(test)]
pub use passed::tests::checked as passed_file;
pub use passed::{Descriptor, DescriptorBudget, DescriptorPermit, PassedFile};
pub use private::{Content, PrivateFile};
pub use staged::{ClientFile, Staged};
