//! What the chain holds of a run after one finalised block, every value proven against that block.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_chain_client::types::{
    Anchor, Fault, RoundRecord as Commit, RoundState, Run, RunState, Stage, VerifierFault,
};
use manyhands_chain_client::{BlockRef, ReadError, StorageKey, VerifyProofError};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::record::FalseEnd;

use crate::chain_view::ChainView;
use crate::report::{Findings, Link};

/// Keys of one proof: its answer stays far below what a node sends at once.
const KEYS_PER_PROOF: usize = 256;

/// The audited state. Entries that are not there are not in the maps.
#[derive(Debug)]
pub(crate) struct OnChain {
    pub(crate) genesis: Digest,
    pub(crate) head: BlockRef,
    pub(crate) run: Run,
    /// By their last rounds.
    pub(crate) commits: BTreeMap<Round, Commit>,
    pub(crate) anchors: BTreeMap<(Round, Stage), Anchor>,
    pub(crate) faults: BTreeMap<(NodeId, Round), Fault>,
    pub(crate) verifier_faults: BTreeMap<FalseEnd, VerifierFault>,
    pub(crate) claims: BTreeMap<NodeId, Balance>,
}

impl OnChain {
    /// Commits that were not rejected, in order.
    pub(crate) fn standing(&self) -> impl Iterator<Item = &Commit> {
        self.commits.values().filter(|commit| !matches!(commit.state, RoundState::Rejected(_)))
    }

    /// Whether entries may have been cleared away.
    pub(crate) fn is_settled(&self) -> bool {
        self.run.state == RunState::Settled
    }
}

/// Reads and proves, noting every proof.
pub(crate) struct Reader<'a, C> {
    pub(crate) chain: &'a C,
    pub(crate) run: RunId,
    head: BlockRef,
}

/// Why a state could not be proven: what is wrong is among the findings.
pub(crate) enum Stopped {
    Found,
    Unanswered(ReadError),
}

impl From<ReadError> for Stopped {
    fn from(error: ReadError) -> Self {
        Self::Unanswered(error)
    }
}

impl<'a, C: ChainView> Reader<'a, C> {
    pub(crate) async fn at_head(chain: &'a C, run: RunId) -> Result<Self, ReadError> {
        let head = chain.finalized_head().await?;
        Ok(Self { chain, run, head })
    }

    /// The run alone: what else there is to read depends on whether it is the one to be audited.
    pub(crate) async fn run(&self, findings: &mut Findings) -> Result<OnChain, Stopped> {
        let head = self.head;
        let canonical = self.chain.block_hash(head.number).await?;
        findings.require(
            Link::Finality.of_run(),
            canonical == Some(head.hash),
            || format!("block {} as the finalised block {}", head.hash, head.number),
            || canonical.map_or("none".to_owned(), |hash| hash.to_string()),
        );
        let key = [StorageKey::run(&self.run)];
        let found = self.prove(findings, &key).await?.pop().flatten();
        let run = match found.as_deref().map(Run::from_state) {
            Some(Ok(run)) => run,
            Some(Err(error)) => return Err(broken(findings, &error.to_string())),
            None => {
                let expected = format!("run {} on chain", self.run);
                findings.failed(Link::Specification.of_run(), expected, "no such run");
                return Err(Stopped::Found);
            }
        };
        Ok(OnChain {
            genesis: self.chain.genesis_hash(),
            head,
            run,
            commits: BTreeMap::new(),
            anchors: BTreeMap::new(),
            faults: BTreeMap::new(),
            verifier_faults: BTreeMap::new(),
            claims: BTreeMap::new(),
        })
    }

    /// Adds the commits, of which none can be of a round from `rounds_max` on. The chain lets a
    /// coordinator commit any number of rounds at once: believing it would exhaust the memory.
    pub(crate) async fn commits(
        &self,
        findings: &mut Findings,
        on_chain: &mut OnChain,
        rounds_max: u32,
    ) -> Result<(), Stopped> {
        let next = on_chain.run.next_round;
        if next.0 > rounds_max {
            let expected = format!("commits of at most {rounds_max} rounds");
            let found = format!("{next} committed rounds");
            findings.failed(Link::RecordChain.of_run(), expected, found);
            return Err(Stopped::Found);
        }
        let rounds: Vec<Round> = (0..next.0).map(Round).collect();
        let key = |round: &Round| StorageKey::round(&self.run, *round);
        on_chain.commits = self.read_all(findings, &rounds, key, Commit::from_state).await?;
        Ok(())
    }

