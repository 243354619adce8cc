//! A chain in memory: entries with real SCALE bytes in a real trie, and a header over its root.

use std::collections::BTreeMap;

use codec::Encode;
use manyhands_audit::ChainView;
use manyhands_chain_client::types::{RunTerms, Stage};
use manyhands_chain_client::{BlockRef, ReadError, ReadProof, StorageKey};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, RunId};
use manyhands_rules::record::FalseEnd;
use sp_core::storage::StateVersion;
use sp_core::{H256, Hasher};
use sp_runtime::generic;
use sp_runtime::traits::BlakeTwo256;
use sp_state_machine::prove_read;

/// The audited block: later than everything.
const HEAD: u32 = 10_000;

/// More than anybody earns.
const FUNDED: u128 = 1_000_000_000_000_000;

#[derive(Debug, Clone)]
pub(crate) struct Commit {
    pub(crate) first_round: u32,
    pub(crate) last_round: u32,
    pub(crate) root: [u8; 32],
    pub(crate) leaves: u32,
    pub(crate) theta: Digest,
    pub(crate) work: u64,
    pub(crate) total: u128,
    pub(crate) evidence: Digest,
    pub(crate) finalized: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Fault {
    /// Replay 0, codec 1.
    pub(crate) kind: u8,
    pub(crate) evidence: Digest,
    /// None if the fault was dismissed.
    pub(crate) slashed: Option<u128>,
}

/// What the pallet would hold, kept apart so that a test can change any of it before it is sealed.
#[derive(Debug, Clone)]
pub(crate) struct TestChain {
    pub(crate) run: RunId,
    pub(crate) owner: NodeId,
    pub(crate) terms: RunTerms,
    pub(crate) now: u32,
    pub(crate) anchors: BTreeMap<(u32, Stage), (Digest, u32)>,
    pub(crate) commits: BTreeMap<u32, Commit>,
    pub(crate) faults: BTreeMap<(NodeId, u32), Fault>,
    /// With the evidence.
    pub(crate) slashed_verifiers: Vec<(FalseEnd, Digest)>,
    pub(crate) claims: BTreeMap<NodeId, u128>,
    pub(crate) escrow: u128,
    pub(crate) funded: u128,
    pub(crate) final_theta: Option<Digest>,
    /// A bit of a proof's nodes is changed.
    pub(crate) forged_proof: bool,
    /// The node names another block as the finalised one of the head's number.
    pub(crate) other_head: bool,
}

impl TestChain {
    pub(crate) const GENESIS: Digest = Digest::new([7; 32]);

    pub(crate) fn new(run: RunId, owner: NodeId, spec: &RunSpec) -> Self {
        Self {
            run,
            owner,
            terms: RunTerms::of(spec),
            now: 10,
            anchors: BTreeMap::new(),
            commits: BTreeMap::new(),
            faults: BTreeMap::new(),
            slashed_verifiers: Vec::new(),
            claims: BTreeMap::new(),
            escrow: FUNDED,
            funded: FUNDED,
            final_theta: None,
            forged_proof: false,
            other_head: false,
        }
    }

    pub(crate) fn hash_of(number: u32) -> Digest {
        Digest::of(format!("block {number}").as_bytes())
    }

    pub(crate) fn anchor(&mut self, round: Round, stage: Stage, digest: Digest) -> u32 {
        self.now += 1;
        self.anchors.entry((round.0, stage)).or_insert((digest, self.now)).1
    }

    pub(crate) fn next_round(&self) -> u32 {
        self.commits.keys().next_back().map_or(0, |last| last + 1)
    }

    pub(crate) fn finalized_reward(&self) -> u128 {
        let finals = self.commits.values().filter(|commit| commit.finalized);
        finals.map(|commit| commit.total).max().unwrap_or(0)
    }

    fn run_bytes(&self) -> Vec<u8> {
        let mut bytes = self.owner.as_bytes().encode();
        bytes.extend(terms_bytes(&self.terms));
        match self.final_theta {
            None => bytes.push(0),
            Some(theta) => bytes.extend((2_u8, 0_u8, theta.as_bytes(), 1_u32, 2_u32).encode()),
        }
        let claimed: u128 = self.claims.values().sum();
        bytes.extend((self.escrow, self.funded, self.funded, 0_u128, 0_u128, claimed).encode());
        let reward = self.finalized_reward();
        bytes.extend((reward, (reward, reward), 1_u128, 1_u128, 1_u32, self.next_round()).encode());
        bytes.extend((Vec::<u32>::new(), None::<u32>, 0_u32, 1_u32).encode());
        bytes
    }

