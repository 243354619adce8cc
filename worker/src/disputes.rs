//! What the owner of a run accuses its members of on the chain, answered.
//!
//! A verifier votes on it by the evidence that the coordinator shows to everybody; what it does not show, nobody found. A
//! node objects to what it is accused of and was never told: who is found out by those that were drawn is dismissed, and may
//! object by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use manyhands_chain_client::types::{FaultKind, Finding, Run, Stage};
use manyhands_chain_client::{
    Accusation, ChainClient, ChainState, Dispute, ReadError, SubmitError,
};
use manyhands_gradient::codec::payload_bytes_max;
use manyhands_network::data::{FetchError, FetchRequest, Refusal, SourceError};
use manyhands_proto::message::{ReplayEnd, ReplayEvidence, Role, UpdateEvidence};
use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use manyhands_rules::evidence::{bytes_max, case_bytes_max, check_case, false_ends, proven};
use manyhands_rules::panel::{Case, Judged, Judgement, agreed};
use manyhands_rules::reward::layout;
use manyhands_rules::update_evidence::{self, find_fault};
use tokio::time::Instant;

use crate::context::{Context, WorkerEvent};

/// Between looks at the chain. Windows are longer, but for those of tests.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// The coordinator has it or has it not.
const EVIDENCE_PATIENCE: Duration = Duration::from_secs(10);
/// All verifiers fetch the same at once.
const SLOWEST_BYTES_PER_SECOND: u64 = 256 << 10;
/// What trickles in must not keep this verifier from other accusations.
const TRANSFER_MAX: Duration = Duration::from_secs(120);

/// The chain's refusals that no repetition changes.
const FOR_GOOD: [&str; 7] = [
    "AlreadyVoted",
    "FaultDecided",
    "JoinedLater",
    "NotContestable",
    "RoundNotAnchored",
    "SelfReport",
    "WindowOver",
];

/// What a verifier makes of an accusation, and why.
#[derive(Debug, Clone, PartialEq)]
enum Opinion {
    Guilty(String),
    Innocent(String),
    /// What there is to see speaks neither for it nor against it.
    None,
}

/// Why a verifier cannot say anything yet.
enum Unseen {
    /// The coordinator says that it has no such evidence, or that nobody may see it.
    NotShown,
    OutOfReach(FetchError),
}

/// What was said of accusations before.
#[derive(Default)]
struct Answers {
    opinions: BTreeMap<Accusation, Opinion>,
    /// This verifier has nothing more to say.
    done: BTreeSet<Accusation>,
    /// What is in the way of an answer was told once.
    told: BTreeSet<Accusation>,
    /// Evidence was not there at an earlier look.
    missing: BTreeSet<Accusation>,
}

/// Whom an accusation is about, as far as this node answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum About {
    Itself,
    Others,
}

/// Follows the chain for as long as the node takes part. What it is accused of does not wait for what it votes on.
pub(crate) async fn answer(context: Arc<Context>, role: Role) {
    match role {
        Role::Worker => follow(&context, About::Itself).await,
        Role::Verifier => {
            tokio::join!(follow(&context, About::Itself), follow(&context, About::Others));
        }
    }
}

async fn follow(context: &Context, about: About) {
    let Some(chain) = &context.chain else { return };
    let mut answers = Answers::default();
    loop {
        tokio::time::sleep(LOOK_AGAIN).await;
        if let Err(error) = look(context, chain, about, &mut answers).await {
            tracing::warn!(%error, "whether anybody is accused is not seen");
        }
    }
}

