//! Submitting a call so that it takes effect exactly once.
//!
//! A call is signed once per nonce, and those bytes are offered again after a lost connection or
//! a timeout until a finalised block holds them or their nonce was used by another transaction: the
//! same bytes cannot take effect twice. Only then is the call signed anew.

use std::time::Duration;

use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, Digest, NodeId};
use subxt::config::substrate::{H256, SubstrateConfig, SubstrateExtrinsicParamsBuilder};
use subxt::events::Phase;
use subxt::rpcs::methods::legacy::TransactionStatus;
use subxt::transactions::Payload;
use tokio::time::Instant;

use crate::chain;
use crate::client::{AtBlock, BlockRef, ChainClient, ReadError, answer};
use crate::events::{TrainingEvent, training_events};
use crate::metrics;
use crate::signer::{self, NodeSigner};

/// How long a submission may take in all. A chain with six-second blocks finalises in a minute.
const SUBMISSION_TIMEOUT: Duration = Duration::from_secs(180);
/// How long one offer is watched before the chain is asked what became of it.
const WATCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Between offers of the same bytes.
const RETRY_DELAY: Duration = Duration::from_millis(250);
/// Blocks for which a signature is valid.
const LIFETIME_BLOCKS: u64 = 256;
/// Nonces tried: each failure means that another process used the same key at the same moment.
const NONCES_MAX: u32 = 16;

/// JSON-RPC error codes of Substrate nodes.
mod code {
    pub(super) const INVALID_TRANSACTION: i32 = 1010;
    pub(super) const ALREADY_KNOWN: i32 = 1013;
    pub(super) const PRIORITY_TOO_LOW: i32 = 1014;
    pub(super) const POOL_FULL: i32 = 1016;
}

/// What a submission did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submission {
    /// The call succeeded in this finalised block and caused these events.
    Included { block: BlockRef, events: Vec<TrainingEvent> },
    /// The chain was already as the call would have left it, as of this block: nothing was sent.
    AlreadyDone { block: BlockRef },
}

impl Submission {
    /// The finalised block whose state shows the effect.
    pub fn block(&self) -> BlockRef {
        match self {
            Self::Included { block, .. } | Self::AlreadyDone { block } => *block,
        }
    }

    /// What the call caused; nothing if it was not needed.
    pub fn events(&self) -> &[TrainingEvent] {
        match self {
            Self::Included { events, .. } => events,
            Self::AlreadyDone { .. } => &[],
        }
    }
}

