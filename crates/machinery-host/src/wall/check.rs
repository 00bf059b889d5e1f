//! The checks of the wall and the exporter that need no running host.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use machinery::trust::expect_trusted;
use machinery::{Error, Report, Result};

use super::console::novnc_folder;
use super::token::{Token, token_file};
use crate::config::{Config, Listen, Wall};
use crate::cwd::Cwd;
use crate::server::listener::expect_replaceable;
use crate::server::peers::Peers;

/// Checks the addresses, the socket and the token. A port may be in use by the host that serves.
pub fn check(config: &Config, cwd: &Cwd, report: &mut Report) {
    let (wall, metrics) = (&config.wall, config.export.listen);
    if let Some(address) = metrics {
        report.keep(expect_own("metrics_listen", address));
    }
    match &wall.listen {
        None if wall.actions || !wall.origins.is_empty() => {
            report.warning("`web_actions` and `web_origins` have no effect without `web_listen`");
        }
        None => {}
        Some(Listen::Socket(path)) => drop(report.keep(expect_replaceable(path))),
        Some(Listen::Address(address)) => {
            if metrics == Some(*address) && address.port() != 0 {
                let reason = format!("`web_listen` and `metrics_listen` are both {address}");
                report.problem(&Error::configuration(reason).advice("Give each a port of its own"));
            }
            report.keep(expect_own("web_listen", *address));
            let file = token_file(wall, cwd);
            if file.symlink_metadata().is_ok() {
                report.keep(Token::read(&file));
            }
        }
    }
    if let Some(listen) = &wall.listen {
        check_later(wall, listen, report);
    }
}

/// Checks what may be there later than the host: a host serves without a wall that fails.
fn check_later(wall: &Wall, listen: &Listen, report: &mut Report) {
    let mut places: Vec<(&str, &Path)> =
        wall.token_file.iter().map(|file| ("web_token_file", file.as_path())).collect();
    if let Listen::Socket(path) = listen {
        places.push(("web_listen", path));
        if let Err(error) = Peers::of("web_socket_group", wall.socket_group.as_deref()) {
            report.warning(format!("the wall is not served: {error}"));
        }
    }
    for (key, path) in places {
        if path.parent().is_some_and(|folder| !folder.is_dir()) {
            report.warning(format!(
                "the folder of '{}' ({key}) does not exist, so the wall is not served: create it, or correct the path. The \
                 unit for systemd makes /run/cuckoo-machinery when it starts",
                path.display()
            ));
        }
    }
    let folder = novnc_folder(wall);
    if let Err(error) = expect_trusted(&folder) {
        report.warning(format!("the wall has no consoles: {error}"));
    } else if wall.novnc.is_some() && !folder.is_dir() {
        report.warning(format!(
            "the wall has no consoles: the folder {} (web_novnc) does not exist",
            folder.display()
        ));
    }
}

/// Expects that the address is one of this computer.
fn expect_own(key: &str, address: SocketAddr) -> Result<()> {
    match TcpListener::bind((address.ip(), 0)) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            let reason = format!("`{key}` is {address}, which is no address of this computer");
            Err(Error::environment(reason).advice("Use one of this computer, such as 127.0.0.1"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::actions::lab::configuration;

    /// Returns the findings for these keys. `%` is a folder with a file `open`, which everybody can read.
    fn findings(keys: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let open = folder.path().join("open");
        fs::write(&open, "a-token-of-the-operators-own-12345\n").unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o644)).unwrap();
        let config = configuration(&folder, &keys.replace('%', &folder.path().to_string_lossy()));
        let mut report = Report::default();
        check(&config, &Cwd::find(Some(folder.path())).unwrap(), &mut report);
        report.findings().iter().map(|finding| format!("{finding:?}\n")).collect()
    }

    #[test]
    fn wall_that_can_be_served_has_no_finding() {
        for keys in ["", "web_listen: 127.0.0.1:0", "web_listen: '[::]:8899'", "web_listen: %/new.sock"] {
            assert_eq!(findings(keys), "", "{keys}");
        }
        // The system chooses another port for each.
        assert_eq!(findings("web_listen: 127.0.0.1:0\nmetrics_listen: 127.0.0.1:0"), "");
    }

    #[test]
    fn wall_that_cannot_be_served_is_a_problem_with_its_reason() {
        for (keys, reason) in [
            ("web_listen: 127.0.0.1:8899\nmetrics_listen: 127.0.0.1:8899", "are both 127.0.0.1:8899"),
            ("web_listen: 192.0.2.1:8899", "`web_listen` is 192.0.2.1:8899, which is no address of this"),
            ("metrics_listen: 192.0.2.1:1", "`metrics_listen` is 192.0.2.1:1"),
            ("web_listen: %/open", "is no socket"),
            ("web_listen: 127.0.0.1:0\nweb_token_file: %/open", "other users could read"),
            ("web_actions: true", "no effect without `web_listen`"),
            ("web_listen: %/none/new.sock", "new.sock' (web_listen) does not exist"),
            (
                "web_listen: 127.0.0.1:0\nweb_token_file: %/none/token",
                "token' (web_token_file) does not exist",
            ),
            ("web_listen: 127.0.0.1:0\nweb_novnc: %/none", "none (web_novnc) does not exist"),
            ("web_listen: %/new.sock\nweb_socket_group: no-such-group", "names as `web_socket_group`"),
        ] {
            assert!(findings(keys).contains(reason), "{keys}: {}", findings(keys));
        }
    }
}
