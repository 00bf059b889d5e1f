//! Processes of a hypervisor: their start, their output, their end, and the leftovers of a host that was killed.
//!
//! ```text
//! command ─▶ Process::start ─▶ Handle: kill, terminate, wait, last lines ─▶ Process::end: reaped, group ended ─▶ End
//! ```
//!
//! [`Process`] belongs to one thread, which waits for the end and reaps it. [`Handle`] is for all others: its pidfd
//! cannot reach another process, even after the end. Each of these is easily done wrong, and is done here:
//!
//! - A child gets the limit of open files that the host was started with, and not the host's raised one
//!   ([`machinery::command`]).
//! - A child leads a process group of its own. A signal of the host's terminal does not reach it, and its helpers end
//!   with it.
//! - No child is to die with the host by `PR_SET_PDEATHSIG`: that signal follows the *thread* that started the child,
//!   and the host's threads come and go. The next host adopts the child by its [`ProcessIdentity`]
//!   ([`Process::adopt`]), or ends [`leftovers`].
//! - A hypervisor that takes commands on its console gets them by [`Handle::ask`], which returns its answer, or its last
//!   words if it dies.
//! - A pipe is read to its end, so that a child that writes a lot neither blocks nor gets SIGPIPE, and only the last
//!   lines are kept.

mod child;
mod console;
mod end;
mod group;
mod handle;
mod identity;
mod leftovers;
mod output;

pub use child::Process;
pub use console::{Console, LineKind};
pub use end::End;
pub use handle::{Handle, bytes_of};
pub use identity::ProcessIdentity;
pub use leftovers::{RunningProcess, leftovers};
pub use output::output;
pub(crate) use output::output_for;