/// Why a submission did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// The chain executed the call and it failed: offering it again would fail again.
    #[error("the chain refused the call in block {block}: {pallet}::{error}")]
    Failed { block: BlockRef, pallet: String, error: String },
    /// The account really lacks the money, as of `at`.
    #[error("account {account} cannot pay for this: it has {free} free at block {at}")]
    MissingMoney { account: NodeId, free: Balance, at: BlockRef },
    /// The account may have the money; this node does not know it yet.
    #[error("the node is behind: it is at block {at}, and block {seen} is final ({reason})")]
    NodeBehind { at: u32, seen: u32, reason: &'static str },
    #[error("the node takes no such transaction: {reason}")]
    Refused { reason: String },
    /// It may still take effect: look at the state before doing it again.
    #[error("no finalised block held the transaction within {} s", waited.as_secs())]
    TimedOut { waited: Duration },
    #[error("another process keeps using this key: {attempts} nonces were taken before ours")]
    KeyInUse { attempts: u32 },
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// A signed transaction.
struct Signed {
    bytes: Vec<u8>,
    hash: H256,
    account: NodeId,
    nonce: u64,
    /// The block it was signed on: it cannot be in an earlier one.
    since: u32,
}

/// What became of one offer.
enum Offer {
    /// In a finalised block, by the node's word.
    Finalized(H256),
    /// Not known, or not possible now: the chain has to be asked.
    Unknown,
    /// The node says that the account cannot pay.
    CannotPay,
    Refused(String),
}

impl ChainClient {
    /// Submits a call and waits until a finalised block holds it.
    pub(crate) async fn submit(
        &self,
        key: &NodeKey,
        call: &impl Payload,
    ) -> Result<Submission, SubmitError> {
        let turn = self.turn(key.node_id());
        let _turn = turn.lock().await;
        let result = self.submit_in_turn(key, call).await;
        metrics::submitted(match &result {
            Ok(_) => "included",
            Err(SubmitError::Failed { .. }) => "failed",
            Err(SubmitError::MissingMoney { .. }) => "missing_money",
            Err(SubmitError::NodeBehind { .. }) => "node_behind",
            Err(SubmitError::Refused { .. }) => "refused",
            Err(SubmitError::TimedOut { .. }) => "timed_out",
            Err(SubmitError::KeyInUse { .. }) => "key_in_use",
            Err(SubmitError::Read(_)) => "unreachable",
        });
        result
    }

    async fn submit_in_turn(
        &self,
        key: &NodeKey,
        call: &impl Payload,
    ) -> Result<Submission, SubmitError> {
        let deadline = Instant::now() + SUBMISSION_TIMEOUT;
        for _ in 0..NONCES_MAX {
            let signed = self.sign(key, call).await?;
            if let Some(block) = self.see_through(&signed, deadline).await? {
                return self.outcome(&signed, block).await;
            }
            tracing::debug!(account = %signed.account, nonce = signed.nonce, "signing anew");
        }
        Err(SubmitError::KeyInUse { attempts: NONCES_MAX })
    }

    async fn sign(&self, key: &NodeKey, call: &impl Payload) -> Result<Signed, SubmitError> {
        let at = self.at_head().await?;
        let account = key.node_id();
        // What waits in the node's pool counts, also what another process put there.
        let chain_account = signer::account(&account);
        let nonce = answer(self.rpc().system_account_next_index(&chain_account)).await?;
        let parameters = SubstrateExtrinsicParamsBuilder::<SubstrateConfig>::new()
            .nonce(nonce)
            .mortal(LIFETIME_BLOCKS)
            .build();
        let mut transactions = at.transactions();
        let signer = NodeSigner(key);
        let signed = answer(transactions.create_signed(call, &signer, parameters)).await?;
        Ok(Signed {
            hash: signed.hash(),
            bytes: signed.into_encoded(),
            account,
            nonce,
            since: self.saw(at.block_number())?,
        })
    }

    /// Offers the transaction until it is in a finalised block, and gives that block; nothing if
    /// its nonce was used by another.
    async fn see_through(
        &self,
        signed: &Signed,
        deadline: Instant,
    ) -> Result<Option<H256>, SubmitError> {
        loop {
            match self.offer(signed).await {
                Offer::Finalized(block) => return Ok(Some(block)),
                Offer::Refused(reason) => return Err(SubmitError::Refused { reason }),
                Offer::CannotPay => return Err(self.why_it_cannot_pay(signed).await?),
                Offer::Unknown => {}
            }
            match self.locate(signed).await {
                Ok(Location::In(block)) => return Ok(Some(block)),
                Ok(Location::Never) => return Ok(None),
                Ok(Location::Nowhere) => {}
                // A lost connection comes back; within the deadline that is not worth an error.
                Err(failure) => tracing::debug!(%failure, "cannot tell where a transaction is"),
            }
            if Instant::now() >= deadline {
                return Err(SubmitError::TimedOut { waited: SUBMISSION_TIMEOUT });
            }
            tokio::time::sleep(RETRY_DELAY).await;
            metrics::resubmitted();
        }
    }

    /// Offers the bytes to the node and watches them for a while.
    async fn offer(&self, signed: &Signed) -> Offer {
        let submitting = self.rpc().author_submit_and_watch_extrinsic(&signed.bytes);
        let mut watch = match tokio::time::timeout(WATCH_TIMEOUT, submitting).await {
            Ok(Ok(watch)) => watch,
            Ok(Err(subxt::rpcs::Error::User(refusal))) => return understand(&refusal),
            Ok(Err(_)) | Err(_) => return Offer::Unknown,
        };
        let until_final = async {
            while let Some(status) = watch.next().await {
                match status {
                    Ok(TransactionStatus::Finalized(block)) => return Offer::Finalized(block),
                    Ok(
                        TransactionStatus::Future
                        | TransactionStatus::Ready
                        | TransactionStatus::Broadcast(_)
                        | TransactionStatus::InBlock(_)
                        | TransactionStatus::Retracted(_),
                    ) => {}
                    Ok(
                        TransactionStatus::FinalityTimeout(_)
                        | TransactionStatus::Usurped(_)
                        | TransactionStatus::Dropped
                        | TransactionStatus::Invalid,
                    )
                    | Err(_) => return Offer::Unknown,
                }
            }
            Offer::Unknown
        };
        tokio::time::timeout(WATCH_TIMEOUT, until_final).await.unwrap_or(Offer::Unknown)
    }

    /// Looks for a transaction in the finalised blocks since it was signed.
    async fn locate(&self, signed: &Signed) -> Result<Location, ReadError> {
        let head = self.finalized_head().await?;
        for number in signed.since..=head.number {
            let hash = answer(self.rpc().chain_get_block_hash(Some(number.into()))).await?;
            let Some(hash) = hash else { break };
            let block = answer(self.rpc().chain_get_block(Some(hash))).await?;
            let holds = block.is_some_and(|details| {
                details.block.extrinsics.iter().any(|extrinsic| extrinsic.0 == signed.bytes)
            });
            if holds {
                return Ok(Location::In(hash));
            }
        }
        let at = self.at(Some(head.hash)).await?;
        let account = signer::account(&signed.account);
        let nonce = answer(at.transactions().account_nonce(&account)).await?;
        let expired = u64::from(head.number) > u64::from(signed.since) + LIFETIME_BLOCKS;
        Ok(if nonce > signed.nonce || expired { Location::Never } else { Location::Nowhere })
    }

    /// Whether the money is missing, or this node merely does not know of it.
    async fn why_it_cannot_pay(&self, signed: &Signed) -> Result<SubmitError, ReadError> {
        let health = answer(self.rpc().system_health()).await?;
        let seen = self.highest_seen();
        let at = self.finalized_head().await?;
        if at.number < seen {
            let reason = "this client has seen a later block";
            return Ok(SubmitError::NodeBehind { at: at.number, seen, reason });
        }
        if health.is_syncing {
            let reason = "it says that it is syncing";
            return Ok(SubmitError::NodeBehind { at: at.number, seen, reason });
        }
        let state = self.state_at(&at.hash).await?;
        let free = state.balance(&signed.account).await?.free;
        Ok(SubmitError::MissingMoney { account: signed.account, free, at })
    }

    /// What the transaction did in its block.
    async fn outcome(&self, signed: &Signed, hash: H256) -> Result<Submission, SubmitError> {
        let at = self.at(Some(Digest::new(hash.0))).await?;
        let block = BlockRef { number: self.saw(at.block_number())?, hash: Digest::new(hash.0) };
        let phase = phase_of(&at, signed).await?;
        let records = answer(at.events().fetch()).await?;
        for record in records.iter() {
            let record = record.map_err(|failure| undecodable(&failure))?;
            if record.phase() == phase && record.is::<chain::system::events::ExtrinsicFailed>() {
                let metadata = at.metadata();
                return Err(failure_in(block, record.field_bytes(), metadata));
            }
        }
        let events = training_events(&at, |of| of == phase).await?;
        Ok(Submission::Included { block, events })
    }
}

/// Where a signed transaction is.
enum Location {
    /// In this finalised block.
    In(H256),
    /// Its nonce was used by another, or its lifetime is over: no block can hold it any more.
    Never,
    /// In no finalised block yet.
    Nowhere,
}

/// The place of a transaction in its block.
async fn phase_of(at: &AtBlock, signed: &Signed) -> Result<Phase, ReadError> {
    let extrinsics = answer(at.extrinsics().fetch()).await?;
    for extrinsic in extrinsics.iter() {
        let extrinsic = extrinsic.map_err(|failure| undecodable(&failure))?;
        if extrinsic.hash() == signed.hash {
            let index = u32::try_from(extrinsic.index()).unwrap_or(u32::MAX);
            return Ok(Phase::ApplyExtrinsic(index));
        }
    }
    Err(ReadError::Undecodable {
        what: "a block",
        reason: format!("it does not hold the transaction {:#x} that it should", signed.hash),
    })
}

fn undecodable(reason: &impl std::fmt::Display) -> ReadError {
    ReadError::Undecodable { what: "a block", reason: reason.to_string() }
}

/// A failed call, by the names of the pallet and of its error.
fn failure_in(
    block: BlockRef,
    bytes: &[u8],
    metadata: subxt::metadata::ArcMetadata,
) -> SubmitError {
    use subxt::error::DispatchError;
    let (pallet, error) = match DispatchError::decode_from(bytes, metadata) {
        Ok(DispatchError::Module(error)) => {
            let text = error.details_string();
            let (pallet, error) = text.split_once("::").unwrap_or(("Runtime", &text));
            (pallet.to_owned(), error.to_owned())
        }
        Ok(other) => ("Runtime".to_owned(), format!("{other:?}")),
        Err(failure) => {
            ("Runtime".to_owned(), format!("an error that does not decode ({failure})"))
        }
    };
    SubmitError::Failed { block, pallet, error }
}

/// What a node's refusal means. The words are those of `InvalidTransaction` in sp-runtime.
fn understand(refusal: &subxt::rpcs::UserError) -> Offer {
    let detail = refusal.data.as_ref().map(|data| data.get().to_owned()).unwrap_or_default();
    match refusal.code {
        code::ALREADY_KNOWN | code::PRIORITY_TOO_LOW | code::POOL_FULL => Offer::Unknown,
        code::INVALID_TRANSACTION if detail.contains("pay some fees") => Offer::CannotPay,
        // The nonce was used, by these very bytes or by others; the lifetime is over; blocks are
        // full. In all three the finalised blocks tell what became of it.
        code::INVALID_TRANSACTION
            if ["outdated", "ancient birth block", "exhaust the resources"]
                .iter()
                .any(|reason| detail.contains(reason)) =>
        {
            Offer::Unknown
        }
        _ => Offer::Refused(format!("{refusal} {detail}")),
    }
}

#[cfg(test)]
mod tests {
    use subxt::rpcs::UserError;

    use super::*;

    /// A refusal as a node words it.
    fn refusal(code: i32, detail: &str) -> UserError {
        let json = format!(r#"{{"code": {code}, "message": "Invalid", "data": "{detail}"}}"#);
        serde_json::from_str(&json).expect("an error object")
    }

    #[test]
    fn a_refusal_is_taken_for_what_it_is() {
        let unpaid = "Inability to pay some fees (e.g. account balance too low)";
        assert!(matches!(understand(&refusal(1010, unpaid)), Offer::CannotPay));
        let forged = understand(&refusal(1010, "Transaction has a bad signature"));
        assert!(matches!(forged, Offer::Refused(reason) if reason.contains("bad signature")));
        // These say nothing about what became of the transaction.
        for (code, detail) in [
            (1010, "Transaction is outdated"),
            (1010, "Transaction has an ancient birth block"),
            (1013, ""),
            (1014, ""),
            (1016, ""),
        ] {
            assert!(
                matches!(understand(&refusal(code, detail)), Offer::Unknown),
                "{code} {detail}"
            );
        }
    }
}
