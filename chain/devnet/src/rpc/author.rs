//! `author_*` and `payment_*`: submitting transactions and watching what becomes of them.

use std::sync::Arc;

use codec::Encode;
use jsonrpsee::core::RegisterMethodError;
use jsonrpsee::server::PendingSubscriptionSink;
use jsonrpsee::types::{ErrorObjectOwned, Params};
use pallet_transaction_payment::RuntimeDispatchInfo;
use serde_json::{Value, json};
use sp_runtime::transaction_validity::TransactionValidityError;
use tokio::sync::watch;

use super::parameters::Parameters;
use super::{Module, accept, blocking, code, error, hex, off_the_loop, send};
use crate::chain::{Chain, EXTRINSIC_BYTES_MAX, SubmitError};
use crate::pool::{PoolRefusal, TransactionStatus};

pub(super) fn register(module: &mut Module) -> Result<(), RegisterMethodError> {
    blocking(module, "author_submitExtrinsic", |chain, parameters| {
        let (hash, _) = chain.submit(parameters.bytes()?)?;
        Ok(hex(hash.as_bytes()))
    })?;
    blocking(module, "author_pendingExtrinsics", |chain, _| {
        Ok(chain.pending().iter().map(|transaction| hex(&transaction.bytes)).collect())
    })?;
    module.register_subscription(
        "author_submitAndWatchExtrinsic",
        "author_extrinsicUpdate",
        "author_unwatchExtrinsic",
        |params, pending, chain, _| submit_and_watch(params, pending, chain),
    )?;
    blocking(module, "payment_queryInfo", |chain, parameters| {
        let mut arguments = parameters.bytes()?;
        if arguments.len() > EXTRINSIC_BYTES_MAX {
            return Err(SubmitError::TooLong(arguments.len()).into());
        }
        let block = parameters.block()?;
        let length = u32::try_from(arguments.len()).unwrap_or(u32::MAX);
        length.encode_to(&mut arguments);
        let info = chain.call("TransactionPaymentApi_query_info", &arguments, block)?;
        let info: RuntimeDispatchInfo<u128> = codec::Decode::decode(&mut info.as_slice())
            .map_err(|failure| error(code::STATE, failure.to_string()))?;
        serde_json::to_value(info).map_err(|failure| error(code::STATE, failure.to_string()))
    })?;
    Ok(())
}

async fn submit_and_watch(
    params: Params<'static>,
    pending: PendingSubscriptionSink,
    chain: Arc<Chain>,
) {
    let submitted = off_the_loop(move || {
        let bytes = Parameters::new(&params).bytes()?;
        Ok::<_, ErrorObjectOwned>(chain.submit(bytes)?)
    });
    match submitted.await.and_then(|result| result) {
        Ok((_, watcher)) => follow(pending, watcher).await,
        Err(refusal) => pending.reject(refusal).await,
    }
}

/// Sends every change of a transaction's status until the last.
async fn follow(pending: PendingSubscriptionSink, mut watcher: watch::Receiver<TransactionStatus>) {
    let Some(sink) = accept(pending).await else { return };
    loop {
        let status = watcher.borrow_and_update().clone();
        for message in status_json(&status) {
            if !send(&sink, &message).await {
                return;
            }
        }
        if status.is_final() {
            return;
        }
        tokio::select! {
            () = sink.closed() => return,
            // The pool forgets a transaction only after its last status.
            changed = watcher.changed() => if changed.is_err() { return },
        }
    }
}

/// A status in Substrate's words; a block here is final when it is made, hence two at once.
fn status_json(status: &TransactionStatus) -> Vec<Value> {
    match status {
        TransactionStatus::Future => vec![json!("future")],
        TransactionStatus::Ready => vec![json!("ready")],
        TransactionStatus::Included(block) => {
            vec![json!({ "inBlock": block }), json!({ "finalized": block })]
        }
        TransactionStatus::Usurped(by) => vec![json!({ "usurped": by })],
        TransactionStatus::Invalid => vec![json!("invalid")],
        TransactionStatus::Dropped => vec![json!("dropped")],
    }
}

impl From<SubmitError> for ErrorObjectOwned {
    fn from(failure: SubmitError) -> Self {
        match failure {
            SubmitError::TooLong(_) | SubmitError::Undecodable => {
                error(code::BAD_TRANSACTION, failure.to_string())
            }
            SubmitError::Invalid(TransactionValidityError::Invalid(reason)) => {
                let why: &'static str = reason.into();
                Self::owned(code::INVALID_TRANSACTION, "Invalid Transaction", Some(why))
            }
            SubmitError::Invalid(TransactionValidityError::Unknown(reason)) => {
                let why: &'static str = reason.into();
                Self::owned(code::UNKNOWN_VALIDITY, "Unknown Transaction Validity", Some(why))
            }
            SubmitError::Refused(refusal) => {
                let code = match refusal {
                    PoolRefusal::AlreadyKnown => code::ALREADY_KNOWN,
                    PoolRefusal::PriorityTooLow { .. } => code::PRIORITY_TOO_LOW,
                    PoolRefusal::Full { .. } => code::POOL_FULL,
                };
                error(code, refusal.to_string())
            }
            SubmitError::Query(failure) => failure.into(),
        }
    }
}
