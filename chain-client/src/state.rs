//! Reading the chain's state, all of it as of one block.

use futures::StreamExt;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use sp_crypto_hashing::{blake2_128, twox_128};
use subxt::storage::{Address, PrefixOf};

use crate::chain;
use crate::client::{AtBlock, BlockRef, ChainClient, ReadError, answer};
use crate::proof::StorageKey;
use crate::signer::{account, node};
use crate::types::{
    Anchor, Challenge, Convert, Fault, Forfeit, RoundRecord, Run, Stage, Suspension, Verifier,
    VerifierFault, Worker, generated,
};

/// What an account has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AccountBalance {
    /// Can be spent, but for the existential deposit.
    pub free: Balance,
    /// On hold: stakes, bonds, deposits.
    pub held: Balance,
}

/// The chain's state after one finalised block.
pub struct ChainState {
    at: AtBlock,
    block: BlockRef,
}

impl ChainClient {
    /// The state after the newest finalised block.
    pub async fn state(&self) -> Result<ChainState, ReadError> {
        ChainState::new(self.at_head().await?)
    }

    /// The state after the block with this hash, however old.
    pub async fn state_at(&self, block: &Digest) -> Result<ChainState, ReadError> {
        ChainState::new(self.at(Some(*block)).await?)
    }

    /// What an account has, after the newest finalised block. An account that never had anything
    /// has nothing.
    pub async fn balance(&self, account: &NodeId) -> Result<AccountBalance, ReadError> {
        self.state().await?.balance(account).await
    }
}

impl ChainState {
    fn new(at: AtBlock) -> Result<Self, ReadError> {
        let number = u32::try_from(at.block_number()).map_err(|_| ReadError::Undecodable {
            what: "a block number",
            reason: format!("{} is over 32 bits", at.block_number()),
        })?;
        let block = BlockRef { number, hash: Digest::new(at.block_hash().0) };
        Ok(Self { at, block })
    }

    /// The block that this is the state after.
    pub fn block(&self) -> BlockRef {
        self.block
    }

    pub async fn balance(&self, of: &NodeId) -> Result<AccountBalance, ReadError> {
        let entry = chain::storage().system().account();
        let Some(info) = self.fetch(entry, (account(of),)).await? else {
            return Ok(AccountBalance::default());
        };
        Ok(AccountBalance { free: Balance(info.data.free), held: Balance(info.data.reserved) })
    }

    pub async fn run(&self, run: &RunId) -> Result<Option<Run>, ReadError> {
        let found = self.fetch(chain::storage().training().runs(), (*run.as_bytes(),)).await?;
        Ok(found.map(Run::convert))
    }

    pub async fn worker(&self, worker: &NodeId) -> Result<Option<Worker>, ReadError> {
        let found = self.fetch(chain::storage().training().workers(), (account(worker),)).await?;
        Ok(found.map(Worker::convert))
    }

    pub async fn verifier(
        &self,
        run: &RunId,
        verifier: &NodeId,
    ) -> Result<Option<Verifier>, ReadError> {
        let keys = (*run.as_bytes(), account(verifier));
        let found = self.fetch(chain::storage().training().verifiers(), keys).await?;
        Ok(found.map(Verifier::convert))
    }

    /// The commit whose last round is `round`.
    pub async fn round(&self, run: &RunId, round: Round) -> Result<Option<RoundRecord>, ReadError> {
        let keys = (*run.as_bytes(), round.0);
        let found = self.fetch(chain::storage().training().rounds(), keys).await?;
        Ok(found.map(RoundRecord::convert))
    }

    /// The run's commits by their last rounds, in order.
    pub async fn rounds(&self, run: &RunId) -> Result<Vec<(Round, RoundRecord)>, ReadError> {
        let all = self.collect(chain::storage().training().rounds(), (*run.as_bytes(),)).await?;
        Ok(sorted(
            all.into_iter().map(|((_, round), value)| (Round(round), RoundRecord::convert(value))),
        ))
    }

    pub async fn anchor(
        &self,
        run: &RunId,
        round: Round,
        stage: Stage,
    ) -> Result<Option<Anchor>, ReadError> {
        let keys = (*run.as_bytes(), (round.0, Convert::convert(stage)));
        let found = self.fetch(chain::storage().training().anchors(), keys).await?;
        Ok(found.map(Anchor::convert))
    }

