//! The live page: what the run does now, for whoever sits at this machine. Read-only, loopback only,
//! one self-contained file.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use manyhands_proto::Digest;
use manyhands_rules::coordinator::Status;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use crate::context::{Context, SeenBlock};
use crate::driver::{Observed, Work};
use crate::metrics;

const PAGE: &str = include_str!("page.html");

/// Everything is in the page itself; it may ask nobody but this server, and nobody may frame it.
const CONTENT_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
     connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Why the page is not served.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    #[error("the live page is for this machine only: expected a loopback address, got {got}")]
    NotLoopback { got: IpAddr },
    #[error(
        "cannot serve the live page at {address}: {source}; choose another port or stop what uses it"
    )]
    Listen { address: SocketAddr, source: io::Error },
}

/// The run, its chain, and what does not work now.
#[derive(Debug, Clone, Serialize)]
pub struct LiveStatus {
    pub run: Status,
    /// What the run's clock, which stands while no coordinator runs, is behind the time of day.
    pub clock_behind_ms: u64,
    /// Real parameters of the model.
    pub parameters: u64,
    /// None in a run without a chain.
    pub chain: Option<ChainStatus>,
    /// What is being tried again, and why it does not work.
    pub problems: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Serialize)]
pub struct ChainStatus {
    pub url: String,
    pub genesis: Digest,
    /// The newest finalised blocks, oldest first.
    pub blocks: Vec<SeenBlock>,
}

/// The page's server; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct LivePage {
    address: SocketAddr,
    server: AbortHandle,
}

impl LivePage {
    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

impl Drop for LivePage {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[derive(Clone)]
struct Source {
    work: mpsc::Sender<Work>,
    context: Arc<Context>,
}

pub(crate) async fn serve(
    address: SocketAddr,
    work: mpsc::Sender<Work>,
    context: Arc<Context>,
) -> Result<LivePage, PageError> {
    if !address.ip().is_loopback() {
        return Err(PageError::NotLoopback { got: address.ip() });
    }
    let listen_error = |source| PageError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    // Installed before the first thing is counted.
    metrics::prometheus();
    let router = Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/status.json", get(status_json))
        .route("/metrics", get(metrics_text))
        .layer(middleware::from_fn(guard))
        .with_state(Source { work, context });
    let serving = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the live page is not served any more");
        }
    });
    Ok(LivePage { address, server: serving.abort_handle() })
}

/// Asks the driver for the status; none if it has stopped.
pub(crate) async fn live_status(
    work: &mpsc::Sender<Work>,
    context: &Context,
) -> Option<LiveStatus> {
    let (asker, answer) = oneshot::channel();
    work.send(Work::Query(asker)).await.ok()?;
    let Observed { status: run, behind_ms } = answer.await.ok()?;
    let chain = context.chain.as_ref().map(|chain| ChainStatus {
        url: chain.url().to_owned(),
        genesis: chain.genesis_hash(),
        blocks: context.notes.blocks(),
    });
    let parameters = context.layout.parameter_count().0;
    let problems = context.notes.problems();
    Some(LiveStatus { run, clock_behind_ms: behind_ms, parameters, chain, problems })
}

async fn status_json(State(source): State<Source>) -> Response {
    match live_status(&source.work, &source.context).await {
        Some(status) => Json(status).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the coordinator has stopped").into_response(),
    }
}

async fn metrics_text() -> Response {
    match metrics::prometheus() {
        Some(handle) => {
            handle.run_upkeep();
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], handle.render()).into_response()
        }
        None => (StatusCode::NOT_FOUND, "metrics are recorded elsewhere").into_response(),
    }
}

/// A web site that makes a browser resolve its own name to this machine must not read the page.
async fn guard(request: Request, next: Next) -> Response {
    if !is_for_this_machine(request.headers()) {
        return (StatusCode::FORBIDDEN, "ask for it by a loopback address").into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn is_for_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST).and_then(|host| host.to_str().ok()) else {
        return false;
    };
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_are_answered() {
        let allowed = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).expect("a header"));
            is_for_this_machine(&headers)
        };
        for host in
            ["127.0.0.1:8080", "127.0.0.1", "localhost:8080", "localhost", "[::1]:80", "[::1]"]
        {
            assert!(allowed(host), "{host}");
        }
        for host in ["evil.example", "evil.example:8080", "192.0.2.1", "localhost.evil.example"] {
            assert!(!allowed(host), "{host}");
        }
        assert!(!is_for_this_machine(&HeaderMap::new()));
    }
}
