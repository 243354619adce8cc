//! What the machine wants done. Each effect ends with the input that answers it, or with an error that
//! ends the service: trouble with peers or the chain is waited out in here, as long as the effect is
//! wanted.

mod anchor;
mod codec_check;
mod compare;
mod complete;
mod fault;
mod judges;
mod merge;
mod openings;
mod payload;
mod possession;
pub(crate) mod settle;
pub(crate) mod stakes;

use std::sync::Arc;

use manyhands_chain_client::Accusation;
use manyhands_network::data::StoreError;
use manyhands_proto::NodeId;
use manyhands_rules::coordinator::{Effect, Input};
use manyhands_rules::record::FalseEnd;

use crate::context::Context;
use crate::journal::BlobNote;
use crate::store::ReadBlobError;

use settle::RecordFileError;

/// What an effect came to.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) input: Input,
    /// Blobs that it put into the store.
    pub(crate) blobs: Vec<BlobNote>,
}

impl From<Input> for Done {
    fn from(input: Input) -> Self {
        Self { input, blobs: Vec::new() }
    }
}

/// Why the service cannot go on. Nothing that was decided is lost: it is all in the journal.
#[derive(Debug, thiserror::Error)]
pub enum EffectError {
    #[error("cannot store a blob: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Read(#[from] ReadBlobError),
    #[error(transparent)]
    Record(#[from] RecordFileError),
    #[error("round {round} cannot be merged: {reason}")]
    Merge { round: manyhands_proto::Round, reason: String },
    #[error("an effect panicked; this is a bug: {0}")]
    Panicked(String),
}

/// Whose answer an effect waits for, beside the coordinator's and the chain's.
pub(crate) fn peers(effect: &Effect) -> Vec<NodeId> {
    match effect {
        Effect::FetchPayload { worker, .. } => vec![*worker],
        Effect::CheckCodec(check) => vec![check.worker],
        Effect::Compare(order) => vec![order.case.worker(), order.replay.verifier],
        Effect::CheckPossession { .. }
        | Effect::CompareJudges(_)
        | Effect::ReportVerifier { .. }
        | Effect::Merge(_)
        | Effect::CheckStakes { .. }
        | Effect::Anchor { .. }
        | Effect::Settle(_)
        | Effect::ReportFault { .. }
        | Effect::CompleteRun { .. } => Vec::new(),
    }
}

/// For metrics and logs.
pub(crate) const fn name(effect: &Effect) -> &'static str {
    match effect {
        Effect::FetchPayload { .. } => "fetch_payload",
        Effect::CheckCodec(_) => "check_codec",
        Effect::CheckPossession { .. } => "check_possession",
        Effect::Compare(_) => "compare",
        Effect::CompareJudges(_) => "compare_judges",
        Effect::ReportVerifier { .. } => "report_verifier",
        Effect::Merge(_) => "merge",
        Effect::CheckStakes { .. } => "check_stakes",
        Effect::Anchor { .. } => "anchor",
        Effect::Settle(_) => "settle",
        Effect::ReportFault { .. } => "report_fault",
        Effect::CompleteRun { .. } => "complete_run",
    }
}

/// Performs one effect. Dropping the future stops it; performing it again does no harm.
pub(crate) async fn perform(context: Arc<Context>, effect: Effect) -> Result<Done, EffectError> {
    match effect {
        Effect::FetchPayload { round, worker, payload, payload_bytes } => {
            let order = payload::Order { round, worker, payload, payload_bytes };
            payload::fetch(&context, order).await
        }
        Effect::CheckCodec(check) => codec_check::check(&context, check).await,
        Effect::Compare(order) => compare::compare(&context, order).await,
        Effect::CheckPossession { round, worker, theta, proof } => {
            possession::check(context, possession::Claim { round, worker, theta, proof }).await
        }
        Effect::Merge(order) => merge::merge(context, order).await,
        Effect::CheckStakes { round, members } => {
            Ok(stakes::check(&context, round, &members).await.into())
        }
        Effect::Anchor { round, stage, digest } => {
            Ok(anchor::anchor(&context, anchor::Anchored { round, stage, digest }).await.into())
        }
        Effect::Settle(record) => settle::settle(&context, *record).await,
        Effect::ReportFault { round, worker, kind, evidence, shown } => {
            let kind = fault::kind_on_chain(kind);
            let accusation = Accusation::Worker { worker, round, kind };
            let shown = shown.map(|shown| fault::show(&context, round, &shown.to_bytes()));
            let blobs = shown.transpose()?.into_iter().collect();
            let slashed = fault::carry_through(&context, accusation, evidence).await;
            Ok(Done { input: Input::FaultSettled { round, worker, slashed }, blobs })
        }
        Effect::CompareJudges(case) => judges::compare(&context, case).await,
        Effect::ReportVerifier { end, case } => {
            let FalseEnd { round, worker, verifier } = end;
            let accusation = Accusation::Verifier { verifier, worker, round };
            let blobs = vec![fault::show(&context, round, &case.canonical_bytes())?];
            let slashed = fault::carry_through(&context, accusation, case.digest()).await;
            Ok(Done { input: Input::VerifierSettled { end, slashed }, blobs })
        }
        Effect::CompleteRun { theta } => Ok(complete::complete(&context, theta).await.into()),
    }
}

/// Runs what takes long on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EffectError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| EffectError::Panicked(error.to_string()))
}
