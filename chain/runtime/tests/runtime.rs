//! The runtime as a node sees it: presets, metadata, and a signed transaction that pays a reward.

use codec::{Decode, Encode};
use frame_support::traits::StorageVersion;
use frame_system::{LastRuntimeUpgrade, LastRuntimeUpgradeInfo};
use manyhands_chain_pallet::Verifiers;
use manyhands_chain_runtime::{
    AccountId, Address, Balances, EXISTENTIAL_DEPOSIT, Executive, Header, Runtime, RuntimeCall,
    RuntimeGenesisConfig, Signature, SignedPayload, System, Training, TxExtension, UNIT,
    UncheckedExtrinsic, VERSION, api, genesis, metadata_scale,
};
use sp_core::{Pair, ed25519};
use sp_runtime::{BuildStorage, generic::Era, traits::Header as _};

fn faucet() -> ed25519::Pair {
    ed25519::Pair::from_seed(&genesis::FAUCET_SEED)
}

/// A chain from the development preset, in its first block.
fn on_development_chain(story: impl FnOnce()) {
    let patch = genesis::preset(&"development".into()).expect("the preset exists");
    let mut config = serde_json::to_value(RuntimeGenesisConfig::default()).expect("is JSON");
    let patch: serde_json::Value = serde_json::from_slice(&patch).expect("the preset is JSON");
    config["balances"] = patch["balances"].clone();
    let config: RuntimeGenesisConfig = serde_json::from_value(config).expect("is a genesis");
    let storage = config.build_storage().expect("the genesis builds");
    sp_io::TestExternalities::new(storage).execute_with(|| {
        Executive::initialize_block(&Header::new(
            1,
            Default::default(),
            Default::default(),
            System::block_hash(0),
            Default::default(),
        ));
        story();
    });
}

fn signed(pair: &ed25519::Pair, nonce: u32, call: RuntimeCall) -> UncheckedExtrinsic {
    let extension: TxExtension = (
        frame_system::AuthorizeCall::new(),
        frame_system::CheckNonZeroSender::new(),
        frame_system::CheckSpecVersion::new(),
        frame_system::CheckTxVersion::new(),
        frame_system::CheckGenesis::new(),
        frame_system::CheckEra::from(Era::Immortal),
        frame_system::CheckNonce::from(nonce),
        frame_system::CheckWeight::new(),
        pallet_transaction_payment::ChargeTransactionPayment::from(0),
        frame_system::WeightReclaim::new(),
    );
    let payload = SignedPayload::new(call.clone(), extension.clone()).expect("can be signed");
    let signature = payload.using_encoded(|bytes| pair.sign(bytes));
    let account = AccountId::new(pair.public().0);
    UncheckedExtrinsic::new_signed(
        call,
        Address::Id(account),
        Signature::Ed25519(signature),
        extension,
    )
}

#[test]
fn the_faucets_account_is_the_key_of_its_public_seed() {
    assert_eq!(sp_io::hashing::blake2_256(genesis::FAUCET_PHRASE), genesis::FAUCET_SEED);
    assert_eq!(AccountId::new(faucet().public().0), genesis::FAUCET_ACCOUNT);
    assert!(genesis::preset(&"local_testnet".into()).is_none());
    assert_eq!(genesis::preset_names(), ["development"]);
}

#[test]
fn an_ed25519_key_signs_a_transfer_and_pays_a_plausible_fee() {
    on_development_chain(|| {
        let newcomer = AccountId::new([7; 32]);
        let call = RuntimeCall::Balances(pallet_balances::Call::transfer_keep_alive {
            dest: Address::Id(newcomer.clone()),
            value: 5 * UNIT,
        });
        let applied = Executive::apply_extrinsic(signed(&faucet(), 0, call.clone()));
        applied.expect("the transaction is valid").expect("the transfer succeeds");
        assert_eq!(Balances::free_balance(&newcomer), 5 * UNIT);
        let left = Balances::free_balance(genesis::FAUCET_ACCOUNT);
        let fee = genesis::FAUCET_ENDOWMENT - 5 * UNIT - left;
        assert!(fee > 0 && fee < 10 * EXISTENTIAL_DEPOSIT, "expected a small fee, got {fee}");
        // The same transaction again: its nonce is spent.
        Executive::apply_extrinsic(signed(&faucet(), 0, call)).expect_err("a replay is refused");
    });
}

#[test]
fn a_newcomer_registers_as_a_worker_in_one_batch() {
    on_development_chain(|| {
        let training = manyhands_chain_pallet::Call::register_worker {
            peer_id: Default::default(),
            capability_digest: [1; 32],
            stake: 10 * UNIT,
        };
        let more = manyhands_chain_pallet::Call::increase_stake { amount: UNIT };
        let calls = vec![RuntimeCall::Training(training), RuntimeCall::Training(more)];
        let batch = RuntimeCall::Utility(pallet_utility::Call::batch_all { calls });
        let applied = Executive::apply_extrinsic(signed(&faucet(), 0, batch));
        applied.expect("the transaction is valid").expect("both calls succeed");
        let worker = manyhands_chain_pallet::Workers::<Runtime>::get(genesis::FAUCET_ACCOUNT);
        assert_eq!(worker.expect("registered").stake, 11 * UNIT);
    });
}

#[test]
fn the_native_dispatcher_answers_and_the_metadata_has_its_magic() {
    let version = sp_io::TestExternalities::default()
        .execute_with(|| api::dispatch("Core_version", &[]))
        .expect("the call exists");
    let decoded = sp_version::RuntimeVersion::decode(&mut version.as_slice()).expect("decodes");
    assert_eq!(decoded.spec_version, VERSION.spec_version);
    assert!(api::dispatch("Core_nonsense", &[]).is_none());
    assert_eq!(&metadata_scale()[..4], b"meta");
}

#[test]
fn the_first_block_of_a_newer_runtime_brings_older_records_to_their_new_form() {
    on_development_chain(|| {
        let (run, who) = ([7; 32], AccountId::new([8; 32]));
        let key = Verifiers::<Runtime>::hashed_key_for(run, &who);
        // As version 1 stored it, without `open_faults`.
        let old = (3 * UNIT, 1_u32, None::<u32>, 0_u32);
        sp_io::storage::set(&key, &old.encode());
        StorageVersion::new(1).put::<Training>();
        let before =
            LastRuntimeUpgradeInfo { spec_version: 2.into(), spec_name: "manyhands".into() };
        LastRuntimeUpgrade::<Runtime>::put(before);
        Executive::initialize_block(&Header::new(
            2,
            Default::default(),
            Default::default(),
            System::block_hash(1),
            Default::default(),
        ));
        let verifier = Verifiers::<Runtime>::get(run, &who).expect("it can be read");
        assert_eq!((verifier.bond, verifier.open_faults), (3 * UNIT, 0));
    });
}
