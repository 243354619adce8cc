//! What everybody earned, and what is taken back.

use std::collections::BTreeMap;

use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, NodeId, TokenCount, WorkUnits};
use manyhands_rules::record::{Check, Earning, Finding, Outcome, Revocation, RoundRecord};
use manyhands_rules::reward;

use crate::records::{Records, is_kept, late_checks, looked_over};
use crate::report::{Findings, Link};

pub(crate) struct Pay<'a> {
    spec: &'a RunSpec,
    earned: BTreeMap<NodeId, Balance>,
    /// Found after their merge and not taken back yet, in the order they were found.
    revocations: Vec<Revocation>,
    /// Work of the token counts seen so far: few differ, and each takes the model's layout.
    work: BTreeMap<TokenCount, WorkUnits>,
}

impl<'a> Pay<'a> {
    pub(crate) fn new(spec: &'a RunSpec) -> Self {
        let (earned, work) = (BTreeMap::new(), BTreeMap::new());
        Self { spec, earned, revocations: Vec::new(), work }
    }

    pub(crate) fn step(
        &mut self,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) {
        self.pay_workers(records, record, findings);
        self.take_back(records, record);
        self.check_revocations(records, record, findings);
        let verifier_work = self.pay_verifiers(records, record, findings);
        self.check_earnings(record, &verifier_work, findings);
    }

    fn pay_workers(&mut self, records: &Records, record: &RoundRecord, findings: &mut Findings) {
        for result in &record.results {
            let worker = result.worker;
            let tokens = records
                .commitment(record.round, worker)
                .map_or(TokenCount(0), |signed| signed.commitment.tokens);
            let full = self.work_of(tokens);
            let paid = reward::reward(self.spec, full);
            let (work, reward) = match result.outcome {
                Outcome::Admitted => (full, paid),
                Outcome::Late => (full, reward::late(paid)),
                Outcome::NotCommitted
                | Outcome::NotUploaded
                | Outcome::Malformed(_)
                | Outcome::CodecFault(_)
                | Outcome::ReplayFault(_)
                | Outcome::Withheld(_)
                | Outcome::Unverified
                | Outcome::Irreproducible => (WorkUnits(0), Balance(0)),
            };
            let at = Link::Rewards.at(record.round).of(worker);
            findings.same(at, "work", (work, result.work));
            findings.same(at, "a reward of", (reward, result.reward));
            let earned = self.earned.entry(worker).or_default();
            earned.0 = earned.0.saturating_add(reward.0);
        }
    }

    /// Forfeits what was earned with rounds that were found faulty, or were not opened, later.
    fn take_back(&mut self, records: &Records, record: &RoundRecord) {
        for check in late_checks(record) {
            if !is_taken_back(check) || !is_kept(self.spec, record.round, check.round) {
                continue;
            }
            let Some(result) = records.result(check.round, check.worker) else { continue };
            let earned = self.earned.entry(check.worker).or_default();
            earned.0 = earned.0.saturating_sub(result.reward.0);
            if result.outcome == Outcome::Admitted {
                let revocation = Revocation { round: check.round, worker: check.worker };
                self.revocations.push(revocation);
            }
        }
    }

    /// What waits is taken back by the next merge, all of it.
    fn check_revocations(
        &mut self,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) {
        let at = Link::Revocations.at(record.round);
        let admitted = record.results.iter().any(|result| result.outcome == Outcome::Admitted);
        let kept = effective(self.spec, records, record, &self.revocations);
        let merges = admitted || !kept.is_empty();
        findings.require(
            at,
            record.merge.is_some() == merges,
            || if merges { "a merge" } else { "no merge" },
            || if merges { "none" } else { "one" },
        );
        let due =
            if record.merge.is_some() { std::mem::take(&mut self.revocations) } else { Vec::new() };
        findings.require(
            at,
            record.revocations == due,
            || listed(&due),
            || listed(&record.revocations),
        );
    }

