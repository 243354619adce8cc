//! `chain_*`: blocks, and following them. Every block is final when it is made, so the new, the
//! best and the finalised heads are the same stream.

use std::sync::Arc;

use jsonrpsee::core::RegisterMethodError;
use jsonrpsee::server::PendingSubscriptionSink;
use serde_json::{Value, json};

use super::parameters::{block_number, wrong_block_number};
use super::{Answer, Module, accept, blocking, hex, off_the_loop, send};
use crate::chain::{Chain, QueryError};
use crate::execution::Header;

pub(super) fn register(module: &mut Module) -> Result<(), RegisterMethodError> {
    blocking(module, "chain_getHeader", |chain, parameters| {
        let hash = parameters.block()?;
        absent_is_null(chain.header(hash), header_json)
    })?;
    blocking(module, "chain_getBlock", |chain, parameters| {
        let hash = parameters.block()?;
        let Ok(header) = chain.header(hash) else { return Ok(Value::Null) };
        let body = chain.body(header.number)?.unwrap_or_default();
        let extrinsics: Vec<Value> = body.iter().map(|extrinsic| hex(extrinsic)).collect();
        Ok(json!({
            "block": { "header": header_json(header), "extrinsics": extrinsics },
            "justifications": null,
        }))
    })?;
    blocking(module, "chain_getBlockHash", |chain, parameters| match parameters.optional()? {
        None => Ok(hex(chain.head().hash.as_bytes())),
        Some(Value::Array(numbers)) => {
            numbers.iter().map(|number| block_hash(chain, number)).collect()
        }
        Some(number) => block_hash(chain, &number),
    })?;
    module.register_alias("chain_getHead", "chain_getBlockHash")?;
    module.register_method("chain_getFinalizedHead", |_, chain, _| {
        hex(chain.head().hash.as_bytes())
    })?;
    module.register_alias("chain_getFinalisedHead", "chain_getFinalizedHead")?;

    for (subscribe, notification, unsubscribe) in [
        ("chain_subscribeNewHeads", "chain_newHead", "chain_unsubscribeNewHeads"),
        ("chain_subscribeAllHeads", "chain_allHead", "chain_unsubscribeAllHeads"),
        ("chain_subscribeFinalizedHeads", "chain_finalizedHead", "chain_unsubscribeFinalizedHeads"),
    ] {
        module.register_subscription(
            subscribe,
            notification,
            unsubscribe,
            |_, pending, chain, _| follow_heads(pending, chain),
        )?;
    }
    Ok(())
}

/// The header as Substrate writes it.
fn header_json(header: Header) -> Value {
    serde_json::to_value(header).unwrap_or(Value::Null)
}

fn absent_is_null<T>(found: Result<T, QueryError>, render: impl FnOnce(T) -> Value) -> Answer {
    match found {
        Ok(value) => Ok(render(value)),
        Err(QueryError::UnknownBlock(_)) => Ok(Value::Null),
        Err(failure) => Err(failure.into()),
    }
}

fn block_hash(chain: &Chain, number: &Value) -> Answer {
    let number = block_number(number).ok_or_else(wrong_block_number)?;
    let Ok(number) = u32::try_from(number) else { return Ok(Value::Null) };
    let header = chain.header_at(number)?;
    Ok(header.map_or(Value::Null, |header| hex(header.hash().as_bytes())))
}

/// Sends the head, then every block after it, none left out however slow the reader is.
async fn follow_heads(pending: PendingSubscriptionSink, chain: Arc<Chain>) {
    let mut heads = chain.watch_head();
    let Some(sink) = accept(pending).await else { return };
    let mut next = heads.borrow_and_update().number;
    loop {
        let head = heads.borrow_and_update().number;
        while next <= head {
            let chain = chain.clone();
            let number = next;
            let header = off_the_loop(move || chain.header_at(number)).await;
            let Ok(Ok(Some(header))) = header else {
                tracing::error!(number, "a block below the head cannot be read");
                return;
            };
            if !send(&sink, &header_json(header)).await {
                return;
            }
            next += 1;
        }
        tokio::select! {
            () = sink.closed() => return,
            changed = heads.changed() => if changed.is_err() { return },
        }
    }
}
