//! Money for newcomers, on development chains.

use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, NodeId};
use subxt::utils::MultiAddress;

use crate::chain;
use crate::client::{ChainClient, ReadError};
use crate::signer::account;
use crate::submit::{Submission, SubmitError};

/// The runtime derives its faucet from these words. **They are public**: whoever reads this can
/// spend the faucet, and on a development chain that is its purpose.
const FAUCET_PHRASE: &[u8] = b"manyhands development faucet";

/// Why the faucet gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum FaucetError {
    #[error(
        "the chain at {url} is not a development chain and has no faucet: send money to the \
         account {account} from another"
    )]
    NotDevelopment { url: String, account: NodeId },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Submit(#[from] SubmitError),
}

/// The key of the development chain's faucet.
fn faucet_key() -> NodeKey {
    NodeKey::from_seed(sp_crypto_hashing::blake2_256(FAUCET_PHRASE))
}

impl ChainClient {
    /// Fills the account's free balance up to `amount` from the faucet of a development chain; does
    /// nothing if it has as much.
    pub async fn fund_from_faucet(
        &self,
        node: &NodeId,
        amount: Balance,
    ) -> Result<Submission, FaucetError> {
        if !self.is_development() {
            return Err(FaucetError::NotDevelopment { url: self.url().to_owned(), account: *node });
        }
        let state = self.state().await?;
        let free = state.balance(node).await?.free;
        let Some(missing) = amount.0.checked_sub(free.0).filter(|missing| *missing > 0) else {
            return Ok(Submission::AlreadyDone { block: state.block() });
        };
        self.transfer(&faucet_key(), node, Balance(missing)).await.map_err(FaucetError::from)
    }

    /// Sends `amount` from the key's account, every time it is called. Fails rather than let the
    /// sender's account die.
    pub async fn transfer(
        &self,
        key: &NodeKey,
        to: &NodeId,
        amount: Balance,
    ) -> Result<Submission, SubmitError> {
        let to = MultiAddress::Id(account(to));
        self.submit(key, &chain::transactions().balances().transfer_keep_alive(to, amount.0)).await
    }
}