async fn look(
    context: &Context,
    chain: &ChainClient,
    about: About,
    answers: &mut Answers,
) -> Result<(), ReadError> {
    let state = chain.state().await?;
    let Some(run) = state.run(&context.run).await?.filter(|run| run.open_disputes > 0) else {
        return Ok(());
    };
    let me = context.key.node_id();
    let mut open = state.disputes(&context.run).await?;
    let is_own = |dispute: &Dispute| dispute.accusation.node() == me;
    open.retain(|it| it.decided_from().is_some() && is_own(it) == (about == About::Itself));
    // What is decided soonest comes first.
    open.sort_by_key(Dispute::decided_from);
    for dispute in open {
        let unanswered =
            dispute.votes.of(&me).is_none() && !answers.done.contains(&dispute.accusation);
        let answered = match about {
            About::Itself => {
                answers.tell_of(context, &dispute.accusation);
                defend(context, chain, (&run, state.block().number), &dispute).await
            }
            About::Others if unanswered => {
                vote(context, chain, (&state, &run), &dispute, answers).await
            }
            About::Others => continue,
        };
        if let Err(error) = answered {
            answers.note(context, &dispute.accusation, &error);
        }
    }
    Ok(())
}

impl Answers {
    /// Tells whoever runs the node, once, what it has to object to by hand.
    fn tell_of(&mut self, context: &Context, accusation: &Accusation) {
        if let Accusation::Worker { kind: FaultKind::Withheld, round, .. } = accusation
            && self.told.insert(*accusation)
        {
            context.trouble(format!(
                "the run's owner says on the chain that this node showed nothing of round {round}; if that is not so, \
                 `manyhands contest` objects"
            ));
        }
    }

    /// Notes that an answer did not reach the chain, and tells whoever runs the node, once.
    fn note(&mut self, context: &Context, accusation: &Accusation, error: &SubmitError) {
        if let SubmitError::Failed { error, .. } = error
            && FOR_GOOD.contains(&error.as_str())
        {
            self.done.insert(*accusation);
        }
        if self.told.insert(*accusation) {
            let (who, round) = (accusation.node().short(), accusation.round());
            context.trouble(format!("no answer about {who} in round {round} yet: {error}"));
        }
    }
}

/// How much of a dispute's time is over, in quarters.
fn quarters_over(dispute: &Dispute, block: u32) -> u32 {
    let whole = dispute.decided_from().map_or(0, |end| end.saturating_sub(dispute.reported_at));
    let over = block.saturating_sub(dispute.reported_at);
    over.saturating_mul(4).checked_div(whole).unwrap_or(4)
}

/// Objects to an accusation, or has it decided once it cannot be lost any more.
async fn defend(
    context: &Context,
    chain: &ChainClient,
    (run, block): (&Run, u32),
    dispute: &Dispute,
) -> Result<(), SubmitError> {
    let accusation = &dispute.accusation;
    // A call is executed in a later block than the one whose state is read here.
    if dispute.decided_from().is_some_and(|end| block.saturating_add(1) >= end) {
        let (against, in_favour) = (dispute.votes.guilty.len(), dispute.votes.innocent.len());
        let acquitted = in_favour as u64 >= u64::from(run.terms.fault_quorum);
        if dispute.is_contested() || (acquitted && in_favour >= against) {
            chain.decide(&context.key, &context.run, accusation).await?;
        }
        return Ok(());
    }
    let dismisses = match accusation {
        Accusation::Worker {
            kind: FaultKind::Replay | FaultKind::Codec | FaultKind::Equivocation,
            ..
        }
        | Accusation::Verifier { .. } => true,
        // Whoever withheld something stays in the run. If every node objected, hiding would cost nobody anything.
        Accusation::Worker { kind: FaultKind::Withheld, .. } => false,
    };
    // By then a dismissal would have come.
    if dismisses && !dispute.is_contested() && quarters_over(dispute, block) >= 2 {
        // There is nothing to show beside what is shown.
        let evidence = dispute.evidence_digest;
        chain.contest(&context.key, &context.run, accusation, evidence).await?;
        context.tell(WorkerEvent::Objected { round: accusation.round() });
    }
    Ok(())
}

/// Whether the chain would take a vote: a refused one costs as much.
async fn has_a_vote(
    context: &Context,
    state: &ChainState,
    run: &Run,
    accusation: &Accusation,
) -> Result<bool, ReadError> {
    let me = context.key.node_id();
    let Some(own) = state.verifier(&context.run, &me).await? else { return Ok(false) };
    let anchor = state.anchor(&context.run, accusation.round(), Stage::Commit).await?;
    let was_there = anchor.is_some_and(|anchor| own.registered_at <= anchor.block);
    Ok(was_there && own.exit_at.is_none() && own.bond >= run.terms.verifier_bond)
}

