//! From a round's payloads to the step that leads to θ_{t+1}: the one computation that coordinator and
//! auditor share.

use manyhands_proto::run_file::Aggregation;
use manyhands_proto::{NodeId, TokenCount};

use crate::aggregate::{
    AggregateError, Member, MergePlan, TensorNorms, WorkerUpdate, aggregate, rule_of,
};
use crate::layout::Layout;
use crate::outer_update::{OuterUpdate, Term};

/// Updates that are merged, and the outer learning rate they are merged with.
#[derive(Debug, Clone, Copy)]
pub struct Admitted<'a> {
    /// The admitted set with its tokens, in any order.
    pub updates: &'a [(WorkerUpdate<'a>, TokenCount)],
    /// α of the round.
    pub alpha: f32,
}

/// A worker's part in an earlier merge that is taken back.
#[derive(Debug, Clone, Copy)]
pub struct Revoked<'a> {
    pub worker: NodeId,
    /// All that was merged then, the revoked update included.
    pub from: Admitted<'a>,
}

/// What leads from θ_t to θ_{t+1}: first what is taken back, in the order given, each with its own
/// round's weights and α; then the round's own aggregate, if anything was admitted.
///
/// # Errors
/// When a set cannot be merged or an update does not fit the layout.
pub fn merge(
    layout: &Layout,
    config: &Aggregation,
    admitted: Admitted<'_>,
    revoked: &[Revoked<'_>],
) -> Result<OuterUpdate, AggregateError> {
    let mut terms = Vec::with_capacity(revoked.len() + 1);
    for Revoked { worker, from } in revoked {
        let aggregate = revocation(layout, config, from.updates, worker)?;
        terms.push(Term { alpha: from.alpha, aggregate });
    }
    if !admitted.updates.is_empty() {
        let (_, aggregate) = aggregate(layout, config, admitted.updates)?;
        terms.push(Term { alpha: admitted.alpha, aggregate });
    }
    Ok(OuterUpdate { terms })
}

fn revocation(
    layout: &Layout,
    config: &Aggregation,
    merged: &[(WorkerUpdate<'_>, TokenCount)],
    worker: &NodeId,
) -> Result<crate::aggregate::Aggregate, AggregateError> {
    let norms: Vec<TensorNorms> =
        merged.iter().map(|(sent, _)| TensorNorms::of(layout, sent.update)).collect();
    let members: Vec<Member<'_>> = merged
        .iter()
        .zip(&norms)
        .map(|((sent, tokens), norms)| Member { worker: sent.worker, tokens: *tokens, norms })
        .collect();
    let plan = MergePlan::new(&members, rule_of(config.clip), config.denominator)?;
    let updates: Vec<WorkerUpdate<'_>> = merged.iter().map(|(sent, _)| *sent).collect();
    Ok(plan.revocation(layout, &updates, worker)?)
}
