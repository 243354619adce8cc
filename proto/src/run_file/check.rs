//! From the owner's text to a consistent [`RunFile`], or to every problem with line, field and remedy.

use std::fmt;

use toml_edit::{Document, Item};

use super::{
    Aggregation, Architecture, Chain, Codec, Precision, Profile, RoundTimes, Rule, Run, RunFile,
    RunSpec, Training, Verification,
};
use crate::message::limits::{OUTER_LEARNING_RATE_MAX, WEIGHED_MAX};

/// One thing to change in a run file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFileProblem {
    /// 1 for the first; none for a specification that came as JSON.
    pub line: Option<usize>,
    /// `section.field`.
    pub field: String,
    pub problem: String,
    pub remedy: String,
}

impl fmt::Display for RunFileProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        write!(f, "{}: {}; {}", self.field, self.problem, self.remedy)
    }
}

/// Everything that is wrong with a run file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct RunFileError {
    pub problems: Vec<RunFileProblem>,
}

/// A problem before its line is known.
struct Contradiction {
    field: &'static str,
    problem: String,
    remedy: String,
}

pub(super) fn parse(text: &str) -> Result<RunFile, RunFileError> {
    let file: RunFile = toml::from_str(text).map_err(|error| syntax(text, &error))?;
    let document = Document::parse(text).ok();
    let problems: Vec<_> = contradictions(&Sections::of_file(&file))
        .into_iter()
        .map(|found| RunFileProblem {
            line: document.as_ref().and_then(|document| line_of(text, document, found.field)),
            field: found.field.to_owned(),
            problem: found.problem,
            remedy: found.remedy,
        })
        .collect();
    if problems.is_empty() { Ok(file) } else { Err(RunFileError { problems }) }
}

pub(super) fn contradictions_of_spec(spec: &RunSpec) -> Vec<RunFileProblem> {
    let mut found = contradictions(&Sections::of_spec(spec));
    if spec.data.train_sequences == 0 {
        found.push(Contradiction {
            field: "data.train_sequences",
            problem: "the data set has no training sequence".to_owned(),
            remedy: "prepare more text or a shorter context".to_owned(),
        });
    }
    found
        .into_iter()
        .map(|found| RunFileProblem {
            line: None,
            field: found.field.to_owned(),
            problem: found.problem,
            remedy: found.remedy,
        })
        .collect()
}

fn syntax(text: &str, error: &toml::de::Error) -> RunFileError {
    let start = error.span().map(|span| span.start);
    let line = start.map(|at| 1 + text[..at.min(text.len())].matches('\n').count());
    let message = error.message().to_owned();
    let field = quoted(&message)
        .map(str::to_owned)
        .or_else(|| line.and_then(|line| text.lines().nth(line - 1)).map(|l| l.trim().to_owned()))
        .unwrap_or_default();
    let remedy = if message.starts_with("unknown field") {
        "remove it or correct its name"
    } else if message.starts_with("missing field") && start.is_none_or(|at| at == 0) {
        "add a section of that name"
    } else if message.starts_with("missing field") {
        "add it to this section"
    } else {
        "correct this line"
    };
    let problem = RunFileProblem { line, field, problem: message, remedy: remedy.to_owned() };
    RunFileError { problems: vec![problem] }
}

/// The first name in backticks: serde puts the field there.
fn quoted(message: &str) -> Option<&str> {
    message.split('`').nth(1)
}

fn line_of(text: &str, document: &Document<&str>, field: &str) -> Option<usize> {
    let (section, key) = field.split_once('.')?;
    let table = document.as_table().get(section)?;
    let item_span = table.as_table_like().and_then(|t| t.get(key)).and_then(Item::span);
    let start = item_span.or_else(|| table.span())?.start;
    Some(1 + text[..start].matches('\n').count())
}

/// The sections that a file and a specification share.
struct Sections<'a> {
    run: &'a Run,
    model: &'a Architecture,
    training: &'a Training,
    held_out_sequences: u32,
    codec: &'a Codec,
    aggregation: &'a Aggregation,
    round: &'a RoundTimes,
    verification: &'a Verification,
    chain: &'a Chain,
}

impl<'a> Sections<'a> {
    fn of_file(file: &'a RunFile) -> Self {
        let RunFile { run, model, training, data, codec, aggregation, round, verification, chain } =
            file;
        let held_out_sequences = data.held_out_sequences;
        Self {
            run,
            model,
            training,
            held_out_sequences,
            codec,
            aggregation,
            round,
            verification,
            chain,
        }
    }

