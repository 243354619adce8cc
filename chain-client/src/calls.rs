//! The training pallet's calls that a node makes, typed. Where the chain's state shows that a call
//! has been made before, it is not made again: a process that was killed may repeat what it was
//! doing.

use manyhands_proto::keys::NodeKey;
use manyhands_proto::leaf::{LeafHash, RewardLeaf};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use subxt::transactions::Payload;

use crate::chain;
use crate::client::{ChainClient, ReadError};
use crate::state::ChainState;
use crate::submit::{Submission, SubmitError};
use crate::types::{CloseReason, Convert, RoundCommitment, RoundState, RunState, RunTerms, Stage};

/// What a worker tells about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCard {
    /// At most 64 bytes.
    pub peer_id: Vec<u8>,
    pub capability_digest: Digest,
}

/// A leaf with its place in a committed tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenLeaf {
    pub leaf: RewardLeaf,
    pub leaf_index: u32,
    /// From the lowest to the top; at most 32.
    pub siblings: Vec<LeafHash>,
}

pub(crate) fn call() -> chain::training::calls::api::TransactionApi {
    chain::transactions().training()
}

/// Workers and verifiers.
impl ChainClient {
    /// Puts down a stake and becomes a worker.
    pub async fn register_worker(
        &self,
        key: &NodeKey,
        card: WorkerCard,
        stake: Balance,
    ) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let registered = async |state: &ChainState| Ok(state.worker(&me).await?.is_some());
        let peer_id = Convert::convert(card.peer_id);
        let digest = Convert::convert(card.capability_digest);
        self.submit_unless(key, &call().register_worker(peer_id, digest, stake.0), registered).await
    }

    /// Adds `amount` to the stake, every time it is called.
    pub async fn increase_stake(
        &self,
        key: &NodeKey,
        amount: Balance,
    ) -> Result<Submission, SubmitError> {
        self.submit(key, &call().increase_stake(amount.0)).await
    }

    /// Accepts the run's terms: from now on its faults can cost the worker's stake.
    pub async fn join_run(&self, key: &NodeKey, run: &RunId) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let joined = async |state: &ChainState| {
            Ok(state.worker(&me).await?.is_some_and(|worker| worker.is_member(run)))
        };
        self.submit_unless(key, &call().join_run(*run.as_bytes()), joined).await
    }

    /// Leaves one run; the stake stays exposed to it for its unbonding period.
    pub async fn leave_run(&self, key: &NodeKey, run: &RunId) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let left = async |state: &ChainState| {
            Ok(state.worker(&me).await?.is_some_and(|worker| !worker.is_member(run)))
        };
        self.submit_unless(key, &call().leave_run(*run.as_bytes()), left).await
    }

    /// Leaves all runs; the stake can be withdrawn when the last exposure is over.
    pub async fn announce_exit(&self, key: &NodeKey) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let exiting = async |state: &ChainState| {
            Ok(state.worker(&me).await?.is_some_and(|worker| worker.exit_at.is_some()))
        };
        self.submit_unless(key, &call().announce_exit(), exiting).await
    }

    pub async fn withdraw_stake(&self, key: &NodeKey) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let gone = async |state: &ChainState| Ok(state.worker(&me).await?.is_none());
        self.submit_unless(key, &call().withdraw_stake(), gone).await
    }

    /// Puts down the run's verifier bond; fills it up after a loss and undoes a retirement.
    pub async fn register_verifier(
        &self,
        key: &NodeKey,
        run: &RunId,
    ) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let registered = async |state: &ChainState| {
            let terms = state.run(run).await?.map(|record| record.terms);
            let verifier = state.verifier(run, &me).await?;
            Ok(terms.zip(verifier).is_some_and(|(terms, verifier)| {
                verifier.exit_at.is_none() && verifier.bond >= terms.verifier_bond
            }))
        };
        self.submit_unless(key, &call().register_verifier(*run.as_bytes()), registered).await
    }

    pub async fn retire_verifier(
        &self,
        key: &NodeKey,
        run: &RunId,
    ) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let retired = async |state: &ChainState| {
            Ok(state.verifier(run, &me).await?.is_some_and(|verifier| verifier.exit_at.is_some()))
        };
        self.submit_unless(key, &call().retire_verifier(*run.as_bytes()), retired).await
    }

    pub async fn withdraw_verifier_bond(
        &self,
        key: &NodeKey,
        run: &RunId,
    ) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let gone = async |state: &ChainState| Ok(state.verifier(run, &me).await?.is_none());
        self.submit_unless(key, &call().withdraw_verifier_bond(*run.as_bytes()), gone).await
    }
}

/// Runs and their money.
impl ChainClient {
    /// Creates a run owned by the key and puts `budget` into its escrow.
    pub async fn create_run(
        &self,
        key: &NodeKey,
        run: &RunId,
        terms: RunTerms,
        budget: Balance,
    ) -> Result<Submission, SubmitError> {
        let me = key.node_id();
        let created = async |state: &ChainState| {
            Ok(state
                .run(run)
                .await?
                .is_some_and(|record| record.owner == me && record.terms == terms))
        };
        let created_by =
            call().create_run(*run.as_bytes(), Convert::convert(terms.clone()), budget.0);
        self.submit_unless(key, &created_by, created).await
    }

