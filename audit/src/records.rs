//! The chain of records, walked from the newest back to the specification.

use std::collections::BTreeMap;

use manyhands_chain_client::types::Stage;
use manyhands_proto::message::{Assignment, SignedCommitment, Start, Work};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, RunId};
use manyhands_rules::assignment::{Opening, plan};
use manyhands_rules::quarantine::left_out_by_round;
use manyhands_rules::record::{
    Check, FaultKind, Finding, Outcome, RoundRecord, WorkerResult, hiding_is_held_against,
};

use crate::evidence::{Evidence, EvidenceError};
use crate::on_chain::OnChain;
use crate::report::{At, Findings, Link};
use crate::{AuditError, Progress};

/// A record of a round with thousands of workers is a few megabytes.
const RECORD_BYTES_MAX: u64 = 64 << 20;
/// Records after the last round: each takes something back or holds what was found last.
const CLOSING_RECORDS_MAX: u32 = 1_024;

/// More records than this a run cannot have.
pub(crate) fn records_max(spec: &RunSpec) -> u32 {
    spec.run.rounds.saturating_add(CLOSING_RECORDS_MAX)
}

/// All records of a run, from round 0 without a gap.
#[derive(Debug)]
pub(crate) struct Records {
    pub(crate) all: Vec<RoundRecord>,
    /// `digests[i]` is that of `all[i]`.
    pub(crate) digests: Vec<Digest>,
    /// Training sequences that nobody trained on in a round, by the records before it.
    left_out: Vec<Vec<u64>>,
    /// Of each worker-round with a replay on record, where the first is: the record, and the place among its checks.
    replays: BTreeMap<(Round, NodeId), (usize, usize)>,
}

impl Records {
    fn new(spec: &RunSpec, all: Vec<RoundRecord>, digests: Vec<Digest>) -> Self {
        let left_out = left_out_by_round(spec, &all);
        let mut replays = BTreeMap::new();
        for (number, record) in all.iter().enumerate() {
            let checks = record.checks.iter().enumerate();
            for (at, check) in checks.filter(|(_, check)| !check.is_of_codec()) {
                replays.entry((check.round, check.worker)).or_insert((number, at));
            }
        }
        Self { all, digests, left_out, replays }
    }

    pub(crate) fn get(&self, round: Round) -> Option<&RoundRecord> {
        self.all.get(round.0 as usize)
    }

    /// The assignments of a round, in worker order; none if there are too many candidates or their positions would not fit.
    pub(crate) fn plan(&self, spec: &RunSpec, record: &RoundRecord) -> Option<Vec<Assignment>> {
        let RoundRecord { round, theta, first_sequence, candidates, sequences_max, .. } = record;
        let ascending = candidates.is_sorted_by(|left, right| left.worker < right.worker);
        if candidates.len() > spec.run.workers_max as usize || !ascending {
            return None;
        }
        let all = u64::from(u32::MAX).checked_mul(candidates.len() as u64)?;
        first_sequence.checked_add(all)?;
        let left_out = self.left_out.get(round.0 as usize)?;
        let opening = Opening {
            round: *round,
            theta: *theta,
            first_sequence: *first_sequence,
            left_out,
            sequences_max: *sequences_max,
        };
        Some(plan(spec, opening, candidates))
    }

    /// What a worker stands for in a round, as far as it is on record.
    pub(crate) fn work(&self, spec: &RunSpec, round: Round, worker: NodeId) -> Option<Work> {
        let planned = self.plan(spec, self.get(round)?)?;
        let assignment = planned.into_iter().find(|assignment| assignment.worker == worker)?;
        let head = match assignment.start {
            Start::Fresh => None,
            Start::Head { round, .. } => Some(self.commitment(round, worker)?.commitment.clone()),
        };
        Some(Work { commitment: self.commitment(round, worker)?.clone(), assignment, head })
    }

    /// Whose updates of a round were taken back by merges before that of round `before`.
    pub(crate) fn revoked_before(&self, before: Round, of: Round) -> Vec<NodeId> {
        let merged = |record: &&RoundRecord| record.round < before && record.merge.is_some();
        let revocations = self.all.iter().filter(merged).flat_map(|record| &record.revocations);
        revocations.filter(|it| it.round == of).map(|it| it.worker).collect()
    }

