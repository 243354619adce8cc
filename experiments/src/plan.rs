//! Which experiments there are.
//!
//! A name is `group/what/seed` or `group/what/how`. Groups stand in the order in which they are worth having.
//!
//! Batches are as small as can be (one sequence of 32 targets) and rounds many: two cores pay for a few
//! million tokens, and what a merge delays is delayed by rounds. A second moment over 20 steps (β₂ = .95)
//! follows the noise of such batches, so it is averaged over a thousand.
//!
//! Methods are compared with a million parameters; everything else has under a quarter of that, or two cores would
//! take a day. Seeds of what is compared are not those of what was tuned.

use manyhands_proto::run_file::{
    Aggregation, Architecture, Codec, Denominator, Precision, Profile, Rule, Training,
};
use manyhands_simulation::forgery::Forgery;

use crate::experiment::{Beginning, Carrying, Download, Experiment, Liars, Lie, Method, Sparse};

const WORKERS: u32 = 8;
/// H.
const STEPS: u32 = 30;
pub(crate) const SEEDS: [u64; 3] = [2, 3, 4];
const TUNING_SEED: u64 = 1;
const RATES: [f64; 3] = [5e-4, 1e-3, 2e-3];
const COMPARE_ROUNDS: u32 = 300;
const CHECKPOINT_ROUNDS: u32 = 200;
const ROBUST_ROUNDS: u32 = 40;
const LATE_ROUNDS: u32 = 60;
/// Of ours, after 200 of 260 rounds.
const LATE_ALPHA: f32 = 2.5;
/// What a cosine has left there.
const LATE_RATE_SHARE: f64 = 0.125;
const TUNING_ROUNDS: u32 = 150;
const ABLATION_ROUNDS: u32 = 150;
const SCALE_ROUNDS: u32 = 300;
const POISON_ROUNDS: u32 = 50;

/// The defence that runs have where their file says nothing else.
pub(crate) const DEFAULT: &str = "default";

/// How merges defend themselves where liars are let loose: the plain mean, what others are compared with,
/// then the default.
pub(crate) fn defences() -> Vec<(&'static str, Aggregation)> {
    let with = |rules: &[Rule]| Aggregation { rules: rules.to_vec(), ..ours_midway().aggregation };
    vec![
        ("mean", with(&[])),
        (DEFAULT, with(&[Rule::MedianNorm, Rule::CosineTrust, Rule::LossGate])),
    ]
}

/// What liars do.
pub(crate) fn lies() -> Vec<(&'static str, Lie)> {
    let forged = |forgery| Lie::Forged(forgery);
    vec![
        ("sign_flip", forged(Forgery::SignFlip { factor: 1.0 })),
        ("sign_flip_10", forged(Forgery::SignFlip { factor: 10.0 })),
        ("inner_product", forged(Forgery::InnerProduct { factor: 1.0 })),
        ("little_is_enough_0.5", forged(Forgery::LittleIsEnough { deviations: 0.5 })),
        ("little_is_enough_1.5", forged(Forgery::LittleIsEnough { deviations: 1.5 })),
        ("gaussian", forged(Forgery::Gaussian { factor: 1.0 })),
        ("gaussian_10", forged(Forgery::Gaussian { factor: 10.0 })),
        ("random_places", forged(Forgery::RandomPlaces { factor: 1.0 })),
        ("random_places_10", forged(Forgery::RandomPlaces { factor: 10.0 })),
        ("unpopular_places", forged(Forgery::UnpopularPlaces { factor: 1.0 })),
        ("unpopular_places_10", forged(Forgery::UnpopularPlaces { factor: 10.0 })),
        ("flipped_labels", Lie::FlippedLabels),
        ("stale", forged(Forgery::Stale)),
        ("zero", forged(Forgery::Zero)),
    ]
}

/// All of them.
pub(crate) fn all() -> Vec<Experiment> {
    let mut plan = Vec::new();
    tune(&mut plan);
    compare(&mut plan);
    plan.extend([checkpoint(), late_checkpoint()]);
    robust(&mut plan);
    ablate(&mut plan);
    scale(&mut plan);
    plan
}

/// The run whose updates are measured.
pub(crate) fn of_benchmarks() -> Experiment {
    base("bench", TUNING_SEED, Method::Sparse(ours()))
}

/// The model whose rounds are replayed, and how it is trained.
pub(crate) fn of_replays() -> (Architecture, Training) {
    let training = Training { beta2: 0.95, learning_rate: 2e-3, ..training() };
    (architecture(32, 2), training)
}