    /// The open challenge of the commit whose last round is `round`.
    pub async fn challenge(
        &self,
        run: &RunId,
        round: Round,
    ) -> Result<Option<Challenge>, ReadError> {
        let keys = (*run.as_bytes(), round.0);
        let found = self.fetch(chain::storage().training().challenges(), keys).await?;
        Ok(found.map(Challenge::convert))
    }

    pub async fn fault(
        &self,
        run: &RunId,
        worker: &NodeId,
        round: Round,
    ) -> Result<Option<Fault>, ReadError> {
        let keys = (*run.as_bytes(), (account(worker), round.0));
        let found = self.fetch(chain::storage().training().faults(), keys).await?;
        Ok(found.map(Fault::convert))
    }

    /// The run's faults, open and decided, in order of worker and round.
    pub async fn faults(&self, run: &RunId) -> Result<Vec<((NodeId, Round), Fault)>, ReadError> {
        let all = self.collect(chain::storage().training().faults(), (*run.as_bytes(),)).await?;
        Ok(sorted(all.into_iter().map(|((_, (worker, round)), value)| {
            ((node(&worker), Round(round)), Fault::convert(value))
        })))
    }

    /// What `verifier` is said to have said wrongly about its replay of `worker`'s `round`. `None`:
    /// nobody said so.
    ///
    /// # Errors
    /// A node that does not answer, or whose answer is not what its metadata says.
    pub async fn verifier_fault(
        &self,
        run: &RunId,
        verifier: &NodeId,
        worker: &NodeId,
        round: Round,
    ) -> Result<Option<VerifierFault>, ReadError> {
        let keys = (*run.as_bytes(), (account(verifier), account(worker), round.0));
        let found = self.fetch(chain::storage().training().verifier_faults(), keys).await?;
        Ok(found.map(VerifierFault::convert))
    }

    /// The faults of the run's verifiers, open and decided, in order of verifier, worker and round.
    ///
    /// # Errors
    /// As for [`ChainState::verifier_fault`].
    pub async fn verifier_faults(
        &self,
        run: &RunId,
    ) -> Result<Vec<((NodeId, NodeId, Round), VerifierFault)>, ReadError> {
        let entry = chain::storage().training().verifier_faults();
        let all = self.collect(entry, (*run.as_bytes(),)).await?;
        Ok(sorted(all.into_iter().map(|((_, (verifier, worker, round)), value)| {
            ((node(&verifier), node(&worker), Round(round)), VerifierFault::convert(value))
        })))
    }

    /// The leaves that a slashed worker cannot claim with.
    pub async fn forfeit(
        &self,
        run: &RunId,
        worker: &NodeId,
    ) -> Result<Option<Forfeit>, ReadError> {
        let keys = (*run.as_bytes(), account(worker));
        let found = self.fetch(chain::storage().training().forfeits(), keys).await?;
        Ok(found.map(Forfeit::convert))
    }

    /// What a worker's undecided faults hold back.
    pub async fn suspension(
        &self,
        run: &RunId,
        worker: &NodeId,
    ) -> Result<Option<Suspension>, ReadError> {
        let keys = (*run.as_bytes(), account(worker));
        let found = self.fetch(chain::storage().training().suspensions(), keys).await?;
        Ok(found.map(Suspension::convert))
    }

    /// What of the worker's stake answers to runs beside `run`: the minimum stakes of all that a
    /// fault can still reach it from.
    pub async fn pledged(&self, worker: &Worker, run: &RunId) -> Result<Balance, ReadError> {
        let mut sum = 0_u128;
        for membership in worker.memberships.iter().filter(|membership| membership.run != *run) {
            let Some(other) = self.run(&membership.run).await? else { continue };
            if membership.is_exposed(&other.state, self.block.number) {
                sum = sum.saturating_add(other.terms.minimum_stake.0);
            }
        }
        Ok(Balance(sum))
    }

    /// All that the run has paid to an account.
    pub async fn claimed(&self, run: &RunId, worker: &NodeId) -> Result<Balance, ReadError> {
        let keys = (*run.as_bytes(), account(worker));
        let found = self.fetch(chain::storage().training().claimed(), keys).await?;
        Ok(Balance(found.unwrap_or(0)))
    }

