//! The HTTP server of the exporter and of the wall: accepts connections, and limits them.
//!
//! ```text
//! accept ─▶ permit ─▶ head, in time ─▶ router ─▶ reply ─▶ next head, or the end
//!             │            └─▶ too slow or too large: closed
//!             └─▶ none is free: the oldest stranger is closed, or the connection waits
//! ```
//!
//! A connection is a stranger until its router [keeps](Connection::keep) it. So strangers never exclude anybody for longer
//! than it takes to connect. A server whose connections have a time closes nobody earlier.
//!
//! A client can neither change anything by its pace nor delay the host. Dropping the server ends all connections, so a
//! reload does.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::serve::Listener;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

/// The size of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// The time that a client has to send a head. A connection that is kept for further requests is idle no longer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The time without any progress after which a client is taken for one that does not read its reply.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

/// The limits of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The number of connections that are served at a time.
    pub connections: usize,
    /// The time of a connection, from its begin to the last byte of the reply. A server without it keeps connections for
    /// further requests.
    pub connection_timeout: Option<Duration>,
}

/// A connection, which each of its requests has as an extension. It counts as long as a value of it exists.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Known>);

#[derive(Debug)]
struct Known {
    is_kept: AtomicBool,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// Keeps the connection while others come: its client is no stranger.
    pub fn keep(&self) {
        self.0.is_kept.store(true, Ordering::Relaxed);
    }

    fn is_kept(&self) -> bool {
        self.0.is_kept.load(Ordering::Relaxed)
    }
}

/// The connections that may be strangers, the oldest first.
#[derive(Default)]
struct Strangers(VecDeque<(Weak<Known>, AbortHandle)>);

impl Strangers {
    fn close_oldest(&mut self) {
        self.forget_others();
        if let Some((_, stranger)) = self.0.pop_front() {
            stranger.abort();
        }
    }

    fn add(&mut self, connection: Weak<Known>, task: AbortHandle) {
        self.forget_others();
        self.0.push_back((connection, task));
    }

    /// Forgets the connections that are kept, or have ended.
    fn forget_others(&mut self) {
        self.0.retain(|(known, _)| known.upgrade().is_some_and(|known| !Connection(known).is_kept()));
    }
}

/// Serves these routes until it is dropped.
pub async fn serve<L: Listener>(mut listener: L, router: &Router, limits: Limits) {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let (mut connections, mut strangers) = (JoinSet::new(), Strangers::default());
    loop {
        let (io, _) = listener.accept().await;
        while connections.try_join_next().is_some() {}
        if permits.available_permits() == 0 {
            strangers.close_oldest();
        }
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let known = Arc::new(Known { is_kept: AtomicBool::new(false), _permit: permit });
        let weak = Arc::downgrade(&known);
        let task = connections.spawn(answer(io, router.clone(), limits, Connection(known)));
        if limits.connection_timeout.is_none() {
            strangers.add(weak, task);
        }
    }
}

/// Answers the requests of a connection, and closes it.
async fn answer<I>(io: I, router: Router, limits: Limits, connection: Connection)
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + 'static,
{
    let mut io = Box::pin(TimeoutStream::new(io));
    io.as_mut().set_write_timeout_pinned(Some(WRITE_TIMEOUT));
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(connection.clone());
        router.call(request)
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(limits.connection_timeout.is_none())
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    let served = match limits.connection_timeout {
        Some(limit) => timeout(limit, served).await,
        None => Ok(served.await),
    };
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client was refused"),
        Err(_) => tracing::debug!("a client was too slow"),
    }
}

#[cfg(test)]
mod tests {
    use axum::Extension;
    use axum::body::Body;
    use axum::routing::get;
    use futures_util::stream::repeat_with;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::sync::mpsc;

    use super::*;

    /// Accepts connections in memory.
    struct InMemory(mpsc::UnboundedReceiver<DuplexStream>);

