//! A chain of three pallets, and the people of the stories.

use std::collections::BTreeMap;

use frame_support::{BoundedVec, assert_ok, derive_impl, traits::ConstU32, traits::ConstU128};
use manyhands_proto::leaf::{merkle_proof, merkle_root};
use sp_runtime::{BuildStorage, Percent, traits::IdentityLookup};

use crate::{
    AccountId, Balance, BlockNumber, Event, FaultKind, Pallet, RewardLeaf, Round, RoundCommitment,
    RunId, RunTerms, SlashTerms, Stage,
};

type Block = frame_system::mocking::MockBlockU32<Test>;

#[frame_support::runtime]
mod runtime {
    #[runtime::runtime]
    #[runtime::derive(
        RuntimeCall,
        RuntimeEvent,
        RuntimeError,
        RuntimeOrigin,
        RuntimeFreezeReason,
        RuntimeHoldReason,
        RuntimeSlashReason,
        RuntimeLockId,
        RuntimeTask,
        RuntimeViewFunction
    )]
    pub struct Test;

    #[runtime::pallet_index(0)]
    pub type System = frame_system;
    #[runtime::pallet_index(1)]
    pub type Balances = pallet_balances;
    #[runtime::pallet_index(2)]
    pub type Training = crate;
}

#[derive_impl(frame_system::config_preludes::TestDefaultConfig)]
impl frame_system::Config for Test {
    type Block = Block;
    type AccountId = AccountId;
    type Lookup = IdentityLookup<AccountId>;
    type AccountData = pallet_balances::AccountData<Balance>;
}

#[derive_impl(pallet_balances::config_preludes::TestDefaultConfig)]
impl pallet_balances::Config for Test {
    type Balance = Balance;
    type ExistentialDeposit = ConstU128<EXISTENTIAL_DEPOSIT>;
    type AccountStore = System;
    type RuntimeHoldReason = RuntimeHoldReason;
}

impl crate::Config for Test {
    type RuntimeHoldReason = RuntimeHoldReason;
    type Currency = Balances;
    type RunDeposit = ConstU128<RUN_DEPOSIT>;
    type RecordDeposit = ConstU128<RECORD_DEPOSIT>;
    type MinimumFunding = ConstU128<MINIMUM_FUNDING>;
    type WindowMax = ConstU32<1_000>;
    type WeightInfo = crate::weights::CountedWeight<Test>;
}

pub(crate) const EXISTENTIAL_DEPOSIT: Balance = 10;
pub(crate) const RUN_DEPOSIT: Balance = 100;
pub(crate) const RECORD_DEPOSIT: Balance = 2;
pub(crate) const MINIMUM_FUNDING: Balance = 50;
pub(crate) const ENDOWMENT: Balance = 1_000_000;
pub(crate) const BUDGET: Balance = 10_000;
pub(crate) const STAKE: Balance = 1_000;

pub(crate) const RUN: RunId = [7; 32];

pub(crate) fn account(index: u8) -> AccountId {
    AccountId::new([index; 32])
}

pub(crate) fn coordinator() -> AccountId {
    account(1)
}
pub(crate) fn alice() -> AccountId {
    account(2)
}
pub(crate) fn bob() -> AccountId {
    account(3)
}
pub(crate) fn sponsor() -> AccountId {
    account(4)
}
pub(crate) fn anybody() -> AccountId {
    account(5)
}
pub(crate) fn verifier(index: u8) -> AccountId {
    account(10 + index)
}

pub(crate) fn signed(who: &AccountId) -> RuntimeOrigin {
    RuntimeOrigin::signed(who.clone())
}

pub(crate) fn terms() -> RunTerms {
    RunTerms {
        config_digest: [9; 32],
        price_per_unit: 10,
        vesting_rounds: 2,
        challenge_window: 5,
        contest_window: 4,
        resolution_window: 6,
        claim_window: 20,
        idle_timeout: 50,
        unbonding_period: 15,
        minimum_stake: 500,
        coordinator_bond: 400,
        verifier_bond: 300,
        contest_bond: 100,
        challenge_bond: 80,
        verifiers: BoundedVec::truncate_from((0..3).map(verifier).collect()),
        attestation_quorum: 0,
        fault_quorum: 2,
        slashes: SlashTerms {
            replay: 400,
            codec: 500,
            withheld: 100,
            equivocation: 500,
            coordinator: 200,
            reporter_share: Percent::from_percent(50),
        },
    }
}

/// A chain with endowed accounts and nothing else; checks every invariant at the end.
pub(crate) fn on_new_chain(story: impl FnOnce()) {
    let mut storage = frame_system::GenesisConfig::<Test>::default()
        .build_storage()
        .expect("the default genesis builds");
    pallet_balances::GenesisConfig::<Test> {
        balances: (1..=13).map(|index| (account(index), ENDOWMENT)).collect(),
        ..Default::default()
    }
    .assimilate_storage(&mut storage)
    .expect("the balances build");
    let mut externalities = sp_io::TestExternalities::new(storage);
    externalities.execute_with(|| {
        System::set_block_number(1);
        story();
        check_invariants();
    });
}

