//! The endpoint `GET /metrics`. It answers one request for each connection, and nothing else.
//!
//! A client can neither change anything nor delay the host: connections, their time and the size of a request are limited.
//! Further connections wait in the kernel.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::page::{Format, Page};

/// The number of connections that are served at a time.
const MAX_CONNECTIONS: usize = 16;
/// The time of a connection, from its begin to the last byte of the reply.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// The size of a request's head.
const MAX_HEAD: usize = 16 << 10;
/// The pause after a connection could not be accepted.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Serves the metrics at that address, until it is dropped.
pub async fn serve(address: SocketAddr, page: &Arc<Page>) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%address, %error, "the metrics are not served: correct `metrics_listen`, or end the program that uses the port, and reload");
            return pending().await;
        }
    };
    let address = listener.local_addr().unwrap_or(address);
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "the metrics have the names of machines, and other computers can read them");
    }
    tracing::info!(%address, "metrics are served");
    accept(&listener, page).await
}

async fn accept(listener: &TcpListener, page: &Arc<Page>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this future, so that a reload ends all connections.
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => drop(connections.spawn(answer(stream, Arc::clone(page), permit))),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for the metrics");
                sleep(ACCEPT_RETRY_INTERVAL).await;
            }
        }
    }
}

/// Answers the request of a connection, and closes it.
async fn answer(stream: TcpStream, page: Arc<Page>, _permit: OwnedSemaphorePermit) {
    let service = service_fn(|request| {
        let page = Arc::clone(&page);
        async move { Ok::<_, Infallible>(response(&request, &page)) }
    });
    let mut builder = http1::Builder::new();
    let served =
        builder.keep_alive(false).max_buf_size(MAX_HEAD).serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client of the metrics was refused"),
        Err(_) => tracing::debug!("a client of the metrics was too slow"),
    }
}

fn response(request: &Request<Incoming>, page: &Page) -> Response<Full<Bytes>> {
    let text = |status, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return text(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is allowed\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    let format = wanted(request.headers());
    let mut response = Response::new(Full::from(page.text(format)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    response
}

/// Returns OpenMetrics for a client that accepts it, and the older text format for all others.
fn wanted(headers: &HeaderMap) -> Format {
    let mut accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    match accepted.any(|value| value.contains("application/openmetrics-text")) {
        true => Format::OpenMetrics,
        false => Format::Prometheus,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_is_openmetrics_when_the_client_accepts_it() {
        let wanted_by =
            |value: &'static str| wanted(&HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(value))]));
        assert_eq!(
            wanted_by("application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"),
            Format::OpenMetrics
        );
        assert_eq!(wanted_by("text/plain;version=0.0.4"), Format::Prometheus);
        assert_eq!(wanted(&HeaderMap::new()), Format::Prometheus);
    }
}
