//! What is said of this node and of others on the chain, answered.
//!
//! A node objects to what a verifier says of it where its run says nothing of the kind: who is found out by those that
//! were drawn is dismissed, and may object by hand. A verifier votes on what other verifiers accuse anybody of, and on
//! what the coordinator accuses verifiers of, by the evidence that the coordinator shows to everybody. What it does
//! not show, nobody drew and nobody compared.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::{
    Attribution, Fault, FaultKind, FaultState, VerifierFault, Votes,
};
use manyhands_chain_client::{
    ChainClient, ChainState, FaultReport, ReadError, SubmitError, VerifierReport,
};
use manyhands_network::data::{FetchError, Refusal, SourceError};
use manyhands_proto::message::{ReplayEvidence, Role};
use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::evidence::{check_contradiction, false_ends};
use manyhands_rules::panel::{Contradiction, within_widest};
use manyhands_rules::reward::layout;

use crate::context::{Context, WorkerEvent};
use crate::verify::{fetch_evidence, judge};

/// Between looks at the chain. Windows are longer, but for those of tests.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Who is accused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Accused {
    Worker {
        worker: NodeId,
        round: Round,
        kind: FaultKind,
    },
    /// Of what it said about that worker's round.
    Verifier {
        verifier: NodeId,
        worker: NodeId,
        round: Round,
    },
}

impl Accused {
    fn node(&self) -> NodeId {
        match *self {
            Self::Worker { worker, .. } => worker,
            Self::Verifier { verifier, .. } => verifier,
        }
    }

    fn round(&self) -> Round {
        match *self {
            Self::Worker { round, .. } | Self::Verifier { round, .. } => round,
        }
    }
}

/// What is said of somebody, and how far it has come.
struct Dispute {
    accused: Accused,
    evidence: Digest,
    opened_by: NodeId,
    opened_as: Attribution,
    votes: Votes,
    /// Blocks: when it was said, and when it can be decided.
    reported_at: u32,
    decided_at: u32,
    contested: bool,
}

impl Dispute {
    /// None of what is decided.
    fn of_worker(((worker, round), fault): ((NodeId, Round), Fault)) -> Option<Self> {
        let Fault {
            kind, evidence_digest, opened_by, opened_as, votes, reported_at, state, ..
        } = fault;
        let (decided_at, contested) = open(state)?;
        Some(Self {
            accused: Accused::Worker { worker, round, kind },
            evidence: evidence_digest,
            opened_by,
            opened_as,
            votes,
            reported_at,
            decided_at,
            contested,
        })
    }

    /// None of what is decided.
    fn of_verifier(
        ((verifier, worker, round), fault): ((NodeId, NodeId, Round), VerifierFault),
    ) -> Option<Self> {
        let VerifierFault {
            evidence_digest, opened_by, opened_as, votes, reported_at, state, ..
        } = fault;
        let (decided_at, contested) = open(state)?;
        Some(Self {
            accused: Accused::Verifier { verifier, worker, round },
            evidence: evidence_digest,
            opened_by,
            opened_as,
            votes,
            reported_at,
            decided_at,
            contested,
        })
    }

    /// What is right may take a moment to be seen: a dismissal, and evidence of what was just decided.
    fn has_settled(&self, block: u32) -> bool {
        block.saturating_sub(self.reported_at)
            >= self.decided_at.saturating_sub(self.reported_at) / 2
    }

    fn wants_our_vote(&self, me: NodeId) -> bool {
        let by_coordinator = self.opened_as == Attribution::Coordinator;
        let asked_elsewhere = match self.accused {
            // Those that were drawn are asked by the coordinator, and what it says is on the run's record.
            Accused::Worker { .. } => by_coordinator,
            Accused::Verifier { .. } => false,
        };
        self.accused.node() != me && !self.votes.has(&me) && !asked_elsewhere
    }
}

fn open(state: FaultState) -> Option<(u32, bool)> {
    match state {
        FaultState::Reported { executable_at } => Some((executable_at, false)),
        FaultState::Contested { resolves_at, .. } => Some((resolves_at, true)),
        FaultState::Executed { .. } | FaultState::Dismissed => None,
    }
}

/// What a verifier makes of an accusation, and why.
enum Found {
    Guilty(String),
    Innocent(String),
    /// Of evidence that the coordinator refuses to show: it may come.
    NotShown(String),
}

/// Follows the chain for as long as the node takes part.
pub(crate) async fn answer(context: Arc<Context>, role: Role) {
    let Some(chain) = &context.chain else { return };
    // Refused for good: said once.
    let mut refused = BTreeSet::new();
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        if let Err(error) = look(&context, chain, role, &mut refused).await {
            tracing::debug!(%error, "what is said on the chain is not seen");
        }
    }
}

