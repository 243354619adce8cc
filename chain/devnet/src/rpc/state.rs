//! `state_*`: storage, proofs and runtime calls at any block there ever was.

use std::sync::Arc;

use jsonrpsee::core::RegisterMethodError;
use jsonrpsee::server::PendingSubscriptionSink;
use jsonrpsee::types::{ErrorObjectOwned, Params};
use serde_json::{Value, json};
use sp_core::{H256, OpaqueMetadata};
use sp_state_machine::{Backend, IterArgs, prove_read};
use sp_version::RuntimeVersion;

use super::parameters::Parameters;
use super::{Answer, Module, accept, blocking, code, error, hex, off_the_loop, send};
use crate::chain::{Chain, Head, QueryError};
use crate::execution::State;

/// Keys in one page.
const PAGE_MAX: u64 = 1_000;

pub(super) fn register(module: &mut Module) -> Result<(), RegisterMethodError> {
    register_storage(module)?;
    register_runtime(module)?;
    module.register_subscription(
        "state_subscribeStorage",
        "state_storage",
        "state_unsubscribeStorage",
        |params, pending, chain, _| follow_storage(params, pending, chain),
    )?;
    module.register_subscription(
        "state_subscribeRuntimeVersion",
        "state_runtimeVersion",
        "state_unsubscribeRuntimeVersion",
        |_, pending, chain, _| follow_version(pending, chain),
    )?;
    Ok(())
}

fn register_storage(module: &mut Module) -> Result<(), RegisterMethodError> {
    blocking(module, "state_getStorage", |chain, parameters| {
        let key = parameters.bytes()?;
        value_json(&chain.state(parameters.block()?)?, &key)
    })?;
    module.register_alias("state_getStorageAt", "state_getStorage")?;
    blocking(module, "state_getStorageHash", |chain, parameters| {
        let key = parameters.bytes()?;
        let hash = chain.state(parameters.block()?)?.storage_hash(&key).map_err(unreadable)?;
        Ok(hash.map_or(Value::Null, |hash| hex(hash.as_bytes())))
    })?;
    blocking(module, "state_getStorageSize", |chain, parameters| {
        let key = parameters.bytes()?;
        let value = chain.state(parameters.block()?)?.storage(&key).map_err(unreadable)?;
        Ok(value.map_or(Value::Null, |value| json!(value.len())))
    })?;
    blocking(module, "state_getKeysPaged", |chain, parameters| {
        let prefix = parameters.optional_bytes()?.unwrap_or_default();
        let count = parameters.number("how many keys")?;
        let start = parameters.optional_bytes()?;
        let block = parameters.block()?;
        if count > PAGE_MAX {
            let message = format!("expected at most {PAGE_MAX} keys a page, got {count}");
            return Err(error(code::TOO_MANY, message));
        }
        let state = chain.state(block)?;
        let mut page = IterArgs::default();
        page.prefix = Some(&prefix);
        page.start_at = start.as_deref();
        page.start_at_exclusive = true;
        let keys = state.keys(page).map_err(unreadable)?;
        // `PAGE_MAX` bounds it, so the conversion never saturates.
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        keys.take(count).map(|key| Ok(hex(&key.map_err(unreadable)?))).collect()
    })?;
    blocking(module, "state_queryStorageAt", |chain, parameters| {
        let keys = parameters.keys()?;
        let block = parameters.block()?.unwrap_or_else(|| chain.head().hash);
        let state = chain.state(Some(block))?;
        let changes: Result<Vec<Value>, ErrorObjectOwned> =
            keys.iter().map(|key| Ok(json!([hex(key), value_json(&state, key)?]))).collect();
        Ok(json!([{ "block": block, "changes": changes? }]))
    })?;
    blocking(module, "state_getReadProof", |chain, parameters| {
        let keys = parameters.keys()?;
        let block = parameters.block()?.unwrap_or_else(|| chain.head().hash);
        let proof = prove_read(chain.state(Some(block))?, keys.iter())
            .map_err(|failure| error(code::STATE, failure.to_string()))?;
        let nodes: Vec<Value> = proof.iter_nodes().map(|node| hex(node)).collect();
        Ok(json!({ "at": block, "proof": nodes }))
    })
}

