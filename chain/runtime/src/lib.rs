//! A small Substrate runtime with the training pallet: accounts, balances, fees, batches, time,
//! and nothing else.
//!
//! The same source is executed natively by the embedded devnet and built as WASM for a stock
//! node. Consensus is the node's business: there is no consensus pallet here, and [`AuraApi`]
//! only answers what a development node asks.
//!
//! [`AuraApi`]: sp_consensus_aura::AuraApi

#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

mod apis;
mod configs;
pub mod genesis;

use alloc::vec::Vec;

use sp_runtime::{MultiAddress, MultiSignature, generic, traits::BlakeTwo256};
use sp_version::{RuntimeVersion, runtime_version};

pub use apis::RUNTIME_API_VERSIONS;
#[cfg(feature = "std")]
pub use apis::api;

pub type Signature = MultiSignature;
/// 32 bytes: for a node of the network, its ed25519 public key.
pub type AccountId = sp_runtime::AccountId32;
pub type Balance = u128;
pub type Nonce = u32;
pub type Hash = sp_core::H256;
pub type BlockNumber = u32;
pub type Address = MultiAddress<AccountId, ()>;
pub type Header = generic::Header<BlockNumber, BlakeTwo256>;
pub type Block = generic::Block<Header, UncheckedExtrinsic>;
pub type SignedPayload = generic::SignedPayload<RuntimeCall, TxExtension>;
pub type UncheckedExtrinsic =
    generic::UncheckedExtrinsic<Address, RuntimeCall, Signature, TxExtension>;

/// What a transaction carries beside its call: replay protection and the fee.
pub type TxExtension = (
    frame_system::AuthorizeCall<Runtime>,
    frame_system::CheckNonZeroSender<Runtime>,
    frame_system::CheckSpecVersion<Runtime>,
    frame_system::CheckTxVersion<Runtime>,
    frame_system::CheckGenesis<Runtime>,
    frame_system::CheckEra<Runtime>,
    frame_system::CheckNonce<Runtime>,
    frame_system::CheckWeight<Runtime>,
    pallet_transaction_payment::ChargeTransactionPayment<Runtime>,
    frame_system::WeightReclaim<Runtime>,
);

pub type Executive = frame_executive::Executive<
    Runtime,
    Block,
    frame_system::ChainContext<Runtime>,
    Runtime,
    AllPalletsWithSystem,
>;

/// The smallest unit of the currency is a planck; one unit is 10^12 of them.
pub const UNIT: Balance = 1_000_000_000_000;
pub(crate) const MILLIUNIT: Balance = UNIT / 1_000;
pub(crate) const MICROUNIT: Balance = UNIT / 1_000_000;

/// Below this an account is removed: it prices the 150 bytes an account occupies forever.
pub const EXISTENTIAL_DEPOSIT: Balance = MILLIUNIT;

#[runtime_version]
pub const VERSION: RuntimeVersion = RuntimeVersion {
    spec_name: alloc::borrow::Cow::Borrowed("manyhands"),
    impl_name: alloc::borrow::Cow::Borrowed("manyhands"),
    authoring_version: 1,
    spec_version: 4,
    impl_version: 1,
    apis: RUNTIME_API_VERSIONS,
    transaction_version: 1,
    system_version: 1,
};

/// The metadata version that clients are built from: the newest stable one, which a client also asks a
/// node for. Types differ between versions, so a client built from another would not recognise us.
const METADATA_VERSION: u32 = 16;

/// The runtime's metadata: SCALE bytes with the `meta` prefix.
pub fn metadata_scale() -> Vec<u8> {
    let metadata = Runtime::metadata_at_version(METADATA_VERSION);
    metadata.expect("the runtime has this version").to_vec()
}

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
    pub struct Runtime;

    #[runtime::pallet_index(0)]
    pub type System = frame_system;

    #[runtime::pallet_index(1)]
    pub type Timestamp = pallet_timestamp;

    #[runtime::pallet_index(2)]
    pub type Balances = pallet_balances;

    #[runtime::pallet_index(3)]
    pub type TransactionPayment = pallet_transaction_payment;

    #[runtime::pallet_index(4)]
    pub type Utility = pallet_utility;

    #[runtime::pallet_index(5)]
    pub type Training = manyhands_chain_pallet;
}
