//! Which experiments there are.
//!
//! A name is `group/what/seed`. Groups stand in the order in which they are worth having.

use manyhands_proto::run_file::{
    Aggregation, Architecture, Codec, Denominator, Precision, Profile, Rule, Training,
};

use crate::experiment::{Carrying, Download, Experiment, Method, Sparse};

const WORKERS: u32 = 8;
/// H.
const STEPS: u32 = 30;
const ROUNDS: u32 = 100;
const SEEDS: [u64; 3] = [1, 2, 3];
/// What all methods are tuned over, one seed, a third of the rounds.
const LEARNING_RATES: [f64; 3] = [2e-3, 4e-3, 8e-3];
const TUNING_ROUNDS: u32 = 34;

/// All of them.
pub(crate) fn all() -> Vec<Experiment> {
    let mut plan = Vec::new();
    compare(&mut plan);
    tune(&mut plan);
    ablate(&mut plan);
    scale(&mut plan);
    plan
}

/// The run whose updates are measured.
pub(crate) fn of_benchmarks() -> Experiment {
    base("bench", 1, Method::Sparse(ours()))
}

/// A model and rounds so small that all methods run in seconds.
pub(crate) fn short() -> Vec<Experiment> {
    let small = |name: &str, method: Method| {
        let mut experiment = base(&format!("short/{name}"), 1, method);
        experiment.workers = 3;
        experiment.rounds = 3;
        experiment.model = architecture(32, 1);
        experiment.model.vocabulary_size = 400;
        experiment.training.steps_per_round = 2;
        experiment
    };
    methods().into_iter().map(|(name, method, _)| small(name, method)).collect()
}