    fn of_spec(spec: &'a RunSpec) -> Self {
        let RunSpec { run, model, training, data, codec, aggregation, round, verification, chain } =
            spec;
        let held_out_sequences = data.held_out_sequences;
        Self {
            run,
            model,
            training,
            held_out_sequences,
            codec,
            aggregation,
            round,
            verification,
            chain,
        }
    }
}

/// Collects what does not hold.
struct Findings(Vec<Contradiction>);

impl Findings {
    fn require(&mut self, holds: bool, field: &'static str, problem: String, remedy: &str) {
        if !holds {
            self.0.push(Contradiction { field, problem, remedy: remedy.to_owned() });
        }
    }

    fn within(&mut self, field: &'static str, value: u64, least: u64, most: u64) {
        let problem = format!("{value} is not between {least} and {most}");
        self.require(
            (least..=most).contains(&value),
            field,
            problem,
            "choose a value in that range",
        );
    }

    fn share(&mut self, field: &'static str, value: f64, positive: bool) {
        let holds = (0.0..=1.0).contains(&value) && (!positive || value > 0.0);
        let least = if positive { "above 0" } else { "0 or more" };
        let problem = format!("{value} is not between 0 and 1");
        self.require(holds, field, problem, &format!("choose a number {least} and at most 1"));
    }

    fn positive(&mut self, field: &'static str, value: f64) {
        let problem = format!("{value} is not a positive number");
        self.require(value.is_finite() && value > 0.0, field, problem, "choose a number above 0");
    }
}

fn contradictions(sections: &Sections<'_>) -> Vec<Contradiction> {
    let mut findings = Findings(Vec::new());
    check_run(sections.run, sections.held_out_sequences, &mut findings);
    check_model(sections.model, &mut findings);
    check_training(sections.training, &mut findings);
    check_merge(sections.codec, sections.aggregation, &mut findings);
    findings.require(
        !sections.aggregation.rules.contains(&Rule::LossGate)
            || sections.run.workers_max as usize <= WEIGHED_MAX,
        "run.workers_max",
        format!("verifiers weigh at most {WEIGHED_MAX} updates a round"),
        &format!("choose at most {WEIGHED_MAX}, or leave loss_gate out of aggregation.rules"),
    );
    let allowed = sections.run.allow.len();
    let needed = sections.run.workers_min.saturating_add(sections.verification.verifiers_min);
    findings.require(
        allowed == 0 || allowed >= needed as usize,
        "run.allow",
        format!("{allowed} nodes are allowed, workers_min and verifiers_min ask for {needed}"),
        "allow more nodes, verifiers too, or remove the list to admit anybody",
    );
    check_round(sections.round, &mut findings);
    check_verification(sections.verification, sections.training.precision, &mut findings);
    check_chain(sections.chain, sections.run, &mut findings);
    findings.0
}

fn check_run(run: &Run, held_out_sequences: u32, findings: &mut Findings) {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    findings.require(
        (1..=64).contains(&run.name.len()) && run.name.chars().all(plain),
        "run.name",
        format!("{:?} is not 1 to 64 letters, digits, - or _", run.name),
        "choose another name",
    );
    findings.within("run.rounds", run.rounds.into(), 1, 10_000_000);
    findings.within("run.workers_max", run.workers_max.into(), 1, 65_536);
    findings.require(
        (1..=run.workers_max).contains(&run.workers_min),
        "run.workers_min",
        format!("{} is not between 1 and workers_max = {}", run.workers_min, run.workers_max),
        "lower workers_min or raise workers_max",
    );
    findings.within("run.evidence_rounds", run.evidence_rounds.into(), 2, 100_000);
    findings.within("data.held_out_sequences", held_out_sequences.into(), 1, 1 << 20);
}

/// Far above what is trained, and so that chunks of 4,096 parameters are counted in 32 bits.
const PARAMETERS_MAX: u128 = 1 << 42;

