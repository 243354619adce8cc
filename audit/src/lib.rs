//! Walks a run from its evidence to a finalised block, and recomputes on the way whatever follows from
//! something else: assignments, outcomes, draws, rewards, aggregates, θ, leaves and totals.
//!
//! What the auditor takes on trust is little: the node's word for which block is final and for the hash
//! of a block by its number (use a node of your own), the coordinator's measured speeds and classes of
//! workers, and the distances of replays against which nobody spoke; what somebody was accused of is recomputed
//! from the chunks that were opened. A reading of the chain's state is believed only with its proof.

mod chain_view;
mod entropy;
mod evidence;
mod on_chain;
mod parameters;
mod pay;
mod records;
mod report;
mod rounds;
mod settlement;
mod trust;
mod update_faults;
mod verdicts;

use std::collections::BTreeSet;
use std::sync::Arc;

use manyhands_chain_client::ReadError;
use manyhands_chain_client::types::{CloseReason, RunState};
use manyhands_proto::run_file::{ChainKind, RunSpec};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::reward::layout;
use manyhands_rules::run_id::run_id;

pub use chain_view::ChainView;
pub use evidence::{Evidence, EvidenceError, FolderEvidence, newest_record};
pub use report::{AuditReport, AuditedBlock, Counts, Finding, Link, LinkSummary, Status, Verdict};

use on_chain::{OnChain, Reader, Stopped};
use parameters::Parameters;
use pay::Pay;
use records::{Records, Walk};
use report::Findings;
use rounds::Walker;
use settlement::Settled;
use trust::Trust;

/// The run to audit, and where to look.
#[derive(Debug)]
pub struct Subject<'a, E, C> {
    pub run: RunId,
    /// Canonical bytes of the run's specification, from anywhere: they are checked.
    pub spec: &'a [u8],
    pub evidence: &'a E,
    /// None for a run without a chain, or if none can be reached.
    pub chain: Option<&'a C>,
}

/// Rounds whose aggregate is recomputed from payloads. In the others θ follows from the published
/// aggregates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RoundSelection {
    #[default]
    All,
    /// The newest so many.
    Latest(u32),
    /// Both ends included.
    Range { first: Round, last: Round },
}

#[derive(Debug, Clone, Default)]
pub struct AuditOptions {
    pub rounds: RoundSelection,
    /// The newest record, where no chain names it or newer ones than its are to be audited too.
    pub newest_record: Option<Digest>,
    /// Who is to coordinate the run. Without a chain the run's id is checked with it.
    pub coordinator: Option<NodeId>,
}

/// How far the audit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A record was read; they are walked backwards, to round 0.
    Records { round: Round },
    /// What the chain holds is being proven.
    Chain,
    /// Assignments, outcomes, draws and rewards of the round have been recomputed.
    Rules { round: Round, of: u32 },
    /// θ after the round has been recomputed.
    Parameters { round: Round, of: u32 },
}

/// Why an audit did not come to an end. What is wrong with the run is in the report instead.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("the chain: {0}")]
    Chain(#[from] ReadError),
    #[error("the evidence: {0}")]
    Evidence(#[from] EvidenceError),
    #[error("a computation panicked; this is a bug: {0}")]
    Panicked(String),
}

/// Audits a run. `progress` is called often and should be quick.
///
/// # Errors
/// When chain or evidence cannot be reached.
pub async fn audit_run<E: Evidence, C: ChainView>(
    subject: Subject<'_, E, C>,
    options: &AuditOptions,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<AuditReport, AuditError> {
    let mut audit = Audit { findings: Findings::default(), found: Found::default() };
    // What breaks off is among the findings.
    match audit.all(&subject, options, progress).await {
        Ok(()) | Err(Stop::Found) => {}
        Err(Stop::Error(error)) => return Err(error),
    }
    let Audit { findings, found } = audit;
    let (verdict, links, findings) = findings.finish();
    Ok(AuditReport {
        run: subject.run,
        verdict,
        block: found.block,
        rounds: found.rounds,
        rounds_unverified: found.rounds_unverified,
        rounds_recomputed: found.rounds_recomputed,
        contributions: found.contributions,
        leaves_on_chain: found.settled.leaves,
        earned: found.earned,
        claimed: found.claimed,
        slashes: found.slashes,
        theta: found.theta,
        links,
        findings,
    })
}

/// What the report tells beside the findings.
#[derive(Default)]
struct Found {
    block: Option<AuditedBlock>,
    rounds: u32,
    rounds_unverified: u32,
    rounds_recomputed: Vec<Round>,
    contributions: u64,
    settled: Settled,
    earned: Balance,
    claimed: Balance,
    slashes: u32,
    theta: Option<Digest>,
}

enum Stop {
    /// By something that is among the findings and that all else rests on.
    Found,
    Error(AuditError),
}

impl<E: Into<AuditError>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

impl From<Stopped> for Stop {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::Found => Self::Found,
            Stopped::Unanswered(error) => Self::Error(error.into()),
        }
    }
}

