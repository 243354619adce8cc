//! How often a worker is replayed: less as it passes, at once more when it fails. Integers only,
//! recomputable by anybody from recorded verdicts.

use serde::{Deserialize, Serialize};

const MAX: u32 = 64;
/// From here on the audit rate is at its floor, half of the base rate.
const FLOOR_AT: u32 = 16;
/// Audits at rate 1 after a fault.
const STRICT_AFTER_FAULT: u32 = 5;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credibility {
    points: u32,
    /// Compute checks that must pass before the rate falls below 1.
    strict: u32,
}

impl Credibility {
    /// A newcomer: replayed before the merge until `probation_checks` passed.
    pub fn on_probation(probation_checks: u32) -> Self {
        Self { points: 0, strict: probation_checks }
    }

    /// Nobody is replayed less.
    pub fn full() -> Self {
        Self { points: MAX, strict: 0 }
    }

    pub fn points(&self) -> u32 {
        self.points
    }

    /// Whether every round is replayed before the merge.
    pub fn is_on_probation(&self) -> bool {
        self.strict > 0
    }

    /// A compute check passed.
    pub fn passed(&mut self) {
        self.points = (self.points + 1).min(MAX);
        self.strict = self.strict.saturating_sub(1);
    }

    /// A fault, or a check it did not answer.
    pub fn failed(&mut self) {
        self.points = self.points * 2 / 3;
        self.strict = STRICT_AFTER_FAULT;
    }

    /// q = max(q₀/2, q₀·16/(16 + points)) as a fraction, 1 on probation.
    pub fn audit_rate(&self, audit_rate_per_mille: u32) -> (u64, u64) {
        if self.is_on_probation() {
            return (1, 1);
        }
        let numerator = u64::from(audit_rate_per_mille) * u64::from(FLOOR_AT);
        (numerator, 1_000 * u64::from(FLOOR_AT + self.points.min(FLOOR_AT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newcomer_earns_trust_and_a_fault_takes_a_third_of_it() {
        let mut credibility = Credibility::on_probation(2);
        assert_eq!(credibility.audit_rate(100), (1, 1));
        (0..20).for_each(|_| credibility.passed());
        let (numerator, denominator) = credibility.audit_rate(100);
        assert_eq!(numerator * 20, denominator, "the floor is half of a tenth");
        credibility.failed();
        assert_eq!(credibility.points(), 13);
        assert!(credibility.is_on_probation());
        (0..5).for_each(|_| credibility.passed());
        assert!(!credibility.is_on_probation());
    }
}
