//! Who may work for a run: a typed predicate, so that a refusal says what was expected and what came.

use crate::reward::layout;
use manyhands_proto::message::{Join, NumericClass, PROTOCOL_VERSION, Refusal, RefusalCode, Role};
use manyhands_proto::run_file::{ChainKind, RunSpec};
use manyhands_proto::{Balance, NodeId};

/// Bytes a worker needs on its device: θ, gradient, two moments, θ_t, error buffer and the
/// vectors of a round, each f32, and the activations of one micro-batch (about 16 hidden-sized and
/// 4 vocabulary-sized values for each token).
pub fn memory_bytes_min(spec: &RunSpec) -> u64 {
    let parameters = layout(&spec.model).parameter_count().0;
    let tokens =
        u64::from(spec.training.micro_batch_sequences) * u64::from(spec.model.context_length);
    let hidden = u64::from(spec.model.layers) * u64::from(spec.model.hidden_size) * 16;
    let vocabulary = u64::from(spec.model.vocabulary_size) * 4;
    parameters * 4 * 8 + tokens * 4 * (hidden + vocabulary)
}

/// What a member of this role has to put down.
pub fn stake_min(spec: &RunSpec, role: Role) -> Balance {
    match role {
        Role::Worker => spec.chain.stake_min,
        Role::Verifier => spec.chain.verifier_bond,
    }
}

/// Whether `node` may take part, with `stake` on hold for it.
///
/// # Errors
/// The first requirement that is not met.
pub fn admit(spec: &RunSpec, node: NodeId, join: &Join, stake: Balance) -> Result<(), Refusal> {
    if join.version != PROTOCOL_VERSION {
        return refuse(
            RefusalCode::VersionMismatch,
            format!("this run speaks protocol {PROTOCOL_VERSION}, you speak {}", join.version),
        );
    }
    if !spec.run.allow.is_empty() && !spec.run.allow.contains(&node) {
        return refuse(RefusalCode::NotAllowed, format!("node {node} is not on the run's list"));
    }
    check_numerics(spec, &join.class)?;
    let memory_min = memory_bytes_min(spec);
    if join.memory_bytes < memory_min {
        return refuse(
            RefusalCode::TooLittleMemory,
            format!("this run needs {memory_min} bytes of memory, you have {}", join.memory_bytes),
        );
    }
    let what = match join.role {
        Role::Worker => "stake",
        Role::Verifier => "bond",
    };
    let stake_min = stake_min(spec, join.role);
    if spec.chain.kind == ChainKind::Substrate && stake < stake_min {
        return refuse(
            RefusalCode::StakeTooSmall,
            format!("this run asks for a {what} of {stake_min}, the chain holds {stake} for you"),
        );
    }
    // In half of its deadline: two sequences are the least that makes a step, and a round of one sequence a step the least
    // that workers are given, however slow those are that repeat it.
    let (sequences_min, time_ms) = match join.role {
        Role::Worker => (2, spec.round.commit_ms),
        Role::Verifier => (spec.training.steps_per_round.max(2), spec.round.check_ms),
    };
    let context_length = u64::from(spec.model.context_length);
    let tokens_min = u64::from(sequences_min) * context_length * 2_000 / time_ms.max(1);
    if join.tokens_per_second < tokens_min {
        return refuse(
            RefusalCode::TooSlow,
            format!(
                "this run needs {tokens_min} tokens per second, you measured {}",
                join.tokens_per_second
            ),
        );
    }
    Ok(())
}

/// Whether a machine comes to the bits that a run asks for, if it does.
///
/// # Errors
/// [`RefusalCode::OtherNumerics`].
pub fn check_numerics(spec: &RunSpec, class: &NumericClass) -> Result<(), Refusal> {
    match spec.verification.fingerprint {
        Some(expected) if class.fingerprint != Some(expected) => {
            let got = match class.fingerprint {
                Some(got) => format!("yours comes to {got}"),
                None => "yours does not come to the same bits twice".to_owned(),
            };
            let reason = format!("this run's machines come to the bits {expected}, {got}");
            refuse(RefusalCode::OtherNumerics, reason)
        }
        Some(_) | None => Ok(()),
    }
}

fn refuse(code: RefusalCode, reason: String) -> Result<(), Refusal> {
    Err(Refusal { code, reason })
}

#[cfg(test)]
mod tests {
    use manyhands_proto::Digest;
    use manyhands_proto::message::{DeviceKind, NumericClass};

    use super::*;
    use crate::record::tests_support::spec;

    fn join() -> Join {
        Join {
            role: Role::Worker,
            version: PROTOCOL_VERSION,
            class: NumericClass::unknown(DeviceKind::Cpu),
            memory_bytes: 1 << 40,
            tokens_per_second: 1_000_000,
            addresses: Vec::new(),
            head_rounds: Vec::new(),
        }
    }

    fn code(spec: &RunSpec, join: &Join, stake: u128) -> Option<RefusalCode> {
        admit(spec, NodeId::new([1; 32]), join, Balance(stake)).err().map(|refusal| refusal.code)
    }

    #[test]
    fn each_requirement_is_refused_with_its_own_code() {
        let mut spec = spec();
        let stake = spec.chain.stake_min.0;
        assert_eq!(code(&spec, &join(), stake), None);
        assert_eq!(code(&spec, &join(), stake - 1), Some(RefusalCode::StakeTooSmall));
        let other = Join { version: 99, ..join() };
        assert_eq!(code(&spec, &other, stake), Some(RefusalCode::VersionMismatch));
        let small = Join { memory_bytes: 1 << 10, ..join() };
        assert_eq!(code(&spec, &small, stake), Some(RefusalCode::TooLittleMemory));
        let slow = Join { tokens_per_second: 0, ..join() };
        assert_eq!(code(&spec, &slow, stake), Some(RefusalCode::TooSlow));
        // A whole round of a sequence a step, in half of two minutes.
        let verifier =
            |tokens_per_second| Join { role: Role::Verifier, tokens_per_second, ..join() };
        let mut long = spec.clone();
        long.training.steps_per_round = 6_000;
        let needed = 6_000 * u64::from(spec.model.context_length) / 60;
        assert_eq!(code(&long, &verifier(needed - 1), stake), Some(RefusalCode::TooSlow));
        assert_eq!(code(&long, &verifier(needed), stake), None);
        let bits = Digest::of(b"bits");
        let exact =
            Join { class: NumericClass { fingerprint: Some(bits), ..join().class }, ..join() };
        spec.verification.fingerprint = Some(bits);
        assert_eq!(code(&spec, &exact, stake), None);
        assert_eq!(code(&spec, &join(), stake), Some(RefusalCode::OtherNumerics));
        spec.verification.fingerprint = Some(Digest::of(b"other bits"));
        assert_eq!(code(&spec, &exact, stake), Some(RefusalCode::OtherNumerics));
        spec.verification.fingerprint = None;
        spec.run.allow = vec![NodeId::new([2; 32])];
        assert_eq!(code(&spec, &join(), stake), Some(RefusalCode::NotAllowed));
    }
}
