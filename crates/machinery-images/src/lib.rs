//! Reads disk images for plugins and the host: their identities, their headers and their bases.
//!
//! A plugin compares identities before each restore. This crate therefore reads only a few small blocks, and
//! starts no process. It reads headers only; `qemu-img` creates and changes images.
//!
//! | module | content |
//! | --- | --- |
//! | `file_id` | [`FileId`]: detects that a file was changed or replaced |
//! | `qcow2` | [`Header`]: a qcow2 image's size, backing file, data file and internal snapshots |
//! | `changes` | [`has_unsaved_changes`], [`is_at_snapshot`]: compare the content of a qcow2 image with its snapshots |
//! | `memory` | [`SnapshotMemory`]: the memory in an internal snapshot of a qcow2 image |
//! | `chain` | [`Chain`]: all files that an image consists of, down to its base |
//! | `trusted` | [`TrustedChain`]: the same, and refuses an image that leaves what its guest may read |
//! | `format` | [`probe_format`]: the format of an image, by its first bytes |

mod chain;
mod changes;
mod file_id;
mod format;
mod memory;
mod qcow2;
mod trusted;

pub use chain::Chain;
pub use changes::{has_unsaved_changes, is_at_snapshot};
pub use file_id::FileId;
pub use format::probe_format;
pub use memory::SnapshotMemory;
pub use qcow2::{Backing, Header, MAGIC, Snapshot};
pub use trusted::{ChainRules, TrustedChain};