/// The same with one run, three registered verifiers, and Alice and Bob as its workers.
pub(crate) fn on_running_chain(terms: RunTerms, story: impl FnOnce()) {
    on_new_chain(|| {
        start_run(terms);
        story();
    });
}

pub(crate) fn start_run(terms: RunTerms) {
    assert_ok!(Training::create_run(signed(&coordinator()), RUN, terms, BUDGET));
    for index in 0..3 {
        assert_ok!(Training::register_verifier(signed(&verifier(index)), RUN));
    }
    for worker in [alice(), bob()] {
        register(&worker, STAKE);
        assert_ok!(Training::join_run(signed(&worker), RUN));
    }
}

pub(crate) fn register(who: &AccountId, stake: Balance) {
    let peer_id = BoundedVec::truncate_from(vec![1, 2, 3]);
    assert_ok!(Training::register_worker(signed(who), peer_id, [1; 32], stake));
}

pub(crate) fn check_invariants() {
    if let Err(broken) = Pallet::<Test>::do_try_state() {
        panic!("invariant broken: {broken:?}");
    }
}

pub(crate) fn advance(blocks: BlockNumber) {
    System::set_block_number(System::block_number() + blocks);
}

pub(crate) fn last_events(count: usize) -> Vec<Event<Test>> {
    let events: Vec<_> = System::events()
        .into_iter()
        .filter_map(|record| match record.event {
            RuntimeEvent::Training(event) => Some(event),
            RuntimeEvent::System(_) | RuntimeEvent::Balances(_) => None,
        })
        .collect();
    events[events.len().saturating_sub(count)..].to_vec()
}

/// Free planck of an account.
pub(crate) fn free(who: &AccountId) -> Balance {
    Balances::free_balance(who)
}

/// The leaves of a round, as the coordinator computes them: cumulative planck by account.
pub(crate) struct Leaves {
    leaves: Vec<RewardLeaf>,
}

impl Leaves {
    pub(crate) fn new(round: Round, rewards: &[(AccountId, Balance)]) -> Self {
        let ordered: BTreeMap<_, _> = rewards.iter().cloned().collect();
        let leaves = ordered
            .into_iter()
            .map(|(worker, cumulative_reward)| RewardLeaf {
                genesis_hash: System::block_hash(0).0,
                run: RUN,
                round,
                worker: *worker.as_ref(),
                work_units: 1,
                cumulative_reward,
                evidence_digest: [round as u8; 32],
            })
            .collect();
        Self { leaves }
    }

    pub(crate) fn hashes(&self) -> Vec<[u8; 32]> {
        self.leaves.iter().map(RewardLeaf::hash).collect()
    }

    pub(crate) fn commitment(&self, first_round: Round, work_units: u64) -> RoundCommitment {
        RoundCommitment {
            first_round,
            last_round: self.leaves[0].round,
            contributions_root: merkle_root(&self.hashes()),
            number_of_leaves: self.leaves.len() as u32,
            theta_digest: [3; 32],
            work_units,
            total_reward: self.leaves.iter().map(|leaf| leaf.cumulative_reward).sum(),
            evidence_digest: [4; 32],
        }
    }

    pub(crate) fn proof(&self, who: &AccountId) -> (RewardLeaf, u32, crate::Siblings) {
        let position = self
            .leaves
            .iter()
            .position(|leaf| leaf.worker == *AsRef::<[u8; 32]>::as_ref(who))
            .expect("the account has a leaf");
        let siblings = merkle_proof(&self.hashes(), position as u32).expect("the leaf exists");
        (self.leaves[position].clone(), position as u32, BoundedVec::truncate_from(siblings))
    }

    pub(crate) fn claim(&self, who: &AccountId) -> frame_support::dispatch::DispatchResult {
        let (leaf, index, siblings) = self.proof(who);
        Training::claim_reward(signed(&anybody()), leaf, index, siblings)
    }
}

/// Commits one round with these cumulative rewards; 100 units pay for up to 1,000 planck of it.
pub(crate) fn commit(round: Round, rewards: &[(AccountId, Balance)]) -> Leaves {
    let leaves = Leaves::new(round, rewards);
    let commitment = leaves.commitment(round, 100);
    assert_ok!(Training::commit_round(signed(&coordinator()), RUN, commitment));
    leaves
}

/// Commits a round and makes it final after its window.
pub(crate) fn commit_and_finalize(round: Round, rewards: &[(AccountId, Balance)]) -> Leaves {
    let leaves = commit(round, rewards);
    advance(5);
    assert_ok!(Training::finalize_round(signed(&anybody()), RUN, round));
    leaves
}

pub(crate) fn anchor(round: Round) {
    assert_ok!(Training::anchor_commitments(
        signed(&coordinator()),
        RUN,
        round,
        Stage::Commit,
        [round as u8; 32]
    ));
}

/// The owner says that a worker's replay of that round ended elsewhere.
pub(crate) fn report(worker: &AccountId, round: Round) -> frame_support::dispatch::DispatchResult {
    let evidence = [5; 32];
    Training::report_fault(
        signed(&coordinator()),
        RUN,
        worker.clone(),
        round,
        FaultKind::Replay,
        evidence,
    )
}
