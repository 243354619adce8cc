//! What the demo measured, and whether it is what the demo promises.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use manyhands_chain_client::types::{FaultState, RoundState};
use manyhands_chain_client::{ChainClient, ReadError};
use manyhands_coordinator::read_record;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::record::{Finding, Outcome, RoundRecord};
use serde::Serialize;

use crate::failure::{Explain, Failure};

/// A learnt model beats token frequencies by at least so much, nats per token.
const LEARNT_MIN: f64 = 0.5;
const BITS_PER_PARAMETER_MAX: f64 = 0.16;

/// Everything here is measured; `runs/demo/report.json` is this.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    pub(super) rounds: u32,
    pub(super) workers: usize,
    pub(super) parameters: u64,
    /// Targets of the updates that were merged.
    pub(super) tokens: u64,
    pub(super) validation_loss_first: f64,
    pub(super) validation_loss_last: f64,
    pub(super) validation_loss_one_process: f64,
    /// validation_loss_last over validation_loss_one_process, less 1.
    pub(super) loss_above_one_process: f64,
    pub(super) unigram_loss: f64,
    /// Payload bytes × 8 over parameters, mean over all commitments.
    pub(super) bits_per_parameter: f64,
    /// Whether every worker had the θ of the record in every round that it came to.
    pub(super) theta_digests_equal: bool,
    /// θ digests of workers that were compared.
    pub(super) theta_digests_compared: usize,
    pub(super) theta: Digest,
    /// The share of a round that a worker waited for the others to train: of the worker that waited longest,
    /// in the worst round and in the middle one.
    pub(super) waiting_share_max: f64,
    pub(super) waiting_share_median: f64,
    /// Leaves in final commits.
    pub(super) contributions_on_chain: u64,
    pub(super) rewards_paid: Balance,
    pub(super) cheaters: Vec<Cheater>,
    pub(super) honest_workers_slashed: usize,
    pub(super) audit: String,
    pub(super) chain_finalized_block: u32,
    pub(super) sample: String,
    pub(super) seconds: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Cheater {
    pub(super) worker: NodeId,
    pub(super) round_caught: Round,
    pub(super) reason: String,
    pub(super) amount_slashed: Balance,
}

/// What the records of a run say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recorded {
    pub(super) workers: usize,
    pub(super) tokens: u64,
    pub(super) bits_per_parameter: f64,
    /// Held-out loss by the round whose θ it is.
    pub(super) losses: BTreeMap<Round, f64>,
    /// θ at the start of each round, the final one included.
    pub(super) thetas: BTreeMap<Round, Digest>,
}

/// What the chain says of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OnChain {
    pub(super) contributions: u64,
    /// Executed faults.
    pub(super) slashed: BTreeMap<(NodeId, Round), Balance>,
    pub(super) finalized_block: u32,
}

/// All records of a run's folder, oldest first.
pub(super) fn records(folder: &Path) -> Result<Vec<RoundRecord>, Failure> {
    let folder = folder.join("records");
    let mut records = Vec::new();
    while manyhands_coordinator::record_path(&folder, Round(records.len() as u32)).exists() {
        let record = read_record(&folder, Round(records.len() as u32))
            .explain("demo_records", "run the demo again")?;
        records.push(record);
    }
    Ok(records)
}

impl Recorded {
    pub(super) fn of(records: &[RoundRecord], parameters: u64) -> Self {
        let (mut workers, mut tokens) = (BTreeSet::new(), 0);
        let (mut payload_bytes, mut commitments) = (0, 0_u64);
        let (mut losses, mut thetas) = (BTreeMap::new(), BTreeMap::new());
        for record in records {
            workers.extend(record.candidates.iter().map(|candidate| candidate.worker));
            for signed in &record.commitments {
                payload_bytes += signed.commitment.payload_bytes;
                commitments += 1;
                let admitted = record.results.iter().any(|result| {
                    result.worker == signed.worker && result.outcome == Outcome::Admitted
                });
                if admitted {
                    tokens += signed.commitment.tokens.0;
                }
            }
            losses.extend(
                record.evaluations.iter().map(|evaluation| (evaluation.round, evaluation.loss)),
            );
            thetas.insert(record.round, record.theta);
            thetas.insert(record.round.next(), record.theta_next);
        }
        let sent = parameters as f64 * commitments.max(1) as f64;
        let bits_per_parameter = payload_bytes as f64 * 8.0 / sent;
        Self { workers: workers.len(), tokens, bits_per_parameter, losses, thetas }
    }
}