    fn entries(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let run = &self.run;
        let mut entries = BTreeMap::from([(StorageKey::run(run).0, self.run_bytes())]);
        for (&(round, stage), (digest, block)) in &self.anchors {
            let key = StorageKey::anchor(run, Round(round), stage);
            entries.insert(key.0, (digest.as_bytes(), block).encode());
        }
        for (&round, c) in &self.commits {
            let commitment = (c.first_round, c.last_round, c.root, c.leaves, c.theta.as_bytes());
            let totals = (c.work, c.total, c.evidence.as_bytes(), 0_u128, 0_u128);
            let state = if c.finalized { 2_u8 } else { 0 };
            let rest = (1_u32, HEAD + 9, Vec::<[u8; 32]>::new(), state);
            entries.insert(
                StorageKey::round(run, Round(round)).0,
                (commitment, totals, rest).encode(),
            );
        }
        let votes = (Vec::<[u8; 32]>::new(), Vec::<[u8; 32]>::new());
        for ((worker, round), fault) in &self.faults {
            let opened = (fault.kind, fault.evidence.as_bytes(), 1_u128, 3_u32);
            let state = match fault.slashed {
                Some(slashed) => (2_u8, slashed).encode(),
                None => 3_u8.encode(),
            };
            let mut bytes = (opened, &votes, 1_u32).encode();
            bytes.extend(state);
            let key = StorageKey::fault(run, worker, Round(*round));
            entries.insert(key.0, bytes);
        }
        for (end, evidence) in &self.slashed_verifiers {
            let mut bytes = ((evidence.as_bytes(), 1_u128, 2_u32), &votes, 1_u32).encode();
            bytes.extend((2_u8, 100_u128).encode());
            let key = StorageKey::verifier_fault(run, &end.verifier, &end.worker, end.round);
            entries.insert(key.0, bytes);
        }
        for (account, claim) in &self.claims {
            entries.insert(StorageKey::claimed(run, account).0, claim.encode());
        }
        entries
    }

    fn state(&self) -> sp_state_machine::InMemoryBackend<BlakeTwo256> {
        let entries = self.entries().into_iter().map(|(key, value)| (key, Some(value))).collect();
        let mut state = sp_state_machine::new_in_mem::<BlakeTwo256>();
        state.insert([(None, entries)], StateVersion::V1);
        state
    }

    fn header(&self) -> Vec<u8> {
        let root = *self.state().root();
        let (parent, extrinsics) = (H256([1; 32]), H256([2; 32]));
        generic::Header::<u32, BlakeTwo256> {
            parent_hash: parent,
            number: HEAD,
            state_root: root,
            extrinsics_root: extrinsics,
            digest: Default::default(),
        }
        .encode()
    }

    fn head(&self) -> Digest {
        Digest::new(BlakeTwo256::hash(&self.header()).0)
    }
}

fn terms_bytes(terms: &RunTerms) -> Vec<u8> {
    let RunTerms { slashes, .. } = terms;
    let mut bytes = (
        terms.config_digest.as_bytes(),
        terms.price_per_unit.0,
        terms.vesting_rounds,
        terms.challenge_window,
        terms.contest_window,
        terms.resolution_window,
        terms.claim_window,
        terms.idle_timeout,
        terms.unbonding_period,
    )
        .encode();
    let bonds = (terms.coordinator_bond.0, terms.verifier_bond.0, terms.contest_bond.0);
    let verifiers: Vec<[u8; 32]> = terms.verifiers.iter().map(|who| *who.as_bytes()).collect();
    let quorums = (terms.attestation_quorum, terms.fault_quorum);
    bytes.extend(
        (terms.minimum_stake.0, bonds, terms.challenge_bond.0, verifiers, quorums).encode(),
    );
    let of_workers =
        (slashes.replay.0, slashes.codec.0, slashes.withheld.0, slashes.equivocation.0);
    bytes.extend((of_workers, slashes.coordinator.0, slashes.reporter_share).encode());
    bytes
}

impl ChainView for TestChain {
    fn genesis_hash(&self) -> Digest {
        Self::GENESIS
    }

    async fn finalized_head(&self) -> Result<BlockRef, ReadError> {
        Ok(BlockRef { number: HEAD, hash: self.head() })
    }

    async fn block_hash(&self, number: u32) -> Result<Option<Digest>, ReadError> {
        Ok(match number {
            HEAD if !self.other_head => Some(self.head()),
            1..=HEAD => Some(Self::hash_of(number)),
            _ => None,
        })
    }

    async fn read_proof(&self, keys: &[StorageKey], _: &Digest) -> Result<ReadProof, ReadError> {
        let proof = prove_read(self.state(), keys.iter().map(|key| &key.0)).expect("entries prove");
        let mut nodes: Vec<Vec<u8>> = proof.iter_nodes().cloned().collect();
        if self.forged_proof {
            *nodes[0].last_mut().expect("a node has bytes") ^= 1;
        }
        Ok(ReadProof { header: self.header(), nodes })
    }

    async fn accused(&self, _: &RunId, _: &Digest) -> Result<Vec<(NodeId, Round)>, ReadError> {
        Ok(self.faults.keys().map(|&(worker, round)| (worker, Round(round))).collect())
    }

    async fn accused_verifiers(&self, _: &RunId, _: &Digest) -> Result<Vec<FalseEnd>, ReadError> {
        Ok(self.slashed_verifiers.iter().map(|(end, _)| *end).collect())
    }

    async fn paid(&self, _: &RunId, _: &Digest) -> Result<Vec<NodeId>, ReadError> {
        Ok(self.claims.keys().copied().collect())
    }
}