async fn vote(
    context: &Context,
    chain: &ChainClient,
    (state, run): (&ChainState, &Run),
    dispute: &Dispute,
    answers: &mut Answers,
) -> Result<(), SubmitError> {
    let accusation = dispute.accusation;
    if !has_a_vote(context, state, run, &accusation).await? {
        return Ok(());
    }
    let opinion = match answers.opinions.get(&accusation) {
        Some(opinion) => opinion.clone(),
        None => {
            let quarters = quarters_over(dispute, state.block().number);
            let opinion = match opinion(context, state, dispute).await? {
                Ok(opinion) => opinion,
                // What was found a moment ago may take another to be there, and so may what a coordinator has that
                // is just starting.
                Err(Unseen::NotShown) => {
                    let again = !answers.missing.insert(accusation);
                    if quarters < 2 || !again {
                        return Ok(());
                    }
                    not_shown()
                }
                // An accuser that answers nobody must not be better off than one that has nothing.
                Err(Unseen::OutOfReach(_)) if quarters >= 3 => not_shown(),
                Err(Unseen::OutOfReach(error)) => {
                    tracing::warn!(%error, "evidence is out of reach");
                    return Ok(());
                }
            };
            answers.opinions.insert(accusation, opinion.clone());
            opinion
        }
    };
    let (finds, reason) = match opinion {
        Opinion::Guilty(reason) => (Finding::Guilty, reason),
        Opinion::Innocent(reason) => (Finding::Innocent, reason),
        Opinion::None => {
            answers.done.insert(accusation);
            return Ok(());
        }
    };
    chain.vote(&context.key, &context.run, &accusation, finds).await?;
    context.tell(WorkerEvent::Voted {
        round: accusation.round(),
        accused: accusation.node(),
        guilty: finds == Finding::Guilty,
        reason,
    });
    Ok(())
}

fn not_shown() -> Opinion {
    Opinion::Innocent("the coordinator shows no evidence".to_owned())
}