/// The run that is poisoned inside the tolerance of replays.
pub(crate) fn of_poison() -> Experiment {
    let mut experiment = small("poison", Method::Sparse(ours()));
    experiment.rounds = POISON_ROUNDS;
    experiment.model = architecture(32, 2);
    experiment
}

/// What a build's numerics are recognised by. It says everything itself: where the plan changes its mind about a method,
/// results of others stay.
pub(crate) fn tiny() -> Experiment {
    let method = Sparse {
        codec: Codec { profile: Profile::Standard, error_decay: 0.9 },
        aggregation: Aggregation {
            denominator: Denominator::Contributors,
            rules: vec![Rule::MedianNorm, Rule::LossGate],
            broadcast: Profile::Wide,
            outer_learning_rate: 1.0,
            outer_learning_rate_final: 3.0,
        },
        moments: Carrying::Rounded,
        download: Download::Broadcast,
        beginning: None,
    };
    short_run("tiny", Method::Sparse(method))
}

/// A model and rounds so small that it runs in a second.
fn short_run(name: &str, method: Method) -> Experiment {
    let mut experiment = base(&format!("short/{name}"), TUNING_SEED, method);
    experiment.workers = 3;
    experiment.rounds = 3;
    experiment.model = architecture(32, 1);
    experiment.training.steps_per_round = 4;
    experiment.training.batch_sequences = 8;
    experiment.training.learning_rate = 2e-2;
    experiment.training.warmup_steps = 1;
    experiment
}

/// All methods and all lies, for a few seconds each.
pub(crate) fn short() -> Vec<Experiment> {
    let of_method = |(name, method, _)| match method {
        // An outer rate that rises within three rounds overshoots.
        Method::DenseDiloco { .. } => short_run(name, dense(0.7)),
        Method::Sparse(_) | Method::Synchronous => short_run(name, method),
    };
    let mut plan: Vec<_> = methods().into_iter().map(of_method).collect();
    let start = short_run("synchronous", Method::Synchronous);
    for (name, lie) in lies() {
        let mut experiment = short_run(name, Method::Sparse(ours()));
        experiment.start = Some(Box::new(start.clone()));
        experiment.liars = Some(Liars { count: 1, lie });
        plan.push(experiment);
    }
    plan
}

/// The methods that are compared, each with what was best for it among `tune`.
pub(crate) fn methods() -> Vec<(&'static str, Method, f64)> {
    vec![
        ("ours", Method::Sparse(ours()), 1e-3),
        ("dense_diloco", dense(2.1), 2e-3),
        ("synchronous", Method::Synchronous, 4e-3),
        ("sparse_loco", Method::Sparse(sparse_loco()), 2e-3),
    ]
}

fn compare(plan: &mut Vec<Experiment>) {
    for seed in SEEDS {
        for (name, method, rate) in methods() {
            let mut experiment = base(&format!("compare/{name}/{seed}"), seed, method);
            experiment.training.learning_rate = rate;
            plan.push(experiment);
        }
    }
}

/// Ours in the middle of a run, where the outer learning rate does not rise yet.
fn ours_midway() -> Sparse {
    let mut method = ours();
    method.aggregation.outer_learning_rate_final = method.aggregation.outer_learning_rate;
    method
}

/// A run in its middle; its data come in another order than of those who start there.
fn checkpoint() -> Experiment {
    let mut experiment = small("checkpoint", Method::Sparse(ours_midway()));
    experiment.seed = 100;
    experiment.rounds = CHECKPOINT_ROUNDS;
    experiment.training.learning_rate_final_share = 1.0;
    experiment
}

/// A run shortly before its end: the learning rate is low, and α, which multiplies what liars do, high.
fn late_checkpoint() -> Experiment {
    let mut method = ours();
    method.aggregation.outer_learning_rate_final = LATE_ALPHA;
    let mut experiment = small("late_checkpoint", Method::Sparse(method));
    experiment.seed = 100;
    experiment.training.decay_steps = STEPS * (CHECKPOINT_ROUNDS + LATE_ROUNDS);
    experiment.rounds = CHECKPOINT_ROUNDS;
    experiment
}

/// From there to the end.
fn late(name: &str, mut method: Sparse) -> Experiment {
    method.aggregation.outer_learning_rate = LATE_ALPHA;
    method.aggregation.outer_learning_rate_final = ours().aggregation.outer_learning_rate_final;
    let mut experiment = small(name, Method::Sparse(method));
    experiment.start = Some(Box::new(late_checkpoint()));
    experiment.rounds = LATE_ROUNDS;
    experiment.training.warmup_steps = 0;
    experiment.training.learning_rate *= LATE_RATE_SHARE;
    experiment
}

