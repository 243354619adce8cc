//! Records against the money: specification and terms, leaves and roots, totals, escrow, claims and
//! slashes.

use std::collections::{BTreeMap, BTreeSet};

use manyhands_chain_client::types::{
    CloseReason, FaultKind, FaultState, RoundRecord as Commit, RoundState, Run, RunState,
};
use manyhands_chain_client::{RunMismatch, TermDifference};
use manyhands_proto::leaf::{RewardLeaf, merkle_root};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId, WorkUnits};
use manyhands_rules::coordinator::Shown;
use manyhands_rules::record::{self, FalseEnd, Finding, Outcome, RoundRecord};
use manyhands_rules::run_id::run_id;

use crate::on_chain::OnChain;
use crate::records::Records;
use crate::report::{Findings, Link};

/// The run that is audited, as whoever asks for the audit knows it.
pub(crate) struct Named<'a> {
    pub(crate) run: RunId,
    pub(crate) coordinator: Option<NodeId>,
    pub(crate) spec: &'a RunSpec,
}

/// Whether the specification is the one that the run's id, and its record on chain, were made of.
pub(crate) fn check_specification(
    named: Named<'_>,
    on_chain: &OnChain,
    findings: &mut Findings,
) -> bool {
    let at = Link::Specification.of_run();
    let Named { run, coordinator, spec } = named;
    let OnChain { run: record, genesis, .. } = on_chain;
    let follows = run_id(*genesis.as_bytes(), record.owner, spec.digest());
    let same = findings.same(at, "run", (run, follows));
    match record.check(&coordinator.unwrap_or(record.owner), spec) {
        Ok(()) => {
            findings.passed(at);
            same
        }
        Err(RunMismatch::Owner { expected, got }) => findings.same(at, "owner", (expected, got)),
        Err(RunMismatch::Terms(differences)) => {
            for TermDifference { term, expected, found } in differences {
                findings.failed(at, format!("{term} {expected}"), found);
            }
            false
        }
    }
}

/// The leaves of a commit: in account order, what each account earned up to its last round, with the
/// work of all its rounds.
fn leaves(
    genesis: Digest,
    run: RunId,
    rounds: &[RoundRecord],
    evidence: Digest,
) -> Vec<RewardLeaf> {
    let Some(last) = rounds.last() else { return Vec::new() };
    let mut work: BTreeMap<NodeId, u64> = BTreeMap::new();
    for earning in rounds.iter().flat_map(|record| &record.earnings) {
        let sum = work.entry(earning.account).or_default();
        *sum = sum.saturating_add(earning.work.0);
    }
    let mut earnings: Vec<_> = last.earnings.iter().collect();
    earnings.sort_by_key(|earning| earning.account);
    earnings
        .into_iter()
        .map(|earning| RewardLeaf {
            genesis_hash: *genesis.as_bytes(),
            run: *run.as_bytes(),
            round: last.round.0,
            worker: *earning.account.as_bytes(),
            work_units: work.get(&earning.account).copied().unwrap_or(0),
            cumulative_reward: earning.cumulative.0,
            evidence_digest: *evidence.as_bytes(),
        })
        .collect()
}

/// What the commits say, compared with the records they cover.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    pub(crate) leaves: u64,
    /// For each account, the cumulative earnings that final commits gave it.
    payable: BTreeMap<NodeId, BTreeSet<Balance>>,
    finalized_reward: Balance,
}

pub(crate) fn check_commits(
    run: RunId,
    records: &Records,
    on_chain: &OnChain,
    findings: &mut Findings,
) -> Settled {
    let mut settled = Settled::default();
    let mut next = Round(0);
    for commit in on_chain.standing() {
        let Commit { commitment, state, .. } = commit;
        let last = commitment.last_round;
        let at = Link::RecordChain.at(last);
        let in_order = findings.same(at, "a commit from round", (next, commitment.first_round));
        next = last.next();
        let covered = commitment.first_round.0 as usize..=last.0 as usize;
        let rounds = records.all.get(covered).filter(|_| in_order);
        let digest = records.digests.get(last.0 as usize);
        let (Some(rounds), Some(&digest)) = (rounds, digest) else {
            findings.failed(at, format!("the records of the commit of round {last}"), "fewer");
            continue;
        };
        findings.same(at, "record", (commitment.evidence_digest, digest));
        check_commit(run, on_chain.genesis, commit, (rounds, digest), findings, &mut settled);
        let at = Link::Finality.at(last);
        match state {
            RoundState::Finalized => findings.passed(at),
            RoundState::Committed | RoundState::Challenged => {
                let why = format!("not before block {}", commit.finalizable_at);
                findings.unchecked(at, "a final commit", why);
            }
            RoundState::Rejected(_) => {}
        }
    }
    let at = Link::RecordChain.of_run();
    if !on_chain.is_settled() {
        findings.same(at, "next round", (next, on_chain.run.next_round));
    }
    if let RunState::Closed { reason: CloseReason::Completed { final_checkpoint }, .. } =
        on_chain.run.state
        && let Some(newest) = records.all.last()
    {
        findings.same(Link::Theta.of_run(), "final θ", (final_checkpoint, newest.theta_next));
    }
    settled
}

