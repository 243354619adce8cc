//! What an auditor asks of a node. Values come with proofs, so the node need not be trusted for them;
//! its word is taken for which block is final, and for which entries there are to ask for.

use std::future::Future;

use manyhands_chain_client::{BlockRef, ChainClient, ReadError, ReadProof, StorageKey};
use manyhands_proto::{Digest, NodeId, Round, RunId};
use manyhands_rules::record::FalseEnd;

/// The chain, as far as an audit needs it.
pub trait ChainView: Sync {
    fn genesis_hash(&self) -> Digest;

    /// The newest finalised block.
    fn finalized_head(&self) -> impl Future<Output = Result<BlockRef, ReadError>> + Send;

    /// The hash of the finalised block `number`; none if there is none yet.
    fn block_hash(
        &self,
        number: u32,
    ) -> impl Future<Output = Result<Option<Digest>, ReadError>> + Send;

    /// A proof of what the state after `block` holds under `keys`.
    fn read_proof(
        &self,
        keys: &[StorageKey],
        block: &Digest,
    ) -> impl Future<Output = Result<ReadProof, ReadError>> + Send;

    /// Worker and round of every fault of the run that the state after `block` holds.
    fn accused(
        &self,
        run: &RunId,
        block: &Digest,
    ) -> impl Future<Output = Result<Vec<(NodeId, Round)>, ReadError>> + Send;

    /// Of which replays the state after `block` holds that they were made up.
    fn accused_verifiers(
        &self,
        run: &RunId,
        block: &Digest,
    ) -> impl Future<Output = Result<Vec<FalseEnd>, ReadError>> + Send;

    /// Every account that the run has paid, after `block`.
    fn paid(
        &self,
        run: &RunId,
        block: &Digest,
    ) -> impl Future<Output = Result<Vec<NodeId>, ReadError>> + Send;
}

impl ChainView for ChainClient {
    fn genesis_hash(&self) -> Digest {
        Self::genesis_hash(self)
    }

    async fn finalized_head(&self) -> Result<BlockRef, ReadError> {
        Self::finalized_head(self).await
    }

    async fn block_hash(&self, number: u32) -> Result<Option<Digest>, ReadError> {
        Self::block_hash(self, number).await
    }

    async fn read_proof(
        &self,
        keys: &[StorageKey],
        block: &Digest,
    ) -> Result<ReadProof, ReadError> {
        Self::read_proof(self, keys, block).await
    }

    async fn accused(
        &self,
        run: &RunId,
        block: &Digest,
    ) -> Result<Vec<(NodeId, Round)>, ReadError> {
        let faults = self.state_at(block).await?.faults(run).await?;
        Ok(faults.into_iter().map(|(accused, _)| accused).collect())
    }

    async fn accused_verifiers(
        &self,
        run: &RunId,
        block: &Digest,
    ) -> Result<Vec<FalseEnd>, ReadError> {
        let faults = self.state_at(block).await?.verifier_faults(run).await?;
        let end = |((verifier, worker, round), _)| FalseEnd { round, worker, verifier };
        Ok(faults.into_iter().map(end).collect())
    }

    async fn paid(&self, run: &RunId, block: &Digest) -> Result<Vec<NodeId>, ReadError> {
        let claims = self.state_at(block).await?.claims(run).await?;
        Ok(claims.into_iter().map(|(account, _)| account).collect())
    }
}