fn midway(name: &str, method: Sparse) -> Experiment {
    let mut experiment = small(name, Method::Sparse(method));
    experiment.start = Some(Box::new(checkpoint()));
    experiment.rounds = ROBUST_ROUNDS;
    experiment
}

/// Liars against defences: a quarter of eight and a third of three against both, others against the default.
fn robust(plan: &mut Vec<Experiment>) {
    for (group, liars, workers) in
        [("2_of_8", 2, 8), ("5_of_20", 5, 20), ("1_of_3", 1, 3), ("late_2_of_8", 2, 8)]
    {
        let lies = lies().into_iter().map(|(name, lie)| (name, Some(lie)));
        for (lie_name, lie) in std::iter::once(("none", None)).chain(lies) {
            for (defence, aggregation) in defences() {
                let is_default = defence == DEFAULT;
                let is_reference = defence == "mean" && lie.is_none();
                let is_wanted = match group {
                    "2_of_8" | "1_of_3" => true,
                    _ => is_default || is_reference,
                };
                // What has to stay below a limit is not left to one seed.
                let seeds = if group == "2_of_8" && (is_default || is_reference) { 3 } else { 1 };
                for seed in SEEDS.into_iter().take(if is_wanted { seeds } else { 0 }) {
                    let name = format!("robust/{group}/{lie_name}/{defence}/{seed}");
                    let method = Sparse { aggregation: aggregation.clone(), ..ours_midway() };
                    let mut experiment = match group {
                        "late_2_of_8" => late(&name, method),
                        _ => midway(&name, method),
                    };
                    experiment.seed = seed;
                    experiment.workers = workers;
                    experiment.liars = lie.map(|lie| Liars { count: liars, lie });
                    plan.push(experiment);
                }
            }
        }
    }
}

/// Equal grids: three inner learning rates, around the best of a method's single runs, and two of what it has of
/// its own.
fn tune(plan: &mut Vec<Experiment>) {
    let rising_to = |mut method: Sparse, alpha: f32| {
        method.aggregation.outer_learning_rate_final = alpha;
        Method::Sparse(method)
    };
    let sparse = |method: Sparse| {
        [("alpha_1", rising_to(method.clone(), 1.0)), ("alpha_3", rising_to(method, 3.0))]
    };
    let grids = [
        ("ours", RATES, sparse(ours())),
        (
            "dense_diloco",
            RATES.map(|rate| 2.0 * rate),
            [("alpha_0.7", dense(0.7)), ("alpha_2.1", dense(2.1))],
        ),
        (
            "synchronous",
            RATES.map(|rate| 2.0 * rate),
            [("clip_1", Method::Synchronous), ("clip_0.3", Method::Synchronous)],
        ),
        ("sparse_loco", RATES, sparse(sparse_loco())),
    ];
    for (name, rates, choices) in grids {
        for (choice, method) in choices {
            for rate in rates {
                let name = format!("tune/{name}/{choice}_lr_{rate}");
                let mut experiment = small(&name, method.clone());
                experiment.rounds = TUNING_ROUNDS;
                experiment.training.learning_rate = rate;
                if choice == "clip_0.3" {
                    experiment.training.gradient_clip = 0.3;
                }
                plan.push(experiment);
            }
        }
    }
}

/// One thing changed at a time, one seed, the small model.
fn ablate(plan: &mut Vec<Experiment>) {
    let mut add = |name: &str, change: &dyn Fn(&mut Sparse)| {
        let mut method = ours();
        change(&mut method);
        let rounds = ABLATION_ROUNDS;
        let name = format!("ablate/{name}");
        plan.push(Experiment { rounds, ..small(&name, Method::Sparse(method)) });
    };
    add("ours", &|_| {});
    add("k_128", &|it| it.codec.profile = Profile::Quality);
    add("k_320", &|it| it.codec.profile = Profile::Wide);
    add("flat12", &|it| it.codec.profile = Profile::Flat12);
    add("dense_fp16", &|it| it.codec.profile = Profile::DenseFp16);
    add("k_320_in_the_first_tenth", &|it| {
        it.beginning = Some(Beginning { rounds: ABLATION_ROUNDS / 10, profile: Profile::Wide });
    });
    add("beta_0.8", &|it| it.codec.error_decay = 0.8);
    add("beta_0.95", &|it| it.codec.error_decay = 0.95);
    add("beta_1", &|it| it.codec.error_decay = 1.0);
    for (name, denominator, alpha) in [
        ("alpha_to_0.4", Denominator::Contributors, 0.4),
        ("alpha_to_1", Denominator::Contributors, 1.0),
        ("alpha_to_5", Denominator::Contributors, 5.0),
        ("floor_to_1", Denominator::Floor, 1.0),
        ("floor_to_3", Denominator::Floor, 3.0),
        ("workers_to_3", Denominator::Workers, 3.0),
    ] {
        add(name, &|it| {
            it.aggregation.denominator = denominator;
            it.aggregation.outer_learning_rate_final = alpha;
        });
    }
    add("moments_unrounded", &|it| it.moments = Carrying::Unrounded);
    add("moments_reset", &|it| it.moments = Carrying::Reset);
    add("no_rules", &|it| it.aggregation.rules = vec![]);
    add("median_norm_alone", &|it| it.aggregation.rules = vec![Rule::MedianNorm]);
    add("broadcast_dense_fp16", &|it| it.aggregation.broadcast = Profile::DenseFp16);
}

