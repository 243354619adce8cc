//! The chain's records in this project's own types.
//!
//! Each mirrors a type of the pallet field by field. The conversions are written by one macro over
//! the types that subxt generates from the runtime's metadata, so a pallet that changed does not
//! compile here.

mod round;
mod run;
mod worker;

pub use round::{
    Anchor, Challenge, ChallengeKind, ChallengeOutcome, RejectReason, RoundCommitment, RoundRecord,
    RoundState, Stage,
};
pub use run::{
    Attribution, CloseReason, PauseReason, RecoveryReason, Run, RunState, RunTerms, SlashTerms,
    Totals,
};
pub use worker::{
    Fault, FaultKind, FaultState, Finding, Forfeit, Membership, Suspension, Verifier,
    VerifierFault, Votes, Worker,
};

use manyhands_proto::leaf::RewardLeaf;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, WorkUnits};
use subxt::config::substrate::AccountId32;

use crate::chain::runtime_types::bounded_collections::bounded_vec::BoundedVec;
use crate::chain::runtime_types::manyhands_proto::leaf::RewardLeaf as GeneratedLeaf;
use crate::chain::runtime_types::sp_arithmetic::per_things::Percent;
use crate::signer;

pub(crate) use crate::chain::runtime_types::manyhands_chain_pallet::types as generated;

/// A value of the chain as one of ours, or the other way round. No conversion loses anything.
pub(crate) trait Convert<From> {
    fn convert(value: From) -> Self;
}

macro_rules! converts_to_itself {
    ($($type:ty),*) => {
        $(impl Convert<$type> for $type {
            fn convert(value: $type) -> Self {
                value
            }
        })*
    };
}
converts_to_itself!(bool, u8, u32, u64, u128, [u8; 32]);

macro_rules! converts {
    ($($chain:ty => $own:ty, $forth:expr, $back:expr;)*) => {
        $(impl Convert<$chain> for $own {
            fn convert(value: $chain) -> Self {
                $forth(value)
            }
        }

        impl Convert<$own> for $chain {
            fn convert(value: $own) -> Self {
                $back(value)
            }
        })*
    };
}
converts! {
    u32 => Round, Round, |round: Round| round.0;
    u64 => WorkUnits, WorkUnits, |units: WorkUnits| units.0;
    u128 => Balance, Balance, |amount: Balance| amount.0;
    [u8; 32] => Digest, Digest::new, |digest: Digest| *digest.as_bytes();
    [u8; 32] => RunId, RunId::new, |run: RunId| *run.as_bytes();
    AccountId32 => NodeId, |account: AccountId32| signer::node(&account), |node: NodeId| signer::account(&node);
    Percent => u8, |share: Percent| share.0, Percent;
}

impl<Chain, Own: Convert<Chain>> Convert<BoundedVec<Chain>> for Vec<Own> {
    fn convert(value: BoundedVec<Chain>) -> Self {
        value.0.into_iter().map(Own::convert).collect()
    }
}

impl<Own, Chain: Convert<Own>> Convert<Vec<Own>> for BoundedVec<Chain> {
    fn convert(value: Vec<Own>) -> Self {
        BoundedVec(value.into_iter().map(Chain::convert).collect())
    }
}

impl<A, B: Convert<A>> Convert<Option<A>> for Option<B> {
    fn convert(value: Option<A>) -> Self {
        value.map(B::convert)
    }
}

impl Convert<RewardLeaf> for GeneratedLeaf {
    fn convert(leaf: RewardLeaf) -> Self {
        Self {
            genesis_hash: leaf.genesis_hash,
            run: leaf.run,
            round: leaf.round,
            worker: leaf.worker,
            work_units: leaf.work_units,
            cumulative_reward: leaf.cumulative_reward,
            evidence_digest: leaf.evidence_digest,
        }
    }
}

