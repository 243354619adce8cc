//! Keeping a round's record and committing its rewards on chain.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::{PauseReason, RoundCommitment, RunState, Stage};
use manyhands_chain_client::{ChainClient, ReadError, SubmitError};
use manyhands_network::data::Access;
use manyhands_proto::leaf::{RewardLeaf, merkle_root};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, WorkUnits};
use manyhands_rules::coordinator::Input;
use manyhands_rules::record::{ParseRecordError, RoundRecord};

use super::{Done, EffectError, blocking};
use crate::context::Context;
use crate::files::write_whole;
use crate::journal::{BlobKind, BlobNote};
use crate::retry::Backoff;

/// The chain's refusals that no repetition of the same record changes. Each attempt costs a fee.
const FOR_GOOD: [&str; 3] = ["RewardAbovePrice", "NoLeaves", "NotOwner"];

/// Between attempts at what was refused for good: only a repaired chain or record can help.
const REFUSED_RETRY: Duration = Duration::from_secs(600);

/// Why a record could not be written or read again.
#[derive(Debug, thiserror::Error)]
pub enum RecordFileError {
    #[error("cannot use the record {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the record {} is damaged: {source}", path.display())]
    Damaged { path: PathBuf, source: ParseRecordError },
}

/// Why a round is not committed yet.
#[derive(Debug, thiserror::Error)]
enum CommitError {
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Effect(#[from] EffectError),
    #[error("the chain does not know the run")]
    NoRun,
    #[error("the admitted set of round {0} is not anchored yet")]
    NotAnchored(Round),
    #[error("{}", stands_still(.0))]
    NotActive(RunState),
    #[error("the chain did not take the commit: {0:?}")]
    NotTaken(RunState),
    #[error(
        "the chain holds {held} as the contributions root of round {round}, expected {expected}"
    )]
    AnotherRoot { round: Round, held: Digest, expected: Digest },
}

/// Why a run that is not active takes no commit, and what its owner can do.
fn stands_still(state: &RunState) -> String {
    match state {
        RunState::Paused(PauseReason::InsufficientFunds { required }) => format!(
            "the run is paused on chain until its escrow holds {required}: launched again with the \
             same folder, it gets what it lacks"
        ),
        RunState::Paused(
            PauseReason::Owner | PauseReason::ChallengeUpheld | PauseReason::NotAttested,
        ) => format!("the run is {state:?} on chain: its owner has to resume it"),
        RunState::Active | RunState::Closed { .. } | RunState::Settled => {
            format!("the run is {state:?} on chain")
        }
    }
}

impl CommitError {
    /// Whether trying again with the same record leads to the same refusal.
    fn is_for_good(&self) -> bool {
        match self {
            Self::Submit(SubmitError::Failed { error, .. }) => FOR_GOOD.contains(&error.as_str()),
            // It stands unless the verifiers reject it.
            Self::AnotherRoot { .. } => true,
            Self::Submit(
                SubmitError::MissingMoney { .. }
                | SubmitError::NodeBehind { .. }
                | SubmitError::Refused { .. }
                | SubmitError::TimedOut { .. }
                | SubmitError::KeyInUse { .. }
                | SubmitError::Read(_),
            )
            | Self::Read(_)
            | Self::Effect(_)
            | Self::NoRun
            | Self::NotAnchored(_)
            | Self::NotActive(_)
            | Self::NotTaken(_) => false,
        }
    }

    /// What is the same from attempt to attempt: without the block that an attempt was refused in.
    fn reason(&self) -> String {
        match self {
            Self::Submit(SubmitError::Failed { pallet, error, .. }) => {
                format!("the chain refuses the commit: {pallet}::{error}")
            }
            Self::Submit(_)
            | Self::Read(_)
            | Self::Effect(_)
            | Self::NoRun
            | Self::NotAnchored(_)
            | Self::NotActive(_)
            | Self::NotTaken(_)
            | Self::AnotherRoot { .. } => self.to_string(),
        }
    }
}

/// What was told last, so that a lasting problem is told once and not at every attempt.
#[derive(Debug, Default)]
struct Told(Option<String>);

impl Told {
    /// Whether this was not what was told last.
    fn is_news(&mut self, reason: &str) -> bool {
        let is_news = self.0.as_deref() != Some(reason);
        self.0 = Some(reason.to_owned());
        is_news
    }
}

/// The file of a round's record.
pub fn record_path(records: &Path, round: Round) -> PathBuf {
    records.join(format!("{round}.json"))
}

/// Reads a round's record.
///
/// # Errors
/// [`RecordFileError`].
pub fn read_record(records: &Path, round: Round) -> Result<RoundRecord, RecordFileError> {
    let path = record_path(records, round);
    let bytes = std::fs::read(&path)
        .map_err(|source| RecordFileError::Io { path: path.clone(), source })?;
    RoundRecord::parse(&bytes).map_err(|source| RecordFileError::Damaged { path, source })
}

