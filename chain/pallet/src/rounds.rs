//! Rounds: anchors, commits, attestations, challenges, finality and claims.

use frame_support::{BoundedVec, dispatch::DispatchResult, ensure};
use manyhands_proto::leaf::verify_proof;
use sp_runtime::{DispatchError, traits::Zero};

use crate::{
    AccountId, Anchor, Anchors, Attribution, Balance, Challenge, ChallengeClaim, ChallengeOutcome,
    Challenges, Claimed, Config, Digest, Error, Event, Forfeits, HoldReason, LeafHash, Pallet,
    PauseReason, RecoveryReason, RejectReason, RewardLeaf, Round, RoundCommitment, RoundRecord,
    RoundState, Rounds, Run, RunId, RunState, Runs, Stage, Suspensions, Totals,
    money::{add, subtract},
};

impl<T: Config> Pallet<T> {
    fn round(run_id: &RunId, round: Round) -> Result<RoundRecord, DispatchError> {
        Rounds::<T>::get(run_id, round).ok_or_else(|| Error::<T>::RoundUnknown.into())
    }

    pub(crate) fn do_anchor_commitments(
        who: AccountId,
        run_id: RunId,
        round: Round,
        stage: Stage,
        digest: Digest,
    ) -> DispatchResult {
        let mut run = Self::owned_active_run(&run_id, &who)?;
        ensure!(round >= run.next_round, Error::<T>::RoundOutOfOrder);
        let key = (round, stage);
        ensure!(!Anchors::<T>::contains_key(run_id, key), Error::<T>::AlreadyAnchored);
        Self::charge_record(&mut run)?;
        Anchors::<T>::insert(run_id, key, Anchor { digest, block: Self::now() });
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::CommitmentsAnchored { run: run_id, round, stage, digest });
        Ok(())
    }

    pub(crate) fn do_commit_round(
        who: AccountId,
        run_id: RunId,
        commitment: RoundCommitment,
    ) -> DispatchResult {
        let mut run = Self::owned_active_run(&run_id, &who)?;
        let in_order = commitment.first_round == run.next_round
            && commitment.last_round >= commitment.first_round;
        ensure!(in_order, Error::<T>::RoundOutOfOrder);
        ensure!(commitment.number_of_leaves > 0, Error::<T>::NoLeaves);
        // An overflowing product is beyond any balance, so nothing is above it.
        let earned_max = run.terms.price_per_unit.saturating_mul(commitment.work_units.into());
        let reward_max = run.committed.reward.saturating_add(earned_max);
        ensure!(commitment.total_reward <= reward_max, Error::<T>::RewardAbovePrice);

        let before = run.committed;
        let ceiling = before.ceiling.max(commitment.total_reward);
        let required = subtract(ceiling, run.claimed)?;
        if required > run.escrow {
            Self::pause(&run_id, &mut run, PauseReason::InsufficientFunds { required });
            Runs::<T>::insert(run_id, run);
            return Ok(());
        }

        let now = Self::now();
        let round = commitment.last_round;
        let finalizable_at = now.saturating_add(run.terms.challenge_window);
        // A rejected commit that ended with the same round has paid for the record already.
        if !Rounds::<T>::contains_key(run_id, round) {
            Self::charge_record(&mut run)?;
        }
        run.pending.try_push(round).map_err(|_| Error::<T>::TooManyPending)?;
        run.next_round = round.checked_add(1).ok_or(Error::<T>::RoundOutOfOrder)?;
        run.committed = Totals { reward: commitment.total_reward, ceiling };
        run.last_progress = now;
        let record = RoundRecord {
            commitment,
            before,
            committed_at: now,
            finalizable_at,
            attestations: BoundedVec::new(),
            state: RoundState::Committed,
        };
        Rounds::<T>::insert(run_id, round, record);
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::RoundCommitted { run: run_id, commitment, finalizable_at });
        Ok(())
    }

    pub(crate) fn do_attest_round(
        who: AccountId,
        run_id: RunId,
        round: Round,
        contributions_root: LeafHash,
    ) -> DispatchResult {
        let run = Self::run(&run_id)?;
        let mut record = Self::round(&run_id, round)?;
        Self::active_verifier(&run_id, &run, &who)?;
        let waiting = matches!(record.state, RoundState::Committed | RoundState::Challenged);
        ensure!(waiting, Error::<T>::WrongRoundState);
        ensure!(
            record.commitment.contributions_root == contributions_root,
            Error::<T>::RootMismatch
        );
        ensure!(!record.attestations.contains(&who), Error::<T>::AlreadyVoted);
        record.attestations.try_push(who.clone()).map_err(|_| Error::<T>::TooManyVerifiers)?;
        let attestations = count(&record.attestations);
        Rounds::<T>::insert(run_id, round, record);
        Self::deposit_event(Event::RoundAttested {
            run: run_id,
            round,
            verifier: who,
            attestations,
        });
        Ok(())
    }

    pub(crate) fn do_challenge_round(
        who: AccountId,
        run_id: RunId,
        round: Round,
        claim: ChallengeClaim,
        evidence_digest: Digest,
    ) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let mut record = Self::round(&run_id, round)?;
        let now = Self::now();
        ensure!(record.state == RoundState::Committed, Error::<T>::WrongRoundState);
        ensure!(now < record.finalizable_at, Error::<T>::WindowOver);
        if let ChallengeClaim::WrongLeaf { leaf, leaf_index, siblings } = &claim {
            Self::ensure_leaf(&record, leaf, *leaf_index, siblings)?;
        }
        let bond = run.terms.challenge_bond;
        let kind = claim.kind();
        Self::hold(HoldReason::ChallengeBond, &who, bond)?;
        record.state = RoundState::Challenged;
        run.open_disputes = run.open_disputes.saturating_add(1);
        let challenge = Challenge {
            challenger: who.clone(),
            kind,
            evidence_digest,
            bond,
            challenged_at: now,
            resolves_at: now.saturating_add(run.terms.resolution_window),
            upheld_by: BoundedVec::new(),
            dismissed_by: BoundedVec::new(),
        };
        Challenges::<T>::insert(run_id, round, challenge);
        Rounds::<T>::insert(run_id, round, record);
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::RoundChallenged {
            run: run_id,
            round,
            challenger: who,
            kind,
            evidence_digest,
            bond,
        });
        Ok(())
    }

    pub(crate) fn do_resolve_challenge(
        who: AccountId,
        run_id: RunId,
        round: Round,
        upheld: bool,
    ) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let mut challenge =
            Challenges::<T>::get(run_id, round).ok_or(Error::<T>::ChallengeUnknown)?;
        Self::active_verifier(&run_id, &run, &who)?;
        ensure!(Self::now() < challenge.resolves_at, Error::<T>::WindowOver);
        // Nobody judges what it brought up itself.
        ensure!(challenge.challenger != who, Error::<T>::SelfReport);
        let voted = challenge.upheld_by.contains(&who) || challenge.dismissed_by.contains(&who);
        ensure!(!voted, Error::<T>::AlreadyVoted);
        let side = if upheld { &mut challenge.upheld_by } else { &mut challenge.dismissed_by };
        side.try_push(who.clone()).map_err(|_| Error::<T>::TooManyVerifiers)?;
        let decided = count(side) >= run.terms.fault_quorum;
        Self::deposit_event(Event::ChallengeVoted { run: run_id, round, verifier: who, upheld });

        if !decided {
            Challenges::<T>::insert(run_id, round, challenge);
            return Ok(());
        }
        Challenges::<T>::remove(run_id, round);
        run.open_disputes = run.open_disputes.saturating_sub(1);
        if upheld {
            Self::uphold(&run_id, &mut run, round, &challenge)?;
        } else {
            Self::dismiss(&run_id, &mut run, round, &challenge)?;
        }
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    /// The challenger was right: it is paid from the coordinator's bond, the round and what was
    /// built on it is rejected, and an open run waits for the coordinator to commit it again.
    fn uphold(
        run_id: &RunId,
        run: &mut Run,
        round: Round,
        challenge: &Challenge,
    ) -> DispatchResult {
        let challenger = &challenge.challenger;
        Self::release(HoldReason::ChallengeBond, challenger, challenge.bond)?;
        let amount = run.terms.slashes.coordinator;
        let reason = RecoveryReason::ChallengeUpheld;
        let reward = Self::slash_coordinator(run_id, run, Some(challenger), amount, reason)?;
        Self::deposit_event(Event::ChallengeResolved {
            run: *run_id,
            round,
            challenger: challenger.clone(),
            outcome: ChallengeOutcome::Upheld,
            attribution: Attribution::Coordinator,
            bond: challenge.bond,
            reward,
        });
        Self::reject_from(run_id, run, round, RejectReason::ChallengeUpheld)?;
        if matches!(run.state, RunState::Active | RunState::Paused(_)) {
            Self::pause(run_id, run, PauseReason::ChallengeUpheld);
        }
        Ok(())
    }

    /// The challenger was wrong: its bond goes to the run and the round gets back the time.
    fn dismiss(
        run_id: &RunId,
        run: &mut Run,
        round: Round,
        challenge: &Challenge,
    ) -> DispatchResult {
        let challenger = &challenge.challenger;
        let from = (HoldReason::ChallengeBond, challenger);
        let reason = RecoveryReason::ChallengeDismissed;
        Self::recover_into_escrow(run_id, run, from, challenge.bond, reason)?;
        let mut record = Self::round(run_id, round)?;
        let stopped_for = Self::now().saturating_sub(challenge.challenged_at);
        record.finalizable_at = record.finalizable_at.saturating_add(stopped_for);
        record.state = RoundState::Committed;
        Rounds::<T>::insert(run_id, round, record);
        Self::deposit_event(Event::ChallengeResolved {
            run: *run_id,
            round,
            challenger: challenger.clone(),
            outcome: ChallengeOutcome::Dismissed,
            attribution: Attribution::Nobody,
            bond: challenge.bond,
            reward: 0,
        });
        Ok(())
    }

    pub(crate) fn do_expire_challenge(run_id: RunId, round: Round) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let mut record = Self::round(&run_id, round)?;
        let challenge = Challenges::<T>::get(run_id, round).ok_or(Error::<T>::ChallengeUnknown)?;
        ensure!(Self::now() >= challenge.resolves_at, Error::<T>::WindowOpen);
        Self::return_challenge(&run_id, &mut run, round, ChallengeOutcome::Undecided)?;
        record.state = RoundState::Committed;
        Rounds::<T>::insert(run_id, round, record);
        Runs::<T>::insert(run_id, run);
        Ok(())
    }

    /// Ends an open challenge of a round, if there is one, without a loser.
    fn return_challenge(
        run_id: &RunId,
        run: &mut Run,
        round: Round,
        outcome: ChallengeOutcome,
    ) -> DispatchResult {
        let Some(challenge) = Challenges::<T>::take(run_id, round) else {
            return Ok(());
        };
        Self::release(HoldReason::ChallengeBond, &challenge.challenger, challenge.bond)?;
        run.open_disputes = run.open_disputes.saturating_sub(1);
        Self::deposit_event(Event::ChallengeResolved {
            run: *run_id,
            round,
            challenger: challenge.challenger,
            outcome,
            attribution: Attribution::Nobody,
            bond: challenge.bond,
            reward: 0,
        });
        Ok(())
    }

    /// Rejects a pending commit and those built on it; the run continues before it.
    fn reject_from(
        run_id: &RunId,
        run: &mut Run,
        round: Round,
        reason: RejectReason,
    ) -> DispatchResult {
        let rejected: BoundedVec<_, _> = run.pending.clone();
        for pending in rejected.into_iter().filter(|pending| *pending >= round) {
            let mut record = Self::round(run_id, pending)?;
            let reason = if pending == round { reason } else { RejectReason::EarlierRejected };
            if pending == round {
                run.next_round = record.commitment.first_round;
                run.committed = record.before;
            } else {
                Self::return_challenge(run_id, run, pending, ChallengeOutcome::Superseded)?;
            }
            record.state = RoundState::Rejected(reason);
            Rounds::<T>::insert(run_id, pending, record);
            Self::deposit_event(Event::RoundRejected { run: *run_id, round: pending, reason });
        }
        run.pending.retain(|pending| *pending < round);
        Ok(())
    }

    pub(crate) fn do_finalize_round(run_id: RunId, round: Round) -> DispatchResult {
        let mut run = Self::run(&run_id)?;
        let mut record = Self::round(&run_id, round)?;
        let now = Self::now();
        ensure!(record.state == RoundState::Committed, Error::<T>::WrongRoundState);
        ensure!(run.pending.first() == Some(&round), Error::<T>::RoundOutOfOrder);
        ensure!(now >= record.finalizable_at, Error::<T>::WindowOpen);

        if count(&record.attestations) < run.terms.attestation_quorum {
            let attest_by = record.finalizable_at.saturating_add(run.terms.resolution_window);
            ensure!(now >= attest_by, Error::<T>::QuorumMissing);
            Self::reject_from(&run_id, &mut run, round, RejectReason::NotAttested)?;
            if run.state == RunState::Active {
                Self::pause(&run_id, &mut run, PauseReason::NotAttested);
            }
            Runs::<T>::insert(run_id, run);
            return Ok(());
        }

        let RoundCommitment { contributions_root, total_reward, .. } = record.commitment;
        record.state = RoundState::Finalized;
        run.pending.retain(|pending| *pending != round);
        run.latest_finalized = Some(round);
        run.finalized_reward = run.finalized_reward.max(total_reward);
        // A round that became final late still leaves its workers the whole time to claim.
        if let RunState::Closed { expires_at, .. } = &mut run.state {
            *expires_at = now.saturating_add(run.terms.claim_window).max(*expires_at);
        }
        Rounds::<T>::insert(run_id, round, record);
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::RoundFinalized {
            run: run_id,
            round,
            contributions_root,
            total_reward,
        });
        Ok(())
    }

    /// Ensures that the leaf stands in the record's tree.
    fn ensure_leaf(
        record: &RoundRecord,
        leaf: &RewardLeaf,
        leaf_index: u32,
        siblings: &[LeafHash],
    ) -> DispatchResult {
        let RoundCommitment { contributions_root, number_of_leaves, .. } = &record.commitment;
        let proven =
            verify_proof(contributions_root, *number_of_leaves, leaf_index, &leaf.hash(), siblings);
        ensure!(proven, Error::<T>::InvalidProof);
        Ok(())
    }

    /// Whether a final round's rewards can be paid at block `now`.
    fn has_vested(run: &Run, round: Round) -> bool {
        let superseded = run
            .latest_finalized
            .is_some_and(|latest| round.saturating_add(run.terms.vesting_rounds) <= latest);
        match run.state {
            RunState::Active | RunState::Paused(_) => superseded,
            RunState::Closed { vests_at, .. } => superseded || Self::now() >= vests_at,
            RunState::Settled => false,
        }
    }

    pub(crate) fn do_claim_reward(
        leaf: &RewardLeaf,
        leaf_index: u32,
        siblings: &[LeafHash],
    ) -> DispatchResult {
        let genesis_hash = frame_system::Pallet::<T>::block_hash(
            frame_system::pallet_prelude::BlockNumberFor::<T>::zero(),
        );
        ensure!(leaf.genesis_hash == genesis_hash.0, Error::<T>::WrongChain);
        let (run_id, round) = (leaf.run, leaf.round);
        let mut run = Self::run(&run_id)?;
        let record = Self::round(&run_id, round)?;
        ensure!(record.state == RoundState::Finalized, Error::<T>::WrongRoundState);
        Self::ensure_claimable(&run)?;
        Self::ensure_leaf(&record, leaf, leaf_index, siblings)?;
        ensure!(Self::has_vested(&run, round), Error::<T>::NotVested);
        let worker = AccountId::new(leaf.worker);
        Self::ensure_not_barred(&run_id, &worker, round, &record)?;

        let paid = Claimed::<T>::get(run_id, &worker);
        let amount: Balance = leaf.cumulative_reward.saturating_sub(paid);
        ensure!(amount > 0, Error::<T>::NothingToClaim);
        run.claimed = add(run.claimed, amount)?;
        ensure!(run.claimed <= run.finalized_reward, Error::<T>::ClaimAboveTotal);
        Self::pay_from_escrow(&run_id, &mut run, &worker, amount)?;
        Claimed::<T>::insert(run_id, &worker, leaf.cumulative_reward);
        Runs::<T>::insert(run_id, run);
        Self::deposit_event(Event::RewardClaimed {
            run: run_id,
            round,
            worker,
            amount,
            cumulative: leaf.cumulative_reward,
        });
        Ok(())
    }

    /// Ensures that no fault bars the worker's leaf of that round, nor may yet come to bar it.
    fn ensure_not_barred(
        run_id: &RunId,
        worker: &AccountId,
        round: Round,
        record: &RoundRecord,
    ) -> DispatchResult {
        let barred = Forfeits::<T>::get(run_id, worker)
            .is_some_and(|forfeit| forfeit.bars(round, record.committed_at));
        ensure!(!barred, Error::<T>::Forfeited);
        let waits = Suspensions::<T>::get(run_id, worker)
            .is_some_and(|suspension| round >= suspension.from_round);
        ensure!(!waits, Error::<T>::FaultUndecided);
        Ok(())
    }

    fn ensure_claimable(run: &Run) -> DispatchResult {
        match run.state {
            RunState::Active | RunState::Paused(_) => Ok(()),
            RunState::Closed { expires_at, .. } => {
                ensure!(Self::now() < expires_at, Error::<T>::ClaimWindowOver);
                Ok(())
            }
            RunState::Settled => Err(Error::<T>::ClaimWindowOver.into()),
        }
    }
}

pub(crate) fn count(accounts: &[AccountId]) -> u32 {
    u32::try_from(accounts.len()).unwrap_or(u32::MAX)
}
