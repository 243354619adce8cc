//! The parameters of each pallet: limits, deposits and fees.

use frame_support::{
    derive_impl, parameter_types,
    traits::{ConstU8, ConstU32, ConstU64, ConstU128, VariantCountOf},
    weights::{
        ConstantMultiplier, IdentityFee, Weight,
        constants::{RocksDbWeight, WEIGHT_REF_TIME_PER_SECOND},
    },
};
use frame_system::limits::{BlockLength, BlockWeights};
use pallet_transaction_payment::{FungibleAdapter, Multiplier, TargetedFeeAdjustment};
use sp_runtime::{FixedPointNumber, Perbill, Perquintill};
use sp_version::RuntimeVersion;

use crate::{
    AccountId, Balance, Balances, Block, EXISTENTIAL_DEPOSIT, Hash, MICROUNIT, MILLIUNIT, Nonce,
    PalletInfo, Runtime, RuntimeCall, RuntimeEvent, RuntimeFreezeReason, RuntimeHoldReason,
    RuntimeOrigin, RuntimeTask, System, VERSION,
};

/// A quarter of each block is kept for operational transactions.
const NORMAL_SHARE: Perbill = Perbill::from_percent(75);
/// Bytes of a block's transactions.
const BLOCK_LENGTH_MAX: u32 = 5 * 1024 * 1024;
/// Bytes of state proof a block may need: what a parachain block may carry today.
const PROOF_SIZE_MAX: u64 = 5 * 1024 * 1024;

parameter_types! {
    pub const Version: RuntimeVersion = VERSION;
    pub RuntimeBlockLength: BlockLength = BlockLength::builder()
        .max_length(BLOCK_LENGTH_MAX)
        .modify_max_length_for_class(
            frame_support::dispatch::DispatchClass::Normal,
            |length| *length = NORMAL_SHARE * BLOCK_LENGTH_MAX,
        )
        .build();
    // Two seconds of execution: a third of a six-second slot.
    pub RuntimeBlockWeights: BlockWeights = BlockWeights::with_sensible_defaults(
        Weight::from_parts(WEIGHT_REF_TIME_PER_SECOND.saturating_mul(2), PROOF_SIZE_MAX),
        NORMAL_SHARE,
    );

    // Fees rise while blocks are more than a quarter full and fall back to the stated price; a
    // block of full load raises them by about 0.1 %.
    pub const TargetBlockFullness: Perquintill = Perquintill::from_percent(25);
    pub AdjustmentVariable: Multiplier = Multiplier::saturating_from_rational(75, 1_000_000);
    pub MinimumMultiplier: Multiplier = Multiplier::saturating_from_integer(1);
    pub MaximumMultiplier: Multiplier = Multiplier::saturating_from_integer(1_000);
}

#[derive_impl(frame_system::config_preludes::SolochainDefaultConfig)]
impl frame_system::Config for Runtime {
    type Block = Block;
    type AccountId = AccountId;
    type Nonce = Nonce;
    type Hash = Hash;
    type AccountData = pallet_balances::AccountData<Balance>;
    type Version = Version;
    type BlockWeights = RuntimeBlockWeights;
    type BlockLength = RuntimeBlockLength;
    type DbWeight = RocksDbWeight;
    type SystemWeightInfo = frame_system::weights::SubstrateWeight<Runtime>;
    type ExtensionsWeightInfo = frame_system::SubstrateExtensionsWeight<Runtime>;
    // One day of six-second blocks: an offline signer's transaction stays valid that long.
    type BlockHashCount = ConstU32<14_400>;
    type SS58Prefix = frame_support::traits::ConstU16<42>;
    type MaxConsumers = ConstU32<128>;
}

impl pallet_timestamp::Config for Runtime {
    type Moment = u64;
    type OnTimestampSet = ();
    // Blocks are sealed by the node's rule, also one per transaction: time only has to advance.
    type MinimumPeriod = ConstU64<1>;
    type WeightInfo = pallet_timestamp::weights::SubstrateWeight<Runtime>;
}

impl pallet_balances::Config for Runtime {
    type RuntimeEvent = RuntimeEvent;
    type RuntimeHoldReason = RuntimeHoldReason;
    type RuntimeFreezeReason = RuntimeFreezeReason;
    type WeightInfo = pallet_balances::weights::SubstrateWeight<Runtime>;
    type Balance = Balance;
    type DustRemoval = ();
    type ExistentialDeposit = ConstU128<EXISTENTIAL_DEPOSIT>;
    type AccountStore = System;
    type ReserveIdentifier = [u8; 8];
    type FreezeIdentifier = RuntimeFreezeReason;
    type MaxLocks = ConstU32<50>;
    type MaxReserves = ConstU32<0>;
    type MaxFreezes = VariantCountOf<RuntimeFreezeReason>;
    type DoneSlashHandler = ();
}

impl pallet_transaction_payment::Config for Runtime {
    type RuntimeEvent = RuntimeEvent;
    type OnChargeTransaction = FungibleAdapter<Balances, ()>;
    type OperationalFeeMultiplier = ConstU8<5>;
    // One planck a picosecond: a second of execution costs one unit.
    type WeightToFee = IdentityFee<Balance>;
    type LengthToFee = ConstantMultiplier<Balance, ConstU128<MICROUNIT>>;
    type FeeMultiplierUpdate = TargetedFeeAdjustment<
        Self,
        TargetBlockFullness,
        AdjustmentVariable,
        MinimumMultiplier,
        MaximumMultiplier,
    >;
    type WeightInfo = pallet_transaction_payment::weights::SubstrateWeight<Runtime>;
}

impl pallet_utility::Config for Runtime {
    type RuntimeEvent = RuntimeEvent;
    type RuntimeCall = RuntimeCall;
    type PalletsOrigin = crate::OriginCaller;
    type WeightInfo = pallet_utility::weights::SubstrateWeight<Runtime>;
}

impl manyhands_chain_pallet::Config for Runtime {
    type RuntimeHoldReason = RuntimeHoldReason;
    type Currency = Balances;
    type RunDeposit = ConstU128<{ 100 * MILLIUNIT }>;
    // A record is a few hundred bytes: the price of an account.
    type RecordDeposit = ConstU128<MILLIUNIT>;
    type MinimumFunding = ConstU128<{ 10 * MILLIUNIT }>;
    // Thirty days of six-second blocks.
    type WindowMax = ConstU32<432_000>;
    type WeightInfo = manyhands_chain_pallet::weights::CountedWeight<Runtime>;
}