async fn look(
    context: &Context,
    chain: &ChainClient,
    role: Role,
    refused: &mut BTreeSet<Accused>,
) -> Result<(), ReadError> {
    let state = chain.state().await?;
    let me = context.key.node_id();
    for dispute in disputes(&state, context).await? {
        if refused.contains(&dispute.accused) {
            continue;
        }
        let settled = dispute.has_settled(state.block().number);
        let answered = if dispute.accused.node() == me {
            // A call is executed in a later block than the one whose state is read here.
            if dispute.contested && state.block().number.saturating_add(1) >= dispute.decided_at {
                decide(context, chain, &dispute.accused).await
            } else if !dispute.contested && dispute.opened_as == Attribution::Verifier && settled {
                object(context, chain, &dispute).await
            } else {
                continue;
            }
        } else if role == Role::Verifier && dispute.wants_our_vote(me) {
            vote(context, chain, &dispute, settled).await
        } else {
            continue;
        };
        match answered {
            Ok(()) => {}
            Err(SubmitError::Failed { error, .. }) => {
                let who = dispute.accused.node().short();
                context.trouble(format!("the chain did not take the answer about {who}: {error}"));
                refused.insert(dispute.accused);
            }
            Err(error) => tracing::debug!(%error, "not answered yet"),
        }
    }
    Ok(())
}

async fn disputes(state: &ChainState, context: &Context) -> Result<Vec<Dispute>, ReadError> {
    let workers = state.faults(&context.run).await?.into_iter().filter_map(Dispute::of_worker);
    let verifiers = state.verifier_faults(&context.run).await?;
    Ok(workers.chain(verifiers.into_iter().filter_map(Dispute::of_verifier)).collect())
}

async fn object(
    context: &Context,
    chain: &ChainClient,
    dispute: &Dispute,
) -> Result<(), SubmitError> {
    // There is nothing to show beside what is on the run's record.
    let (key, run, evidence) = (&context.key, &context.run, dispute.evidence);
    match dispute.accused {
        Accused::Worker { round, .. } => {
            chain.contest_fault(key, run, round, evidence).await?;
        }
        Accused::Verifier { worker, round, .. } => {
            chain.contest_verifier_fault(key, run, (&worker, round), evidence).await?;
        }
    }
    context.tell(WorkerEvent::Objected { round: dispute.accused.round(), by: dispute.opened_by });
    Ok(())
}

/// Has what this node objected to decided: nobody else may care.
async fn decide(
    context: &Context,
    chain: &ChainClient,
    accused: &Accused,
) -> Result<(), SubmitError> {
    let (key, run) = (&context.key, &context.run);
    match accused {
        Accused::Worker { worker, round, .. } => {
            chain.execute_fault(key, run, worker, *round).await?;
        }
        Accused::Verifier { verifier, worker, round } => {
            chain.execute_verifier_fault(key, run, verifier, (worker, *round)).await?;
        }
    }
    Ok(())
}

async fn vote(
    context: &Context,
    chain: &ChainClient,
    dispute: &Dispute,
    settled: bool,
) -> Result<(), SubmitError> {
    let found = match dispute.accused {
        Accused::Worker { worker, round, kind } => {
            judge_worker(context, dispute, (round, worker), kind).await
        }
        Accused::Verifier { verifier, worker, round } => {
            judge_verifier(context, dispute, verifier, (round, worker)).await
        }
    };
    let (guilty, reason) = match found {
        Ok(Found::Guilty(reason)) => (true, reason),
        Ok(Found::Innocent(reason)) => (false, reason),
        Ok(Found::NotShown(reason)) if settled => (false, reason),
        Ok(Found::NotShown(_)) => return Ok(()),
        Err(error) => {
            tracing::debug!(%error, "evidence is out of reach");
            return Ok(());
        }
    };
    cast(context, chain, dispute, guilty).await?;
    let (round, accused) = (dispute.accused.round(), dispute.accused.node());
    context.tell(WorkerEvent::Judged { round, accused, guilty, reason });
    Ok(())
}

async fn cast(
    context: &Context,
    chain: &ChainClient,
    dispute: &Dispute,
    guilty: bool,
) -> Result<(), SubmitError> {
    let (key, run, evidence_digest) = (&context.key, context.run, dispute.evidence);
    match (dispute.accused, guilty) {
        (Accused::Worker { worker, round, kind }, true) => {
            let report = FaultReport { run, worker, round, kind, evidence_digest };
            chain.report_fault(key, report).await?;
        }
        (Accused::Worker { worker, round, .. }, false) => {
            chain.defend_worker(key, &run, &worker, round).await?;
        }
        (Accused::Verifier { verifier, worker, round }, true) => {
            let report = VerifierReport { run, verifier, worker, round, evidence_digest };
            chain.report_verifier(key, report).await?;
        }
        (Accused::Verifier { verifier, worker, round }, false) => {
            chain.defend_verifier(key, &run, &verifier, (&worker, round)).await?;
        }
    }
    Ok(())
}

