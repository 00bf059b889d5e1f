//! Ends the running host, with all machines that it has started.

use std::time::Duration;

use machinery::Result;
use serde_json::{Value, json};

use crate::client::Client;
use crate::cwd::Cwd;
use crate::cwd_lock::wait_for_end_of_host;

/// The time that the process has to end after its last reply: its plugins are shut down.
const END_TIMEOUT: Duration = Duration::from_secs(120);

/// Ends the host, and returns its answer once it has ended.
///
/// # Errors
/// No host answers, or it does not end in time.
pub fn shutdown(cwd: &Cwd) -> Result<Value> {
    let mut client = Client::connect(&cwd.manager_socket())?;
    let answer = client.request(json!({"action": "shutdown"}), |_| ())?;
    if answer["success"] == json!(true) {
        // Its machines end first, each within the timeouts of the configuration.
        client.wait_for_close();
        wait_for_end_of_host(&cwd.state(), END_TIMEOUT)?;
    }
    Ok(answer)
}
