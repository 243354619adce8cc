//! Aggregates and θ, recomputed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use manyhands_gradient::aggregate::Member;
use manyhands_gradient::codec::{Update, payload_bytes_max};
use manyhands_gradient::{
    self as gradient, Admitted, Layout, OuterState, Revoked, initial_theta, outer_learning_rate,
    vector,
};
use manyhands_proto::message::{Flagged, LossEffect, Merge};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, TokenCount};
use manyhands_rules::record::{RoundRecord, by_round, loss_effects};

use crate::evidence::Evidence;
use crate::pay::effective;
use crate::records::{Fetched, Records, fetch};
use crate::report::{At, Findings, Link};
use crate::{AuditError, Progress};

/// Recomputes θ over all rounds: from payloads in the chosen ones, from the published aggregates in the
/// others.
pub(crate) struct Parameters<'a, E> {
    pub(crate) spec: Arc<RunSpec>,
    pub(crate) layout: Arc<Layout>,
    pub(crate) records: &'a Records,
    pub(crate) evidence: &'a E,
    /// Rounds to recompute from payloads.
    pub(crate) chosen: BTreeSet<Round>,
}

/// The admitted updates of a round.
struct Contributions {
    /// In worker order.
    updates: Vec<(NodeId, Update, TokenCount)>,
    effects: BTreeMap<NodeId, LossEffect>,
    alpha: f32,
}

impl Contributions {
    fn members(&self) -> Vec<Member<'_>> {
        self.updates
            .iter()
            .map(|(worker, update, tokens)| Member {
                worker: *worker,
                tokens: *tokens,
                update,
                loss_effect: self.effects.get(worker).copied(),
            })
            .collect()
    }
}

/// What a merge takes back of an earlier round.
struct TakenBack {
    workers: Vec<NodeId>,
    /// Whose parts merges in between took back.
    earlier: Vec<NodeId>,
    from: Contributions,
}