fn check_model(model: &Architecture, findings: &mut Findings) {
    findings.within("model.vocabulary_size", model.vocabulary_size.into(), 257, 1 << 20);
    findings.within("model.hidden_size", model.hidden_size.into(), 8, 1 << 16);
    findings.within("model.layers", model.layers.into(), 1, 1_024);
    findings.within("model.feed_forward_size", model.feed_forward_size.into(), 8, 1 << 20);
    findings.within("model.context_length", model.context_length.into(), 8, 1 << 20);
    let table = u128::from(model.vocabulary_size) * u128::from(model.hidden_size);
    let attention = 4 * u128::from(model.hidden_size) * u128::from(model.hidden_size);
    let feed_forward = 3 * u128::from(model.hidden_size) * u128::from(model.feed_forward_size);
    let parameters = 2 * table + u128::from(model.layers) * (attention + feed_forward);
    findings.require(
        parameters <= PARAMETERS_MAX,
        "model.layers",
        format!("the model has about {parameters} parameters, more than {PARAMETERS_MAX}"),
        "choose a smaller model",
    );
    let heads = model.heads.max(1);
    findings.require(
        model.heads > 0
            && model.hidden_size.is_multiple_of(heads)
            && (model.hidden_size / heads).is_multiple_of(2),
        "model.heads",
        format!(
            "hidden_size = {} does not split into {} heads of even size",
            model.hidden_size, model.heads
        ),
        "choose heads so that hidden_size / heads is a whole even number",
    );
    findings.require(
        model.key_value_heads > 0 && model.heads.is_multiple_of(model.key_value_heads.max(1)),
        "model.key_value_heads",
        format!("{} does not divide heads = {}", model.key_value_heads, model.heads),
        "choose a divisor of heads",
    );
    findings.positive("model.rope_theta", model.rope_theta);
    findings.positive("model.norm_epsilon", model.norm_epsilon);
}

fn check_training(training: &Training, findings: &mut Findings) {
    findings.within("training.steps_per_round", training.steps_per_round.into(), 1, 100_000);
    findings.within("training.batch_sequences", training.batch_sequences.into(), 1, 1 << 20);
    findings.require(
        (1..=training.batch_sequences.max(1)).contains(&training.micro_batch_sequences),
        "training.micro_batch_sequences",
        format!(
            "{} is not between 1 and batch_sequences = {}",
            training.micro_batch_sequences, training.batch_sequences
        ),
        "lower micro_batch_sequences or raise batch_sequences",
    );
    findings.positive("training.learning_rate", training.learning_rate);
    findings.share("training.learning_rate_final_share", training.learning_rate_final_share, false);
    findings.require(
        training.decay_steps == 0 || training.decay_steps > training.warmup_steps,
        "training.decay_steps",
        format!("{} ends before warmup_steps = {}", training.decay_steps, training.warmup_steps),
        "raise decay_steps, or set it to 0 to decay over the whole run",
    );
    for (field, beta) in [("training.beta1", training.beta1), ("training.beta2", training.beta2)] {
        let problem = format!("{beta} is not below 1");
        findings.require((0.0..1.0).contains(&beta), field, problem, "choose from 0 to below 1");
    }
    findings.positive("training.epsilon", training.epsilon);
    findings.share("training.weight_decay", training.weight_decay, false);
    findings.positive("training.gradient_clip", training.gradient_clip);
}

fn check_merge(codec: &Codec, aggregation: &Aggregation, findings: &mut Findings) {
    findings.require(
        codec.profile != Profile::Flat12,
        "codec.profile",
        "no chunk of a flat12 update can be checked alone, so nobody could be held to it"
            .to_owned(),
        "choose standard",
    );
    findings.require(
        aggregation.broadcast != Profile::Flat12,
        "aggregation.broadcast",
        "flat12 cannot be merged slice by slice".to_owned(),
        "choose wide",
    );
    let rules = &aggregation.rules;
    let is_named_twice = rules.iter().enumerate().any(|(at, rule)| rules[..at].contains(rule));
    findings.require(
        !is_named_twice,
        "aggregation.rules",
        "a rule is named twice, and would hold everybody back twice".to_owned(),
        "name each rule once",
    );
    findings.share("codec.error_decay", codec.error_decay.into(), false);
    for (field, rate) in [
        ("aggregation.outer_learning_rate", aggregation.outer_learning_rate),
        ("aggregation.outer_learning_rate_final", aggregation.outer_learning_rate_final),
    ] {
        findings.require(
            rate > 0.0 && rate <= OUTER_LEARNING_RATE_MAX,
            field,
            format!("{rate} is out of range"),
            &format!("choose a number above 0 and at most {OUTER_LEARNING_RATE_MAX}"),
        );
    }
}