    /// Adds `amount` to the escrow, every time it is called; whoever adds gets a share of what is
    /// left at the end.
    pub async fn fund_run(
        &self,
        key: &NodeKey,
        run: &RunId,
        amount: Balance,
    ) -> Result<Submission, SubmitError> {
        self.submit(key, &call().fund_run(*run.as_bytes(), amount.0)).await
    }

    /// Resumes a paused run, filling up the coordinator's bond.
    pub async fn resume_run(&self, key: &NodeKey, run: &RunId) -> Result<Submission, SubmitError> {
        let active = async |state: &ChainState| {
            is_in(state, run, |state| matches!(state, RunState::Active)).await
        };
        self.submit_unless(key, &call().resume_run(*run.as_bytes()), active).await
    }

    /// Ends the run with its result.
    pub async fn complete_run(
        &self,
        key: &NodeKey,
        run: &RunId,
        final_checkpoint: Digest,
    ) -> Result<Submission, SubmitError> {
        let completed = async |state: &ChainState| {
            is_in(state, run, |state| {
                matches!(state, RunState::Closed { reason, .. }
                    if *reason == CloseReason::Completed { final_checkpoint })
            })
            .await
        };
        let complete = call().complete_run(*run.as_bytes(), Convert::convert(final_checkpoint));
        self.submit_unless(key, &complete, completed).await
    }
}

/// Rounds, challenges and claims.
impl ChainClient {
    /// Puts the digest of a round's set on chain.
    pub async fn anchor_commitments(
        &self,
        key: &NodeKey,
        run: &RunId,
        (round, stage): (Round, Stage),
        digest: Digest,
    ) -> Result<Submission, SubmitError> {
        let anchored = async |state: &ChainState| {
            Ok(state.anchor(run, round, stage).await?.is_some_and(|anchor| anchor.digest == digest))
        };
        let anchor = call().anchor_commitments(
            *run.as_bytes(),
            round.0,
            Convert::convert(stage),
            Convert::convert(digest),
        );
        self.submit_unless(key, &anchor, anchored).await
    }

    /// Commits the rounds from the last commit's end on. If the escrow does not cover them, the
    /// chain pauses the run instead: then the submission's events hold a `RunPaused` and no
    /// `RoundCommitted`.
    pub async fn commit_round(
        &self,
        key: &NodeKey,
        run: &RunId,
        commitment: RoundCommitment,
    ) -> Result<Submission, SubmitError> {
        let committed = async |state: &ChainState| {
            Ok(state.round(run, commitment.last_round).await?.is_some_and(|record| {
                record.commitment == commitment && !matches!(record.state, RoundState::Rejected(_))
            }))
        };
        let commit = call().commit_round(*run.as_bytes(), Convert::convert(commitment));
        self.submit_unless(key, &commit, committed).await
    }

    /// Ends a challenge that the verifiers did not decide in time. Anybody may.
    pub async fn expire_challenge(
        &self,
        key: &NodeKey,
        run: &RunId,
        round: Round,
    ) -> Result<Submission, SubmitError> {
        let gone = async |state: &ChainState| Ok(state.challenge(run, round).await?.is_none());
        self.submit_unless(key, &call().expire_challenge(*run.as_bytes(), round.0), gone).await
    }

    /// Makes the oldest commit final after its window, or rejects it if too few attested it.
    /// Anybody may.
    pub async fn finalize_round(
        &self,
        key: &NodeKey,
        run: &RunId,
        round: Round,
    ) -> Result<Submission, SubmitError> {
        let finalized = async |state: &ChainState| {
            let record = state.round(run, round).await?;
            Ok(record.is_some_and(|record| record.state == RoundState::Finalized))
        };
        self.submit_unless(key, &call().finalize_round(*run.as_bytes(), round.0), finalized).await
    }

    /// Pays the leaf's worker what it earned and was not paid. Anybody may.
    pub async fn claim_reward(
        &self,
        key: &NodeKey,
        claim: ProvenLeaf,
    ) -> Result<Submission, SubmitError> {
        let run = RunId::new(claim.leaf.run);
        let worker = NodeId::new(claim.leaf.worker);
        let earned = Balance(claim.leaf.cumulative_reward);
        let paid = async |state: &ChainState| Ok(state.claimed(&run, &worker).await? >= earned);
        let claim = call().claim_reward(
            Convert::convert(claim.leaf),
            claim.leaf_index,
            Convert::convert(claim.siblings),
        );
        self.submit_unless(key, &claim, paid).await
    }
}

impl ChainClient {
    /// Submits a call unless the newest finalised state shows that it is done.
    pub(crate) async fn submit_unless(
        &self,
        key: &NodeKey,
        call: &impl Payload,
        done: impl AsyncFnOnce(&ChainState) -> Result<bool, ReadError>,
    ) -> Result<Submission, SubmitError> {
        let state = self.state().await?;
        if done(&state).await? {
            return Ok(Submission::AlreadyDone { block: state.block() });
        }
        self.submit(key, call).await
    }
}

async fn is_in(
    state: &ChainState,
    run: &RunId,
    wanted: impl FnOnce(&RunState) -> bool,
) -> Result<bool, ReadError> {
    Ok(state.run(run).await?.is_some_and(|run| wanted(&run.state)))
}