/// Declares a type that mirrors the pallet's type of the same name, with the conversions in both
/// directions.
macro_rules! mirror {
    ($(#[$meta:meta])* struct $name:ident {
        $($(#[$field_meta:meta])* $field:ident: $type:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }

        impl $crate::types::Convert<$crate::types::generated::$name> for $name {
            fn convert(value: $crate::types::generated::$name) -> Self {
                Self { $($field: $crate::types::Convert::convert(value.$field),)* }
            }
        }

        impl $crate::types::Convert<$name> for $crate::types::generated::$name {
            fn convert(value: $name) -> Self {
                Self { $($field: $crate::types::Convert::convert(value.$field),)* }
            }
        }
    };
    ($(#[$meta:meta])* enum $name:ident {
        $($(#[$variant_meta:meta])* $variant:ident
            $(($inner:ident: $inner_type:ty))?
            $({ $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })?,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($(#[$variant_meta])* $variant
                $(($inner_type))?
                $({ $($(#[$field_meta])* $field: $type,)* })?,)*
        }

        impl $crate::types::Convert<$crate::types::generated::$name> for $name {
            fn convert(value: $crate::types::generated::$name) -> Self {
                use $crate::types::generated::$name as Chain;
                match value {
                    $(Chain::$variant $(($inner))? $({ $($field,)* })? => Self::$variant
                        $(($crate::types::Convert::convert($inner)))?
                        $({ $($field: $crate::types::Convert::convert($field),)* })?,)*
                }
            }
        }

        impl $crate::types::Convert<$name> for $crate::types::generated::$name {
            fn convert(value: $name) -> Self {
                match value {
                    $($name::$variant $(($inner))? $({ $($field,)* })? => Self::$variant
                        $(($crate::types::Convert::convert($inner)))?
                        $({ $($field: $crate::types::Convert::convert($field),)* })?,)*
                }
            }
        }
    };
}
pub(crate) use mirror;

/// Why the bytes of a proven value are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected the SCALE bytes of a {expected}, got {length} bytes that are not")]
pub struct DecodeStateError {
    expected: &'static str,
    length: usize,
}

/// Lets a value from a storage proof be read without a node.
macro_rules! from_state_bytes {
    ($($name:ident),*) => {
        $(impl $name {
            /// Reads the value as the chain's state holds it.
            pub fn from_state(mut bytes: &[u8]) -> Result<Self, DecodeStateError> {
                let length = bytes.len();
                let wrong = || DecodeStateError { expected: stringify!($name), length };
                let value = <generated::$name as codec::Decode>::decode(&mut bytes)
                    .map_err(|_| wrong())?;
                if bytes.is_empty() { Ok(Convert::convert(value)) } else { Err(wrong()) }
            }
        })*
    };
}
from_state_bytes!(Run, RoundRecord, Anchor, Fault, VerifierFault);

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> RunTerms {
        RunTerms {
            config_digest: Digest::new([1; 32]),
            price_per_unit: Balance(2),
            vesting_rounds: 3,
            challenge_window: 4,
            contest_window: 5,
            resolution_window: 6,
            claim_window: 7,
            idle_timeout: 8,
            unbonding_period: 9,
            minimum_stake: Balance(10),
            coordinator_bond: Balance(11),
            verifier_bond: Balance(12),
            contest_bond: Balance(13),
            challenge_bond: Balance(14),
            verifiers: vec![NodeId::new([15; 32])],
            attestation_quorum: 16,
            fault_quorum: 17,
            slashes: SlashTerms {
                replay: Balance(18),
                codec: Balance(19),
                withheld: Balance(20),
                equivocation: Balance(21),
                coordinator: Balance(22),
                reporter_share: 23,
            },
        }
    }

    #[test]
    fn terms_survive_the_way_to_the_chain_and_back() {
        let there: generated::RunTerms = Convert::convert(terms());
        assert_eq!(RunTerms::convert(there), terms());
    }

    #[test]
    fn a_value_of_the_state_is_read_whole_or_not_at_all() {
        let bytes = [&[9; 32][..], &300_u32.to_le_bytes()].concat();
        let anchor = Anchor { digest: Digest::new([9; 32]), block: 300 };
        assert_eq!(Anchor::from_state(&bytes), Ok(anchor));
        let longer = [&bytes[..], &[0]].concat();
        for wrong in [&bytes[1..], &longer, &[]] {
            assert!(Anchor::from_state(wrong).is_err());
        }
        assert!(Run::from_state(&[0xff; 2_000]).is_err());
    }

    #[test]
    fn a_verifiers_fault_is_read_from_the_bytes_that_the_chain_holds() {
        let bytes = [
            &[1; 32][..],          // evidence_digest
            &3_u128.to_le_bytes(), // deposit
            &2_u32.to_le_bytes(),  // jury
            &[1 << 2],             // one vote that it is guilty
            &[4; 32],
            &[1 << 2], // and one that it is not
            &[5; 32],
            &6_u32.to_le_bytes(),  // reported_at
            &[1],                  // state: Contested
            &7_u128.to_le_bytes(), // bond
            &[8; 32],              // evidence_digest
            &9_u32.to_le_bytes(),  // resolves_at
        ]
        .concat();
        let fault = VerifierFault {
            evidence_digest: Digest::new([1; 32]),
            deposit: Balance(3),
            jury: 2,
            votes: Votes {
                guilty: vec![NodeId::new([4; 32])],
                innocent: vec![NodeId::new([5; 32])],
            },
            reported_at: 6,
            state: FaultState::Contested {
                bond: Balance(7),
                evidence_digest: Digest::new([8; 32]),
                resolves_at: 9,
            },
        };
        assert_eq!(VerifierFault::from_state(&bytes), Ok(fault.clone()));
        assert!(VerifierFault::from_state(&bytes[1..]).is_err());
        let there: generated::VerifierFault = Convert::convert(fault.clone());
        assert_eq!(VerifierFault::convert(there), fault);
    }
}