fn check_round(round: &RoundTimes, findings: &mut Findings) {
    const DAY_MS: u64 = 86_400_000;
    findings.within("round.commit_ms", round.commit_ms, 100, DAY_MS);
    findings.within("round.upload_ms", round.upload_ms, 100, DAY_MS);
    findings.within("round.check_ms", round.check_ms, 100, DAY_MS);
    findings.within("round.sync_ms", round.sync_ms, 100, DAY_MS);
    findings.within("round.silence_ms", round.silence_ms, 1_000, DAY_MS);
}

/// Honest bf16 rounds came out up to .0052 apart between CPUs, and .034 between a CPU and a GPU.
const BF16_DISTANCE_MIN: f64 = 0.01;

fn check_verification(verification: &Verification, precision: Precision, findings: &mut Findings) {
    findings.within(
        "verification.audit_rate_per_mille",
        verification.audit_rate_per_mille.into(),
        0,
        1_000,
    );
    findings.within(
        "verification.recheck_per_mille",
        verification.recheck_per_mille.into(),
        0,
        1_000,
    );
    findings.within("verification.codec_chunks", verification.codec_chunks.into(), 1, 1_024);
    findings.within("verification.replay_chunks", verification.replay_chunks.into(), 1, 65_536);
    findings.within(
        "verification.evaluate_every_rounds",
        verification.evaluate_every_rounds.into(),
        1,
        1_000_000,
    );
    for (field, distance_max) in [
        ("verification.delta_distance_max", verification.delta_distance_max),
        ("verification.same_kind_delta_distance_max", verification.same_kind_delta_distance_max),
    ] {
        findings.share(field, distance_max, true);
        findings.require(
            precision == Precision::F32 || distance_max >= BF16_DISTANCE_MIN,
            field,
            format!("{distance_max} is below what honest bf16 training differs by"),
            "choose 0.02 for the same kind of device and 0.1 for another, or training.precision = \"f32\"",
        );
    }
    findings.share(
        "verification.first_moment_distance_max",
        verification.first_moment_distance_max,
        true,
    );
    findings.share(
        "verification.second_moment_distance_max",
        verification.second_moment_distance_max,
        true,
    );
}

fn check_chain(chain: &Chain, run: &Run, findings: &mut Findings) {
    findings.within("chain.slash_per_mille", chain.slash_per_mille.into(), 0, 1_000);
    findings.within(
        "chain.withheld_slash_per_mille",
        chain.withheld_slash_per_mille.into(),
        0,
        1_000,
    );
    findings.within(
        "chain.reporter_share_per_mille",
        chain.reporter_share_per_mille.into(),
        0,
        1_000,
    );
    findings.within("chain.fault_quorum", chain.fault_quorum.into(), 1, 64);
    findings.within(
        "chain.challenge_window_blocks",
        chain.challenge_window_blocks.into(),
        1,
        1 << 24,
    );
    findings.within("chain.contest_window_blocks", chain.contest_window_blocks.into(), 1, 1 << 24);
    findings.require(
        chain.vesting_rounds <= run.evidence_rounds,
        "chain.vesting_rounds",
        format!(
            "rewards vest for {} rounds but evidence is kept for {}",
            chain.vesting_rounds, run.evidence_rounds
        ),
        "raise run.evidence_rounds or lower chain.vesting_rounds",
    );
}

#[cfg(test)]
mod tests {
    use super::super::*;

    const GOOD: &str = r#"
[run]
name = "tiny"
rounds = 3

[model]
vocabulary_size = 512
hidden_size = 32
layers = 2
heads = 4
key_value_heads = 2
feed_forward_size = 64
context_length = 32

[training]
steps_per_round = 4
batch_sequences = 4
micro_batch_sequences = 2
learning_rate = 1e-3

[data]
dataset = "data"
"#;

    fn data() -> DataSet {
        DataSet {
            manifest: Digest::of(b"manifest"),
            train_sequences: 10,
            held_out_sequences: 2,
            theta: Digest::of(b"theta"),
            theta_is_given: false,
        }
    }

    #[test]
    fn a_short_file_is_enough_and_its_specification_has_one_canonical_form() {
        let spec = RunFile::parse(GOOD).expect("a good file").resolve(data());
        let bytes = spec.canonical_bytes();
        assert_eq!(RunSpec::parse(&bytes).expect("parses"), spec);
        let mut spaced = bytes.clone();
        spaced.push(b' ');
        assert!(matches!(RunSpec::parse(&spaced), Err(RunSpecError::NotCanonical)));
    }

