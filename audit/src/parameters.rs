//! Aggregates and θ, recomputed.

use std::collections::BTreeSet;
use std::sync::Arc;

use manyhands_gradient::aggregate::WorkerUpdate;
use manyhands_gradient::codec::{Update, payload_bytes_max};
use manyhands_gradient::{
    Admitted, CHUNK, Layout, OuterUpdate, Revoked, initial_theta, merge, outer_learning_rate,
    vector,
};
use manyhands_proto::message::Merge;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, TokenCount};
use manyhands_rules::record::{Outcome, Revocation, RoundRecord};

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
    alpha: f32,
}

impl Contributions {
    fn borrowed(&self) -> Vec<(WorkerUpdate<'_>, TokenCount)> {
        self.updates
            .iter()
            .map(|(worker, update, tokens)| (WorkerUpdate { worker: *worker, update }, *tokens))
            .collect()
    }
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
        let mut theta = self.initial(findings).await?;
        for record in &self.records.all {
            let chosen = self.chosen.contains(&record.round);
            if theta.is_none() && chosen {
                theta = self.published(record, findings).await?;
            }
            let update = if chosen {
                let update = self.recomputed(record, findings).await?;
                if update.is_some() {
                    recomputed.push(record.round);
                }
                update
            } else {
                None
            };
            theta = self.next(record, theta, update, findings).await?;
            progress(Progress::Parameters { round: record.round, of });
        }
        Ok(recomputed)
    }

    /// θ₀ follows from the seed, or is a blob that the specification names.
    async fn initial(&self, findings: &mut Findings) -> Result<Option<Vec<f32>>, AuditError> {
        let at = Link::Theta.at(Round(0));
        let named = self.spec.data.theta;
        if self.spec.data.theta_is_given {
            return self.theta_blob(named, at, findings).await;
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

    async fn theta_blob(
        &self,
        digest: Digest,
        at: At,
        findings: &mut Findings,
    ) -> Result<Option<Vec<f32>>, AuditError> {
        let bytes_max = self.layout.vector_len() as u64 * 4;
        let bytes = match fetch(self.evidence, findings, at, (digest, bytes_max)).await? {
            Fetched::Bytes(bytes) => bytes,
            Fetched::Gone => {
                findings.expired(at, format!("θ {digest}"));
                return Ok(None);
            }
            Fetched::Wrong => return Ok(None),
        };
        match vector::from_bytes(&bytes, &self.layout) {
            Ok(theta) => Ok(Some(theta)),
            Err(error) => {
                findings.failed(at, "a vector of the model's parameters", error.to_string());
                Ok(None)
            }
        }
    }

    /// θ_t as it was published, where it could not be followed from θ₀.
    async fn published(
        &self,
        record: &RoundRecord,
        findings: &mut Findings,
    ) -> Result<Option<Vec<f32>>, AuditError> {
        self.theta_blob(record.theta, Link::Theta.at(record.round), findings).await
    }

    /// The round's update, recomputed from payloads; none if it cannot be, or there is none.
    async fn recomputed(
        &self,
        record: &RoundRecord,
        findings: &mut Findings,
    ) -> Result<Option<OuterUpdate>, AuditError> {
        let Some(published) = record.merge else { return Ok(None) };
        let Some(admitted) = self.contributions(record, record.round, findings).await? else {
            return Ok(None);
        };
        let mut revoked = Vec::new();
        for revocation in effective(&self.spec, self.records, record, &record.revocations) {
            let Some(of) = self.records.get(revocation.round) else { continue };
            let Some(from) = self.contributions(of, record.round, findings).await? else {
                return Ok(None);
            };
            revoked.push((revocation.worker, from));
        }
        let (spec, layout) = (Arc::clone(&self.spec), Arc::clone(&self.layout));
        let merged = blocking(move || merged(&spec, &layout, &admitted, &revoked)).await?;
        let at = Link::Aggregate.at(record.round);
        match merged {
            Ok((update, digest, bytes)) => {
                let same = findings.same(at, "aggregate", (digest, published.aggregate))
                    & findings.same(at, "bytes", (bytes, published.aggregate_bytes));
                Ok(same.then_some(update))
            }
            Err(error) => {
                findings.failed(at, "payloads that merge", error);
                Ok(None)
            }
        }
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
        let admitted = record.results.iter().filter(|result| result.outcome == Outcome::Admitted);
        for result in admitted {
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
        Ok(complete.then_some(Contributions { updates, alpha }))
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

    /// θ_{t+1}, from an update that was recomputed or else from the published one.
    async fn next(
        &self,
        record: &RoundRecord,
        theta: Option<Vec<f32>>,
        recomputed: Option<OuterUpdate>,
        findings: &mut Findings,
    ) -> Result<Option<Vec<f32>>, AuditError> {
        let at = Link::Theta.at(record.round);
        let Some(merge) = record.merge else {
            findings.same(at, "θ as before", (record.theta, record.theta_next));
            return Ok(theta);
        };
        let alpha = self.alpha(record.round);
        findings.require(
            Link::Aggregate.at(record.round),
            alpha.to_bits() == merge.outer_learning_rate.to_bits(),
            || format!("an outer learning rate of {alpha}"),
            || merge.outer_learning_rate.to_string(),
        );
        let Some(mut theta) = theta else { return Ok(None) };
        let update = match recomputed {
            Some(update) => update,
            None => match self.published_update(record, merge, findings).await? {
                Some(update) => update,
                None => return Ok(None),
            },
        };
        let (theta, digest) = blocking(move || {
            update.apply(&mut theta);
            let digest = vector::digest(&theta);
            (theta, digest)
        })
        .await?;
        Ok(findings.same(at, "θ with the digest", (record.theta_next, digest)).then_some(theta))
    }

    async fn published_update(
        &self,
        record: &RoundRecord,
        merge: Merge,
        findings: &mut Findings,
    ) -> Result<Option<OuterUpdate>, AuditError> {
        let at = Link::Aggregate.at(record.round);
        let alphas = self.alphas(record);
        // A value and its index take at most as much as twice the value, and framing little more.
        let bytes_max =
            alphas.len() as u64 * self.layout.chunk_count() as u64 * CHUNK as u64 * 8 + 4_096;
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
        let parsed = blocking(move || OuterUpdate::parse(&bytes, &layout)).await?;
        match parsed {
            Ok(update) => {
                let found: Vec<f32> = update.terms.iter().map(|term| term.alpha).collect();
                let same = findings.require(
                    at,
                    found == alphas,
                    || format!("terms with the learning rates {alphas:?}"),
                    || format!("{found:?}"),
                );
                Ok(same.then_some(update))
            }
            Err(error) => {
                findings.failed(at, "an aggregate", error.to_string());
                Ok(None)
            }
        }
    }

    /// The learning rates of an update's terms: each revocation's, then the round's own.
    fn alphas(&self, record: &RoundRecord) -> Vec<f32> {
        let taken_back: Vec<&Revocation> =
            effective(&self.spec, self.records, record, &record.revocations);
        let own = record.results.iter().any(|result| result.outcome == Outcome::Admitted);
        taken_back
            .into_iter()
            .map(|revocation| self.alpha(revocation.round))
            .chain(own.then(|| self.alpha(record.round)))
            .collect()
    }
}

/// The update with its bytes' digest and length, or why the updates cannot be merged.
fn merged(
    spec: &RunSpec,
    layout: &Layout,
    admitted: &Contributions,
    revoked: &[(NodeId, Contributions)],
) -> Result<(OuterUpdate, Digest, u64), String> {
    let own = admitted.borrowed();
    let from: Vec<_> = revoked.iter().map(|(_, contributions)| contributions.borrowed()).collect();
    let revoked: Vec<Revoked<'_>> = revoked
        .iter()
        .zip(&from)
        .map(|((worker, contributions), updates)| Revoked {
            worker: *worker,
            from: Admitted { updates, alpha: contributions.alpha },
        })
        .collect();
    let own = Admitted { updates: &own, alpha: admitted.alpha };
    let update =
        merge(layout, &spec.aggregation, own, &revoked).map_err(|error| error.to_string())?;
    let bytes = update.to_bytes();
    Ok((update, Digest::of(&bytes), bytes.len() as u64))
}

/// Runs what takes long on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AuditError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| AuditError::Panicked(error.to_string()))
}
