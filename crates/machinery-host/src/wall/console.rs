//! The console of a machine in the page: a WebSocket that passes RFB on, and the files of noVNC, which speaks it.
//!
//! ```text
//! page ─▶ noVNC ─▶ WebSocket ─▶ relay ─▶ the machine's console
//!                       └─▶ the page leaves, the run ends, or the wall ends: closed
//! ```

use std::path::Path as FilePath;

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::watch;
use tokio::task::block_in_place;

use super::shared::{Failed, Wall, expect_actions, find};
use crate::manager::console::Console;

/// The size of a page's message. Pasted text is the largest.
const MAX_MESSAGE: usize = 1 << 20;
/// The number of bytes that the host keeps between the page and the machine.
const BUFFER: usize = 64 << 10;

/// Connects the page to the machine's console. Keys and clicks are actions, so the same rules hold.
pub async fn console(
    State(wall): Wall,
    Path(name): Path<String>,
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

/// Passes bytes between the page's messages and a stream.
async fn pass_on(socket: &mut WebSocket, mut stream: DuplexStream) {
    let mut chunk = vec![0; BUFFER];
    loop {
        let passed = tokio::select! {
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => stream.write_all(&bytes).await.is_ok(),
                Some(Ok(Message::Close(_)) | Err(_)) | None => false,
                Some(Ok(_)) => true,
            },
            read = stream.read(&mut chunk) => match read {
                Ok(length) if length > 0 => {
                    let bytes = chunk[..length].to_vec();
                    socket.send(Message::Binary(bytes.into())).await.is_ok()
                }
                _ => false,
            },
        };
        if !passed {
            return;
        }
    }
}

/// Returns a module of noVNC.
pub async fn novnc(State(wall): Wall, Path(file): Path<String>) -> Response {
    let content = block_in_place(|| read_module(&wall.novnc, &file));
    match content {
        Some(content) => ([(CONTENT_TYPE, "text/javascript; charset=utf-8")], content).into_response(),
        None => (StatusCode::NOT_FOUND, "noVNC is not installed, or has no such file\n").into_response(),
    }
}

/// Reads a module below the folder.
fn read_module(folder: &FilePath, file: &str) -> Option<String> {
    let is_plain = |part: &str| {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_part)
    };
    let is_module = file.ends_with(".js") && file.split('/').all(is_plain);
    is_module.then(|| std::fs::read_to_string(folder.join(file)).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_is_a_file_below_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let novnc = folder.path().join("novnc");
        std::fs::create_dir_all(novnc.join("core")).unwrap();
        std::fs::write(folder.path().join("secret.js"), "secret").unwrap();
        std::fs::write(novnc.join("core/rfb.js"), "export default 1").unwrap();
        std::fs::write(novnc.join("core/.hidden.js"), "").unwrap();
        std::fs::write(novnc.join("package.json"), "{}").unwrap();
        assert_eq!(read_module(&novnc, "core/rfb.js").as_deref(), Some("export default 1"));
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
            assert_eq!(read_module(&novnc, wrong), None, "{wrong}");
        }
    }
}