    #[test]
    fn deadlines_are_shares_of_the_runs_own_clock() {
        let times = |section: &str| {
            let text = format!("{GOOD}\n[round]\n{section}\n");
            let RoundTimes { commit_ms, upload_ms, check_ms, sync_ms, .. } =
                RunFile::parse(&text).expect("a good file").round;
            [commit_ms, upload_ms, check_ms, sync_ms]
        };
        assert_eq!(times(""), [120_000, 40_000, 120_000, 60_000]);
        assert_eq!(times("commit_ms = 3_600_000"), [3_600_000, 1_200_000, 3_600_000, 1_800_000]);
        assert_eq!(times("commit_ms = 900\ncheck_ms = 500"), [900, 300, 500, 450]);
        assert_eq!(times("commit_ms = 150"), [150, 100, 150, 100]);
    }

    #[test]
    fn a_missing_section_or_field_is_named_with_where_to_add_it() {
        let remedy = |left_out: &str| {
            let error = RunFile::parse(&GOOD.replace(left_out, "")).expect_err("it is missing");
            (error.problems[0].field.clone(), error.problems[0].remedy.clone())
        };
        let found = |field: &str, remedy: &str| (field.to_owned(), remedy.to_owned());
        let section = remedy("[data]\ndataset = \"data\"\n");
        assert_eq!(section, found("data", "add a section of that name"));
        assert_eq!(remedy("layers = 2\n"), found("layers", "add it to this section"));
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line_and_a_remedy() {
        let text = GOOD.replace("layers = 2", "layers = 2\nlayer_count = 2");
        let error = RunFile::parse(&text).expect_err("unknown field");
        assert_eq!(error.problems[0].line, Some(10));
        assert_eq!(error.problems[0].field, "layer_count");
        assert!(error.problems[0].remedy.contains("remove"), "{error}");
    }

    #[test]
    fn every_contradiction_is_named_with_its_line_and_a_remedy() {
        let text = GOOD.replace("heads = 4", "heads = 5").replace("rounds = 3", "rounds = 0");
        let error = RunFile::parse(&text).expect_err("contradictions");
        let found: Vec<_> = error.problems.iter().map(|p| (p.line, p.field.as_str())).collect();
        assert_eq!(
            found,
            [
                (Some(4), "run.rounds"),
                (Some(10), "model.heads"),
                (Some(11), "model.key_value_heads")
            ],
        );
        assert!(error.problems.iter().all(|problem| !problem.remedy.is_empty()));
    }

    #[test]
    fn a_threshold_that_honest_bf16_cannot_keep_is_refused() {
        let text = GOOD.replace("[training]", "[training]\nprecision = \"bf16\"");
        let error = RunFile::parse(&text).expect_err("the default threshold is for f32");
        let fields: Vec<_> = error.problems.iter().map(|problem| problem.field.as_str()).collect();
        let both = ["verification.delta_distance_max", "verification.same_kind_delta_distance_max"];
        assert_eq!(fields, both);
        let text = text
            + "\n[verification]\ndelta_distance_max = 0.1\nsame_kind_delta_distance_max = 0.02\n";
        assert!(RunFile::parse(&text).is_ok());
    }

    #[test]
    fn a_merge_that_cannot_be_is_refused() {
        let refused = |section: &str, run: &str| {
            let text = GOOD.replace("rounds = 3", &format!("rounds = 3\n{run}"));
            let error = RunFile::parse(&(text + section)).expect_err("it cannot be merged");
            error.problems[0].field.clone()
        };
        let aggregation = |field: &str| refused(&format!("\n[aggregation]\n{field}\n"), "");
        assert_eq!(aggregation("outer_learning_rate = 0.0"), "aggregation.outer_learning_rate");
        let rate = aggregation("outer_learning_rate_final = 10.5");
        assert_eq!(rate, "aggregation.outer_learning_rate_final");
        assert_eq!(aggregation("broadcast = \"flat12\""), "aggregation.broadcast");
        assert_eq!(refused("", "workers_max = 1_025"), "run.workers_max");
        let without = GOOD.replace("rounds = 3", "rounds = 3\nworkers_max = 1_025");
        assert!(RunFile::parse(&(without + "\n[aggregation]\nrules = []\n")).is_ok());
    }

    #[test]
    fn a_specification_from_a_peer_is_checked_like_a_file() {
        let mut spec = RunFile::parse(GOOD).expect("a good file").resolve(data());
        spec.training.micro_batch_sequences = 0;
        assert!(matches!(
            RunSpec::parse(&spec.canonical_bytes()),
            Err(RunSpecError::Contradiction(_))
        ));
    }
}
