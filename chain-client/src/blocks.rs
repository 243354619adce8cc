//! Following finalised blocks: each one, once, in order, through lost connections.

use std::time::Duration;

use manyhands_proto::Digest;
use subxt::rpcs::client::RpcSubscription;

use crate::client::{BlockRef, ChainClient, Header, ReadError, answer};

/// Without news for so long the node is asked directly: a subscription can die unnoticed.
const NEWS_TIMEOUT: Duration = Duration::from_secs(20);

/// Finalised blocks from some number on.
pub struct FinalizedBlocks {
    client: ChainClient,
    next: u32,
    /// The newest finalised block known.
    head: Option<u32>,
    news: Option<RpcSubscription<Header>>,
}

impl ChainClient {
    /// Follows finalised blocks, beginning with the newest.
    pub async fn watch_finalized(&self) -> Result<FinalizedBlocks, ReadError> {
        let head = self.finalized_head().await?;
        Ok(self.watch_finalized_from(head.number))
    }

    /// Follows finalised blocks, beginning with `number`, past or future.
    pub fn watch_finalized_from(&self, number: u32) -> FinalizedBlocks {
        FinalizedBlocks { client: self.clone(), next: number, head: None, news: None }
    }
}

impl FinalizedBlocks {
    /// Waits for the next block. None is left out and none comes twice, also where the connection
    /// was lost in between. After an error the same block can be asked for again.
    ///
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Result<BlockRef, ReadError> {
        loop {
            if self.head.is_some_and(|head| self.next <= head) {
                let rpc = self.client.rpc();
                let hash = answer(rpc.chain_get_block_hash(Some(self.next.into())))
                    .await?
                    .ok_or_else(|| ReadError::NoSuchBlock(self.next.to_string()))?;
                let block = BlockRef { number: self.next, hash: Digest::new(hash.0) };
                self.next += 1;
                return Ok(block);
            }
            self.wait_for_news().await?;
        }
    }

    /// Learns of a newer head, or that the subscription is of no use any more.
    async fn wait_for_news(&mut self) -> Result<(), ReadError> {
        let Some(news) = &mut self.news else {
            let subscribing = self.client.rpc().chain_subscribe_finalized_heads();
            self.news = Some(answer(subscribing).await?);
            // What became final before the subscription is not news to it.
            self.head = Some(self.client.finalized_head().await?.number);
            return Ok(());
        };
        match tokio::time::timeout(NEWS_TIMEOUT, news.next()).await {
            Ok(Some(Ok(header))) => {
                self.head = Some(self.client.saw(header.number)?);
            }
            Ok(Some(Err(_)) | None) | Err(_) => self.news = None,
        }
        Ok(())
    }
}