    /// All that the run has paid, by account, in the order of their ids.
    pub async fn claims(&self, run: &RunId) -> Result<Vec<(NodeId, Balance)>, ReadError> {
        let all = self.collect(chain::storage().training().claimed(), (*run.as_bytes(),)).await?;
        Ok(sorted(all.into_iter().map(|((_, who), amount)| (node(&who), Balance(amount)))))
    }

    async fn fetch<A: Address>(
        &self,
        entry: A,
        keys: A::KeyParts,
    ) -> Result<Option<A::Value>, ReadError> {
        let found = answer(self.at.storage().try_fetch(entry, keys)).await?;
        found.map(|value| value.decode().map_err(undecodable)).transpose()
    }

    async fn collect<A: Address, K: PrefixOf<A::KeyParts>>(
        &self,
        entry: A,
        keys: K,
    ) -> Result<Vec<(A::KeyParts, A::Value)>, ReadError>
    where
        A::KeyParts: subxt::ext::frame_decode::storage::IntoDecodableValues,
    {
        let mut entries = answer(self.at.storage().iter(entry, keys)).await?;
        let mut all = Vec::new();
        while let Some(entry) = answer(next_of(&mut entries)).await? {
            let keys = entry.key().map_err(undecodable)?.decode().map_err(undecodable)?;
            all.push((keys, entry.value().decode().map_err(undecodable)?));
        }
        Ok(all)
    }
}

/// The next of a stream of results, as a result of an option.
async fn next_of<T, E>(
    stream: &mut (impl futures::Stream<Item = Result<T, E>> + Unpin),
) -> Result<Option<T>, E> {
    stream.next().await.transpose()
}

fn sorted<K: Ord, V>(entries: impl Iterator<Item = (K, V)>) -> Vec<(K, V)> {
    let mut all: Vec<_> = entries.collect();
    all.sort_by(|(left, _), (right, _)| left.cmp(right));
    all
}

fn undecodable(reason: impl std::fmt::Display) -> ReadError {
    ReadError::Undecodable { what: "a storage value", reason: reason.to_string() }
}

/// Keys of the training pallet's entries, for proofs. Every map hashes its keys with
/// `Blake2_128Concat`: the BLAKE2b-128 of the key's SCALE bytes, then those bytes.
impl StorageKey {
    pub fn run(run: &RunId) -> Self {
        Self::entry("Runs", &[run.as_bytes()])
    }

    /// The commit whose last round is `round`.
    pub fn round(run: &RunId, round: Round) -> Self {
        Self::entry("Rounds", &[run.as_bytes(), &round.0.to_le_bytes()])
    }

    pub fn anchor(run: &RunId, round: Round, stage: Stage) -> Self {
        let stage: generated::Stage = Convert::convert(stage);
        let mut key = round.0.to_le_bytes().to_vec();
        codec::Encode::encode_to(&stage, &mut key);
        Self::entry("Anchors", &[run.as_bytes(), &key])
    }

    pub fn fault(run: &RunId, worker: &NodeId, round: Round) -> Self {
        let key = [worker.as_bytes().as_slice(), &round.0.to_le_bytes()].concat();
        Self::entry("Faults", &[run.as_bytes(), &key])
    }

    /// Of what `verifier` said about `worker`'s `round`.
    pub fn verifier_fault(run: &RunId, verifier: &NodeId, worker: &NodeId, round: Round) -> Self {
        let accounts = [verifier.as_bytes().as_slice(), worker.as_bytes()].concat();
        let key = [accounts.as_slice(), &round.0.to_le_bytes()].concat();
        Self::entry("VerifierFaults", &[run.as_bytes(), &key])
    }

    /// SCALE of a `u128`; no value means nothing was paid.
    pub fn claimed(run: &RunId, worker: &NodeId) -> Self {
        Self::entry("Claimed", &[run.as_bytes(), worker.as_bytes()])
    }

    fn entry(name: &str, keys: &[&[u8]]) -> Self {
        let mut key = twox_128(b"Training").to_vec();
        key.extend_from_slice(&twox_128(name.as_bytes()));
        for part in keys {
            key.extend_from_slice(&blake2_128(part));
            key.extend_from_slice(part);
        }
        Self(key)
    }
}
