//! What a run's specification says about its record on chain, and whether the record is that.
//!
//! Whoever makes a run, stakes on it or audits it derives the same terms here: a change of this
//! file changes what all of them agree on.

use std::fmt;

use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, NodeId};

use crate::types::{Run, RunTerms, SlashTerms};

/// Blocks without a committed round after which anybody may close the run: a week of six-second
/// blocks.
const IDLE_TIMEOUT_BLOCKS: u32 = 100_800;
/// Blocks after the end in which rewards can be claimed: the same.
const CLAIM_WINDOW_BLOCKS: u32 = 100_800;

/// Why a run's record on chain is not what its specification says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RunMismatch {
    #[error(
        "on chain the run belongs to account {got}, expected its coordinator {expected}: somebody \
         else took its id"
    )]
    Owner { expected: NodeId, got: NodeId },
    #[error("on chain the run has other terms than its specification: {}", listed(.0))]
    Terms(Vec<TermDifference>),
}

/// A term that the chain holds otherwise than it follows from the specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TermDifference {
    pub term: &'static str,
    pub expected: String,
    pub found: String,
}

impl fmt::Display for TermDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { term, expected, found } = self;
        write!(f, "{term}: expected {expected}, found {found}")
    }
}

fn listed(differences: &[TermDifference]) -> String {
    let each: Vec<_> = differences.iter().map(ToString::to_string).collect();
    each.join("; ")
}

impl Run {
    /// Ensures that this is the record of the run that `coordinator` makes of `spec`: nobody should
    /// put down or pay anything for another.
    pub fn check(&self, coordinator: &NodeId, spec: &RunSpec) -> Result<(), RunMismatch> {
        if self.owner != *coordinator {
            return Err(RunMismatch::Owner { expected: *coordinator, got: self.owner });
        }
        let differences = RunTerms::of(spec).differences(&self.terms);
        if differences.is_empty() { Ok(()) } else { Err(RunMismatch::Terms(differences)) }
    }
}

impl RunTerms {
    /// The terms that the chain enforces, as they follow from the run's specification.
    pub fn of(spec: &RunSpec) -> Self {
        let chain = &spec.chain;
        let share =
            |amount: Balance, per_mille: u32| Balance(amount.0 / 1_000 * u128::from(per_mille));
        let slash = share(chain.stake_min, chain.slash_per_mille);
        let bond_min = chain.verifier_bond.min(chain.coordinator_bond);
        let resolution_window = chain.contest_window_blocks;
        let windows =
            [chain.challenge_window_blocks, chain.contest_window_blocks, resolution_window];
        Self {
            config_digest: spec.digest(),
            price_per_unit: chain.price_per_work_unit,
            vesting_rounds: chain.vesting_rounds,
            challenge_window: chain.challenge_window_blocks,
            contest_window: chain.contest_window_blocks,
            resolution_window,
            claim_window: CLAIM_WINDOW_BLOCKS,
            idle_timeout: IDLE_TIMEOUT_BLOCKS,
            // A stake must still be there when the last fault of its rounds is decided.
            unbonding_period: windows
                .iter()
                .fold(0, |sum: u32, window| sum.saturating_add(*window)),
            minimum_stake: chain.stake_min,
            coordinator_bond: chain.coordinator_bond,
            verifier_bond: chain.verifier_bond,
            // Enough that nobody contests for fun, little enough that everybody can.
            contest_bond: Balance(bond_min.0 / 10),
            challenge_bond: bond_min,
            verifiers: Vec::new(),
            // Rounds become final when nobody challenges them: verifiers attest nothing by default.
            attestation_quorum: 0,
            fault_quorum: chain.fault_quorum.max(1),
            slashes: SlashTerms {
                replay: slash,
                codec: slash,
                withheld: share(chain.stake_min, chain.withheld_slash_per_mille),
                equivocation: slash,
                coordinator: share(chain.coordinator_bond, chain.slash_per_mille),
                reporter_share: u8::try_from(chain.reporter_share_per_mille.min(1_000) / 10)
                    .unwrap_or(100),
            },
        }
    }

    /// Where `found` differs from these terms, in the order of their declaration.
    fn differences(&self, found: &Self) -> Vec<TermDifference> {
        // Taken apart without a rest, so that a new term cannot be forgotten here.
        let Self {
            config_digest,
            price_per_unit,
            vesting_rounds,
            challenge_window,
            contest_window,
            resolution_window,
            claim_window,
            idle_timeout,
            unbonding_period,
            minimum_stake,
            coordinator_bond,
            verifier_bond,
            contest_bond,
            challenge_bond,
            verifiers,
            attestation_quorum,
            fault_quorum,
            slashes,
        } = self;
        let mut all = Differences::default();
        all.compare("specification", config_digest, &found.config_digest);
        all.compare("price per work unit", price_per_unit, &found.price_per_unit);
        all.compare("vesting rounds", vesting_rounds, &found.vesting_rounds);
        all.compare("challenge window", challenge_window, &found.challenge_window);
        all.compare("contest window", contest_window, &found.contest_window);
        all.compare("resolution window", resolution_window, &found.resolution_window);
        all.compare("claim window", claim_window, &found.claim_window);
        all.compare("idle timeout", idle_timeout, &found.idle_timeout);
        all.compare("unbonding period", unbonding_period, &found.unbonding_period);
        all.compare("minimum stake", minimum_stake, &found.minimum_stake);
        all.compare("coordinator's bond", coordinator_bond, &found.coordinator_bond);
        all.compare("verifier's bond", verifier_bond, &found.verifier_bond);
        all.compare("contest bond", contest_bond, &found.contest_bond);
        all.compare("challenge bond", challenge_bond, &found.challenge_bond);
        all.compare("invited verifiers", &named(verifiers), &named(&found.verifiers));
        all.compare("attestation quorum", attestation_quorum, &found.attestation_quorum);
        all.compare("fault quorum", fault_quorum, &found.fault_quorum);
        all.compare_slashes(slashes, &found.slashes);
        all.0
    }
}