struct Audit {
    findings: Findings,
    found: Found,
}

impl Audit {
    async fn all<E: Evidence, C: ChainView>(
        &mut self,
        subject: &Subject<'_, E, C>,
        options: &AuditOptions,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<(), Stop> {
        let Subject { run, evidence, .. } = *subject;
        let spec = self.specification(subject.spec)?;
        let mut on_chain = match subject.chain {
            Some(chain) => {
                progress(Progress::Chain);
                let reader = Reader::at_head(chain, run).await?;
                let mut on_chain = reader.run(&mut self.findings).await?;
                let block = on_chain.head;
                self.found.block = Some(AuditedBlock { number: block.number, hash: block.hash });
                self.found.claimed = on_chain.run.claimed;
                let coordinator = options.coordinator;
                let named = settlement::Named { run, coordinator, spec: &spec };
                if !settlement::check_specification(named, &on_chain, &mut self.findings) {
                    return Err(Stop::Found);
                }
                let rounds_max = records::records_max(&spec);
                reader.commits(&mut self.findings, &mut on_chain, rounds_max).await?;
                Some((reader, on_chain))
            }
            None => {
                self.without_chain(run, &spec, options)?;
                None
            }
        };

        let tip = on_chain.as_ref().and_then(|(_, on_chain)| on_chain.standing().last());
        let tip =
            tip.map(|commit| (commit.commitment.last_round, commit.commitment.evidence_digest));
        let Some((round, newest)) =
            options.newest_record.map(|newest| (None, newest)).or(tip.map(|(r, d)| (Some(r), d)))
        else {
            let why = "no chain names the newest record, and none was given";
            self.findings.unchecked(Link::RecordChain.of_run(), "a round's record", why);
            return Ok(());
        };
        let walk = Walk { run, spec: &spec, newest, round };
        let records = records::walk(walk, evidence, &mut self.findings, progress).await?;
        let records = records.ok_or(Stop::Found)?;

        if let Some((reader, on_chain)) = &mut on_chain {
            progress(Progress::Chain);
            let anchored = records::anchored_rounds(&records);
            let faults = records.faults().map(|(round, worker, _)| (worker, round));
            reader.complete(&mut self.findings, on_chain, &anchored, faults).await?;
        }
        let on_chain = on_chain.as_ref().map(|(_, on_chain)| on_chain);
        self.rules(run, &spec, &records, on_chain, progress);
        match subject.chain.zip(on_chain) {
            Some((chain, on_chain)) => {
                records::check_anchors(&records, on_chain, &mut self.findings);
                entropy::check(&records, on_chain, chain, &mut self.findings).await?;
                self.settlement(&spec, run, &records, on_chain);
            }
            None => entropy::without_chain(&spec, &records, &mut self.findings),
        }
        verdicts::check_looked_over(&spec, &records, &mut self.findings);
        let complete = on_chain.is_some_and(is_complete);
        verdicts::recompute(&spec, &records, evidence, complete, &mut self.findings).await?;
        update_faults::recompute(&spec, &records, evidence, &mut self.findings).await?;
        let chosen = chosen(options.rounds, &records);
        let (layout, spec) = (Arc::new(layout(&spec.model)), Arc::new(spec));
        let records = &records;
        let parameters = Parameters { spec, layout, records, evidence, chosen };
        self.found.rounds_recomputed = parameters.check(&mut self.findings, progress).await?;
        Ok(())
    }

    fn specification(&mut self, bytes: &[u8]) -> Result<RunSpec, Stop> {
        RunSpec::parse(bytes).map_err(|error| {
            let at = Link::Specification.of_run();
            self.findings.failed(at, "the specification of a run", error.to_string());
            Stop::Found
        })
    }

    fn without_chain(
        &mut self,
        run: RunId,
        spec: &RunSpec,
        options: &AuditOptions,
    ) -> Result<(), Stop> {
        let findings = &mut self.findings;
        let settles = spec.chain.kind == ChainKind::Substrate;
        let why = if settles { "no chain was asked" } else { "the run settles on no chain" };
        let at = Link::Specification.of_run();
        match options.coordinator.filter(|_| !settles) {
            Some(coordinator) => {
                let named = run_id([0; 32], coordinator, spec.digest());
                if !findings.same(at, "run", (run, named)) {
                    return Err(Stop::Found);
                }
            }
            None => findings.unchecked(at, "the run that was made of the specification", why),
        }
        let on_chain = [
            Link::CommitSetAnchor,
            Link::AdmittedSetAnchor,
            Link::LeafRoot,
            Link::StorageProof,
            Link::Finality,
            Link::Totals,
            Link::Escrow,
            Link::Claims,
            Link::Slashes,
        ];
        for link in on_chain {
            findings.unchecked(link.of_run(), "what the chain holds", why);
        }
        Ok(())
    }

    /// Everything that follows from the records alone.
    fn rules(
        &mut self,
        run: RunId,
        spec: &RunSpec,
        records: &Records,
        on_chain: Option<&OnChain>,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) {
        let of = records.all.len() as u32;
        let (mut walker, mut trust) = (Walker::new(run, spec), Trust::new(spec));
        let mut pay = Pay::new(spec);
        for record in &records.all {
            walker.step(records, record, &mut self.findings);
            trust.step(records, record, &mut self.findings);
            pay.step(records, record, &mut self.findings);
            let paid = record.results.iter().filter(|result| result.reward.0 > 0).count();
            self.found.contributions += paid as u64;
            self.findings.passed(Link::RecordChain.at(record.round));
            progress(Progress::Rules { round: record.round, of });
        }
        trust.finish(records, on_chain.is_some_and(is_complete), &mut self.findings);
        let verifiers = on_chain.map_or(0, |on_chain| on_chain.run.verifiers);
        self.found.rounds_unverified =
            trust::check_attended(records, verifiers, &mut self.findings);
        self.found.rounds = of;
        if let Some(newest) = records.all.last() {
            self.found.theta = Some(newest.theta_next);
            let sum = newest.earnings.iter().map(|e| e.cumulative.0);
            self.found.earned = Balance(sum.fold(0, u128::saturating_add));
        }
    }

    fn settlement(&mut self, spec: &RunSpec, run: RunId, records: &Records, on_chain: &OnChain) {
        let findings = &mut self.findings;
        let cases = verdicts::case_digests(spec, records);
        self.found.settled = settlement::check_commits(run, records, on_chain, findings);
        settlement::check_money(&self.found.settled, on_chain, findings);
        self.found.slashes = settlement::check_slashes(spec, records, &cases, on_chain, findings);
        settlement::check_bonds(records, &cases, on_chain, findings);
    }
}

fn is_complete(on_chain: &OnChain) -> bool {
    let closed = &on_chain.run.state;
    matches!(closed, RunState::Closed { reason: CloseReason::Completed { .. }, .. })
}

fn chosen(rounds: RoundSelection, records: &Records) -> BTreeSet<Round> {
    let of = records.all.len() as u32;
    let range = match rounds {
        RoundSelection::All => 0..of,
        RoundSelection::Latest(count) => of.saturating_sub(count)..of,
        RoundSelection::Range { first, last } => first.0..last.0.saturating_add(1).min(of),
    };
    range.map(Round).collect()
}