    impl Listener for InMemory {
        type Io = DuplexStream;
        type Addr = ();

        async fn accept(&mut self) -> (DuplexStream, ()) {
            match self.0.recv().await {
                Some(stream) => (stream, ()),
                None => std::future::pending().await,
            }
        }

        fn local_addr(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Starts a server with a short and an endless reply, and returns what connects to it.
    fn server(limits: Limits) -> (impl Fn() -> DuplexStream, tokio::task::JoinHandle<()>) {
        let endless =
            || async { Body::from_stream(repeat_with(|| Ok::<_, std::io::Error>(vec![0_u8; 1000]))) };
        let keep = |Extension(connection): Extension<Connection>| async move {
            connection.keep();
            "kept"
        };
        let router = Router::new()
            .route("/", get(|| async { "short" }))
            .route("/keep", get(keep))
            .route("/endless", get(endless));
        let (sender, receiver) = mpsc::unbounded_channel();
        let server = tokio::spawn(async move { serve(InMemory(receiver), &router, limits).await });
        let connect = move || {
            let (client, stream) = duplex(1 << 10);
            sender.send(stream).unwrap();
            client
        };
        (connect, server)
    }

    const ONE: Limits = Limits { connections: 1, connection_timeout: None };

    /// Sends the beginning of a request, and returns everything until the server closes.
    async fn exchange(client: &mut DuplexStream, request: &str) -> String {
        // The server may have closed.
        let _ = client.write_all(request.as_bytes()).await;
        let mut reply = Vec::new();
        let _ = client.read_to_end(&mut reply).await;
        String::from_utf8_lossy(&reply).into_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn connection_is_closed_when_its_client_does_not_send() {
        let (connect, _server) = server(ONE);
        for request in ["", "GET / HTTP/1.1\r\nHost:", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"] {
            let reply = exchange(&mut connect(), request).await;
            assert_eq!(reply.contains("short"), request.ends_with("\r\n\r\n"), "{reply}");
        }
        assert!(!exchange(&mut connect(), &"x".repeat(4 * MAX_HEAD)).await.contains("200"));
    }

    #[tokio::test(start_paused = true)]
    async fn connection_is_closed_when_its_client_does_not_read() {
        let (connect, _server) = server(ONE);
        let mut deaf = connect();
        deaf.write_all(b"GET /keep HTTP/1.1\r\nHost: x\r\n\r\nGET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        // The second client waits for the permit of the first.
        let reply = exchange(&mut connect(), "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(reply.ends_with("short"), "{reply}");
    }

    #[tokio::test(start_paused = true)]
    async fn stranger_is_closed_when_another_client_connects_and_a_known_one_is_kept() {
        let (connect, _server) = server(ONE);
        let [mut stranger, mut known] = [connect(), connect()];
        let begun = tokio::time::Instant::now();
        let mut reply = [0; 512];
        known.write_all(b"GET /keep HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let length = known.read(&mut reply).await.unwrap();
        assert!(String::from_utf8_lossy(&reply[..length]).contains("kept"));
        assert_eq!((stranger.read(&mut reply).await.unwrap(), begun.elapsed()), (0, Duration::ZERO));
        let mut next = connect();
        let reply = exchange(&mut next, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert!(reply.ends_with("short") && begun.elapsed() >= HEAD_TIMEOUT, "{reply} {:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn connection_ends_with_its_time_and_with_the_server() {
        let limits = Limits { connection_timeout: Some(Duration::from_secs(10)), ..ONE };
        let (connect, running) = server(limits);
        let mut reader = connect();
        let begun = tokio::time::Instant::now();
        reader.write_all(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut chunk = [0; 1000];
        while reader.read(&mut chunk).await.unwrap() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(begun.elapsed() < Duration::from_secs(11), "{:?}", begun.elapsed());
        let mut left = connect();
        running.abort();
        assert_eq!(exchange(&mut left, "GET / HTTP/1.1\r\n").await, "");
    }
}
