//! What the first block starts from.

use alloc::{string::ToString, vec, vec::Vec};

use frame_support::build_struct_json_patch;
use pallet_balances::GenesisConfig as BalancesConfig;
use sp_genesis_builder::{DEV_RUNTIME_PRESET, PresetId};

use crate::{AccountId, Balance, RuntimeGenesisConfig, UNIT};

/// The development chain's faucet is derived from these words. **The seed is public**: whoever
/// reads this can spend the faucet, and on a development chain that is its purpose.
pub const FAUCET_PHRASE: &[u8] = b"manyhands development faucet";

/// BLAKE2b-256 of [`FAUCET_PHRASE`]: the faucet's ed25519 seed.
pub const FAUCET_SEED: [u8; 32] = [
    0x8a, 0x05, 0x32, 0x56, 0xec, 0xac, 0xa6, 0xbb, 0x8e, 0xbd, 0x76, 0xee, 0x1a, 0x21, 0xd1, 0x49,
    0xfc, 0x81, 0x60, 0x08, 0xf3, 0x5c, 0x21, 0x00, 0x9b, 0x96, 0x1b, 0x8e, 0x46, 0xc0, 0xfa, 0x2c,
];

/// The ed25519 public key of [`FAUCET_SEED`], which is the faucet's account.
pub const FAUCET_ACCOUNT: AccountId = AccountId::new([
    0x75, 0xa7, 0xc2, 0x50, 0x02, 0x99, 0x4e, 0xe5, 0xd8, 0xb7, 0x14, 0xd2, 0x3d, 0x03, 0xa8, 0x5a,
    0xa0, 0x65, 0x56, 0xe2, 0x37, 0xe1, 0xa5, 0xdf, 0xda, 0x1d, 0x6c, 0x0c, 0x33, 0x9c, 0xcf, 0x1d,
]);

/// What the faucet starts with.
pub const FAUCET_ENDOWMENT: Balance = UNIT * 1_000_000_000;

/// The JSON patch of a named preset.
pub fn preset(id: &PresetId) -> Option<Vec<u8>> {
    if id.as_str() != DEV_RUNTIME_PRESET {
        return None;
    }
    let patch = build_struct_json_patch!(RuntimeGenesisConfig {
        balances: BalancesConfig { balances: vec![(FAUCET_ACCOUNT, FAUCET_ENDOWMENT)] },
    });
    Some(patch.to_string().into_bytes())
}

pub fn preset_names() -> Vec<PresetId> {
    vec![PresetId::from(DEV_RUNTIME_PRESET)]
}