fn check_commit(
    run: RunId,
    genesis: Digest,
    commit: &Commit,
    (rounds, evidence): (&[RoundRecord], Digest),
    findings: &mut Findings,
    settled: &mut Settled,
) {
    let commitment = &commit.commitment;
    let last = commitment.last_round;
    let leaves = leaves(genesis, run, rounds, evidence);
    let hashes: Vec<_> = leaves.iter().map(RewardLeaf::hash).collect();
    let root = Digest::new(merkle_root(&hashes));
    let at = Link::LeafRoot.at(last);
    findings.same(at, "root", (commitment.contributions_root, root));
    findings.same(at, "leaves", (commitment.number_of_leaves as usize, leaves.len()));

    let at = Link::Totals.at(last);
    let work = WorkUnits(leaves.iter().fold(0, |sum, leaf| sum.saturating_add(leaf.work_units)));
    let total =
        Balance(leaves.iter().fold(0, |sum, leaf| sum.saturating_add(leaf.cumulative_reward)));
    findings.same(at, "work", (commitment.work_units, work));
    findings.same(at, "a total of", (commitment.total_reward, total));
    if let Some(record) = rounds.last() {
        let at = Link::Theta.at(last);
        findings.same(at, "committed θ", (commitment.theta_digest, record.theta_next));
    }
    if commit.state == RoundState::Finalized {
        settled.leaves += leaves.len() as u64;
        settled.finalized_reward = settled.finalized_reward.max(total);
        for leaf in &leaves {
            let payable = settled.payable.entry(NodeId::new(leaf.worker)).or_default();
            payable.insert(Balance(leaf.cumulative_reward));
        }
    }
}

/// Whether the money of the run is where its records say.
pub(crate) fn check_money(settled: &Settled, on_chain: &OnChain, findings: &mut Findings) {
    let Run { escrow, funded, recovered, refunded, claimed, finalized_reward, .. } = &on_chain.run;
    let at = Link::Totals.of_run();
    findings.same(at, "a final total of", (settled.finalized_reward, *finalized_reward));

    let at = Link::Escrow.of_run();
    let came_in = Balance(funded.0.saturating_add(recovered.0));
    let accounted =
        [escrow, claimed, refunded].iter().fold(0_u128, |sum, b| sum.saturating_add(b.0));
    findings.same(at, "funded and recovered", (came_in, Balance(accounted)));
    findings.require(
        at,
        claimed <= finalized_reward,
        || format!("claims of at most {finalized_reward}"),
        || claimed.to_string(),
    );

    let paid = Balance(on_chain.claims.values().fold(0, |sum, claim| sum.saturating_add(claim.0)));
    let at = Link::Claims.of_run();
    if on_chain.is_settled() {
        findings.unchecked(at, "claims", "the run is settled, its records may be cleared away");
        return;
    }
    findings.same(at, "claims of", (*claimed, paid));
    for (&account, claim) in &on_chain.claims {
        let payable = settled.payable.get(&account);
        findings.require(
            Link::Claims.of_worker(account),
            payable.is_some_and(|payable| payable.contains(claim)),
            || "what a leaf of a final commit says",
            || claim.to_string(),
        );
    }
}

/// What verifiers found, and the digest of what it follows from, by worker and round.
type Cases = BTreeMap<(NodeId, Round), (Finding, Digest)>;

