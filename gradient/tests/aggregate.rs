use std::sync::LazyLock;

use manyhands_gradient::aggregate::{
    Aggregate, AggregateError, Factor, MedianNorm, Member, MergeError, MergePlan,
    ParseAggregateError, PlanError, TensorNorms, WorkerUpdate, aggregate, rule_of,
};
use manyhands_gradient::codec::Update;
use manyhands_gradient::vector::digest;
use manyhands_gradient::{CHUNK, Layout, outer_learning_rate, outer_step};
use manyhands_proto::run_file::{Aggregation, Clip, Denominator, Profile};
use manyhands_proto::{ChunkIndex, Round, TokenCount};
use proptest::prelude::*;

use crate::support::{encoded, layout, matrix, noise, trained, update_of, worker};

const TOKENS: [u64; 5] = [30_000, 10_000, 25_000, 25_000, 7];

fn config(denominator: Denominator, clip: Clip) -> Aggregation {
    Aggregation { denominator, clip, outer_learning_rate: 1.0, outer_learning_rate_final: 0.4 }
}

/// Five workers, the third of them dense.
fn updates(layout: &Layout) -> Vec<Update> {
    let profiles = [Profile::Standard, Profile::Quality, Profile::DenseInt8];
    (0..5).map(|seed| update_of(layout, profiles[seed % 3], seed as u64)).collect()
}

fn admitted(updates: &[Update]) -> Vec<(WorkerUpdate<'_>, TokenCount)> {
    let numbered = (1_u8..).zip(updates).zip(TOKENS);
    numbered
        .map(|((number, update), tokens)| {
            (WorkerUpdate { worker: worker(number), update }, TokenCount(tokens))
        })
        .collect()
}

#[test]
fn a_merge_never_changes_a_bit() {
    let layout = layout();
    let updates = updates(&layout);
    let merged = |denominator, clip| {
        aggregate(&layout, &config(denominator, clip), &admitted(&updates)).expect("they fit")
    };
    let (plan, floored) = merged(Denominator::Floor, Clip::MedianNorm);
    let mut theta = noise(&layout, 9, 0.02);
    outer_step(&mut theta, &floored, 0.7);
    let got = [
        merged(Denominator::Contributors, Clip::None).1.digest(),
        floored.digest(),
        merged(Denominator::Workers, Clip::MedianNorm).1.digest(),
        plan.digest(),
        digest(&theta),
    ];
    assert_eq!(
        got.map(|digest| digest.short()),
        ["8eefc78f", "97100bc6", "4fea86a6", "c15492d5", "0a03b0c1"]
    );
}

/// One chunk of the design's formula, over some of a plan's workers (in the order of their ids).
fn by_formula(
    plan: &MergePlan,
    sent: &[WorkerUpdate<'_>],
    denominator: Denominator,
    (chunk, tensor): (usize, usize),
) -> [f32; CHUNK] {
    let weight = |id| plan.weight(&id).expect("in the plan");
    let all = sent.iter().fold(0.0, |sum, sent| sum + weight(sent.worker));
    let (mut numerator, mut weights) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);
    for sent in sent {
        let weight = weight(sent.worker);
        let factor = plan.factors(&sent.worker).expect("in the plan")[tensor];
        let factor = factor.units() as f32 / 16_777_216.0;
        let symbols = sent.update.chunk(ChunkIndex(chunk as u32)).expect("it is there");
        symbols.for_each(|index, value| {
            numerator[index] += (weight * factor) * value;
            weights[index] += weight;
        });
    }
    std::array::from_fn(|index| match (weights[index], denominator) {
        (0.0, _) => 0.0,
        (own, Denominator::Contributors) => numerator[index] / own,
        (own, Denominator::Floor) => numerator[index] / own.max(sent.len().min(2) as f32),
        (_, Denominator::Workers) => numerator[index] / all,
    })
}

fn dense(aggregate: &Aggregate, chunk: usize) -> [f32; CHUNK] {
    let mut values = [0.0; CHUNK];
    aggregate.chunk(chunk).for_each(|(index, value)| values[index] = value);
    values
}

