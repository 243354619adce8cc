use std::sync::LazyLock;

use manyhands_gradient::aggregate::{
    Factor, Gram, Member, MergePlan, PlanError, TensorNorms, rule_of,
};
use manyhands_gradient::codec::{GROUP_CHUNKS, Payload, Update};
use manyhands_gradient::vector::digest;
use manyhands_gradient::{
    Admitted, CHUNK, Layout, OuterState, OuterStep, Revoked, merge, outer_learning_rate,
};
use manyhands_proto::message::{Flagged, LossEffect, Signal};
use manyhands_proto::run_file::{Aggregation, Denominator, Profile, Rule};
use manyhands_proto::{ChunkIndex, NodeId, Round, TokenCount};
use proptest::prelude::*;

use crate::support::{Trained, encoded, layout, matrix, noise, trained, update_of, worker};

const TOKENS: [u64; 5] = [30_000, 10_000, 25_000, 25_000, 7];
const ALPHA: f32 = 0.7;
const DENOMINATORS: [Denominator; 3] =
    [Denominator::Contributors, Denominator::Floor, Denominator::Workers];

fn config(denominator: Denominator, rule: Rule) -> Aggregation {
    Aggregation {
        denominator,
        rules: vec![rule],
        outer_learning_rate_final: 0.4,
        ..Aggregation::default()
    }
}

/// Five workers, the third of them dense.
fn updates(layout: &Layout) -> Vec<Update> {
    let profiles = [Profile::Standard, Profile::Quality, Profile::DenseInt8];
    (0..5).map(|seed| update_of(layout, profiles[seed % 3], seed as u64)).collect()
}

fn members(updates: &[Update]) -> Vec<Member<'_>> {
    let numbered = (1_u8..).zip(updates).zip(TOKENS);
    numbered.map(|((number, update), tokens)| member(number, tokens, update)).collect()
}

fn member(number: u8, tokens: u64, update: &Update) -> Member<'_> {
    let (worker, tokens) = (worker(number), TokenCount(tokens));
    Member { worker, tokens, update, loss_effect: None }
}

/// θ and the residual of a round, and what is broadcast.
struct Merged {
    theta: Vec<f32>,
    residual: Vec<f32>,
    broadcast: Payload,
}

impl Merged {
    fn digests(&self) -> [String; 3] {
        [digest(&self.theta), digest(&self.residual), self.broadcast.digest()].map(|it| it.short())
    }
}

fn start(layout: &Layout) -> (Vec<f32>, Vec<f32>) {
    (noise(layout, 9, 0.02), noise(layout, 10, 0.0005))
}

