//! The endpoint `GET /metrics`. It answers one request for each connection, and nothing else.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::StatusCode;
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap};
use tokio::net::TcpListener;

use super::page::{Format, Page};
use crate::actions::context::Reloads;
use crate::http::{self, Limits};

const LIMITS: Limits = Limits { connections: 16, connection_timeout: Some(Duration::from_secs(10)) };

/// Serves the metrics at that address, until it is dropped. Each reload is another try where they are not served.
pub async fn serve(address: SocketAddr, page: &Arc<Page>, mut reloads: Reloads) {
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                tracing::error!(%address, %error, "the metrics are not served: correct `metrics_listen`, or end the program that uses the port, and reload")
            }
        }
        reloads.next(|_| true).await;
    };
    let address = listener.local_addr().unwrap_or(address);
    if !address.ip().is_loopback() {
        tracing::warn!(%address, "the metrics have the names of machines, and other computers can read them");
    }
    tracing::info!(%address, "metrics are served");
    http::serve(listener, &router(page), LIMITS).await
}

fn router(page: &Arc<Page>) -> Router {
    let not_allowed =
        || async { (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "GET")], "only GET is allowed\n") };
    Router::new()
        .route("/metrics", get(metrics).fallback(not_allowed))
        .fallback(|| async { (StatusCode::NOT_FOUND, "the metrics are at /metrics\n") })
        .with_state(Arc::clone(page))
}

async fn metrics(State(page): State<Arc<Page>>, headers: HeaderMap) -> Response {
    let format = wanted(&headers);
    ([(CONTENT_TYPE, format.content_type())], page.text(format)).into_response()
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
    use hyper::header::HeaderValue;

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