/// The leaves of a commit that covers these consecutive rounds, in account order: what each account
/// earned up to the last of them, its work of all of them, and the last record's digest as evidence.
pub fn reward_leaves(genesis: Digest, run: RunId, records: &[RoundRecord]) -> Vec<RewardLeaf> {
    let Some(last) = records.last() else { return Vec::new() };
    let mut work: BTreeMap<NodeId, WorkUnits> = BTreeMap::new();
    for earning in records.iter().flat_map(|record| &record.earnings) {
        let sum = work.entry(earning.account).or_default();
        sum.0 = sum.0.saturating_add(earning.work.0);
    }
    let evidence_digest = *last.digest().as_bytes();
    let mut earnings = last.earnings.clone();
    earnings.sort_by_key(|earning| earning.account);
    earnings
        .into_iter()
        .map(|earning| RewardLeaf {
            genesis_hash: *genesis.as_bytes(),
            run: *run.as_bytes(),
            round: last.round.0,
            worker: *earning.account.as_bytes(),
            work_units: work.get(&earning.account).map_or(0, |work| work.0),
            cumulative_reward: earning.cumulative.0,
            evidence_digest,
        })
        .collect()
}

/// The commit of these consecutive rounds; none if nobody has earned anything yet.
pub fn round_commitment(
    genesis: Digest,
    run: RunId,
    records: &[RoundRecord],
) -> Option<RoundCommitment> {
    let (first, last) = (records.first()?, records.last()?);
    let leaves = reward_leaves(genesis, run, records);
    let number_of_leaves = u32::try_from(leaves.len()).ok().filter(|&count| count > 0)?;
    let hashes: Vec<_> = leaves.iter().map(RewardLeaf::hash).collect();
    Some(RoundCommitment {
        first_round: first.round,
        last_round: last.round,
        contributions_root: Digest::new(merkle_root(&hashes)),
        number_of_leaves,
        theta_digest: last.theta_next,
        work_units: WorkUnits(leaves.iter().fold(0, |sum, l| sum.saturating_add(l.work_units))),
        total_reward: Balance(
            leaves.iter().fold(0, |sum, leaf| sum.saturating_add(leaf.cumulative_reward)),
        ),
        evidence_digest: last.digest(),
    })
}

/// Writes the record as a file and as a blob, then commits it on chain. A round in which nobody has
/// earned anything yet is left to a later commit, which covers both.
pub(super) async fn settle(
    context: &Arc<Context>,
    record: RoundRecord,
) -> Result<Done, EffectError> {
    let round = record.round;
    let (own, kept) = (context.clone(), record.clone());
    let digest = blocking(move || keep(&own, &kept)).await??;
    if let Some(chain) = &context.chain {
        commit_in_the_end(context, chain, &record).await?;
    }
    let note = BlobNote { digest, kind: BlobKind::Record, round };
    Ok(Done { input: Input::Settled { round }, blobs: vec![note] })
}

/// Tries until the round is committed. What stands in the way is told once, and stays on the page.
async fn commit_in_the_end(
    context: &Arc<Context>,
    chain: &ChainClient,
    record: &RoundRecord,
) -> Result<(), EffectError> {
    let round = record.round;
    let what = format!("settling round {round}");
    let (mut backoff, mut told) = (Backoff::for_chain(), Told::default());
    loop {
        let error = match commit(context, chain, record).await {
            Ok(()) => break,
            Err(CommitError::Effect(error)) => return Err(error),
            Err(error) => error,
        };
        let (reason, for_good) = (error.reason(), error.is_for_good());
        // An anchor that is under way tells by itself what keeps it.
        let is_awaited = matches!(error, CommitError::NotAnchored(_));
        if !is_awaited && told.is_news(&reason) {
            if for_good {
                tracing::error!(%round, reason, "a round cannot be settled: nobody is paid for it");
            } else {
                tracing::warn!(%round, reason, "a round is not settled yet; trying again");
            }
            context.notes.report(&what, reason);
        }
        if for_good {
            tokio::time::sleep(REFUSED_RETRY).await;
        } else {
            backoff.wait().await;
        }
    }
    context.notes.clear(&what);
    Ok(())
}

fn keep(context: &Context, record: &RoundRecord) -> Result<Digest, EffectError> {
    let bytes = record.canonical_bytes();
    let path = record_path(&context.records, record.round);
    write_whole(&path, &bytes).map_err(|source| RecordFileError::Io { path, source })?;
    Ok(context.store.insert(&bytes, Access::Everyone)?)
}

