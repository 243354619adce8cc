//! Making blocks: when, and out of what.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use codec::Encode;
use manyhands_chain_runtime::UncheckedExtrinsic;
use sp_core::H256;
use sp_inherents::InherentData;
use sp_runtime::traits::Header as _;
use sp_runtime::transaction_validity::{InvalidTransaction, TransactionValidityError};
use sp_runtime::{ApplyExtrinsicResult, Digest, ExtrinsicInclusionMode};
use sp_timestamp::{INHERENT_IDENTIFIER, Timestamp};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use crate::chain::{Chain, Head};
use crate::execution::{CallError, Execution, Header, StateChange};
use crate::metrics;
use crate::pool::{BlockOutcome, Transaction};
use crate::store::{NewBlock, StoreError};

/// Why no block was made.
#[derive(Debug, thiserror::Error)]
enum SealError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Runtime(#[from] CallError),
    #[error(
        "the runtime put the state root {in_header:#x} into the header, expected {computed:#x}"
    )]
    StateRoot { in_header: H256, computed: H256 },
}

/// Seals a block whenever a transaction is ready and, regardless, once per `block_time_ms`.
/// Ends when told to, or with the reason when the disk fails: a chain that cannot write must not
/// pretend to go on.
pub(crate) async fn run(
    chain: Arc<Chain>,
    block_time_ms: NonZeroU64,
    mut stop: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    let mut timer = tokio::time::interval(Duration::from_millis(block_time_ms.get()));
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
            () = chain.transaction_ready.notified() => {}
            _ = timer.tick() => {}
        }
        let sealer = chain.clone();
        match tokio::task::spawn_blocking(move || seal(&sealer)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                metrics::block_failed();
                tracing::error!(%error, "no more blocks can be written");
                return Err(error);
            }
            // The runtime's panics are caught where it is called, so this one is ours.
            Err(failure) => match failure.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The whole process is being shut down.
                Err(_) => return Ok(()),
            },
        }
    }
}

/// Makes one block of what is ready. If the runtime cannot close a block with these transactions,
/// they are thrown out: one of them broke it, and the next block must not meet it again.
fn seal(chain: &Chain) -> Result<(), StoreError> {
    let candidates = chain.ready();
    match try_seal(chain, &candidates) {
        Ok(()) => Ok(()),
        Err(SealError::Store(error)) => Err(error),
        Err(error @ (SealError::Runtime(_) | SealError::StateRoot { .. })) => {
            metrics::block_failed();
            tracing::error!(%error, transactions = candidates.len(), "a block was given up");
            chain.discard(candidates.iter().map(|transaction| transaction.hash).collect());
            Ok(())
        }
    }
}

fn try_seal(chain: &Chain, candidates: &[Arc<Transaction>]) -> Result<(), SealError> {
    let parent = chain.head();
    let state = chain.state_under(parent.state_root)?;
    let Sealed { header, extrinsics, change, outcome } =
        build(Execution::new(&state), parent, candidates)?;
    if header.state_root != change.root {
        return Err(SealError::StateRoot { in_header: header.state_root, computed: change.root });
    }
    let hash = header.hash();
    let block = NewBlock { header: &header, hash, extrinsics: &extrinsics, nodes: &change.nodes };
    chain.append(&block, &outcome)?;
    tracing::debug!(
        number = header.number,
        block = ?hash,
        transactions = outcome.included.len(),
        refused = outcome.invalid.len(),
        "sealed"
    );
    if !outcome.included.is_empty() && !chain.ready().is_empty() {
        // This block was full.
        chain.transaction_ready.notify_one();
    }
    Ok(())
}

struct Sealed {
    header: Header,
    extrinsics: Vec<Vec<u8>>,
    change: StateChange,
    outcome: BlockOutcome,
}

fn build(
    mut execution: Execution<'_>,
    parent: Head,
    candidates: &[Arc<Transaction>],
) -> Result<Sealed, CallError> {
    // The runtime fills in the two roots when it closes the block.
    let draft =
        Header::new(parent.number + 1, H256::zero(), H256::zero(), parent.hash, Digest::default());
    let mode: ExtrinsicInclusionMode = execution.typed("Core_initialize_block", &draft)?;
    let mut extrinsics = apply_inherents(&mut execution)?;
    let mut outcome = BlockOutcome::default();
    if mode == ExtrinsicInclusionMode::AllExtrinsics {
        apply_transactions(&mut execution, candidates, &mut extrinsics, &mut outcome);
    }
    let header = execution.typed("BlockBuilder_finalize_block", &())?;
    Ok(Sealed { header, extrinsics, change: execution.finish(), outcome })
}

fn apply_inherents(execution: &mut Execution<'_>) -> Result<Vec<Vec<u8>>, CallError> {
    // The only place that reads the wall clock. The runtime moves it on by its minimum period if
    // two blocks fall into one millisecond, or if the clock went back.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let mut data = InherentData::new();
    data.put_data(INHERENT_IDENTIFIER, &Timestamp::new(now_ms))
        .expect("one timestamp, put once, into an empty set");
    let inherents: Vec<UncheckedExtrinsic> =
        execution.typed("BlockBuilder_inherent_extrinsics", &data)?;
    let mut encoded = Vec::with_capacity(inherents.len());
    for inherent in inherents {
        let bytes = inherent.encode();
        let applied: ApplyExtrinsicResult =
            execution.attempt("BlockBuilder_apply_extrinsic", &bytes, Result::is_ok)?;
        match applied {
            Ok(_) => encoded.push(bytes),
            Err(refusal) => {
                tracing::error!(?refusal, "the runtime refused its own inherent extrinsic");
            }
        }
    }
    Ok(encoded)
}

fn apply_transactions(
    execution: &mut Execution<'_>,
    candidates: &[Arc<Transaction>],
    extrinsics: &mut Vec<Vec<u8>>,
    outcome: &mut BlockOutcome,
) {
    for transaction in candidates {
        let applied: Result<ApplyExtrinsicResult, CallError> =
            execution.attempt("BlockBuilder_apply_extrinsic", &transaction.bytes, Result::is_ok);
        match applied {
            Ok(Ok(_)) => {
                extrinsics.push(transaction.bytes.clone());
                outcome.included.push(transaction.hash);
            }
            // Full: the next block takes the rest. Alone in a block it would never fit.
            Ok(Err(TransactionValidityError::Invalid(InvalidTransaction::ExhaustsResources)))
                if !outcome.included.is_empty() => {}
            // It waits for one that did not fit.
            Ok(Err(TransactionValidityError::Invalid(InvalidTransaction::Future)))
                if !outcome.included.is_empty() => {}
            Ok(Err(refusal)) => {
                tracing::debug!(transaction = ?transaction.hash, ?refusal, "refused by the block");
                outcome.invalid.push(transaction.hash);
            }
            Err(error) => {
                tracing::error!(transaction = ?transaction.hash, %error, "thrown out");
                outcome.invalid.push(transaction.hash);
            }
        }
    }
}