impl<E: Evidence> Parameters<'_, E> {
    /// Returns the rounds whose aggregate was recomputed from payloads.
    pub(crate) async fn check(
        &self,
        findings: &mut Findings,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Vec<Round>, AuditError> {
        let of = self.records.all.len() as u32;
        let mut recomputed = Vec::new();
        let mut state = State {
            theta: self.initial(findings).await?,
            residual: Some(vec![0.0; self.layout.vector_len()]),
            residual_named: None,
        };
        for record in &self.records.all {
            state = match record.merge {
                None => {
                    let at = Link::Theta.at(record.round);
                    findings.same(at, "θ as before", (record.theta, record.theta_next));
                    state
                }
                Some(merge) => {
                    let (next, was_recomputed) = self.next(record, merge, state, findings).await?;
                    if was_recomputed {
                        recomputed.push(record.round);
                    }
                    next
                }
            };
            progress(Progress::Parameters { round: record.round, of });
        }
        Ok(recomputed)
    }

    /// θ₀ follows from the seed, or is a blob that the specification names.
    async fn initial(&self, findings: &mut Findings) -> Result<Option<Vec<f32>>, AuditError> {
        let at = Link::Theta.at(Round(0));
        let named = self.spec.data.theta;
        if self.spec.data.theta_is_given {
            return self.vector_blob("θ", named, at, findings).await;
        }
        let (spec, layout) = (Arc::clone(&self.spec), Arc::clone(&self.layout));
        let (theta, digest) = blocking(move || {
            let theta = initial_theta(&layout, &spec.model, spec.run.seed);
            let digest = vector::digest(&theta);
            (theta, digest)
        })
        .await?;
        Ok(findings.same(at, "θ₀ with the digest", (named, digest)).then_some(theta))
    }

    async fn vector_blob(
        &self,
        what: &str,
        digest: Digest,
        at: At,
        findings: &mut Findings,
    ) -> Result<Option<Vec<f32>>, AuditError> {
        let bytes_max = self.layout.vector_len() as u64 * 4;
        let bytes = match fetch(self.evidence, findings, at, (digest, bytes_max)).await? {
            Fetched::Bytes(bytes) => bytes,
            Fetched::Gone => {
                findings.expired(at, format!("{what} {digest}"));
                return Ok(None);
            }
            Fetched::Wrong => return Ok(None),
        };
        match vector::from_bytes(&bytes, &self.layout) {
            Ok(values) => Ok(Some(values)),
            Err(error) => {
                findings.failed(at, "a vector of the model's parameters", error.to_string());
                Ok(None)
            }
        }
    }

    /// What follows from a round's merge, and whether that was recomputed from payloads.
    async fn next(
        &self,
        record: &RoundRecord,
        merge: Merge,
        mut state: State,
        findings: &mut Findings,
    ) -> Result<(State, bool), AuditError> {
        let alpha = self.alpha(record.round);
        findings.require(
            Link::Aggregate.at(record.round),
            alpha.to_bits() == merge.outer_learning_rate.to_bits(),
            || format!("an outer learning rate of {alpha}"),
            || merge.outer_learning_rate.to_string(),
        );
        let chosen = self.chosen.contains(&record.round);
        if state.theta.is_none() && chosen {
            let at = Link::Theta.at(record.round);
            state.theta = self.vector_blob("θ", record.theta, at, findings).await?;
        }
        if chosen {
            if state.residual.is_none()
                && let Some(named) = state.residual_named
            {
                let at = Link::Aggregate.at(record.round);
                state.residual = self.vector_blob("the residual", named, at, findings).await?;
            }
            state = match self.recomputed(record, merge, state, findings).await? {
                Ok(next) => return Ok((next, true)),
                Err(state) => state,
            };
        }
        let next = State { theta: None, residual: None, residual_named: Some(merge.residual) };
        let Some(mut theta) = state.theta else { return Ok((next, false)) };
        let Some(update) = self.published_update(record, merge, findings).await? else {
            return Ok((next, false));
        };
        let layout = Arc::clone(&self.layout);
        let (theta, digest) = blocking(move || {
            update.subtract_from(&layout, &mut theta);
            let digest = vector::digest(&theta);
            (theta, digest)
        })
        .await?;
        let at = Link::Theta.at(record.round);
        let same = findings.same(at, "θ with the digest", (record.theta_next, digest));
        Ok((State { theta: same.then_some(theta), ..next }, false))
    }

    /// What follows from a round's payloads; the state as it was if that cannot be told.
    async fn recomputed(
        &self,
        record: &RoundRecord,
        published: Merge,
        state: State,
        findings: &mut Findings,
    ) -> Result<Result<State, State>, AuditError> {
        let Some(residual) = state.residual.clone() else { return Ok(Err(state)) };
        let Some(admitted) = self.contributions(record, record.round, findings).await? else {
            return Ok(Err(state));
        };
        let mut revocations = Vec::new();
        let kept = effective(&self.spec, self.records, record, &record.revocations);
        for (round, workers) in by_round(kept) {
            let Some(of) = self.records.get(round) else { continue };
            let Some(from) = self.contributions(of, record.round, findings).await? else {
                return Ok(Err(state));
            };
            let earlier = self.records.revoked_before(record.round, round);
            revocations.push(TakenBack { workers, earlier, from });
        }
        let (spec, layout) = (Arc::clone(&self.spec), Arc::clone(&self.layout));
        let theta = state.theta.clone();
        let merged =
            blocking(move || merged(&spec, &layout, (theta, residual), &admitted, &revocations))
                .await?;
        let at = Link::Aggregate.at(record.round);
        let merged = match merged {
            Ok(merged) => merged,
            Err(error) => {
                findings.failed(at, "payloads that merge", error);
                return Ok(Err(state));
            }
        };
        let same = findings.same(at, "aggregate", (merged.aggregate, published.aggregate))
            & findings.same(at, "bytes", (merged.aggregate_bytes, published.aggregate_bytes))
            & findings.same(at, "residual", (merged.residual_digest, published.residual));
        if !same {
            return Ok(Err(state));
        }
        findings.require(
            Link::AuditDraw.at(record.round),
            merged.flagged == record.flagged,
            || format!("{} updates worth a closer look", merged.flagged.len()),
            || format!("{}, or others", record.flagged.len()),
        );
        let at = Link::Theta.at(record.round);
        let theta = merged.theta.filter(|(_, digest)| {
            findings.same(at, "θ with the digest", (record.theta_next, *digest))
        });
        Ok(Ok(State {
            theta: theta.map(|(theta, _)| theta),
            residual: Some(merged.residual),
            residual_named: Some(published.residual),
        }))
    }

    /// The admitted updates of a round, for the merge of round `during`.
    async fn contributions(
        &self,
        record: &RoundRecord,
        during: Round,
        findings: &mut Findings,
    ) -> Result<Option<Contributions>, AuditError> {
        let alpha = self.alpha(record.round);
        let mut updates = Vec::new();
        let mut complete = true;
        for result in record.admitted() {
            let at = Link::Aggregate.at(during).of(result.worker);
            let Some(signed) = self.records.commitment(record.round, result.worker) else {
                findings.failed(at, "a commitment of the admitted worker", "none");
                complete = false;
                continue;
            };
            let commitment = &signed.commitment;
            let bytes_max = payload_bytes_max(&self.layout, self.spec.codec.profile) as u64;
            let bytes =
                match fetch(self.evidence, findings, at, (commitment.payload, bytes_max)).await? {
                    Fetched::Bytes(bytes) => bytes,
                    Fetched::Gone => {
                        self.gone(at, record.round, commitment.payload, findings);
                        complete = false;
                        continue;
                    }
                    Fetched::Wrong => {
                        complete = false;
                        continue;
                    }
                };
            findings.same(at, "bytes", (commitment.payload_bytes, bytes.len() as u64));
            match Update::parse(&bytes, &self.layout, self.spec.codec.profile) {
                Ok(update) => updates.push((result.worker, update, commitment.tokens)),
                Err(error) => {
                    findings.failed(at, "a payload", error.to_string());
                    complete = false;
                }
            }
        }
        let effects = loss_effects(&record.weighings);
        Ok(complete.then_some(Contributions { updates, effects, alpha }))
    }

    /// Evidence may be gone when its time is over, not before.
    fn gone(&self, at: At, round: Round, digest: Digest, findings: &mut Findings) {
        let newest = self.records.newest().unwrap_or(round);
        let window = self.spec.run.evidence_rounds;
        let expected = format!("blob {digest}");
        // Half of the window: the coordinator may be some rounds ahead of what the chain has.
        if round.0.saturating_add(window / 2) >= newest.0 {
            let found = format!("nothing, though it is to be kept for {window} rounds");
            findings.failed(at, expected, found);
        } else if self.chosen.contains(&round) {
            findings.expired(at, expected);
        } else {
            findings.unchecked(
                at,
                expected,
                "nothing: it is no longer kept, and was not asked for",
            );
        }
    }

    fn alpha(&self, round: Round) -> f32 {
        outer_learning_rate(&self.spec.aggregation, round, self.spec.run.rounds)
    }

    async fn published_update(
        &self,
        record: &RoundRecord,
        merge: Merge,
        findings: &mut Findings,
    ) -> Result<Option<Update>, AuditError> {
        let at = Link::Aggregate.at(record.round);
        let profile = self.spec.aggregation.broadcast;
        let bytes_max = payload_bytes_max(&self.layout, profile) as u64;
        let named = (merge.aggregate, merge.aggregate_bytes.min(bytes_max));
        let bytes = match fetch(self.evidence, findings, at, named).await? {
            Fetched::Bytes(bytes) => bytes,
            Fetched::Gone => {
                self.gone(at, record.round, merge.aggregate, findings);
                return Ok(None);
            }
            Fetched::Wrong => return Ok(None),
        };
        let layout = Arc::clone(&self.layout);
        match blocking(move || Update::parse(&bytes, &layout, profile)).await? {
            Ok(update) => Ok(Some(update)),
            Err(error) => {
                findings.failed(at, "an aggregate", error.to_string());
                Ok(None)
            }
        }
    }
}