/// How the gap to one process changes with the rounds, with H and with the model, at equal tokens.
fn scale(plan: &mut Vec<Experiment>) {
    let mut add = |name: &str, change: &dyn Fn(&mut Experiment)| {
        for (method_name, method, rate) in methods() {
            if !["ours", "synchronous"].contains(&method_name) {
                continue;
            }
            let mut experiment = small(&format!("scale/{name}/{method_name}"), method);
            experiment.training.learning_rate = rate;
            experiment.rounds = SCALE_ROUNDS;
            change(&mut experiment);
            plan.push(experiment);
        }
    };
    add("rounds_300", &|_| {});
    add("h_10", &|it| {
        it.training.steps_per_round = 10;
        it.rounds = 3 * SCALE_ROUNDS;
    });
    add("h_90", &|it| {
        it.training.steps_per_round = 90;
        it.rounds = SCALE_ROUNDS / 3;
    });
    add("hidden_32", &|it| it.model = architecture(32, 2));
    add("hidden_128_rounds_600", &|it| {
        it.model = architecture(128, 4);
        it.rounds = 2 * COMPARE_ROUNDS;
    });
}

fn base(name: &str, seed: u64, method: Method) -> Experiment {
    Experiment {
        name: name.to_owned(),
        seed,
        workers: WORKERS,
        rounds: COMPARE_ROUNDS,
        model: architecture(128, 4),
        training: training(),
        method,
        start: None,
        liars: None,
    }
}

/// 223,552 parameters.
fn small(name: &str, method: Method) -> Experiment {
    Experiment { model: architecture(64, 2), ..base(name, TUNING_SEED, method) }
}

fn ours() -> Sparse {
    Sparse {
        codec: Codec { profile: Profile::Standard, error_decay: 0.9 },
        aggregation: Aggregation {
            denominator: Denominator::Contributors,
            rules: vec![Rule::MedianNorm, Rule::CosineTrust, Rule::LossGate],
            broadcast: Profile::Wide,
            outer_learning_rate: 1.0,
            outer_learning_rate_final: 3.0,
        },
        moments: Carrying::Rounded,
        download: Download::Broadcast,
        beginning: None,
    }
}

/// As its paper's code has it: no rule, mean over contributors, everybody fetches everything.
fn sparse_loco() -> Sparse {
    let mut method = ours();
    method.codec = Codec { profile: Profile::Flat12, error_decay: 0.95 };
    method.aggregation.rules = vec![];
    method.aggregation.outer_learning_rate_final = 1.0;
    method.moments = Carrying::Unrounded;
    method.download = Download::AllPayloads;
    method
}

/// As DiLoCo's paper has it, but that the outer learning rate may rise, as ours does.
fn dense(outer_learning_rate_final: f32) -> Method {
    Method::DenseDiloco { outer_learning_rate: 0.7, outer_learning_rate_final, momentum: 0.9 }
}

/// 1,000,576 parameters at a hidden size of 128 and 4 layers.
fn architecture(hidden_size: u32, layers: u32) -> Architecture {
    Architecture {
        vocabulary_size: 2048,
        hidden_size,
        layers,
        heads: 4,
        key_value_heads: 2,
        feed_forward_size: hidden_size * 11 / 4,
        context_length: 32,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        tie_embeddings: true,
    }
}

fn training() -> Training {
    Training {
        steps_per_round: STEPS,
        batch_sequences: 1,
        micro_batch_sequences: 32,
        learning_rate: 1e-3,
        warmup_steps: 60,
        decay_steps: 0,
        learning_rate_final_share: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_clip: 1.0,
        precision: Precision::F32,
    }
}