/// Whether the coordinator shows a replay of that round by whoever accuses, that ended elsewhere.
async fn judge_worker(
    context: &Context,
    dispute: &Dispute,
    about: (Round, NodeId),
    kind: FaultKind,
) -> Result<Found, FetchError> {
    match kind {
        FaultKind::Replay => {}
        // The coordinator finds these, and reports them.
        FaultKind::Codec | FaultKind::Withheld | FaultKind::Equivocation => {
            return Ok(Found::Innocent("no verifier finds such a fault".to_owned()));
        }
    }
    let bytes = match shown(context, dispute.evidence).await? {
        Ok(bytes) => bytes,
        Err(reason) => return Ok(Found::NotShown(reason)),
    };
    let terms = &context.spec.verification;
    Ok(match judge(context, about, &bytes) {
        Err(reason) => Found::Innocent(reason),
        Ok((by, _)) if by != dispute.opened_by => {
            Found::Innocent("the evidence is of another verifier".to_owned())
        }
        Ok((_, found)) if within_widest(&found, terms) => {
            Found::Innocent(format!("the distance of Δ is {:.1e}, which is none", found.delta))
        }
        Ok((_, found)) => Found::Guilty(format!("the distance of Δ is {:.1e}", found.delta)),
    })
}

/// Whether the coordinator shows two other ends of that round that are near each other and far from this verifier's.
async fn judge_verifier(
    context: &Context,
    dispute: &Dispute,
    verifier: NodeId,
    (round, worker): (Round, NodeId),
) -> Result<Found, FetchError> {
    let bytes = match shown(context, dispute.evidence).await? {
        Ok(bytes) => bytes,
        Err(reason) => return Ok(Found::NotShown(reason)),
    };
    let contradiction = match Contradiction::parse(&bytes) {
        Ok(contradiction) => contradiction,
        Err(error) => return Ok(Found::Innocent(error.to_string())),
    };
    let (layout, terms) = (layout(&context.spec.model), &context.spec.verification);
    let signed = &contradiction.commitment;
    if (signed.commitment.round, signed.worker) != (round, worker) {
        return Ok(Found::Innocent("the evidence is of another round".to_owned()));
    }
    if let Err(reason) = check_contradiction(&contradiction, context.run, &layout, terms) {
        return Ok(Found::Innocent(reason));
    }
    let mut ends = BTreeMap::new();
    for digest in contradiction.judgements.iter().filter_map(|judgement| judgement.evidence) {
        let bytes = match shown(context, digest).await? {
            Ok(bytes) => bytes,
            Err(reason) => return Ok(Found::NotShown(reason)),
        };
        if let Ok(parsed) = ReplayEvidence::parse(&bytes) {
            ends.insert(digest, parsed);
        }
    }
    Ok(if false_ends(&contradiction, &ends, &layout, terms).contains(&verifier) {
        Found::Guilty("two others ended near each other, and far from it".to_owned())
    } else {
        Found::Innocent("no two others ended near each other, and far from it".to_owned())
    })
}

/// Evidence from the coordinator, or in words that it does not show it.
async fn shown(context: &Context, digest: Digest) -> Result<Result<Vec<u8>, String>, FetchError> {
    match fetch_evidence(context, digest).await {
        Ok(bytes) => Ok(Ok(bytes)),
        Err(FetchError::NoSource { failures, .. })
            if failures.iter().any(|failure| is_withheld(&failure.error)) =>
        {
            Ok(Err("the coordinator does not show the evidence".to_owned()))
        }
        Err(error) => Err(error),
    }
}

/// Whether it is the coordinator that does not show something, rather than the line.
fn is_withheld(error: &SourceError) -> bool {
    match error {
        SourceError::Refused(Refusal::Unknown | Refusal::Forbidden | Refusal::NotYet)
        | SourceError::Blame(_)
        | SourceError::TooLarge { .. } => true,
        SourceError::Refused(Refusal::Busy { .. } | Refusal::OutOfRange | Refusal::Storage)
        | SourceError::Connect(_)
        | SourceError::Stalled { .. }
        | SourceError::TooSlow { .. }
        | SourceError::Lost(_)
        | SourceError::GroupCount { .. } => false,
    }
}