fn register_runtime(module: &mut Module) -> Result<(), RegisterMethodError> {
    blocking(module, "state_call", |chain, parameters| {
        let method = parameters.text("the name of a runtime entry point")?;
        let arguments = parameters.bytes()?;
        Ok(hex(&chain.call(&method, &arguments, parameters.block()?)?))
    })?;
    module.register_alias("state_callAt", "state_call")?;
    blocking(module, "state_getMetadata", |chain, parameters| {
        let metadata: OpaqueMetadata =
            chain.typed_call("Metadata_metadata", &(), parameters.block()?)?;
        Ok(hex(&metadata))
    })?;
    blocking(module, "state_getRuntimeVersion", |chain, parameters| {
        version_json(chain, parameters.block()?)
    })?;
    module.register_alias("chain_getRuntimeVersion", "state_getRuntimeVersion")?;
    Ok(())
}

fn unreadable(failure: impl std::fmt::Display) -> ErrorObjectOwned {
    QueryError::State(failure.to_string()).into()
}

fn value_json(state: &State, key: &[u8]) -> Answer {
    let value = state.storage(key).map_err(unreadable)?;
    Ok(value.map_or(Value::Null, |value| hex(&value)))
}

fn version_json(chain: &Chain, block: Option<H256>) -> Answer {
    let version: RuntimeVersion = chain.typed_call("Core_version", &(), block)?;
    serde_json::to_value(version).map_err(|failure| error(code::STATE, failure.to_string()))
}

/// The version once: it cannot change while this process runs, for the runtime is part of it.
async fn follow_version(pending: PendingSubscriptionSink, chain: Arc<Chain>) {
    match off_the_loop(move || version_json(&chain, None)).await.and_then(|result| result) {
        Ok(version) => {
            let Some(sink) = accept(pending).await else { return };
            if send(&sink, &version).await {
                sink.closed().await;
            }
        }
        Err(failure) => pending.reject(failure).await,
    }
}

/// Sends the values of some keys, and again those that a block changed.
async fn follow_storage(
    params: Params<'static>,
    pending: PendingSubscriptionSink,
    chain: Arc<Chain>,
) {
    let keys: Arc<[Vec<u8>]> = match Parameters::new(&params).keys() {
        Ok(keys) => keys.into(),
        Err(failure) => return pending.reject(failure).await,
    };
    let mut heads = chain.watch_head();
    let Some(sink) = accept(pending).await else { return };
    let mut known: Option<Vec<Value>> = None;
    loop {
        let head = *heads.borrow_and_update();
        let (reader, wanted) = (chain.clone(), keys.clone());
        let values = off_the_loop(move || read_values(&reader, head, &wanted)).await;
        let Ok(Ok(values)) = values else {
            tracing::error!(number = head.number, "the head's state cannot be read");
            return;
        };
        let changes: Vec<Value> = keys
            .iter()
            .zip(&values)
            .enumerate()
            .filter(|(place, (_, value))| {
                known.as_ref().is_none_or(|known| known[*place] != **value)
            })
            .map(|(_, (key, value))| json!([hex(key), value]))
            .collect();
        known = Some(values);
        let message = json!({ "block": head.hash, "changes": changes });
        if !changes.is_empty() && !send(&sink, &message).await {
            return;
        }
        tokio::select! {
            () = sink.closed() => return,
            changed = heads.changed() => if changed.is_err() { return },
        }
    }
}

fn read_values(
    chain: &Chain,
    head: Head,
    keys: &[Vec<u8>],
) -> Result<Vec<Value>, ErrorObjectOwned> {
    let state = chain.state_under(head.state_root)?;
    keys.iter().map(|key| value_json(&state, key)).collect()
}