    pub(crate) fn commitment(&self, round: Round, worker: NodeId) -> Option<&SignedCommitment> {
        self.get(round)?.commitments.iter().find(|signed| signed.worker == worker)
    }

    pub(crate) fn result(&self, round: Round, worker: NodeId) -> Option<&WorkerResult> {
        self.get(round)?.results.iter().find(|result| result.worker == worker)
    }

    /// The last round; there is at least one.
    pub(crate) fn newest(&self) -> Option<Round> {
        self.all.last().map(|record| record.round)
    }

    /// Rounds in which somebody was to train: not those that only took something back.
    pub(crate) fn trained(&self) -> impl Iterator<Item = &RoundRecord> {
        self.all.iter().filter(|record| !record.candidates.is_empty())
    }

    /// Faults on record, as they are reported to the chain.
    pub(crate) fn faults(&self) -> impl Iterator<Item = (Round, NodeId, Outcome)> + '_ {
        self.all.iter().flat_map(|record| {
            let held_against = hiding_is_held_against(&record.results);
            let counts = move |outcome: &Outcome| match outcome.fault() {
                None => false,
                Some(FaultKind::Withheld) => held_against,
                Some(FaultKind::Malformed | FaultKind::Codec | FaultKind::Replay) => true,
            };
            let at_close = record
                .results
                .iter()
                .filter(move |result| counts(&result.outcome))
                .map(|result| (record.round, result.worker, result.outcome.clone()));
            let later = late_checks(record).filter_map(|check| match &check.finding {
                Finding::ReplayFault(distances) => {
                    Some((check.round, check.worker, Outcome::ReplayFault(*distances)))
                }
                Finding::Withheld(reason) => {
                    Some((check.round, check.worker, Outcome::Withheld(reason.clone())))
                }
                Finding::CodecPassed
                | Finding::CodecFault(_)
                | Finding::ReplayPassed(_)
                | Finding::Undecided
                | Finding::Irreproducible => None,
            });
            at_close.chain(later)
        })
    }
}

/// Where in `record.checks` the checks ended and the outcomes were decided: the coordinator's codec
/// checks are recorded at that moment. None if there was none: nobody had uploaded.
pub(crate) fn close_of(record: &RoundRecord) -> Option<usize> {
    let of_codec = |check: &Check| check.is_of_codec() && check.round == record.round;
    record.checks.iter().position(of_codec)
}

/// Replays that the merge of this record waited for.
pub(crate) fn early_checks(record: &RoundRecord) -> impl Iterator<Item = &Check> {
    let close = close_of(record).unwrap_or(0);
    record.checks[..close]
        .iter()
        .filter(move |check| !check.is_of_codec() && check.round == record.round)
}

/// Replays of rounds that were merged before they ended.
pub(crate) fn late_checks(record: &RoundRecord) -> impl Iterator<Item = &Check> {
    let close = close_of(record).unwrap_or(0);
    record.checks.iter().enumerate().filter_map(move |(index, check)| {
        let late = check.round != record.round || index >= close;
        (!check.is_of_codec() && late).then_some(check)
    })
}

/// A replay that one verifier had let pass, if `check` of `record` is of another that looked over it: with the record
/// that it is in, which is an earlier one.
pub(crate) fn looked_over<'r>(
    records: &'r Records,
    record: &RoundRecord,
    check: &Check,
) -> Option<(&'r RoundRecord, &'r Check)> {
    let &(number, at) = records.replays.get(&(check.round, check.worker))?;
    let first = records.all.get(number).filter(|first| first.round < record.round)?;
    Some((first, first.checks.get(at)?))
}

/// The effects of round `of` were still known to the coordinator while `now` was open.
pub(crate) fn is_kept(spec: &RunSpec, now: Round, of: Round) -> bool {
    of.0 >= now.0.saturating_sub(spec.run.evidence_rounds)
}

/// Fetches a blob. A blob that is not what its name says fails the audit at `at`.
pub(crate) enum Fetched {
    Bytes(Vec<u8>),
    Gone,
    /// It is among the findings.
    Wrong,
}

