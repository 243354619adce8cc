//! Substrate's JSON-RPC over the chain: the legacy methods that subxt, polkadot.js and others use.

mod author;
mod heads;
mod parameters;
mod state;
mod system;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use jsonrpsee::RpcModule;
use jsonrpsee::core::RegisterMethodError;
use jsonrpsee::server::{
    BatchRequestConfig, PendingSubscriptionSink, PingConfig, Server, ServerConfig, ServerHandle,
    SubscriptionSink,
};
use jsonrpsee::types::ErrorObjectOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::chain::{Chain, QueryError};
use crate::store::StoreError;

/// Bytes of a request: a transaction of the largest size, in hexadecimal, and a little more.
const REQUEST_BYTES_MAX: u32 = 3 << 20;
/// Bytes of an answer: metadata and blocks in hexadecimal.
const RESPONSE_BYTES_MAX: u32 = 16 << 20;
const CONNECTIONS_MAX: u32 = 256;
const SUBSCRIPTIONS_PER_CONNECTION_MAX: u32 = 256;
const BATCH_MAX: u32 = 64;
/// Messages that may wait for a slow reader before its subscriptions are held back.
const MESSAGES_WAITING_MAX: u32 = 128;

/// JSON-RPC error codes as Substrate nodes use them.
mod code {
    pub(super) const BAD_TRANSACTION: i32 = 1001;
    pub(super) const INVALID_TRANSACTION: i32 = 1010;
    pub(super) const UNKNOWN_VALIDITY: i32 = 1011;
    pub(super) const ALREADY_KNOWN: i32 = 1013;
    pub(super) const PRIORITY_TOO_LOW: i32 = 1014;
    pub(super) const POOL_FULL: i32 = 1016;
    pub(super) const CLIENT: i32 = 4003;
    pub(super) const STATE: i32 = 4002;
    pub(super) const TOO_MANY: i32 = 4005;
}

type Answer = Result<Value, ErrorObjectOwned>;
type Module = RpcModule<Chain>;

/// Starts to serve on a bound socket.
pub(crate) fn serve(listener: TcpListener, chain: Arc<Chain>) -> std::io::Result<ServerHandle> {
    let config = ServerConfig::builder()
        .max_request_body_size(REQUEST_BYTES_MAX)
        .max_response_body_size(RESPONSE_BYTES_MAX)
        .max_connections(CONNECTIONS_MAX)
        .max_subscriptions_per_connection(SUBSCRIPTIONS_PER_CONNECTION_MAX)
        .set_batch_request_config(BatchRequestConfig::Limit(BATCH_MAX))
        .set_message_buffer_capacity(MESSAGES_WAITING_MAX)
        // A client that vanished without a word gives its place back after two minutes.
        .enable_ws_ping(
            PingConfig::new()
                .ping_interval(Duration::from_secs(30))
                .inactive_limit(Duration::from_secs(120)),
        )
        .build();
    let server = Server::builder().set_config(config).build_from_tcp(listener)?;
    let module = module(chain).expect("no method is registered twice: every test starts a server");
    Ok(server.start(module))
}

/// What a client should write to reach `address`.
pub(crate) fn url(address: SocketAddr) -> String {
    format!("ws://{address}")
}

fn module(chain: Arc<Chain>) -> Result<Module, RegisterMethodError> {
    let mut module = RpcModule::from_arc(chain);
    system::register(&mut module)?;
    heads::register(&mut module)?;
    state::register(&mut module)?;
    author::register(&mut module)?;
    let mut methods: Vec<&str> = module.method_names().collect();
    methods.push("rpc_methods");
    methods.sort_unstable();
    let methods = json!({ "methods": methods });
    module.register_method("rpc_methods", move |_, _, _| methods.clone())?;
    Ok(module)
}

/// Registers a method that reads the disk or runs the runtime, so away from the event loop.
fn blocking<F>(
    module: &mut Module,
    name: &'static str,
    answer: F,
) -> Result<(), RegisterMethodError>
where
    F: Fn(&Chain, &mut parameters::Parameters<'_>) -> Answer + Clone + Send + Sync + 'static,
{
    module.register_blocking_method(name, move |params, chain, _| {
        answer(&chain, &mut parameters::Parameters::new(&params))
    })?;
    Ok(())
}

fn error(code: i32, message: impl Into<String>) -> ErrorObjectOwned {
    ErrorObjectOwned::owned(code, message, None::<()>)
}

impl From<QueryError> for ErrorObjectOwned {
    fn from(failure: QueryError) -> Self {
        let code = match &failure {
            QueryError::UnknownBlock(_) => code::CLIENT,
            QueryError::Call(_) | QueryError::State(_) | QueryError::Store(_) => code::STATE,
        };
        error(code, failure.to_string())
    }
}

impl From<StoreError> for ErrorObjectOwned {
    fn from(failure: StoreError) -> Self {
        error(code::STATE, failure.to_string())
    }
}

/// `0x` and hexadecimal digits.
fn hex(bytes: &[u8]) -> Value {
    Value::String(format!("0x{}", hex::encode(bytes)))
}

/// Runs `work` where it may block. The chain's own panics are bugs: they fail the call.
async fn off_the_loop<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ErrorObjectOwned> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|failure| error(code::STATE, failure.to_string()))
}

/// Accepts a subscription; nothing if the client is gone already.
async fn accept(pending: PendingSubscriptionSink) -> Option<SubscriptionSink> {
    pending.accept().await.ok()
}

/// Sends one notification; whether the client is still there.
async fn send(sink: &SubscriptionSink, value: &Value) -> bool {
    let Ok(message) = RawValue::from_string(value.to_string()) else { return false };
    sink.send(message).await.is_ok()
}