/// What the evidence shows.
async fn opinion(
    context: &Context,
    state: &ChainState,
    dispute: &Dispute,
) -> Result<Result<Opinion, Unseen>, ReadError> {
    match dispute.accusation {
        Accusation::Worker { worker, round, kind: FaultKind::Codec } => {
            let found = update_fault(context, (worker, round), dispute.evidence_digest).await;
            return Ok(found);
        }
        Accusation::Worker { kind: FaultKind::Equivocation, .. } => {
            let reason = "nothing in a run finds such a fault".to_owned();
            return Ok(Ok(Opinion::Innocent(reason)));
        }
        Accusation::Worker { kind: FaultKind::Replay | FaultKind::Withheld, .. }
        | Accusation::Verifier { .. } => {}
    }
    let (layout, terms) = (layout(&context.spec.model), &context.spec.verification);
    let most = case_bytes_max(terms).max(update_evidence::bytes_max(&layout));
    let bytes = match shown(context, dispute.evidence_digest, most).await {
        Ok(bytes) => bytes,
        Err(unseen) => return Ok(Err(unseen)),
    };
    if let Accusation::Worker { worker, round, kind: FaultKind::Withheld } = dispute.accusation
        && let Some(opinion) = hidden_from_coordinator(&bytes, context.run, (worker, round))
    {
        return Ok(Ok(opinion));
    }
    let case = match Case::parse(&bytes) {
        Ok(case) => case,
        Err(error) => return Ok(Ok(Opinion::Innocent(error.to_string()))),
    };
    if let Err(reason) = check_case(&case, context.run, &layout, terms) {
        return Ok(Ok(Opinion::Innocent(reason)));
    }
    let me = context.key.node_id();
    // Whoever answers for its word with nothing, or never did, accuses nobody.
    let mut bonded = BTreeSet::from([me]);
    for judge in case.judgements.iter().map(Judgement::verifier) {
        let record = state.verifier(&context.run, &judge).await?;
        if record.is_some_and(|record| record.bond > Balance(0)) {
            bonded.insert(judge);
        }
    }
    let drawn = (terms.replay_chunks as usize).min(layout.chunk_count());
    let mut ends = BTreeMap::new();
    for digest in case.judgements.iter().filter_map(|judgement| judgement.evidence) {
        match shown(context, digest, bytes_max(&layout, drawn)).await {
            Ok(bytes) => {
                if let Ok(parsed) = ReplayEvidence::parse(&bytes) {
                    ends.insert(digest, parsed);
                }
            }
            Err(unseen) => return Ok(Err(unseen)),
        }
    }
    Ok(Ok(match dispute.accusation {
        Accusation::Worker { worker, round, kind } => {
            if (case.worker(), case.round()) != (worker, round) {
                Opinion::Innocent("the evidence is of another round".to_owned())
            } else {
                let own = case.judgements.iter().find(|judgement| judgement.verifier() == me);
                let mut proven = proven(&case, &ends, &layout, terms);
                proven.retain(|judgement| {
                    !judgement.verdict.accuses() || bonded.contains(&judgement.verifier())
                });
                let is_word = |judgement: &&Judgement| match judgement.replay.replayed.end {
                    ReplayEnd::At(_) => false,
                    ReplayEnd::Nowhere | ReplayEnd::Withheld(_) => true,
                };
                let words = case.judgements.iter().filter(is_word).count();
                of_worker(own, &proven, words, kind)
            }
        }
        Accusation::Verifier { verifier, worker, round } => {
            if (case.worker(), case.round()) != (worker, round) {
                Opinion::Innocent("the evidence is of another round".to_owned())
            } else if false_ends(&case, &ends, &layout, terms).contains(&verifier) {
                let known = |judge: &Judgement| {
                    judge.verifier() == verifier || bonded.contains(&judge.verifier())
                };
                if !case.judgements.iter().all(known) {
                    return Ok(Ok(Opinion::None));
                }
                Opinion::Guilty("two others ended near each other, and far from it".to_owned())
            } else {
                Opinion::Innocent("no two others ended near each other, and far from it".to_owned())
            }
        }
    }))
}

/// What the evidence shows of an update that the coordinator found a fault in.
async fn update_fault(
    context: &Context,
    about: (NodeId, Round),
    digest: Digest,
) -> Result<Opinion, Unseen> {
    let (layout, terms) = (layout(&context.spec.model), &context.spec.codec);
    let bytes = shown(context, digest, update_evidence::bytes_max(&layout)).await?;
    let evidence = match UpdateEvidence::parse(&bytes) {
        Ok(evidence) => evidence,
        Err(error) => return Ok(Opinion::Innocent(error.to_string())),
    };
    let work = &evidence.work;
    if (work.worker(), work.round()) != about {
        return Ok(Opinion::Innocent("the evidence is of another round".to_owned()));
    }
    let payload_max = payload_bytes_max(&layout, terms.profile) as u64;
    let commitment = &work.commitment.commitment;
    let payload = if commitment.payload_bytes > payload_max {
        // What was committed to says it all.
        None
    } else {
        Some(shown(context, commitment.payload, payload_max).await?)
    };
    let returned = match work.returned_payload().filter(|_| evidence.opened.is_some()) {
        None => None,
        Some(digest) => Some(shown(context, digest, payload_max).await?),
    };
    let (run, terms) = (context.run, terms.clone());
    let finding = tokio::task::spawn_blocking(move || {
        let payloads = (payload.as_deref(), returned.as_deref());
        find_fault(&evidence, run, (&layout, &terms), payloads)
    });
    Ok(match finding.await.expect("arithmetic does not panic") {
        Ok(fault) => Opinion::Guilty(fault),
        Err(reason) => Opinion::Innocent(reason),
    })
}