/// Every fault on chain has a verdict on record, and costs no more than its terms. Returns how many
/// were slashed.
pub(crate) fn check_slashes(
    spec: &RunSpec,
    records: &Records,
    cases: &Cases,
    on_chain: &OnChain,
    findings: &mut Findings,
) -> u32 {
    let mut recorded: BTreeMap<(NodeId, Round), Outcome> = BTreeMap::new();
    for (round, worker, outcome) in records.faults() {
        recorded.insert((worker, round), outcome);
    }
    let mut slashes = 0;
    for (&(worker, round), fault) in &on_chain.faults {
        let at = Link::Slashes.at(round).of(worker);
        let verdict =
            recorded.get(&(worker, round)).filter(|outcome| kind_of(outcome) == Some(fault.kind));
        let slashed = match fault.state {
            FaultState::Dismissed => {
                // The worker is barred and unpaid by the record, and acquitted by the chain: who is
                // right, neither of them shows.
                if recorded.contains_key(&(worker, round)) {
                    let why = "dismissed on chain, though the record holds on to its verdict";
                    findings.unchecked(at, "a slash for the recorded fault", why);
                }
                continue;
            }
            FaultState::Reported { .. } | FaultState::Contested { .. } => None,
            FaultState::Executed { slashed } => Some(slashed),
        };
        match (verdict, slashed) {
            (Some(_), _) => findings.passed(at),
            (None, Some(_)) => {
                findings.failed(
                    at,
                    format!("a verdict of the kind {:?}", fault.kind),
                    "none on record",
                );
            }
            (None, None) => findings.unchecked(at, "a verdict", "reported, and not on record yet"),
        }
        if let Some(outcome) = verdict {
            let found = cases.get(&(worker, round)).filter(|(found, _)| says(found, outcome));
            let evidence = match (outcome, found) {
                (Outcome::CodecFault(fault), _) => Some(fault.evidence),
                (_, Some((_, digest))) => Some(*digest),
                // What the coordinator found itself rests on what the worker stands for.
                (_, None) => records
                    .work(spec, round, worker)
                    .map(|work| Digest::of(&Shown::Work(Box::new(work)).to_bytes())),
            };
            if let Some(evidence) = evidence {
                findings.same(at, "evidence", (fault.evidence_digest, evidence));
            }
        }
        if let Some(slashed) = slashed {
            slashes += 1;
            let terms = &on_chain.run.terms.slashes;
            let most = match fault.kind {
                FaultKind::Replay => terms.replay,
                FaultKind::Codec => terms.codec,
                FaultKind::Withheld => terms.withheld,
                FaultKind::Equivocation => terms.equivocation,
            };
            let (expected, found) =
                (|| format!("a slash of at most {most}"), || slashed.to_string());
            findings.require(at, slashed <= most, expected, found);
        }
    }
    for (worker, round) in recorded.into_keys() {
        if !on_chain.faults.contains_key(&(worker, round)) {
            let why = "not reported: it is too early, or the worker has no stake in this run";
            findings.unchecked(Link::Slashes.at(round).of(worker), "the fault on chain", why);
        }
    }
    slashes
}

/// No verifier lost its bond but for a replay that is on record as made up: whether it is, the evidence tells.
pub(crate) fn check_bonds(
    records: &Records,
    cases: &Cases,
    on_chain: &OnChain,
    findings: &mut Findings,
) {
    let recorded: BTreeSet<FalseEnd> =
        records.all.iter().flat_map(|record| &record.false_ends).copied().collect();
    for (end, fault) in &on_chain.verifier_faults {
        let at = Link::Slashes.at(end.round).of(end.verifier);
        match (recorded.contains(end), fault.state) {
            (true, FaultState::Dismissed) => {
                let why = "dismissed on chain, though the record holds on to it";
                findings.unchecked(at, "the bond of a verifier that made its replay up", why);
            }
            (true, _) => match cases.get(&(end.worker, end.round)) {
                Some((_, digest)) => {
                    _ = findings.same(at, "evidence", (fault.evidence_digest, *digest));
                }
                None => findings.unchecked(at, "its evidence", "no verdict of it on record"),
            },
            (false, FaultState::Executed { .. }) => {
                findings.failed(at, "a replay on record as made up", "none");
            }
            (false, _) => {
                findings.unchecked(at, "a replay on record as made up", "reported, none yet");
            }
        }
    }
    for end in recorded.iter().filter(|end| !on_chain.verifier_faults.contains_key(end)) {
        let at = Link::Slashes.at(end.round).of(end.verifier);
        let why = "not reported: it is too early, or the verifier has no bond in this run";
        findings.unchecked(at, "the fault on chain", why);
    }
}

/// Whether an outcome is what verifiers found.
fn says(finding: &Finding, outcome: &Outcome) -> bool {
    match (finding, outcome) {
        (Finding::ReplayFault(found), Outcome::ReplayFault(recorded)) => found == recorded,
        (Finding::Withheld(found), Outcome::Withheld(recorded)) => found == recorded,
        (
            Finding::ReplayFault(_)
            | Finding::Withheld(_)
            | Finding::ReplayPassed(_)
            | Finding::CodecPassed
            | Finding::CodecFault(_)
            | Finding::Undecided
            | Finding::Irreproducible,
            _,
        ) => false,
    }
}

/// On chain a payload that does not parse counts as one that the codec cannot have written.
fn kind_of(outcome: &Outcome) -> Option<FaultKind> {
    outcome.fault().map(|kind| match kind {
        record::FaultKind::Malformed | record::FaultKind::Codec => FaultKind::Codec,
        record::FaultKind::Replay => FaultKind::Replay,
        record::FaultKind::Withheld => FaultKind::Withheld,
    })
}
