//! The console: connections to the screen, keyboard and mouse of a running machine.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use machinery::host::Instance;

use crate::call::Outcome;
use crate::report::{CheckFailure, Result, demand, failed};
use crate::session::Session;

/// The begin of an RFB server's greeting. Source: RFC 6143, 7.1.1.
const GREETING: &[u8] = b"RFB 003.";
/// The length of a greeting.
const GREETING_LENGTH: usize = 12;
/// The time until a connection is closed after the end of the run.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

pub fn console(session: &Session) -> Result {
    let infos = session.call("machines", |instance, _| instance.machines())?;
    let Some(machine) = infos.into_iter().find(|info| info.console).map(|info| info.name) else {
        return Err(CheckFailure::Skipped("no machine has a console".to_owned()));
    };
    is_refused(session, &machine)?;
    session.restore(&machine)?;
    let [mut first, mut second] = [open(session, &machine)?, open(session, &machine)?];
    greets(session, &mut first)?;
    greets(session, &mut second)?;
    drop(second);
    session.is_alive(&machine)?;
    session.stop(&machine)?;
    is_closed(&mut first)?;
    is_refused(session, &machine)
}

/// Calls `console`, and returns the plugin's result.
fn call(session: &Session, machine: &str) -> Result<Outcome<UnixStream>> {
    let name = machine.to_owned();
    let call = move |instance: &Instance, deadline| instance.console(&name, deadline);
    session.try_call(&format!("console of {machine}"), session.timeout(), call)
}

fn open(session: &Session, machine: &str) -> Result<UnixStream> {
    call(session, machine)?.expect_success(&format!("console of {machine}"))
}

/// Demands that a machine that is off has no console.
fn is_refused(session: &Session, machine: &str) -> Result {
    match call(session, machine)? {
        Outcome::Success(_) => Err(CheckFailure::Failed(format!(
            "console of {machine} must fail while the machine is off, but it succeeded"
        ))),
        Outcome::Refusal(error) => {
            demand!(!error.reason().trim().is_empty(), "console of {machine} failed without a reason");
            Ok(())
        }
    }
}

/// Demands that an RFB server greets.
fn greets(session: &Session, viewer: &mut UnixStream) -> Result {
    let mut greeting = [0; GREETING_LENGTH];
    let read =
        viewer.set_read_timeout(Some(session.timeout())).and_then(|()| viewer.read_exact(&mut greeting));
    read.map_err(|error| failed("reading the greeting of the console", &error))?;
    demand!(
        greeting.starts_with(GREETING),
        "the console must greet as an RFB server, but greets with {:?}",
        String::from_utf8_lossy(&greeting)
    );
    Ok(())
}

/// Demands that the end of the run has closed the connection.
fn is_closed(viewer: &mut UnixStream) -> Result {
    let action = "reading the console after the end of the run";
    viewer.set_read_timeout(Some(CLOSE_TIMEOUT)).map_err(|error| failed(action, &error))?;
    match viewer.read_to_end(&mut Vec::new()) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(CheckFailure::Failed("the console is still open after the end of the run".to_owned()))
        }
        Err(error) => Err(failed(action, &error)),
    }
}