/// What a verifier makes of what a worker showed the coordinator nothing of: of that it sees what the worker stands for, and
/// knows no more. None if it is verifiers that were shown nothing.
fn hidden_from_coordinator(bytes: &[u8], run: RunId, about: (NodeId, Round)) -> Option<Opinion> {
    let work = UpdateEvidence::parse(bytes).ok()?.work;
    let is_its = work.check(run).is_ok() && (work.worker(), work.round()) == about;
    Some(if is_its {
        Opinion::None
    } else {
        Opinion::Innocent("the evidence is of another round".to_owned())
    })
}

/// What follows from what this verifier found itself, if it was asked, from what the evidence of others proves, and from how
/// many say what nobody else can see.
fn of_worker(
    own: Option<&Judgement>,
    proven: &[Judgement],
    words: usize,
    kind: FaultKind,
) -> Opinion {
    if own.is_some_and(|own| !own.verdict.accuses()) {
        return Opinion::Innocent("this verifier's own replay let it pass".to_owned());
    }
    let accusing = proven.iter().filter(|judgement| judgement.verdict.accuses()).count();
    let passed = proven.len() - accusing;
    match (kind, own.map(|own| &own.verdict)) {
        // What only it could know, a verifier may believe.
        (FaultKind::Withheld, Some(Judged::Withheld(reason))) => {
            Opinion::Guilty(format!("it withheld evidence: {reason}"))
        }
        // That nothing was shown leaves nothing to show.
        (FaultKind::Withheld | FaultKind::Codec | FaultKind::Equivocation, _) => Opinion::None,
        (FaultKind::Replay, own) => {
            // As the panel decides: two against it, or one where nobody else was there. That one can know what it found.
            let own_fault = matches!(own, Some(Judged::Fault(_)));
            if agreed(proven).is_some() {
                return Opinion::Guilty("two replays of it ended elsewhere".to_owned());
            }
            match (accusing.max(usize::from(own_fault)), passed) {
                (2.., _) if words == 0 => {
                    Opinion::Innocent("no two replays of it ended near each other".to_owned())
                }
                (2.., _) => Opinion::None,
                (1, 0) if own_fault => {
                    Opinion::Guilty("this verifier's own replay ended elsewhere".to_owned())
                }
                (1, 0) => Opinion::None,
                (seen @ (0 | 1), _) if seen + words >= 2 => Opinion::None,
                (0 | 1, _) => {
                    let reason = "the evidence does not show that its replay ended elsewhere";
                    Opinion::Innocent(reason.to_owned())
                }
            }
        }
    }
}

/// Evidence from the coordinator.
async fn shown(context: &Context, digest: Digest, bytes_max: u64) -> Result<Vec<u8>, Unseen> {
    let mut request = FetchRequest::new(digest, context.sources(&[]), bytes_max);
    let slowest = Duration::from_secs(bytes_max / SLOWEST_BYTES_PER_SECOND).min(TRANSFER_MAX);
    request.deadline = Some(Instant::now() + EVIDENCE_PATIENCE + slowest);
    match context.data.fetch_to_memory(request).await {
        Ok((bytes, _)) => Ok(bytes.into()),
        Err(FetchError::NoSource { failures, .. })
            if failures.iter().any(|failure| is_withheld(&failure.error)) =>
        {
            Err(Unseen::NotShown)
        }
        Err(error) => Err(Unseen::OutOfReach(error)),
    }
}

/// Whether it is the coordinator that does not show something, rather than the line.
fn is_withheld(error: &SourceError) -> bool {
    match error {
        SourceError::Refused(Refusal::Unknown | Refusal::Forbidden)
        | SourceError::Blame(_)
        | SourceError::TooLarge { .. } => true,
        SourceError::Refused(
            Refusal::NotYet | Refusal::Busy { .. } | Refusal::OutOfRange | Refusal::Storage,
        )
        | SourceError::Connect(_)
        | SourceError::Stalled { .. }
        | SourceError::TooSlow { .. }
        | SourceError::Lost(_)
        | SourceError::GroupCount { .. } => false,
    }
}

#[cfg(test)]
mod tests;