#[test]
fn the_merge_is_the_formula_of_the_design() {
    let layout = layout();
    let updates = updates(&layout);
    let admitted = admitted(&updates);
    let sent: Vec<_> = admitted.iter().map(|(sent, _)| *sent).collect();
    for denominator in [Denominator::Contributors, Denominator::Floor, Denominator::Workers] {
        let config = config(denominator, Clip::MedianNorm);
        let (plan, merged) = aggregate(&layout, &config, &admitted).expect("they fit");
        let total: u64 = TOKENS.iter().sum();
        for (id, tokens) in plan.workers().zip(TOKENS) {
            let weight = f64::from(plan.weight(&id).expect("in the plan"));
            let exact = tokens as f64 * 5.0 / total as f64;
            assert!((weight - exact).abs() <= exact * f64::from(f32::EPSILON) / 2.0);
        }
        for (chunk, place) in layout.places().iter().enumerate() {
            let expected = by_formula(&plan, &sent, denominator, (chunk, place.tensor));
            assert_eq!(dense(&merged, chunk), expected, "{denominator:?} {chunk}");
        }
    }
}

#[test]
fn slices_merged_apart_and_joined_are_the_whole() {
    let layout = layout();
    let updates = updates(&layout);
    let config = config(Denominator::Floor, Clip::MedianNorm);
    let (plan, whole) = aggregate(&layout, &config, &admitted(&updates)).expect("they fit");
    let chunks = layout.chunk_count();
    let cuts = [0, 1, 17, 100.min(chunks - 1), chunks];

    // A reducer's part of the norms adds up exactly, whatever the slices.
    for update in &updates {
        let mut sum = TensorNorms::of_slice(&layout, update, cuts[3]..chunks);
        for pair in cuts[..4].windows(2) {
            sum.add(&TensorNorms::of_slice(&layout, update, pair[0]..pair[1]));
        }
        assert_eq!(sum, TensorNorms::of(&layout, update));
    }
    let sent: Vec<_> = admitted(&updates).into_iter().map(|(update, _)| update).collect();
    let mut joined = plan.merge(&layout, &sent, 0..cuts[1]).expect("they fit");
    for pair in cuts[1..].windows(2) {
        let slice = plan.merge(&layout, &sent, pair[0]..pair[1]).expect("they fit");
        let bytes = slice.to_bytes();
        let slice = Aggregate::parse(&bytes, &layout, pair[0]..pair[1]).expect("our own bytes");
        joined.append(&slice);
    }
    assert!(joined == whole);
    assert_eq!(joined.digest(), whole.digest());
}

#[test]
fn the_median_worker_bounds_everybodys_norm() {
    let layout = layout();
    let mut loud = trained(&layout, 3);
    for (end, start) in loud.end.iter_mut().zip(&loud.start) {
        *end = start + (*end - start) * 30.0;
    }
    let (payload, _) = encoded(&layout, Profile::Standard, &loud);
    let loud = Update::parse(payload.as_bytes(), &layout, Profile::Standard).expect("well formed");
    let quiet: Vec<_> = (0..3).map(|seed| update_of(&layout, Profile::Standard, seed)).collect();
    let all: Vec<_> = quiet.iter().chain([&loud]).collect();
    let norms: Vec<_> = all.iter().map(|update| TensorNorms::of(&layout, update)).collect();
    let members: Vec<_> = (1_u8..)
        .zip(&norms)
        .map(|(number, norms)| Member { worker: worker(number), tokens: TokenCount(5), norms })
        .collect();
    let plan = MergePlan::new(&members, &MedianNorm, Denominator::Floor).expect("a valid set");
    for tensor in 0..layout.tensors().len() {
        let mut sorted: Vec<u128> = norms.iter().map(|norms| norms.squared()[tensor]).collect();
        sorted.sort_unstable();
        let median = (sorted[1] as f64).sqrt();
        for (id, norms) in plan.workers().zip(&norms) {
            let factor = plan.factors(&id).expect("in the plan")[tensor];
            let clipped = (norms.squared()[tensor] as f64).sqrt() * f64::from(factor.units())
                / f64::from(Factor::ONE.units());
            assert!(clipped <= median * (1.0 + 1e-9), "tensor {tensor}: {clipped} over {median}");
        }
    }
    assert!(plan.factors(&worker(4)).expect("in the plan").iter().all(|f| *f < Factor::ONE));
}