fn merged(
    layout: &Layout,
    config: &Aggregation,
    members: &[Member<'_>],
    revoked: &[Revoked<'_>],
) -> Merged {
    let (mut theta, mut residual) = start(layout);
    let state = OuterState { theta: &mut theta, residual: &mut residual };
    let admitted = Admitted { members, alpha: ALPHA };
    let broadcast = merge(layout, config, admitted, revoked, state).expect("they fit").broadcast;
    Merged { theta, residual, broadcast }
}

#[test]
fn a_merge_never_changes_a_bit() {
    let layout = layout();
    let updates = updates(&layout);
    let got = |denominator, rule| {
        merged(&layout, &config(denominator, rule), &members(&updates), &[]).digests()
    };
    let all = [
        got(Denominator::Contributors, Rule::Mean),
        got(Denominator::Floor, Rule::MedianNorm),
        got(Denominator::Workers, Rule::MedianNorm),
        got(Denominator::Contributors, Rule::GeometricMedian),
        got(Denominator::Contributors, Rule::CenteredClip),
        got(Denominator::Contributors, Rule::CosineTrust),
    ];
    let golden = [
        ["b58fe0cb", "615da920", "ec21aed6"],
        ["9f7f62bc", "1eefde77", "b3bd7813"],
        ["06d5cf9c", "50daddd3", "23afabce"],
        ["90975f42", "f840156a", "d8e16bf4"],
        ["a9647f56", "181d305b", "a20eea66"],
        ["4d8de447", "8ec1267d", "ec30468c"],
    ];
    assert_eq!(all, golden.map(|digests| digests.map(str::to_owned)));
}

/// One chunk of the design's formula, over some of a plan's workers (in the order of their ids).
fn by_formula(
    layout: &Layout,
    plan: &MergePlan,
    members: &[Member<'_>],
    denominator: Denominator,
    (chunk, tensor): (usize, usize),
) -> [f32; CHUNK] {
    let weight = |id| plan.weight(&id).expect("in the plan");
    let all = plan.workers().fold(0.0, |sum, id| sum + weight(id));
    let (mut numerator, mut weights) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);
    let mut heaviest = [0.0_f32; CHUNK];
    let mut values = [0.0; CHUNK];
    for member in members {
        let weight = weight(member.worker);
        let factor = plan.factors(&member.worker).expect("in the plan")[tensor];
        if factor == Factor::NOTHING {
            continue;
        }
        let factor = factor.units() as f32 / 16_777_216.0;
        member.update.dequantised_chunk(layout, ChunkIndex(chunk as u32), &mut values);
        for (index, &value) in values.iter().enumerate().filter(|(_, value)| **value != 0.0) {
            numerator[index] += (weight * factor) * value;
            weights[index] += weight;
            heaviest[index] = heaviest[index].max(weight);
        }
    }
    std::array::from_fn(|index| match (weights[index], denominator) {
        (0.0, _) => 0.0,
        (own, Denominator::Contributors) => numerator[index] / own.max(1.0),
        (own, Denominator::Floor) => {
            let cap =
                if plan.workers().count() > 1 { 2.0_f32.max(2.0 * heaviest[index]) } else { 1.0 };
            numerator[index] / own.max(cap)
        }
        (_, Denominator::Workers) => numerator[index] / all,
    })
}

#[test]
fn the_merge_is_the_formula_of_the_design() {
    let layout = layout();
    let updates = updates(&layout);
    let members = members(&updates);
    let (theta, residual) = start(&layout);
    for denominator in DENOMINATORS {
        let config = config(denominator, Rule::MedianNorm);
        let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
        let total: u64 = TOKENS.iter().sum();
        for (id, tokens) in plan.workers().zip(TOKENS) {
            let weight = f64::from(plan.weight(&id).expect("in the plan"));
            let exact = tokens as f64 * 5.0 / total as f64;
            assert!((weight - exact).abs() <= exact * f64::from(f32::EPSILON) / 2.0);
        }
        let merged = merged(&layout, &config, &members, &[]);
        let broadcast = Update::parse(merged.broadcast.as_bytes(), &layout, config.broadcast)
            .expect("our own broadcast");
        let mut sent_down = [0.0; CHUNK];
        for (chunk, place) in layout.places().iter().enumerate() {
            let place = (chunk, place.tensor);
            let aggregate = by_formula(&layout, &plan, &members, denominator, place);
            broadcast.dequantised_chunk(&layout, ChunkIndex(chunk as u32), &mut sent_down);
            for (index, (aggregate, sent)) in aggregate.iter().zip(&sent_down).enumerate() {
                let at = chunk * CHUNK + index;
                let waiting = residual[at] + ALPHA * aggregate;
                assert_eq!(merged.residual[at], waiting - sent, "{denominator:?} {at}");
                assert_eq!(merged.theta[at], theta[at] - sent, "{denominator:?} {at}");
            }
        }
    }
}

#[test]
fn whoever_has_the_broadcast_gets_the_same_theta() {
    let layout = layout();
    let updates = updates(&layout);
    for broadcast in [Profile::Standard, Profile::Wide, Profile::DenseFp16] {
        let config = Aggregation { broadcast, ..Aggregation::default() };
        let merged = merged(&layout, &config, &members(&updates), &[]);
        let (mut theta, _) = start(&layout);
        let update = Update::parse(merged.broadcast.as_bytes(), &layout, broadcast)
            .expect("our own broadcast");
        update.subtract_from(&layout, &mut theta);
        assert_eq!(digest(&theta), digest(&merged.theta), "{broadcast:?}");
    }
}

#[test]
fn what_the_broadcast_leaves_out_comes_later() {
    let layout = matrix(3);
    let update = update_of(&layout, Profile::Quality, 1);
    let config = Aggregation {
        broadcast: Profile::Standard,
        denominator: Denominator::Contributors,
        ..Aggregation::default()
    };
    let mut theta = vec![0.0; layout.vector_len()];
    let mut residual = theta.clone();
    let mut expected = theta.clone();
    update.subtract_from(&layout, &mut expected);
    let step = |members: &[_], theta: &mut [f32], residual: &mut [f32]| {
        let admitted = Admitted { members, alpha: 1.0 };
        merge(&layout, &config, admitted, &[], OuterState { theta, residual }).expect("it fits");
    };
    step(&[member(1, 9, &update)], &mut theta, &mut residual);
    let left = |residual: &[f32]| residual.iter().filter(|value| **value != 0.0).count();
    assert!(left(&residual) > 0);
    for (index, expected) in expected.iter().enumerate() {
        assert!((theta[index] - residual[index] - expected).abs() < 1e-6, "nothing is lost");
    }
    for _ in 0..8 {
        step(&[], &mut theta, &mut residual);
    }
    for (theta, expected) in theta.iter().zip(&expected) {
        assert!((theta - expected).abs() < 2e-4, "{theta} {expected}");
    }
}

#[test]
fn slices_merged_apart_and_joined_are_the_whole_for_any_number_of_threads() {
    let layout = layout();
    let updates = updates(&layout);
    let members = members(&updates);
    let config = config(Denominator::Floor, Rule::MedianNorm);
    let whole = merged(&layout, &config, &members, &[]);
    let chunks = layout.chunk_count();

    // A reducer's part of the norms adds up exactly, whatever the slices.
    let cuts = [0, 1, 17, 100.min(chunks - 1), chunks];
    for update in &updates {
        let mut sum = TensorNorms::of_slice(&layout, update, cuts[3]..chunks);
        for pair in cuts[..4].windows(2) {
            sum.add(&TensorNorms::of_slice(&layout, update, pair[0]..pair[1]));
        }
        assert_eq!(&sum, update.norms());
    }
    let admitted = Admitted { members: &members, alpha: ALPHA };
    let step = OuterStep::new(&layout, &config, admitted, &[]).expect("they fit");
    for threads in [1, 5] {
        let (mut theta, mut residual) = start(&layout);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let mut slices = Vec::new();
        // The last slice first: reducers do not wait for each other.
        for first in (0..chunks).step_by(GROUP_CHUNKS * threads).rev() {
            let slice = first..(first + GROUP_CHUNKS * threads).min(chunks);
            let values = slice.start * CHUNK..slice.end * CHUNK;
            let state =
                OuterState { theta: &mut theta[values.clone()], residual: &mut residual[values] };
            slices.insert(0, pool.install(|| step.apply(slice, state)));
        }
        let broadcast = step.join(&slices).expect("they cover it");
        assert_eq!(Merged { theta, residual, broadcast }.digests(), whole.digests(), "{threads}");
    }

    // Without a broadcast everything arrives at once.
    let (mut theta, residual) = start(&layout);
    for first in (0..chunks).step_by(GROUP_CHUNKS) {
        let slice = first..(first + GROUP_CHUNKS).min(chunks);
        step.merge_into(slice.clone(), &mut theta[slice.start * CHUNK..slice.end * CHUNK]);
    }
    for (at, theta) in theta.iter().enumerate() {
        let later = whole.theta[at] - (whole.residual[at] - residual[at]);
        assert!((theta - later).abs() < 1e-7, "{at}: {theta} {later}");
    }
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
    let members: Vec<_> =
        (1_u8..).zip(&all).map(|(number, update)| member(number, 5, update)).collect();
    let config = config(Denominator::Floor, Rule::MedianNorm);
    let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
    for tensor in 0..layout.tensors().len() {
        let mut sorted: Vec<u128> =
            all.iter().map(|update| update.norms().squared()[tensor]).collect();
        sorted.sort_unstable();
        let median = (sorted[1] as f64).sqrt();
        for (id, update) in plan.workers().zip(&all) {
            let factor = plan.factors(&id).expect("in the plan")[tensor];
            let clipped = (update.norms().squared()[tensor] as f64).sqrt()
                * f64::from(factor.units())
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
    let members = members(&updates);
    let others: Vec<_> = members.iter().filter(|it| it.worker != worker(2)).copied().collect();
    let from = Admitted { members: &members, alpha: 0.5 };
    let (_, residual) = start(&layout);
    for denominator in DENOMINATORS {
        let config = config(denominator, Rule::MedianNorm);
        let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
        let revoked = Revoked { workers: &[worker(2)], earlier: &[], from };
        let merged = merged(&layout, &config, &[], &[revoked]);
        let broadcast = Update::parse(merged.broadcast.as_bytes(), &layout, config.broadcast)
            .expect("our own broadcast");
        let mut sent_down = [0.0; CHUNK];
        for (chunk, place) in layout.places().iter().enumerate() {
            let place = (chunk, place.tensor);
            let with = by_formula(&layout, &plan, &members, denominator, place);
            let without = by_formula(&layout, &plan, &others, denominator, place);
            broadcast.dequantised_chunk(&layout, ChunkIndex(chunk as u32), &mut sent_down);
            for (index, sent) in sent_down.iter().enumerate() {
                let at = chunk * CHUNK + index;
                let waiting = residual[at] + 0.5 * (without[index] - with[index]);
                assert_eq!(merged.residual[at], waiting - sent, "{denominator:?} {at}");
            }
        }
    }
    let config = config(Denominator::Floor, Rule::Mean);
    let refusal = |workers: &[NodeId], earlier: &[NodeId]| {
        let revoked = Revoked { workers, earlier, from };
        let nothing = Admitted { members: &[], alpha: 1.0 };
        let step = OuterStep::new(&layout, &config, nothing, &[revoked]);
        step.expect_err("it makes no sense").to_string()
    };
    let stranger = PlanError::NotMember { worker: worker(99) };
    assert_eq!(refusal(&[worker(99)], &[]), stranger.to_string());
    assert_eq!(refusal(&[], &[worker(1)]), PlanError::NothingRevoked.to_string());
    let twice = PlanError::RevokedTwice { worker: worker(1) };
    assert_eq!(refusal(&[worker(1)], &[worker(1)]), twice.to_string());
}

#[test]
fn rounds_that_take_back_cheats_end_where_honest_rounds_would_have() {
    let layout = matrix(3);
    // Every value is broadcast, so that both stories can be told apart by their ends alone.
    let config = Aggregation {
        denominator: Denominator::Contributors,
        rules: vec![],
        broadcast: Profile::DenseFp16,
        ..Aggregation::default()
    };
    let updates = |first_seed: u64| -> Vec<Update> {
        let seeds = first_seed..first_seed + 4;
        seeds.map(|seed| update_of(&layout, Profile::Standard, seed)).collect()
    };
    let (first, second) = (updates(0), updates(4));
    let equal = |updates: &'static [Update]| -> Vec<Member<'static>> {
        (1_u8..).zip(updates).map(|(number, update)| member(number, 9, update)).collect()
    };
    let (first, second) = (equal(Vec::leak(first)), equal(Vec::leak(second)));
    let run = |rounds: &[(&[Member<'_>], f32, &[Revoked<'_>])]| {
        let mut theta = noise(&layout, 9, 0.02);
        let mut residual = vec![0.0; layout.vector_len()];
        for (members, alpha, revoked) in rounds {
            let state = OuterState { theta: &mut theta, residual: &mut residual };
            let admitted = Admitted { members, alpha: *alpha };
            merge(&layout, &config, admitted, revoked, state).expect("they fit");
        }
        theta.iter().zip(&residual).map(|(theta, residual)| theta - residual).collect::<Vec<_>>()
    };
    let from = Admitted { members: &first, alpha: 1.0 };
    let cheats = [worker(3), worker(4)];
    let taking_back =
        |earlier, workers| Revoked { workers: &cheats[workers], earlier: &cheats[earlier], from };
    let honest = run(&[(&first[..2], 1.0, &[]), (&second, 0.7, &[]), (&second, 0.7, &[])]);
    // Found together, or one after the other: who colludes gains nothing by being found in turn.
    let together = [&[taking_back(0..0, 0..2)][..], &[]];
    let in_turn = [&[taking_back(0..0, 1..2)][..], &[taking_back(1..2, 0..1)]];
    for [second_round, third_round] in [together, in_turn] {
        let corrected =
            run(&[(&first, 1.0, &[]), (&second, 0.7, second_round), (&second, 0.7, third_round)]);
        for (corrected, honest) in corrected.iter().zip(&honest) {
            assert!((corrected - honest).abs() < 2e-7, "{corrected} {honest}");
        }
    }
}

#[test]
fn sets_that_make_no_sense_are_refused_with_a_name() {
    let layout = layout();
    let updates = updates(&layout);
    let config = config(Denominator::Floor, Rule::MedianNorm);
    let members = members(&updates);
    let refusal = |members: &[Member<'_>]| {
        MergePlan::new(&layout, &config, members).expect_err("it makes no sense")
    };
    assert_eq!(refusal(&[]), PlanError::NoMembers);
    let twice = PlanError::Duplicate { worker: worker(1) };
    assert_eq!(refusal(&[members[0], members[0]]), twice);
    let idle = Member { tokens: TokenCount(0), ..members[0] };
    assert_eq!(refusal(&[idle]), PlanError::NoTokens { worker: worker(1) });
    let foreign = update_of(&matrix(1), Profile::Standard, 1);
    let other = PlanError::Layout { worker: worker(8), expected: layout.chunk_count(), got: 1 };
    assert_eq!(refusal(&[member(8, 1, &foreign)]), other);
}

#[test]
fn products_of_slices_add_up_to_those_of_whole_vectors() {
    let layout = layout();
    let updates = updates(&layout);
    let updates: Vec<&Update> = updates.iter().collect();
    let whole = Gram::of(&layout, &updates);
    let chunks = layout.chunk_count();
    let mut sum = Gram::of_slice(&layout, &updates, GROUP_CHUNKS..chunks);
    sum.add(&Gram::of_slice(&layout, &updates, 0..GROUP_CHUNKS));
    assert_eq!(sum, whole);
    let sent: Vec<Vec<f32>> = updates
        .iter()
        .map(|update| {
            let mut sent = vec![0.0; layout.vector_len()];
            update.subtract_from(&layout, &mut sent);
            sent
        })
        .collect();
    for (number, tensor) in layout.tensors().iter().enumerate() {
        for a in 0..updates.len() {
            for b in 0..a {
                let values = sent[a][tensor.range()].iter().zip(&sent[b][tensor.range()]);
                let unit = 2.0_f64.powi(72);
                let product: i128 =
                    values.map(|(a, b)| (f64::from(*a) * f64::from(*b) * unit) as i128).sum();
                assert_eq!(whole.product(number, (a, b)), product, "{a} {b} {}", tensor.name());
                assert_eq!(whole.product(number, (b, a)), product);
            }
        }
    }
    assert_eq!(Gram::of(&layout, &updates[..1]).workers(), 1, "one alone has no pair");
}

/// Updates of workers that agree: a common step, and a little of their own.
fn agreeing(layout: &Layout, workers: u64) -> Vec<Vec<f32>> {
    let common = noise(layout, 50, 0.004);
    (0..workers)
        .map(|seed| {
            let own = noise(layout, 60 + seed, 0.002);
            common.iter().zip(&own).map(|(common, own)| common + own).collect()
        })
        .collect()
}

fn update_that_sends(layout: &Layout, steps: &[f32]) -> Update {
    let start = vec![0.0; layout.vector_len()];
    let end = steps.iter().map(|step| -step).collect();
    let error = start.clone();
    let (payload, _) = encoded(layout, Profile::Standard, &Trained { start, end, error });
    Update::parse(payload.as_bytes(), layout, Profile::Standard).expect("well formed")
}

/// The mean factor of each worker, the liar last.
fn mean_factors(rule: Rule, honest: u64, lie: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f64> {
    let layout = layout();
    let mut steps = agreeing(&layout, honest + 1);
    let liar = steps.last_mut().expect("there is one");
    *liar = lie(liar);
    let updates: Vec<_> = steps.iter().map(|steps| update_that_sends(&layout, steps)).collect();
    let members: Vec<_> =
        (1_u8..).zip(&updates).map(|(number, update)| member(number, 9, update)).collect();
    let config = config(Denominator::Floor, rule);
    let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
    plan.workers()
        .map(|id| {
            let factors = plan.factors(&id).expect("in the plan");
            let sum: f64 = factors.iter().map(|factor| f64::from(factor.units())).sum();
            sum / factors.len() as f64 / f64::from(Factor::ONE.units())
        })
        .collect()
}

const RULES: [Rule; 5] = [
    Rule::MedianNorm,
    Rule::GeometricMedian,
    Rule::CenteredClip,
    Rule::CosineTrust,
    Rule::LossGate,
];

#[test]
fn rules_leave_honest_workers_nearly_whole() {
    for rule in RULES {
        for honest in [0, 1, 2, 6] {
            let factors = mean_factors(rule, honest, <[f32]>::to_vec);
            assert!(factors.iter().all(|factor| *factor > 0.85), "{rule:?}: {factors:?}");
        }
    }
}

#[test]
fn where_nobody_sent_anything_nobody_is_held_back() {
    for rule in RULES {
        for workers in [1, 5] {
            let layout = layout();
            let zero = update_that_sends(&layout, &vec![0.0; layout.vector_len()]);
            let members: Vec<_> = (1..=workers).map(|number| member(number, 9, &zero)).collect();
            let config = config(Denominator::Floor, rule);
            let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
            for id in plan.workers() {
                let factors = plan.factors(&id).expect("in the plan");
                assert!(factors.iter().all(|factor| *factor == Factor::ONE), "{rule:?}");
            }
        }
    }
}

#[test]
fn who_turns_the_update_around_is_not_trusted() {
    let factors = mean_factors(Rule::CosineTrust, 6, |it| it.iter().map(|it| -it).collect());
    assert_eq!(factors[6], 0.0);
    assert!(factors[..6].iter().all(|factor| *factor == 1.0), "{factors:?}");
}

#[test]
fn who_shouts_is_held_back_by_every_rule_but_trust_and_the_mean() {
    for rule in [Rule::MedianNorm, Rule::GeometricMedian, Rule::CenteredClip] {
        let factors = mean_factors(rule, 6, |it| it.iter().map(|it| -20.0 * it).collect());
        let least = factors[..6].iter().fold(1.0_f64, |least, it| least.min(*it));
        assert!(factors[6] < 0.9 * least, "{rule:?}: {factors:?}");
    }
    let factors = mean_factors(Rule::Mean, 6, |it| it.iter().map(|it| -20.0 * it).collect());
    assert_eq!(factors, [1.0; 7]);
}

#[test]
fn who_raises_held_out_loss_is_left_out_whole() {
    let layout = layout();
    let update = update_that_sends(&layout, &noise(&layout, 1, 0.01));
    let config = config(Denominator::Floor, Rule::LossGate);
    let effects = [Some(-0.02), Some(-0.01), None, Some(f64::NAN), Some(0.5), Some(-0.03)];
    let members: Vec<_> = (1_u8..)
        .zip(effects)
        .map(|(number, effect)| Member {
            loss_effect: effect.map(|effect| LossEffect::between(3.5, 3.5 + effect)),
            ..member(number, 9, &update)
        })
        .collect();
    let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
    let passes = plan.workers().map(|id| plan.factors(&id).expect("in the plan")[0] == Factor::ONE);
    assert_eq!(passes.collect::<Vec<_>>(), [true, true, true, false, false, true]);
    // And the merge is that of the others.
    let others: Vec<_> = [0, 1, 2, 5].map(|at| members[at]).into();
    let merge = |members: &[Member<'_>]| merged(&layout, &config, members, &[]).digests();
    assert_eq!(merge(&members), merge(&others));
}

#[test]
fn what_is_worth_a_closer_look_is_seen_in_passing_and_the_honest_are_left_alone() {
    let layout = layout();
    let common = noise(&layout, 1, 0.01);
    let trained = |seed: u64, factor: f32| -> Update {
        let own = noise(&layout, 100 + seed, 0.01);
        let values: Vec<f32> = common.iter().zip(own).map(|(a, b)| factor * (a + b)).collect();
        update_that_sends(&layout, &values)
    };
    let honest: Vec<Update> = (0..6).map(|seed| trained(seed, 1.0)).collect();
    let (turned, loud, nothing) = (trained(7, -1.0), trained(8, 5.0), trained(9, 0.0));
    let config = Aggregation::default();
    let flagged = |others: &[(u8, &Update)], harms: Option<u8>| {
        let of_honest = (1_u8..).zip(&honest);
        let members: Vec<Member<'_>> = of_honest
            .chain(others.iter().copied())
            .map(|(number, update)| {
                let effect = if harms == Some(number) { 0.5 } else { -0.01 };
                let loss_effect = Some(LossEffect::between(3.5, 3.5 + effect));
                Member { loss_effect, ..member(number, 9, update) }
            })
            .collect();
        let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
        plan.flagged().collect::<Vec<_>>()
    };
    assert_eq!(flagged(&[], None), []);
    let shown = |number: u8, signal| Flagged { worker: worker(number), signal };
    assert_eq!(flagged(&[(9, &turned)], None), [shown(9, Signal::AgainstAll)]);
    assert_eq!(flagged(&[(9, &loud)], None), [shown(9, Signal::Loud)]);
    assert_eq!(flagged(&[(9, &nothing)], None), [shown(9, Signal::Nothing)]);
    // Nobody can say who copied whom.
    let alike = [3, 9].map(|number| shown(number, Signal::LikeAnother));
    assert_eq!(flagged(&[(9, &honest[2])], None), alike);
    assert_eq!(flagged(&[], Some(4)), [shown(4, Signal::RaisesLoss)]);
}

#[test]
fn rules_hold_back_together_and_are_known_by_name() {
    let layout = layout();
    let updates = updates(&layout);
    let members = members(&updates);
    let factors = |rules: Vec<Rule>| {
        let config = Aggregation { rules, ..Aggregation::default() };
        let plan = MergePlan::new(&layout, &config, &members).expect("a valid set");
        plan.factors(&worker(2)).expect("in the plan").to_vec()
    };
    let (clip, trust) = (factors(vec![Rule::MedianNorm]), factors(vec![Rule::CosineTrust]));
    for (tensor, both) in factors(vec![Rule::MedianNorm, Rule::CosineTrust]).into_iter().enumerate()
    {
        let product = u64::from(clip[tensor].units()) * u64::from(trust[tensor].units());
        assert_eq!(u64::from(both.units()), product >> 24);
    }
    for rule in RULES.into_iter().chain([Rule::Mean]) {
        let named = serde_json::to_value(rule).expect("a name");
        assert_eq!(named, rule_of(rule).name());
    }
}

#[test]
fn alpha_goes_in_a_line_from_first_to_last() {
    let config = config(Denominator::Floor, Rule::MedianNorm);
    let at = |round| outer_learning_rate(&config, Round(round), 7);
    assert_eq!((at(0), at(6), at(100)), (1.0, 0.4, 0.4));
    assert!((at(3) - 0.7).abs() < 1e-6);
    assert_eq!(outer_learning_rate(&config, Round(0), 1), 1.0);
}

static UPDATES: LazyLock<Vec<Update>> = LazyLock::new(|| updates(&layout()));

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_order_of_arrival_never_matters(order in Just(vec![0, 1, 2, 3, 4]).prop_shuffle()) {
        let layout = layout();
        let config = config(Denominator::Floor, Rule::MedianNorm);
        let in_order = members(&UPDATES);
        let shuffled: Vec<_> = order.into_iter().map(|at: usize| in_order[at]).collect();
        let digests = |set: &[_]| merged(&layout, &config, set, &[]).digests();
        prop_assert_eq!(digests(&in_order), digests(&shuffled));
    }
}