impl OnChain {
    pub(super) async fn of(chain: &ChainClient, run: RunId) -> Result<Self, ReadError> {
        let state = chain.state().await?;
        let rounds = state.rounds(&run).await?;
        let finals = rounds.iter().filter(|(_, commit)| commit.state == RoundState::Finalized);
        let contributions =
            finals.map(|(_, commit)| u64::from(commit.commitment.number_of_leaves)).sum();
        let faults = state.faults(&run).await?;
        let slashed = faults
            .into_iter()
            .filter_map(|(of, fault)| match fault.state {
                FaultState::Executed { slashed } => Some((of, slashed)),
                FaultState::Reported { .. }
                | FaultState::Contested { .. }
                | FaultState::Dismissed => None,
            })
            .collect();
        Ok(Self { contributions, slashed, finalized_block: state.block().number })
    }

    /// Those who were slashed, with what the records say of why.
    pub(super) fn cheaters(&self, records: &[RoundRecord]) -> Vec<Cheater> {
        self.slashed
            .iter()
            .map(|(&(worker, round), &amount_slashed)| Cheater {
                worker,
                round_caught: round,
                reason: reason(records, worker, round),
                amount_slashed,
            })
            .collect()
    }
}

fn reason(records: &[RoundRecord], worker: NodeId, round: Round) -> String {
    let checks = records.iter().flat_map(|record| &record.checks);
    let mut own = checks.filter(|check| check.worker == worker && check.round == round);
    let found = own.find_map(|check| match &check.finding {
        Finding::ReplayFault(distances) => Some(Outcome::ReplayFault(*distances)),
        Finding::CodecFault(fault) => Some(Outcome::CodecFault(fault.clone())),
        Finding::CodecPassed
        | Finding::ReplayPassed(_)
        | Finding::Withheld(_)
        | Finding::Undecided
        | Finding::Irreproducible => None,
    });
    let outcome = || {
        let record = records.iter().find(|record| record.round == round)?;
        let result = record.results.iter().find(|result| result.worker == worker)?;
        Some(result.outcome.clone())
    };
    let outcome = found.or_else(outcome);
    outcome.map_or_else(|| "not recorded".to_owned(), |outcome| outcome.to_string())
}

impl Report {
    /// Whatever is not as the demo promises, in words; nothing if all is.
    pub(super) fn broken_promises(&self, extra_workers: &[NodeId]) -> Vec<String> {
        let mut broken = Vec::new();
        let mut expect = |holds: bool, what: String| {
            if !holds {
                broken.push(what);
            }
        };
        expect(self.theta_digests_equal, "workers had different parameters".to_owned());
        expect(
            self.theta_digests_compared > 0,
            "no worker told which parameters it has".to_owned(),
        );
        expect(self.audit == "ok", format!("the audit found: {}", self.audit));
        for worker in extra_workers {
            let caught = self
                .cheaters
                .iter()
                .any(|cheater| cheater.worker == *worker && cheater.amount_slashed.0 > 0);
            expect(caught, format!("{} was not caught and slashed", worker.short()));
        }
        expect(
            self.honest_workers_slashed == 0,
            format!("{} honest workers were slashed", self.honest_workers_slashed),
        );
        expect(self.rewards_paid.0 > 0, "nobody was paid".to_owned());
        expect(self.contributions_on_chain > 0, "the chain holds no contribution".to_owned());
        expect(
            self.validation_loss_last <= self.unigram_loss - LEARNT_MIN,
            format!(
                "the loss ended at {:.3}, token frequencies alone give {:.3}",
                self.validation_loss_last, self.unigram_loss
            ),
        );
        expect(
            self.bits_per_parameter <= BITS_PER_PARAMETER_MAX,
            format!(
                "updates take {:.3} bits per parameter, at most {BITS_PER_PARAMETER_MAX} were promised",
                self.bits_per_parameter
            ),
        );
        broken
    }
}