/// The methods that are compared, each at the learning rate that its tuning chose.
fn methods() -> Vec<(&'static str, Method, f64)> {
    vec![
        ("ours", Method::Sparse(ours()), 4e-3),
        ("dense_diloco", dense(0.7, 0.9), 4e-3),
        ("synchronous", Method::Synchronous, 4e-3),
        ("sparse_loco", Method::Sparse(sparse_loco()), 4e-3),
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

/// Equal grids: three inner learning rates, and two of what a method has of its own.
fn tune(plan: &mut Vec<Experiment>) {
    let with_alpha = |mut method: Sparse, alpha: f32| {
        method.aggregation.outer_learning_rate = alpha;
        method.aggregation.outer_learning_rate_final = alpha;
        Method::Sparse(method)
    };
    let grids: [(&str, [(&str, Method); 2]); 4] = [
        ("ours", [("alpha_1", with_alpha(ours(), 1.0)), ("alpha_0.7", with_alpha(ours(), 0.7))]),
        ("dense_diloco", [("0.7_0.9", dense(0.7, 0.9)), ("1_0.6", dense(1.0, 0.6))]),
        ("synchronous", [("clip_1", Method::Synchronous), ("clip_0.3", Method::Synchronous)]),
        (
            "sparse_loco",
            [
                ("alpha_1", with_alpha(sparse_loco(), 1.0)),
                ("alpha_0.7", with_alpha(sparse_loco(), 0.7)),
            ],
        ),
    ];
    for (name, choices) in grids {
        for (choice, method) in choices {
            for rate in LEARNING_RATES {
                let name = format!("tune/{name}/{choice}_lr_{rate}");
                let mut experiment = base(&name, 1, method.clone());
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

/// One thing changed at a time, one seed.
fn ablate(plan: &mut Vec<Experiment>) {
    let mut add = |name: &str, change: &dyn Fn(&mut Sparse)| {
        let mut method = ours();
        change(&mut method);
        let name = format!("ablate/{name}/1");
        plan.push(Experiment { rounds: ABLATION_ROUNDS, ..base(&name, 1, Method::Sparse(method)) });
    };
    add("ours", &|_| {});
    add("k_128", &|it| it.codec.profile = Profile::Quality);
    add("k_256", &|it| it.codec.profile = Profile::Wide);
    add("flat12", &|it| it.codec.profile = Profile::Flat12);
    add("dense_fp16", &|it| it.codec.profile = Profile::DenseFp16);
    add("beta_0.9", &|it| it.codec.error_decay = 0.9);
    add("beta_1", &|it| it.codec.error_decay = 1.0);
    for (name, denominator, alpha) in [
        ("contributors_0.7", Denominator::Contributors, 0.7),
        ("floor_1", Denominator::Floor, 1.0),
        ("workers_1", Denominator::Workers, 1.0),
    ] {
        add(name, &|it| {
            it.aggregation.denominator = denominator;
            it.aggregation.outer_learning_rate = alpha;
            it.aggregation.outer_learning_rate_final = alpha;
        });
    }
    add("alpha_falls", &|it| it.aggregation.outer_learning_rate_final = 0.4);
    add("moments_unrounded", &|it| it.moments = Carrying::Unrounded);
    add("moments_reset", &|it| it.moments = Carrying::Reset);
    add("no_clip", &|it| it.aggregation.rules = vec![]);
    add("broadcast_quality", &|it| it.aggregation.broadcast = Profile::Quality);
    add("broadcast_dense_fp16", &|it| it.aggregation.broadcast = Profile::DenseFp16);
}

const ABLATION_ROUNDS: u32 = 50;

/// How the gap to one process changes with H and with the model, at equal tokens.
fn scale(plan: &mut Vec<Experiment>) {
    let mut add = |name: &str, change: &dyn Fn(&mut Experiment)| {
        for (method_name, method, rate) in methods() {
            if !["ours", "synchronous"].contains(&method_name) {
                continue;
            }
            let mut experiment = base(&format!("scale/{name}/{method_name}"), 1, method);
            experiment.training.learning_rate = rate;
            experiment.rounds = ABLATION_ROUNDS;
            change(&mut experiment);
            plan.push(experiment);
        }
    };
    add("h_10", &|it| {
        it.training.steps_per_round = 10;
        it.rounds = 3 * ABLATION_ROUNDS;
    });
    add("h_90", &|it| {
        it.training.steps_per_round = 90;
        it.rounds = ABLATION_ROUNDS.div_ceil(3);
    });
    add("hidden_64", &|it| it.model = architecture(64, 4));
    add("hidden_192", &|it| it.model = architecture(192, 4));
}

fn base(name: &str, seed: u64, method: Method) -> Experiment {
    Experiment {
        name: name.to_owned(),
        seed,
        workers: WORKERS,
        rounds: ROUNDS,
        model: architecture(128, 4),
        training: training(),
        method,
    }
}

fn ours() -> Sparse {
    Sparse {
        codec: Codec { profile: Profile::Standard, error_decay: 0.95 },
        aggregation: Aggregation {
            denominator: Denominator::Contributors,
            rules: vec![Rule::MedianNorm],
            broadcast: Profile::Wide,
            outer_learning_rate: 1.0,
            outer_learning_rate_final: 1.0,
        },
        moments: Carrying::Rounded,
        download: Download::Broadcast,
        beginning: None,
    }
}

/// As its paper's code has it: no rule, mean over contributors, everybody fetches everything.
fn sparse_loco() -> Sparse {
    let mut method = ours();
    method.codec.profile = Profile::Flat12;
    method.aggregation.rules = vec![];
    method.moments = Carrying::Unrounded;
    method.download = Download::AllPayloads;
    method
}

fn dense(outer_learning_rate: f32, momentum: f32) -> Method {
    Method::DenseDiloco { outer_learning_rate, momentum }
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
        context_length: 64,
        rope_theta: 10_000.0,
        norm_epsilon: 1e-5,
        tie_embeddings: true,
    }
}

fn training() -> Training {
    Training {
        steps_per_round: STEPS,
        batch_sequences: 4,
        micro_batch_sequences: 32,
        learning_rate: 4e-3,
        warmup_steps: 60,
        decay_steps: 0,
        learning_rate_final_share: 0.1,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_clip: 1.0,
        precision: Precision::F32,
    }
}
