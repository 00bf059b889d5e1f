//! The socket and its protocol.
//!
//! A message is one JSON object a line, both ways. Only the host's user, root and one group may use the socket.
//! A client that floods, never reads or sends garbage harms only itself: connections are counted per process,
//! each has a bounded number of requests and replies, and a write that does not progress ends the connection.
//!
//! | file | content |
//! | --- | --- |
//! | `listener` | binds the socket and accepts connections |
//! | `connection` | one client's connection |
//! | `socket_folder` | makes sockets and their folder where another user can rename them |
//! | `consoles` | the sockets of the machines' consoles |
//! | `dispatch` | from a request to the manager, and back to the reply |
//! | `outbox` | the lines on their way to the client |
//! | `protocol`, `reply` | the two directions of the protocol |
//! | `framing` | reads lines |
//! | `receive` | reads bytes and descriptors |
//! | `limits`, `peers` | how many connections, and whose |

mod connection;
pub mod consoles;
mod dispatch;
mod framing;
#[cfg(test)]
mod fuzz;
mod limits;
pub mod listener;
mod outbox;
pub mod peers;
pub mod protocol;
mod receive;
pub mod reply;
mod socket_folder;