#[test]
fn a_revocation_is_the_difference_of_two_merges_with_frozen_weights() {
    let layout = layout();
    let updates = updates(&layout);
    let admitted = admitted(&updates);
    let sent: Vec<_> = admitted.iter().map(|(update, _)| *update).collect();
    let others: Vec<_> = sent.iter().filter(|sent| sent.worker != worker(2)).copied().collect();
    for denominator in [Denominator::Contributors, Denominator::Floor, Denominator::Workers] {
        let config = config(denominator, Clip::MedianNorm);
        let (plan, merged) = aggregate(&layout, &config, &admitted).expect("they fit");
        let revocation = plan.revocation(&layout, &sent, &worker(2)).expect("it is in the set");
        for (chunk, place) in layout.places().iter().enumerate() {
            let with = dense(&merged, chunk);
            let without = by_formula(&plan, &others, denominator, (chunk, place.tensor));
            let difference: [f32; CHUNK] = std::array::from_fn(|at| without[at] - with[at]);
            assert_eq!(dense(&revocation, chunk), difference, "{denominator:?} {chunk}");
        }
        let bytes = revocation.to_bytes();
        let all = 0..layout.chunk_count();
        assert_eq!(Aggregate::parse(&bytes, &layout, all).as_ref(), Ok(&revocation));
        assert_eq!(
            plan.revocation(&layout, &sent, &worker(99)),
            Err(MergeError::Missing { worker: worker(99) })
        );
    }
}

#[test]
fn a_revoked_round_is_as_if_the_worker_had_not_been_there() {
    let layout = layout();
    let updates = updates(&layout);
    // A mean over contributors does not change when every weight is scaled alike.
    let config = config(Denominator::Contributors, Clip::None);
    let admitted = admitted(&updates);
    let (plan, merged) = aggregate(&layout, &config, &admitted).expect("they fit");
    let sent: Vec<_> = admitted.iter().map(|(update, _)| *update).collect();
    let revocation = plan.revocation(&layout, &sent, &worker(2)).expect("it is in the set");
    let others: Vec<_> =
        admitted.iter().filter(|(sent, _)| sent.worker != worker(2)).copied().collect();
    let (_, without) = aggregate(&layout, &config, &others).expect("they fit");

    let mut theta = noise(&layout, 9, 0.02);
    let mut expected = theta.clone();
    outer_step(&mut theta, &merged, 0.7);
    outer_step(&mut theta, &revocation, 0.7);
    outer_step(&mut expected, &without, 0.7);
    for (theta, expected) in theta.iter().zip(&expected) {
        assert!((theta - expected).abs() < 1e-7, "{theta} {expected}");
    }
}

#[test]
fn revoking_the_only_worker_undoes_the_round() {
    let layout = layout();
    let update = update_of(&layout, Profile::Standard, 1);
    let sent = WorkerUpdate { worker: worker(1), update: &update };
    let config = config(Denominator::Floor, Clip::MedianNorm);
    let (plan, merged) =
        aggregate(&layout, &config, &[(sent, TokenCount(9))]).expect("one is enough");
    let revocation = plan.revocation(&layout, &[sent], &worker(1)).expect("it is in the set");
    for chunk in merged.chunks() {
        let taken = merged.chunk(chunk).map(|(index, value)| (index, -value));
        assert!(revocation.chunk(chunk).eq(taken));
    }
}

