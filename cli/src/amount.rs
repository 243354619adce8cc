//! Amounts of money as people write them, in tokens.

use std::str::FromStr;

use manyhands_proto::Balance;

const DECIMALS: usize = Balance::DECIMALS;

/// An amount on the command line: `100`, `0.25`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Amount(pub(crate) Balance);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an amount in tokens with at most {DECIMALS} decimals, as 100 or 0.25, got {0:?}")]
pub(crate) struct ParseAmountError(String);

impl FromStr for Amount {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, ParseAmountError> {
        let wrong = || ParseAmountError(text.chars().take(40).collect());
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(part) || part.len() > DECIMALS {
            return Err(wrong());
        }
        format!("{whole}{part:0<DECIMALS$}")
            .parse()
            .map(|units| Self(Balance(units)))
            .map_err(|_| wrong())
    }
}

/// What part of the machine's time training may take: `25%`, above 0 and at most 1.
pub(crate) fn parse_load(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    match number.trim().parse::<f64>() {
        Ok(percent) if (1.0..=100.0).contains(&percent) => Ok(percent / 100.0),
        Ok(_) | Err(_) => Err(format!("expected 1% to 100%, got {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_they_are_written() {
        for text in ["100", "0.25", "0.000000000001", "7"] {
            let amount: Amount = text.parse().expect(text);
            assert_eq!(amount.0.to_string(), format!("{text} tokens"));
        }
        assert_eq!("1.50".parse::<Amount>().expect("decimals").0.to_string(), "1.5 tokens");
        assert_eq!(Balance(10_u128.pow(12)).to_string(), "1 token");
        for text in ["", "-1", ".5", "1e3", "0.0000000000001", "99999999999999999999999999999999"] {
            assert!(text.parse::<Amount>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_load_is_a_percentage() {
        assert_eq!(parse_load("25%"), Ok(0.25));
        assert_eq!(parse_load("100"), Ok(1.0));
        for text in ["0%", "101%", "x", "NaN"] {
            assert!(parse_load(text).is_err(), "{text}");
        }
    }
}