#[derive(Default)]
struct Differences(Vec<TermDifference>);

impl Differences {
    fn compare<T: PartialEq + fmt::Display>(
        &mut self,
        term: &'static str,
        expected: &T,
        found: &T,
    ) {
        if expected != found {
            let (expected, found) = (expected.to_string(), found.to_string());
            self.0.push(TermDifference { term, expected, found });
        }
    }

    fn compare_slashes(&mut self, expected: &SlashTerms, found: &SlashTerms) {
        let SlashTerms { replay, codec, withheld, equivocation, coordinator, reporter_share } =
            expected;
        self.compare("slash for a replay fault", replay, &found.replay);
        self.compare("slash for a codec fault", codec, &found.codec);
        self.compare("slash for withholding", withheld, &found.withheld);
        self.compare("slash for equivocation", equivocation, &found.equivocation);
        self.compare("coordinator's slash", coordinator, &found.coordinator);
        self.compare("reporters' percentage", reporter_share, &found.reporter_share);
    }
}

fn named(verifiers: &[NodeId]) -> String {
    if verifiers.is_empty() {
        return "everybody".to_owned();
    }
    let each: Vec<_> = verifiers.iter().map(ToString::to_string).collect();
    each.join(", ")
}

#[cfg(test)]
mod tests {
    use manyhands_proto::run_file::{DataSet, RunFile};
    use manyhands_proto::{Digest, Round};

    use super::*;
    use crate::types::{RunState, Totals};

    const COORDINATOR: NodeId = NodeId::new([1; 32]);

    fn spec() -> RunSpec {
        let text = r#"
            [run]
            name = "tiny"
            rounds = 2
            [model]
            vocabulary_size = 512
            hidden_size = 32
            layers = 1
            heads = 4
            key_value_heads = 2
            feed_forward_size = 64
            context_length = 32
            [training]
            steps_per_round = 4
            batch_sequences = 4
            micro_batch_sequences = 2
            learning_rate = 1e-3
            [data]
            dataset = "data"
        "#;
        RunFile::parse(text).expect("a good file").resolve(DataSet {
            manifest: Digest::of(b"manifest"),
            train_sequences: 10_000,
            held_out_sequences: 2,
            theta: Digest::of(b"theta 0"),
            theta_is_given: false,
        })
    }

    fn run(terms: RunTerms) -> Run {
        let nothing = Balance(0);
        Run {
            owner: COORDINATOR,
            terms,
            state: RunState::Active,
            escrow: nothing,
            funded: nothing,
            funded_outstanding: nothing,
            recovered: nothing,
            refunded: nothing,
            claimed: nothing,
            finalized_reward: nothing,
            committed: Totals { reward: nothing, ceiling: nothing },
            deposit: nothing,
            bond: nothing,
            verifiers: 0,
            next_round: Round(0),
            pending: Vec::new(),
            latest_finalized: None,
            open_disputes: 0,
            last_progress: 1,
        }
    }

    #[test]
    fn terms_keep_the_chains_own_limits() {
        let spec = spec();
        let terms = RunTerms::of(&spec);
        assert_eq!(terms.config_digest, spec.digest());
        assert!(terms.slashes.replay <= terms.minimum_stake);
        assert!(terms.slashes.coordinator <= terms.coordinator_bond);
        assert!(terms.contest_bond <= terms.verifier_bond);
        let windows = terms.challenge_window + terms.contest_window + terms.resolution_window;
        assert!(terms.unbonding_period >= windows);
    }

    #[test]
    fn a_record_is_the_runs_only_with_its_owner_and_all_of_its_terms() {
        type Change = fn(&mut RunTerms);
        let changes: [(&str, Change); 8] = [
            ("specification", |terms| terms.config_digest = Digest::of(b"another")),
            ("minimum stake", |terms| terms.minimum_stake.0 += 1),
            ("unbonding period", |terms| terms.unbonding_period += 1),
            ("claim window", |terms| terms.claim_window -= 1),
            ("invited verifiers", |terms| terms.verifiers.push(COORDINATOR)),
            ("fault quorum", |terms| terms.fault_quorum -= 1),
            ("slash for a replay fault", |terms| terms.slashes.replay.0 += 1),
            ("reporters' percentage", |terms| terms.slashes.reporter_share += 1),
        ];
        let spec = spec();
        assert_eq!(run(RunTerms::of(&spec)).check(&COORDINATOR, &spec), Ok(()));
        for (term, change) in changes {
            let mut terms = RunTerms::of(&spec);
            change(&mut terms);
            match run(terms).check(&COORDINATOR, &spec) {
                Err(RunMismatch::Terms(differences)) => {
                    assert_eq!(differences.iter().map(|d| d.term).collect::<Vec<_>>(), [term]);
                }
                other => panic!("expected another {term}, got {other:?}"),
            }
        }
        let stranger = NodeId::new([2; 32]);
        let refusal = run(RunTerms::of(&spec)).check(&stranger, &spec).expect_err("not its owner");
        assert_eq!(refusal, RunMismatch::Owner { expected: stranger, got: COORDINATOR });
    }
}