    /// Adds the anchors of `rounds`, the faults (those on record among them) and the claims.
    pub(crate) async fn complete(
        &self,
        findings: &mut Findings,
        on_chain: &mut OnChain,
        rounds: &[Round],
        recorded_faults: impl Iterator<Item = (NodeId, Round)>,
    ) -> Result<(), Stopped> {
        let run = self.run;
        let stages: Vec<(Round, Stage)> = rounds
            .iter()
            .flat_map(|&round| [(round, Stage::Commit), (round, Stage::Admitted)])
            .collect();
        let key = |(round, stage): &(Round, Stage)| StorageKey::anchor(&run, *round, *stage);
        on_chain.anchors = self.read_all(findings, &stages, key, Anchor::from_state).await?;

        let accused = self.chain.accused(&run, &self.head.hash).await?;
        let accused: BTreeSet<_> = accused.into_iter().chain(recorded_faults).collect();
        let accused: Vec<_> = accused.into_iter().collect();
        let key = |(worker, round): &(NodeId, Round)| StorageKey::fault(&run, worker, *round);
        on_chain.faults = self.read_all(findings, &accused, key, Fault::from_state).await?;

        let accused = self.chain.accused_verifiers(&run, &self.head.hash).await?;
        let key = |end: &FalseEnd| {
            StorageKey::verifier_fault(&run, &end.verifier, &end.worker, end.round)
        };
        on_chain.verifier_faults =
            self.read_all(findings, &accused, key, VerifierFault::from_state).await?;

        let paid = self.chain.paid(&run, &self.head.hash).await?;
        let key = |account: &NodeId| StorageKey::claimed(&run, account);
        on_chain.claims = self.read_all(findings, &paid, key, balance).await?;
        Ok(())
    }

    async fn read_all<K: Ord + Copy, V, E: std::fmt::Display>(
        &self,
        findings: &mut Findings,
        entries: &[K],
        key: impl Fn(&K) -> StorageKey,
        decode: impl Fn(&[u8]) -> Result<V, E>,
    ) -> Result<BTreeMap<K, V>, Stopped> {
        let mut values = BTreeMap::new();
        for entries in entries.chunks(KEYS_PER_PROOF) {
            let keys: Vec<_> = entries.iter().map(&key).collect();
            let proven = self.prove(findings, &keys).await?;
            for (&entry, bytes) in entries.iter().zip(proven) {
                let Some(bytes) = bytes else { continue };
                match decode(&bytes) {
                    Ok(value) => _ = values.insert(entry, value),
                    Err(error) => return Err(broken(findings, &error.to_string())),
                }
            }
        }
        Ok(values)
    }

    async fn prove(
        &self,
        findings: &mut Findings,
        keys: &[StorageKey],
    ) -> Result<Vec<Option<Vec<u8>>>, Stopped> {
        let proof = self.chain.read_proof(keys, &self.head.hash).await?;
        match proof.verify(&self.head.hash, keys) {
            Ok((_, values)) => {
                findings.passed(Link::StorageProof.of_run());
                Ok(values)
            }
            Err(error @ (VerifyProofError::Header | VerifyProofError::OtherBlock { .. })) => {
                let expected = format!("the header of finalised block {}", self.head.number);
                findings.failed(Link::Finality.of_run(), expected, error.to_string());
                Err(Stopped::Found)
            }
            Err(
                error @ (VerifyProofError::TooManyNodes { .. } | VerifyProofError::Broken { .. }),
            ) => Err(broken(findings, &error.to_string())),
        }
    }
}

fn broken(findings: &mut Findings, found: &str) -> Stopped {
    findings.failed(Link::StorageProof.of_run(), "values that the state root proves", found);
    Stopped::Found
}

/// SCALE of a `u128`: 16 bytes, little-endian.
fn balance(bytes: &[u8]) -> Result<Balance, String> {
    let bytes: [u8; 16] =
        bytes.try_into().map_err(|_| format!("expected 16 bytes, got {}", bytes.len()))?;
    Ok(Balance(u128::from_le_bytes(bytes)))
}