/// What is known at the start of a round.
struct State {
    theta: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
    /// The residual's digest in the records; none before the first merge, when it is all zeros.
    residual_named: Option<Digest>,
}

/// What a merge led to.
struct Merged {
    aggregate: Digest,
    aggregate_bytes: u64,
    /// θ_{t+1} and its digest, if θ_t was known.
    theta: Option<(Vec<f32>, Digest)>,
    residual: Vec<f32>,
    residual_digest: Digest,
    flagged: Vec<Flagged>,
}

/// Merges again, or says why the updates cannot be merged. What is broadcast does not depend on θ.
fn merged(
    spec: &RunSpec,
    layout: &Layout,
    (theta, mut residual): (Option<Vec<f32>>, Vec<f32>),
    admitted: &Contributions,
    revocations: &[TakenBack],
) -> Result<Merged, String> {
    let own = admitted.members();
    let merged_then: Vec<_> = revocations.iter().map(|it| it.from.members()).collect();
    let revoked: Vec<Revoked<'_>> = revocations
        .iter()
        .zip(&merged_then)
        .map(|(TakenBack { workers, earlier, from }, members)| Revoked {
            workers,
            earlier,
            from: Admitted { members, alpha: from.alpha },
        })
        .collect();
    let own = Admitted { members: &own, alpha: admitted.alpha };
    let is_known = theta.is_some();
    let mut theta = theta.unwrap_or_else(|| vec![0.0; layout.vector_len()]);
    let state = OuterState { theta: &mut theta, residual: &mut residual };
    let gradient::Merged { broadcast, flagged } =
        gradient::merge(layout, &spec.aggregation, own, &revoked, state)
            .map_err(|error| error.to_string())?;
    let digest = vector::digest(&theta);
    Ok(Merged {
        aggregate: broadcast.digest(),
        aggregate_bytes: broadcast.as_bytes().len() as u64,
        theta: is_known.then_some((theta, digest)),
        residual_digest: vector::digest(&residual),
        residual,
        flagged,
    })
}

/// Runs what takes long on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AuditError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| AuditError::Panicked(error.to_string()))
}
