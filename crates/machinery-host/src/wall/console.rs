//! The console of a machine in the page: a WebSocket that passes RFB on, and the files of noVNC, which speaks it.
//!
//! ```text
//! page ─▶ noVNC ─▶ WebSocket ─▶ relay ─▶ the machine's console
//!                       └─▶ the page leaves or is silent, the run ends, or the wall ends: closed
//! ```

use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use machinery::Error;
use machinery::trust::expect_trusted;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::watch;
use tokio::task::block_in_place;
use tokio::time::{Instant, interval_at, timeout};

use super::shared::{Failed, Wall, expect_actions, find};
use crate::config;
use crate::http::Connection;
use crate::manager::console::Console;

/// The folder of Debian's package `novnc`.
const NOVNC: &str = "/usr/share/novnc";
/// The size of a page's message. Pasted text is the largest.
const MAX_MESSAGE: usize = 1 << 20;
/// The number of bytes that the host keeps between the page and the machine.
const BUFFER: usize = 64 << 10;

/// The time between two questions to the page whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// Connects the page to the machine's console. Keys and clicks are actions, so the same rules hold.
pub async fn console(
    State(wall): Wall,
    Path(name): Path<String>,
    Extension(connection): Extension<Connection>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Failed> {
    expect_actions(&wall)?;
    wall.guard.expect_allowed(&Method::POST, &headers)?;
    let machine = find(&wall, &name)?;
    let opened = wall.manager.console(&machine).await;
    let console = opened.map_err(|reason| Failed::new(StatusCode::CONFLICT, reason))?;
    let lives = wall.lives.clone();
    Ok(upgrade.max_message_size(MAX_MESSAGE).on_upgrade(async move |socket| {
        tracing::info!(machine = name, "console opened on the wall");
        view(socket, console, lives).await;
        tracing::info!(machine = name, "console closed on the wall");
        // The connection counts until here.
        drop(connection);
    }))
}

/// Passes bytes on until the page leaves, the run ends, or the wall ends.
async fn view(mut socket: WebSocket, console: Console, mut lives: watch::Receiver<()>) {
    let (viewer, page) = duplex(BUFFER);
    tokio::select! {
        // A connection that has broken is closed like any other.
        _ = console.relay(viewer) => {}
        () = pass_on(&mut socket, page) => {}
        _ = lives.changed() => {}
    }
    // The page may have left.
    let _ = socket.send(Message::Close(None)).await;
}

/// Passes bytes between the page's messages and a stream, as long as the page answers.
async fn pass_on(socket: &mut WebSocket, mut stream: DuplexStream) {
    let mut chunk = vec![0; BUFFER];
    let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
    let mut is_alive = true;
    loop {
        let passed = tokio::select! {
            message = socket.recv() => {
                // A page that sends anything is there; a browser answers pings by itself.
                is_alive = true;
                match message {
                    Some(Ok(Message::Binary(bytes))) => stream.write_all(&bytes).await.is_ok(),
                    Some(Ok(Message::Close(_)) | Err(_)) | None => false,
                    Some(Ok(_)) => true,
                }
            }
            read = stream.read(&mut chunk) => match read {
                Ok(length) if length > 0 => {
                    let bytes = chunk[..length].to_vec();
                    send(socket, Message::Binary(bytes.into())).await
                }
                _ => false,
            },
            _ = pings.tick() => std::mem::take(&mut is_alive) && send(socket, Message::Ping(Bytes::new())).await,
        };
        if !passed {
            return;
        }
    }
}

/// Sends a message, and reports whether the page has taken it in time.
async fn send(socket: &mut WebSocket, message: Message) -> bool {
    matches!(timeout(PING_INTERVAL, socket.send(message)).await, Ok(Ok(())))
}

/// Returns the folder of noVNC.
pub fn novnc_folder(wall: &config::Wall) -> PathBuf {
    wall.novnc.clone().unwrap_or_else(|| NOVNC.into())
}

/// Returns a module of noVNC.
pub async fn novnc(State(wall): Wall, Path(file): Path<String>) -> Response {
    let content = block_in_place(|| read_module(&wall.novnc, &file));
    match content {
        Ok(Some(content)) => ([(CONTENT_TYPE, "text/javascript; charset=utf-8")], content).into_response(),
        Err(error) => {
            tracing::error!(%error, "noVNC is not used");
            (StatusCode::FORBIDDEN, "noVNC is not used: the host's log has the reason\n").into_response()
        }
        Ok(None) => (StatusCode::NOT_FOUND, "noVNC is not installed, or has no such file\n").into_response(),
    }
}

/// Reads a module below the folder. It runs in the page with the rights of the wall, so the host must trust it.
///
/// # Errors
/// Another user could change the module.
fn read_module(folder: &FilePath, file: &str) -> Result<Option<String>, Error> {
    let is_plain = |part: &str| {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_part)
    };
    let is_module = file.ends_with(".js") && file.split('/').all(is_plain);
    if !is_module {
        return Ok(None);
    }
    Ok(std::fs::read_to_string(expect_trusted(&folder.join(file))?).ok())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::routing::get;
    use hyper::server::conn::http1;
    use hyper_util::rt::TokioIo;
    use hyper_util::service::TowerToHyperService;

    use super::*;

    /// Returns a page's end of a WebSocket, and the machine's end.
    async fn connected() -> (DuplexStream, DuplexStream) {
        let ((machine, of_host), (mut page, server)) = (duplex(BUFFER), duplex(BUFFER));
        let of_host = Arc::new(Mutex::new(Some(of_host)));
        let upgrade = async move |upgrade: WebSocketUpgrade| {
            let stream = of_host.lock().unwrap().take().unwrap();
            upgrade.on_upgrade(async move |mut socket| pass_on(&mut socket, stream).await)
        };
        let service = TowerToHyperService::new(Router::new().route("/", get(upgrade)));
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(server), service).with_upgrades());
        let request = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                       Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        page.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(page.read_u8().await.unwrap());
        }
        (page, machine)
    }

    const PING: [u8; 2] = [0x89, 0];
    const PONG: [u8; 6] = [0x8a, 0x80, 0, 0, 0, 0];

    #[tokio::test(start_paused = true)]
    async fn page_that_answers_no_ping_is_closed_and_another_one_stays() {
        let (mut page, mut machine) = connected().await;
        let begun = Instant::now();
        for _ in 0..5 {
            let mut ping = [0; 2];
            page.read_exact(&mut ping).await.unwrap();
            assert_eq!(ping, PING);
            page.write_all(&PONG).await.unwrap();
        }
        assert_eq!(begun.elapsed(), 5 * PING_INTERVAL);
        page.write_all(&[0x82, 0x81, 0, 0, 0, 0, b'k']).await.unwrap();
        assert_eq!(machine.read_u8().await.unwrap(), b'k');
        // The key is a sign of life, and the next ping is not answered.
        assert_eq!(machine.read(&mut [0]).await.unwrap(), 0, "the place is free");
        assert_eq!(begun.elapsed(), 7 * PING_INTERVAL);
    }

    #[test]
    fn module_is_a_file_below_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let novnc = folder.path().join("novnc");
        std::fs::create_dir_all(novnc.join("core")).unwrap();
        std::fs::write(folder.path().join("secret.js"), "secret").unwrap();
        std::fs::write(novnc.join("core/rfb.js"), "export default 1").unwrap();
        std::fs::write(novnc.join("core/.hidden.js"), "").unwrap();
        std::fs::write(novnc.join("package.json"), "{}").unwrap();
        assert_eq!(read_module(&novnc, "core/rfb.js").unwrap().as_deref(), Some("export default 1"));
        for wrong in [
            "../secret.js",
            "core/../../secret.js",
            "/etc/passwd",
            "core//rfb.js",
            "core/.hidden.js",
            "package.json",
            "core\\rfb.js",
            "core/none.js",
            "",
        ] {
            assert_eq!(read_module(&novnc, wrong).unwrap(), None, "{wrong}");
        }
        // Another user could change them.
        std::fs::set_permissions(novnc.join("core"), Permissions::from_mode(0o777)).unwrap();
        let error = read_module(&novnc, "core/rfb.js").unwrap_err().to_string();
        assert!(error.contains("everybody can write to"), "{error}");
    }
}