    fn pay_verifiers(
        &mut self,
        records: &Records,
        record: &RoundRecord,
        findings: &mut Findings,
    ) -> BTreeMap<NodeId, WorkUnits> {
        let mut done: BTreeMap<NodeId, WorkUnits> = BTreeMap::new();
        for check in &record.checks {
            if check.is_of_codec() {
                continue;
            }
            let Some(signed) = records.commitment(check.round, check.worker) else {
                let at = Link::Rewards.at(record.round).of(check.worker);
                findings.failed(at, "a replay of a committed update", "one of another");
                continue;
            };
            let work = self.work_of(signed.commitment.tokens);
            // Whoever let it pass before was paid then.
            let paid = usize::from(looked_over(records, record, check).is_some());
            for judgement in check.judgements.iter().skip(paid) {
                if judgement.verdict.agrees_with(&check.finding) {
                    let sum = done.entry(judgement.verifier()).or_default();
                    sum.0 = sum.0.saturating_add(work.0);
                }
            }
        }
        for (verifier, work) in &done {
            let earned = self.earned.entry(*verifier).or_default();
            earned.0 = earned.0.saturating_add(reward::reward(self.spec, *work).0);
        }
        done
    }

    fn check_earnings(
        &self,
        record: &RoundRecord,
        verifier_work: &BTreeMap<NodeId, WorkUnits>,
        findings: &mut Findings,
    ) {
        let at = Link::Rewards.at(record.round);
        let expected: Vec<Earning> = self
            .earned
            .iter()
            .filter(|(_, earned)| earned.0 > 0)
            .map(|(&account, &cumulative)| {
                let trained = record.results.iter().find(|result| result.worker == account);
                let trained = trained.map_or(0, |result| result.work.0);
                // An account may train and replay others in the same round, and is paid for both.
                let replayed = verifier_work.get(&account).map_or(0, |work| work.0);
                Earning { account, work: WorkUnits(trained.saturating_add(replayed)), cumulative }
            })
            .collect();
        let accounts =
            |earnings: &[Earning]| earnings.iter().map(|e| e.account).collect::<Vec<_>>();
        let same = findings.require(
            at,
            accounts(&expected) == accounts(&record.earnings),
            || format!("{} accounts that earned, in their order", expected.len()),
            || format!("{} accounts, or others", record.earnings.len()),
        );
        if !same {
            return;
        }
        for (expected, found) in expected.iter().zip(&record.earnings) {
            let at = at.of(expected.account);
            findings.same(at, "cumulative earnings of", (expected.cumulative, found.cumulative));
            findings.same(at, "work of", (expected.work, found.work));
        }
    }

    fn work_of(&mut self, tokens: TokenCount) -> WorkUnits {
        let model = &self.spec.model;
        *self.work.entry(tokens).or_insert_with(|| reward::work(model, tokens))
    }
}

/// The revocations that a merge can still carry out: the coordinator keeps what it needs for them as
/// long as the evidence.
pub(crate) fn effective<'r>(
    spec: &RunSpec,
    records: &Records,
    record: &RoundRecord,
    revocations: &'r [Revocation],
) -> Vec<&'r Revocation> {
    revocations
        .iter()
        .filter(|revocation| is_kept(spec, record.round, revocation.round))
        .filter(|revocation| {
            records.get(revocation.round).is_some_and(|of| !of.candidates.is_empty())
        })
        .collect()
}

/// Whether what was paid for a merged round is forfeit, and its update taken back.
fn is_taken_back(check: &Check) -> bool {
    match check.finding {
        Finding::ReplayFault(_) | Finding::Withheld(_) | Finding::Irreproducible => true,
        Finding::CodecPassed
        | Finding::CodecFault(_)
        | Finding::ReplayPassed(_)
        | Finding::Undecided => false,
    }
}

fn listed(revocations: &[Revocation]) -> String {
    if revocations.is_empty() {
        return "no revocation".to_owned();
    }
    let each = revocations.iter().map(|r| format!("round {} of {}", r.round, r.worker.short()));
    format!("revocations of {}", each.collect::<Vec<_>>().join(", "))
}