#[test]
fn sets_that_make_no_sense_are_refused_with_a_name() {
    let layout = layout();
    let updates = updates(&layout);
    let config = config(Denominator::Floor, Clip::MedianNorm);
    let admitted = admitted(&updates);
    let refusal = |set: &[(WorkerUpdate<'_>, TokenCount)]| {
        aggregate(&layout, &config, set).map(|_| ()).expect_err("it makes no sense")
    };
    assert_eq!(refusal(&[]), AggregateError::Plan(PlanError::NoMembers));
    let twice = PlanError::Duplicate { worker: worker(1) };
    assert_eq!(refusal(&[admitted[0], admitted[0]]), AggregateError::Plan(twice));
    let idle = PlanError::NoTokens { worker: worker(1) };
    assert_eq!(refusal(&[(admitted[0].0, TokenCount(0))]), AggregateError::Plan(idle));
    let foreign_layout = matrix(1);
    let foreign = update_of(&foreign_layout, Profile::Standard, 1);
    let foreign = WorkerUpdate { worker: worker(8), update: &foreign };
    assert!(matches!(
        refusal(&[(foreign, TokenCount(1))]),
        AggregateError::Merge(MergeError::Layout { got: 1, .. })
    ));
    let (plan, _) = aggregate(&layout, &config, &admitted[..2]).expect("they fit");
    let all = 0..layout.chunk_count();
    assert_eq!(
        plan.merge(&layout, &[admitted[0].0], all.clone()),
        Err(MergeError::Missing { worker: worker(2) })
    );
    assert_eq!(
        plan.merge(&layout, &[admitted[0].0, admitted[1].0, admitted[2].0], all.clone()),
        Err(MergeError::Unexpected { worker: worker(3) })
    );
    assert!(matches!(
        plan.merge(&layout, &[admitted[0].0, admitted[1].0], 0..all.end + 1),
        Err(MergeError::Slice { .. })
    ));
    assert_eq!(rule_of(Clip::None).name(), "mean");
    assert_eq!(rule_of(Clip::MedianNorm).name(), "median_norm");
}

#[test]
fn alpha_falls_in_a_line() {
    let config = config(Denominator::Floor, Clip::MedianNorm);
    let at = |round| outer_learning_rate(&config, Round(round), 7);
    assert_eq!((at(0), at(6), at(100)), (1.0, 0.4, 0.4));
    assert!((at(3) - 0.7).abs() < 1e-6);
    assert_eq!(outer_learning_rate(&config, Round(0), 1), 1.0);
}

#[test]
fn aggregates_of_other_slices_versions_and_lengths_are_refused() {
    let layout = layout();
    let updates = updates(&layout);
    let config = config(Denominator::Floor, Clip::None);
    let (_, merged) = aggregate(&layout, &config, &admitted(&updates)).expect("they fit");
    let bytes = merged.to_bytes();
    let all = 0..layout.chunk_count();
    let parse = |bytes: &[u8]| Aggregate::parse(bytes, &layout, all.clone());
    assert!(parse(&bytes).expect("our own bytes") == merged);
    assert!(matches!(
        Aggregate::parse(&bytes, &layout, 0..3),
        Err(ParseAggregateError::TooLong { .. } | ParseAggregateError::Slice { .. })
    ));
    assert!(matches!(parse(&[2; 40]), Err(ParseAggregateError::Version { got: 2 })));
    assert!(matches!(parse(&[]), Err(ParseAggregateError::Length { .. })));
    assert!(matches!(parse(&bytes[..bytes.len() - 2]), Err(ParseAggregateError::Length { .. })));
}

static UPDATES: LazyLock<Vec<Update>> = LazyLock::new(|| updates(&layout()));

/// One worker's update of two chunks, merged.
static MERGED: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let layout = matrix(2);
    let update = update_of(&layout, Profile::Standard, 1);
    let sent = WorkerUpdate { worker: worker(1), update: &update };
    let config = config(Denominator::Floor, Clip::None);
    let merged = aggregate(&layout, &config, &[(sent, TokenCount(1))]);
    merged.expect("one is enough").1.to_bytes()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_order_of_arrival_never_matters(order in Just(vec![0, 1, 2, 3, 4]).prop_shuffle()) {
        let layout = layout();
        let config = config(Denominator::Floor, Clip::MedianNorm);
        let in_order = admitted(&UPDATES);
        let shuffled: Vec<_> = order.into_iter().map(|at: usize| in_order[at]).collect();
        let (plan, merged) = aggregate(&layout, &config, &in_order).expect("they fit");
        let (plan_shuffled, merged_shuffled) =
            aggregate(&layout, &config, &shuffled).expect("they fit");
        prop_assert!(plan == plan_shuffled && merged == merged_shuffled);
    }

    #[test]
    fn mutated_aggregates_are_refused_or_canonical(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0_u32..8), 1..4),
    ) {
        let layout = matrix(2);
        let mut bytes = MERGED.clone();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if let Ok(parsed) = Aggregate::parse(&bytes, &layout, 0..2) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
        }
    }
}