pub(crate) async fn fetch<E: Evidence>(
    evidence: &E,
    findings: &mut Findings,
    at: At,
    (digest, bytes_max): (Digest, u64),
) -> Result<Fetched, AuditError> {
    match evidence.blob(digest, bytes_max).await {
        Ok(Some(bytes)) => Ok(Fetched::Bytes(bytes)),
        Ok(None) => Ok(Fetched::Gone),
        Err(error @ (EvidenceError::Changed { .. } | EvidenceError::TooLarge { .. })) => {
            findings.failed(at, format!("blob {digest}"), error.to_string());
            Ok(Fetched::Wrong)
        }
        Err(error @ (EvidenceError::Io { .. } | EvidenceError::Unreachable { .. })) => {
            Err(error.into())
        }
    }
}

/// What the walk starts from and must lead to.
pub(crate) struct Walk<'a> {
    pub(crate) run: RunId,
    pub(crate) spec: &'a RunSpec,
    pub(crate) newest: Digest,
    /// The round that the chain says the newest record is of.
    pub(crate) round: Option<Round>,
}

/// All records; none if the walk broke off, which is then among the findings.
pub(crate) async fn walk<E: Evidence>(
    walk: Walk<'_>,
    evidence: &E,
    findings: &mut Findings,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Option<Records>, AuditError> {
    let mut expected = walk.round;
    let mut digest = walk.newest;
    let mut backwards: Vec<(RoundRecord, Digest)> = Vec::new();
    loop {
        let at = expected.map_or(Link::RecordChain.of_run(), |round| Link::RecordChain.at(round));
        let bytes = match fetch(evidence, findings, at, (digest, RECORD_BYTES_MAX)).await? {
            Fetched::Bytes(bytes) => bytes,
            Fetched::Gone => {
                findings.expired(at, format!("record {digest}"));
                return Ok(None);
            }
            Fetched::Wrong => return Ok(None),
        };
        let record = match RoundRecord::parse(&bytes) {
            Ok(record) => record,
            Err(error) => {
                findings.failed(at, "a round's record", error.to_string());
                return Ok(None);
            }
        };
        let at = Link::RecordChain.at(record.round);
        let last = records_max(walk.spec);
        let is_next = expected.is_none_or(|round| round == record.round) && record.round.0 < last;
        let round = |round: Option<Round>| {
            round.map_or_else(|| format!("a round below {last}"), |r| format!("round {r}"))
        };
        let holds = findings.require(at, is_next, || round(expected), || round(Some(record.round)))
            && findings.same(at, "run", (walk.run, record.run));
        if !holds {
            return Ok(None);
        }
        progress(Progress::Records { round: record.round });
        let (number, previous) = (record.round, record.previous);
        backwards.push((record, digest));
        match number.0.checked_sub(1) {
            Some(before) => (expected, digest) = (Some(Round(before)), previous),
            None => {
                let rooted = findings.same(at, "specification", (walk.spec.digest(), previous));
                backwards.reverse();
                let (all, digests) = backwards.into_iter().unzip();
                return Ok(rooted.then(|| Records::new(walk.spec, all, digests)));
            }
        }
    }
}

/// The sets of each round as they were anchored.
pub(crate) fn check_anchors(records: &Records, on_chain: &OnChain, findings: &mut Findings) {
    for record in records.trained() {
        let sets = [
            (Link::CommitSetAnchor, Stage::Commit, record.committed()),
            (Link::AdmittedSetAnchor, Stage::Admitted, record.admitted_set()),
        ];
        for (link, stage, digest) in sets {
            let at = link.at(record.round);
            match on_chain.anchors.get(&(record.round, stage)) {
                Some(anchor) => _ = findings.same(at, "digest", (anchor.digest, digest)),
                None if on_chain.is_settled() => findings.expired(at, "an anchor on chain"),
                // A round that is not committed yet may still be waiting for its anchor.
                None if record.round >= on_chain.run.next_round => {
                    findings.unchecked(at, "an anchor on chain", "none yet");
                }
                None => findings.failed(at, "an anchor on chain", "none"),
            }
        }
    }
}

/// Rounds whose anchors are wanted.
pub(crate) fn anchored_rounds(records: &Records) -> Vec<Round> {
    records.trained().map(|record| record.round).collect()
}
