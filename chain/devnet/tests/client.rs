//! A small client: hand-made transactions and the questions the tests ask.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::Path;

use codec::{Decode, Encode};
use frame_system::{AccountInfo, CheckEra, CheckNonce};
use jsonrpsee::core::client::{ClientT, Error, Subscription, SubscriptionClientT};
use jsonrpsee::rpc_params;
use jsonrpsee::ws_client::{WsClient, WsClientBuilder};
use manyhands_chain_devnet::{Devnet, DevnetConfig, DevnetHandle};
use manyhands_chain_runtime::{
    AccountId, Address, Balance, Header, RuntimeCall, SignedPayload, TxExtension,
    UncheckedExtrinsic, VERSION, genesis,
};
use pallet_balances::AccountData;
use pallet_transaction_payment::ChargeTransactionPayment;
use serde_json::{Value, json};
use sp_core::{H256, Pair as _, ed25519};
use sp_crypto_hashing::{blake2_128, twox_128};
use sp_runtime::MultiSignature;
use sp_runtime::generic::Era;

/// So long that the timer plays no part: but for the block at the start, blocks come of
/// transactions alone.
pub(crate) const NO_TIMER_MS: u64 = 3_600_000;

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(crate) fn config(data_dir: &Path, block_time_ms: u64) -> DevnetConfig {
    DevnetConfig {
        data_dir: data_dir.to_owned(),
        listen: loopback(),
        block_time_ms: NonZeroU64::new(block_time_ms).expect("a block time"),
    }
}

pub(crate) async fn start(data_dir: &Path, block_time_ms: u64) -> DevnetHandle {
    Devnet::start(config(data_dir, block_time_ms)).await.expect("the devnet starts")
}

pub(crate) fn faucet() -> ed25519::Pair {
    ed25519::Pair::from_seed(&genesis::FAUCET_SEED)
}

/// A connection and the chain's genesis hash.
pub(crate) struct Client {
    pub(crate) rpc: WsClient,
    pub(crate) genesis: H256,
}

impl Client {
    pub(crate) async fn connect(devnet: &DevnetHandle) -> Self {
        Self::connect_to(devnet.url()).await
    }

    pub(crate) async fn connect_to(url: &str) -> Self {
        let rpc = WsClientBuilder::default().build(url).await.expect("the devnet listens");
        let genesis = rpc.request("chain_getBlockHash", rpc_params![0]).await.expect("a genesis");
        Self { rpc, genesis }
    }

    pub(crate) async fn ask(&self, method: &str, params: Value) -> Result<Value, Error> {
        let Value::Array(values) = params else { panic!("parameters are a list") };
        let mut builder = jsonrpsee::core::params::ArrayParams::new();
        for value in values {
            builder.insert(value).expect("JSON");
        }
        self.rpc.request(method, builder).await
    }

    pub(crate) async fn get(&self, method: &str, params: Value) -> Value {
        self.ask(method, params).await.expect("an answer")
    }

    /// The code of the error that the call must give, and its whole text.
    pub(crate) async fn refusal(&self, method: &str, params: Value) -> (i32, String) {
        match self.ask(method, params).await {
            Err(Error::Call(error)) => {
                let detail = error.data().map(|data| data.get().to_owned()).unwrap_or_default();
                (error.code(), format!("{} {detail}", error.message()))
            }
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    pub(crate) async fn header(&self, number: u32) -> (Header, H256) {
        let hash = self.get("chain_getBlockHash", json!([number])).await;
        let header = self.get("chain_getHeader", json!([hash])).await;
        let header: Header = serde_json::from_value(header).expect("a header");
        assert_eq!(json!(header.hash()), hash, "the header hashes to the block's hash");
        let hash = header.hash();
        (header, hash)
    }

    pub(crate) async fn head_number(&self) -> u32 {
        let header = self.get("chain_getHeader", json!([])).await;
        serde_json::from_value::<Header>(header).expect("a header").number
    }

    pub(crate) async fn balance(&self, account: &AccountId, at: Option<H256>) -> Balance {
        let value = self.get("state_getStorage", json!([hex(&account_key(account)), at])).await;
        let Value::String(text) = value else { return 0 };
        decode::<AccountInfo<u32, AccountData<Balance>>>(&text).data.free
    }

    /// Submits and waits until the transaction is final; the block, and what was said before.
    pub(crate) async fn finalize(&self, extrinsic: &[u8]) -> (H256, Vec<Value>) {
        let mut watch = self.watch(extrinsic).await.expect("the transaction is taken");
        let mut said = Vec::new();
        while let Some(status) = watch.next().await {
            let status = status.expect("JSON");
            if let Some(block) = status.get("finalized") {
                return (serde_json::from_value(block.clone()).expect("a hash"), said);
            }
            said.push(status);
        }
        panic!("the watch ended before the transaction was final; it said {said:?}");
    }

    pub(crate) async fn watch(&self, extrinsic: &[u8]) -> Result<Subscription<Value>, Error> {
        let params = rpc_params![hex(extrinsic)];
        self.rpc
            .subscribe("author_submitAndWatchExtrinsic", params, "author_unwatchExtrinsic")
            .await
    }

    pub(crate) fn transfer(
        &self,
        from: &ed25519::Pair,
        nonce: u32,
        to: &AccountId,
        amount: Balance,
    ) -> Vec<u8> {
        let call = pallet_balances::Call::transfer_keep_alive {
            dest: Address::Id(to.clone()),
            value: amount,
        };
        self.sign(from, nonce, RuntimeCall::Balances(call))
    }

    pub(crate) fn sign(&self, from: &ed25519::Pair, nonce: u32, call: RuntimeCall) -> Vec<u8> {
        let extension: TxExtension = (
            frame_system::AuthorizeCall::new(),
            frame_system::CheckNonZeroSender::new(),
            frame_system::CheckSpecVersion::new(),
            frame_system::CheckTxVersion::new(),
            frame_system::CheckGenesis::new(),
            CheckEra::from(Era::Immortal),
            CheckNonce::from(nonce),
            frame_system::CheckWeight::new(),
            ChargeTransactionPayment::from(0),
            frame_system::WeightReclaim::new(),
        );
        let implicit = (
            (),
            (),
            VERSION.spec_version,
            VERSION.transaction_version,
            self.genesis,
            self.genesis,
            (),
            (),
            (),
            (),
        );
        let payload = SignedPayload::from_raw(call.clone(), extension.clone(), implicit);
        let signature = payload.using_encoded(|bytes| from.sign(bytes));
        UncheckedExtrinsic::new_signed(
            call,
            Address::Id(AccountId::from(from.public())),
            MultiSignature::Ed25519(signature),
            extension,
        )
        .encode()
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    format!("0x{}", hex::encode(bytes))
}

pub(crate) fn unhex(value: &Value) -> Vec<u8> {
    let text = value.as_str().expect("text").strip_prefix("0x").expect("0x");
    hex::decode(text).expect("hexadecimal")
}

pub(crate) fn decode<T: Decode>(text: &str) -> T {
    let bytes = hex::decode(text.strip_prefix("0x").expect("0x")).expect("hexadecimal");
    T::decode(&mut bytes.as_slice()).expect("SCALE")
}

/// The storage key of `System::Account`.
pub(crate) fn account_key(account: &AccountId) -> Vec<u8> {
    let account: &[u8; 32] = account.as_ref();
    [&twox_128(b"System")[..], &twox_128(b"Account"), &blake2_128(account), account].concat()
}
