//! Parameters of a call, parsed once: a wrong one is refused with what was expected.

use jsonrpsee::types::error::INVALID_PARAMS_CODE;
use jsonrpsee::types::{ErrorObjectOwned, Params, ParamsSequence};
use serde_json::Value;
use sp_core::H256;

use super::error;

/// Keys in one call.
const KEYS_MAX: usize = 1_024;

pub(super) struct Parameters<'a> {
    sequence: ParamsSequence<'a>,
    place: usize,
}

impl<'a> Parameters<'a> {
    pub(super) fn new(params: &'a Params<'_>) -> Self {
        Self { sequence: params.sequence(), place: 0 }
    }

    fn wrong(&self, expected: &str) -> ErrorObjectOwned {
        error(INVALID_PARAMS_CODE, format!("expected {expected} as parameter {}", self.place))
    }

    /// The next parameter; nothing if it is null or absent.
    pub(super) fn optional(&mut self) -> Result<Option<Value>, ErrorObjectOwned> {
        self.place += 1;
        let value: Option<Value> =
            self.sequence.optional_next().map_err(|_| self.wrong("a JSON value"))?;
        Ok(value)
    }

    pub(super) fn text(&mut self, expected: &str) -> Result<String, ErrorObjectOwned> {
        match self.optional()? {
            Some(Value::String(text)) => Ok(text),
            Some(_) | None => Err(self.wrong(expected)),
        }
    }

    pub(super) fn bytes(&mut self) -> Result<Vec<u8>, ErrorObjectOwned> {
        let text = self.text("bytes in hexadecimal")?;
        self.parse_bytes(&text)
    }

    pub(super) fn optional_bytes(&mut self) -> Result<Option<Vec<u8>>, ErrorObjectOwned> {
        match self.optional()? {
            None => Ok(None),
            Some(Value::String(text)) => self.parse_bytes(&text).map(Some),
            Some(_) => Err(self.wrong("bytes in hexadecimal")),
        }
    }

    pub(super) fn number(&mut self, expected: &str) -> Result<u64, ErrorObjectOwned> {
        self.optional()?.and_then(|value| value.as_u64()).ok_or_else(|| self.wrong(expected))
    }

    /// A block hash; nothing means the head.
    pub(super) fn block(&mut self) -> Result<Option<H256>, ErrorObjectOwned> {
        let Some(bytes) = self.optional_bytes()? else { return Ok(None) };
        if bytes.len() != 32 {
            return Err(self.wrong("a block hash of 32 bytes"));
        }
        Ok(Some(H256::from_slice(&bytes)))
    }

    pub(super) fn keys(&mut self) -> Result<Vec<Vec<u8>>, ErrorObjectOwned> {
        let Some(Value::Array(keys)) = self.optional()? else {
            return Err(self.wrong("a list of storage keys"));
        };
        if keys.len() > KEYS_MAX {
            return Err(self.wrong(&format!("at most {KEYS_MAX} storage keys")));
        }
        let key = |value: &Value| match value.as_str() {
            Some(text) => self.parse_bytes(text),
            None => Err(self.wrong("a list of storage keys in hexadecimal")),
        };
        keys.iter().map(key).collect()
    }

    fn parse_bytes(&self, text: &str) -> Result<Vec<u8>, ErrorObjectOwned> {
        hex::decode(text.strip_prefix("0x").unwrap_or(text))
            .map_err(|_| self.wrong("bytes in hexadecimal"))
    }
}

/// A block number, as JSON number or hexadecimal text.
pub(super) fn block_number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => u64::from_str_radix(text.strip_prefix("0x")?, 16).ok(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

pub(super) fn wrong_block_number() -> ErrorObjectOwned {
    error(INVALID_PARAMS_CODE, "expected a block number, a list of them, or nothing")
}