async fn commit(
    context: &Arc<Context>,
    chain: &ChainClient,
    record: &RoundRecord,
) -> Result<(), CommitError> {
    let (run, round) = (&context.run, record.round);
    let state = chain.state().await?;
    let on_chain = state.run(run).await?.ok_or(CommitError::NoRun)?;
    if on_chain.next_round > round {
        return same_root(context, chain, record, &state).await;
    }
    // The chain takes no anchor of a committed round, so the anchor goes first.
    let anchored =
        record.candidates.is_empty() || state.anchor(run, round, Stage::Admitted).await?.is_some();
    if !anchored {
        return Err(CommitError::NotAnchored(round));
    }
    if record.earnings.is_empty() {
        return Ok(());
    }
    match on_chain.state {
        RunState::Active => {}
        other @ (RunState::Paused(_) | RunState::Closed { .. } | RunState::Settled) => {
            return Err(CommitError::NotActive(other));
        }
    }
    let Some(commitment) = commitment_from(context, chain, on_chain.next_round, round).await?
    else {
        return Ok(());
    };
    chain.commit_round(&context.key, run, commitment).await?;
    let after = chain.state().await?.run(run).await?.ok_or(CommitError::NoRun)?;
    // A commit that the escrow does not cover pauses the run instead.
    if after.next_round > round { Ok(()) } else { Err(CommitError::NotTaken(after.state)) }
}

async fn commitment_from(
    context: &Arc<Context>,
    chain: &ChainClient,
    first: Round,
    last: Round,
) -> Result<Option<RoundCommitment>, EffectError> {
    let (own, genesis) = (context.clone(), chain.genesis_hash());
    blocking(move || {
        let records = (first.0..=last.0)
            .map(|round| read_record(&own.records, Round(round)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(round_commitment(genesis, own.run, &records))
    })
    .await?
}

/// A round that is committed already must be committed as ours.
async fn same_root(
    context: &Arc<Context>,
    chain: &ChainClient,
    record: &RoundRecord,
    state: &manyhands_chain_client::ChainState,
) -> Result<(), CommitError> {
    // Nothing ends with this round if a later one's commit covers it.
    let Some(held) = state.round(&context.run, record.round).await? else { return Ok(()) };
    let held = held.commitment;
    let expected = commitment_from(context, chain, held.first_round, record.round).await?;
    match expected.map(|commitment| commitment.contributions_root) {
        Some(expected) if expected != held.contributions_root => Err(CommitError::AnotherRoot {
            round: record.round,
            held: held.contributions_root,
            expected,
        }),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use manyhands_chain_client::BlockRef;
    use manyhands_rules::record::Earning;

    use super::*;

    fn record(round: u32, earnings: &[(u8, u64, u128)]) -> RoundRecord {
        let digest = Digest::of(&round.to_le_bytes());
        RoundRecord {
            run: RunId::new([1; 32]),
            round: Round(round),
            previous: digest,
            theta: digest,
            theta_next: digest,
            first_sequence: 0,
            candidates: Vec::new(),
            verified: true,
            attending: Vec::new(),
            sequences_max: None,
            commitments: Vec::new(),
            commitments_entropy: None,
            results: Vec::new(),
            merge: None,
            flagged: Vec::new(),
            revocations: Vec::new(),
            checks: Vec::new(),
            false_ends: Vec::new(),
            draws: Vec::new(),
            weighings: Vec::new(),
            evaluations: Vec::new(),
            earnings: earnings
                .iter()
                .map(|&(id, work, cumulative)| Earning {
                    account: NodeId::new([id; 32]),
                    work: WorkUnits(work),
                    cumulative: Balance(cumulative),
                })
                .collect(),
        }
    }

    fn refused(block: u32, error: &str) -> CommitError {
        let block = BlockRef { number: block, hash: Digest::of(&block.to_le_bytes()) };
        let (pallet, error) = ("Training".to_owned(), error.to_owned());
        CommitError::Submit(SubmitError::Failed { block, pallet, error })
    }

    #[test]
    fn a_refusal_for_good_is_told_once_and_not_repeated_at_once() {
        let (mut told, mut news) = (Told::default(), 0);
        for block in 0..5 {
            let refusal = refused(block, "RewardAbovePrice");
            assert!(refusal.is_for_good());
            news += u32::from(told.is_news(&refusal.reason()));
        }
        assert_eq!(news, 1, "each attempt is refused in another block, for the same reason");
        let waits = refused(9, "TooManyPending");
        assert!(!waits.is_for_good());
        assert!(told.is_news(&waits.reason()));
        let paused = CommitError::NotActive(RunState::Settled);
        assert!(!paused.is_for_good() && told.is_news(&paused.reason()));
    }

    #[test]
    fn one_commit_covers_several_rounds_with_their_work_and_the_last_totals() {
        let records = [record(3, &[(1, 10, 100)]), record(4, &[(1, 5, 150), (2, 7, 70)])];
        let (genesis, run) = (Digest::of(b"genesis"), RunId::new([1; 32]));
        let leaves = reward_leaves(genesis, run, &records);
        let told: Vec<_> =
            leaves.iter().map(|l| (l.round, l.work_units, l.cumulative_reward)).collect();
        assert_eq!(told, [(4, 15, 150), (4, 7, 70)]);
        let commitment = round_commitment(genesis, run, &records).expect("somebody earned");
        assert_eq!((commitment.first_round, commitment.last_round), (Round(3), Round(4)));
        assert_eq!((commitment.work_units, commitment.total_reward), (WorkUnits(22), Balance(220)));
        assert_eq!(commitment.evidence_digest, records[1].digest());
        assert!(round_commitment(genesis, run, &[record(0, &[])]).is_none());
    }
}
