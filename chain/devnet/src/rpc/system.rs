//! `system_*`: who answers here.

use jsonrpsee::core::RegisterMethodError;
use jsonrpsee::types::error::INVALID_PARAMS_CODE;
use serde_json::json;
use sp_core::crypto::{AccountId32, Ss58Codec};

use super::{Module, blocking, error};

/// SS58 prefix of a chain without a registered one.
const SS58_FORMAT: u16 = 42;
/// Of `Balance`: one token is 10¹² of the smallest unit.
const TOKEN_DECIMALS: u32 = 12;
const TOKEN_SYMBOL: &str = "UNIT";

pub(super) fn register(module: &mut Module) -> Result<(), RegisterMethodError> {
    module.register_method("system_name", |_, _, _| "manyhands devnet")?;
    module.register_method("system_version", |_, _, _| env!("CARGO_PKG_VERSION"))?;
    module.register_method("system_chain", |_, _, _| "Manyhands Development")?;
    module.register_method("system_chainType", |_, _, _| "Development")?;
    module.register_method("system_properties", |_, _, _| {
        json!({
            "ss58Format": SS58_FORMAT,
            "tokenDecimals": TOKEN_DECIMALS,
            "tokenSymbol": TOKEN_SYMBOL,
        })
    })?;
    module.register_method(
        "system_health",
        |_, _, _| json!({ "peers": 0, "isSyncing": false, "shouldHavePeers": false }),
    )?;
    module.register_method("system_nodeRoles", |_, _, _| json!(["Authority"]))?;
    blocking(module, "system_accountNextIndex", |chain, parameters| {
        let text = parameters.text("an account")?;
        let account: AccountId32 = text
            .strip_prefix("0x")
            .and_then(|digits| {
                let mut bytes = [0; 32];
                hex::decode_to_slice(digits, &mut bytes).ok().map(|()| bytes.into())
            })
            .or_else(|| AccountId32::from_ss58check(&text).ok())
            .ok_or_else(|| {
                error(INVALID_PARAMS_CODE, "expected an account in SS58 or 64 hexadecimal digits")
            })?;
        Ok(json!(chain.next_nonce(account.as_ref())?))
    })?;
    module.register_alias("account_nextIndex", "system_accountNextIndex")?;
    Ok(())
}
