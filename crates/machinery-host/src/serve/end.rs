//! The end of a host: of its plugins, and of its process, which may execute a newer program.

use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use machinery::trust::expect_trusted;
use machinery::{Error, ErrorKind};
use tokio::task::JoinSet;

use crate::actions::Ending;
use crate::fleet::Machinery;
use crate::limits;
use crate::manager::Manager;
use crate::plugin::call::{self, CallResult};
use crate::server::listener;

use super::signals::LateSignals;

/// The time that clients have to read their last replies when the host ends.
const LAST_REPLIES_TIMEOUT: Duration = Duration::from_secs(3);

/// The program that this process executes next.
pub struct NextProgram {
    /// The socket that it inherits.
    pub listener: UnixListener,
    /// True if it stops all machines, and ends.
    pub stop: bool,
    /// The signals of the time until it is executed.
    pub signals: LateSignals,
}

/// Waits for last replies, and shuts the plugins down, or has them hand over. Returns whether one has handed over.
pub async fn drain(manager: &Manager, ending: impl Fn() -> Ending, mut connections: JoinSet<()>) -> bool {
    manager.ended().send_replace(true);
    let last_replies = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_REPLIES_TIMEOUT, last_replies).await.is_err() {
        tracing::warn!("some clients do not read their last replies");
    }
    let limit = manager.queues().context().timeouts().shutdown;
    let mut handed_over = false;
    for machinery in manager.roster().machineries() {
        let hands_over = ending() == Ending::HandOver && machinery.adopts();
        handed_over |= hands_over;
        end_plugin(machinery, hands_over, limit).await;
    }
    tracing::info!("ended");
    handed_over
}

async fn end_plugin(machinery: &Arc<Machinery>, hands_over: bool, limit: Duration) {
    let (name, what) = (&machinery.name, if hands_over { "hand_over" } else { "shutdown" });
    let called = machinery.call(what, limit, move |machinery, deadline| {
        let handed_over = hands_over.then(|| machinery.instance.hand_over(deadline));
        match handed_over {
            Some(Err(error)) if error.kind() == ErrorKind::Unsupported => {
                machinery.instance.shutdown(deadline)
            }
            Some(handed_over) => handed_over,
            None => machinery.instance.shutdown(deadline),
        }
    });
    let error = match called.await {
        CallResult::Returned(Ok(())) => return,
        CallResult::Returned(Err(error)) => error,
        CallResult::Abandoned(_) => call::timed_out(what, limit),
    };
    tracing::error!(machinery = name, %error, "{what} failed");
}

/// Executes the host's program, which may be a newer one, with the same arguments and the same socket. Returns only if that
/// fails.
pub fn execute_again(program: &Path, next: NextProgram) -> Error {
    if let Err(error) = expect_trusted(program) {
        return error.advice("Start the host again once that is mended: it adopts the runs");
    }
    let failed = |error: &dyn std::fmt::Display| {
        Error::failed(format!("cannot execute {}: {error}", program.display()))
            .advice("Start the host again: it adopts the runs")
    };
    let mut command = machinery::command(program);
    command.args(std::env::args_os().skip(1));
    // The protocol of sd_listen_fds(3). The process keeps its number.
    command.env("LISTEN_PID", std::process::id().to_string()).env("LISTEN_FDS", "1");
    let mapping = FdMapping { parent_fd: next.listener.into(), child_fd: listener::FIRST_INHERITED };
    match command.fd_mappings(vec![mapping]) {
        Ok(command) => {
            // No child is forked, which would get the limit.
            limits::restore_file_limit();
            match next.signals.leave_to_next_program(next.stop) {
                Ok(()) => failed(&command.exec()),
                Err(error) => failed(&error),
            }
        }
        Err(error) => failed(&error),
    }
}
