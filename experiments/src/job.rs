//! One experiment, from where it stands to its result.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use manyhands_model::Device;

use crate::checkpoint::Checkpoint;
use crate::cluster::{Cluster, ClusterState, RoundFigures, Text};
use crate::experiment::Experiment;
use crate::result::{ExperimentResult, Origin, Point};

/// What experiments train on, and where they are kept.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) text: Text,
    pub(crate) device: Device,
    pub(crate) origin: Origin,
    /// Checkpoints.
    pub(crate) work: PathBuf,
    pub(crate) results: PathBuf,
}

impl Place {
    pub(crate) fn open(
        text: &Path,
        device: Device,
        work: PathBuf,
        results: PathBuf,
    ) -> anyhow::Result<Self> {
        let text = Text::open(text)?;
        Ok(Self { origin: Origin::of(&text, device)?, text, device, work, results })
    }

    /// As `--device` has it.
    pub(crate) fn device_name(&self) -> String {
        match self.device {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda(index) => format!("cuda:{index}"),
            Device::Mps | Device::Vulkan => "mps".to_owned(),
        }
    }
}

/// Held-out sequences of one evaluation: the same for all, so losses are paired.
pub(crate) const HELD_OUT_SEQUENCES: u64 = 1024;
/// Evaluations in a run.
const POINTS: u32 = 10;
/// Checkpoints are not closer together; they are written where an evaluation is.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// Runs an experiment to its end and keeps the result; `tell` is told how far it is.
pub(crate) fn run(
    experiment: &Experiment,
    place: &Place,
    tell: &mut dyn FnMut(&Point),
) -> anyhow::Result<ExperimentResult> {
    match ExperimentResult::find(&place.results, experiment, &place.origin)? {
        Some(found) => Ok(found),
        None => Ok(train(experiment, place, tell)?.0),
    }
}

/// Where an experiment ended. It is kept beside the checkpoints, and trained again where it is not there.
pub(crate) fn final_state(
    experiment: &Experiment,
    place: &Place,
    tell: &mut dyn FnMut(&Point),
) -> anyhow::Result<ClusterState> {
    let path = end_path(place, &experiment.name);
    if let Some(end) = Checkpoint::load(&path)?.filter(|it| it.belongs_to(experiment, place)) {
        return Ok(end.state);
    }
    let (ExperimentResult { origin, points, seconds, .. }, state) = train(experiment, place, tell)?;
    let end = Checkpoint { experiment: experiment.clone(), origin, points, seconds, state };
    end.save(&path)?;
    Ok(end.state)
}

/// Whether its end is there for experiments that start with it.
pub(crate) fn has_end(experiment: &Experiment, place: &Place) -> anyhow::Result<bool> {
    let end = Checkpoint::load(&end_path(place, &experiment.name))?;
    Ok(end.is_some_and(|end| end.belongs_to(experiment, place)))
}

fn train(
    experiment: &Experiment,
    place: &Place,
    tell: &mut dyn FnMut(&Point),
) -> anyhow::Result<(ExperimentResult, ClusterState)> {
    let path = checkpoint_path(place, &experiment.name);
    std::fs::create_dir_all(path.parent().context("a checkpoint lies in a folder")?)?;
    let start = match &experiment.start {
        Some(start) => Some(final_state(start, place, &mut |_| {})?),
        None => None,
    };
    let mut cluster = Cluster::new(experiment, &place.text, place.device, start)?;
    let (mut points, mut seconds) = (Vec::new(), 0.0);
    let begun = Checkpoint::load(&path)?.filter(|begun| begun.belongs_to(experiment, place));
    if let Some(begun) = begun {
        (points, seconds) = (begun.points, begun.seconds);
        cluster.resume(begun.state);
    }
    let mut saved = Instant::now();
    let mut since_point: Vec<RoundFigures> = Vec::new();
    while cluster.state().round < experiment.rounds {
        let began = Instant::now();
        since_point.push(cluster.step()?);
        seconds += began.elapsed().as_secs_f64();
        let rounds = cluster.state().round;
        let every = experiment.rounds.div_ceil(POINTS);
        if !rounds.is_multiple_of(every) && rounds != experiment.rounds {
            continue;
        }
        let point =
            point(experiment, rounds, &since_point, cluster.held_out_loss(HELD_OUT_SEQUENCES)?);
        since_point.clear();
        tell(&point);
        points.push(point);
        // Only where a point is: what the means are over is then not lost.
        if saved.elapsed() > SAVE_EVERY {
            let state = cluster.state().clone();
            let experiment = experiment.clone();
            let (origin, points) = (place.origin.clone(), points.clone());
            Checkpoint { experiment, origin, points, seconds, state }.save(&path)?;
            saved = Instant::now();
        }
    }
    let last = points.last().context("an experiment has at least one round")?;
    let mean = |of: fn(&Point) -> f64| {
        let mut before = 0;
        let mut sum = 0.0;
        for point in &points {
            sum += of(point) * f64::from(point.rounds - before);
            before = point.rounds;
        }
        sum / f64::from(experiment.rounds)
    };
    let result = ExperimentResult {
        experiment: experiment.clone(),
        origin: place.origin.clone(),
        parameters: cluster.layout().parameter_count().0,
        held_out_loss: last.held_out_loss,
        bits_up: mean(|point| point.bits_up),
        bits_down: mean(|point| point.bits_down),
        seconds,
        points,
    };
    result.save(&place.results)?;
    remove_if_there(&path)?;
    Ok((result, cluster.into_state()))
}

fn point(
    experiment: &Experiment,
    rounds: u32,
    since: &[RoundFigures],
    held_out_loss: f64,
) -> Point {
    let mean =
        |of: fn(&RoundFigures) -> f64| since.iter().map(of).sum::<f64>() / since.len() as f64;
    Point {
        rounds,
        tokens: u64::from(rounds) * experiment.tokens_per_round(),
        train_loss: mean(|it| it.train_loss),
        held_out_loss,
        bits_up: mean(|it| it.bits_up),
        bits_down: mean(|it| it.bits_down),
    }
}

fn checkpoint_path(place: &Place, name: &str) -> PathBuf {
    place.work.join(format!("{name}.checkpoint"))
}

fn end_path(place: &Place, name: &str) -> PathBuf {
    place.work.join(format!("{name}.end"))
}

fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use manyhands_model::data::{PrepareOptions, SourceSet, TokenizerChoice, prepare};
    use tempfile::TempDir;

    use super::*;
    use crate::plan;

    /// This repository's own sources, prepared.
    fn place() -> (TempDir, Place) {
        let folder = tempfile::tempdir().expect("a folder");
        let own = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = [own.join("src"), own.join("../docs"), own.join("../gradient/src")];
        let extensions = ["rs", "md"].map(str::to_owned);
        let options = PrepareOptions {
            sources: SourceSet::find(&text, &extensions, "text").expect("sources"),
            tokenizer: TokenizerChoice::Train { vocabulary_size: 400, sample_bytes_max: 1 << 17 },
            folder: folder.path().join("text"),
            held_out_per_mille: 200,
            shard_tokens: 1 << 16,
            text_bytes_max: None,
        };
        prepare(&options, &mut |_| {}).expect("it is text");
        let [work, results] = ["work", "results"].map(|name| folder.path().join(name));
        let place = Place::open(&options.folder, Device::Cpu, work, results).expect("text");
        (folder, place)
    }

    #[test]
    fn every_method_learns_something_and_is_not_run_twice() {
        let (_folder, place) = place();
        for experiment in plan::short() {
            let mut told = 0;
            let mut tell = |_: &Point| told += 1;
            let result = run(&experiment, &place, &mut tell).expect("it runs");
            let begun = result.points[0];
            let name = &experiment.name;
            // Liars may keep a model from learning; log V is what it knows at first.
            let known = f64::from(experiment.model.vocabulary_size).ln();
            let learnt = result.held_out_loss < known - 0.5;
            assert!(learnt || experiment.liars.is_some(), "{name}: {}", result.held_out_loss);
            assert!(begun.bits_up > 0.0 && begun.bits_down > 0.0, "{name}");
            assert_eq!(run(&experiment, &place, &mut tell).expect("it is there"), result);
            assert_eq!(told, experiment.rounds, "{name}");
        }
    }

    #[test]
    fn an_interrupted_experiment_ends_as_if_it_had_not_been() {
        let (_folder, place) = place();
        for experiment in plan::short() {
            let whole = run(&experiment, &place, &mut |_| {}).expect("it runs");
            let start = experiment.start.as_deref();
            let start = start.map(|it| final_state(it, &place, &mut |_| {}).expect("its end"));
            let mut cluster =
                Cluster::new(&experiment, &place.text, place.device, start).expect("a cluster");
            let figures = cluster.step().expect("a round");
            let loss = cluster.held_out_loss(HELD_OUT_SEQUENCES).expect("a loss");
            let begun = Checkpoint {
                experiment: experiment.clone(),
                origin: place.origin.clone(),
                points: vec![point(&experiment, 1, &[figures], loss)],
                seconds: 1.0,
                state: cluster.state().clone(),
            };
            let elsewhere = Place { results: place.work.join("other"), ..place.clone() };
            let path = checkpoint_path(&elsewhere, &experiment.name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            begun.save(&path).expect("it is kept");
            let resumed = run(&experiment, &elsewhere, &mut |_| {}).expect("it goes on");
            assert_eq!(resumed.points, whole.points, "{}", experiment.name);
            assert!(!path.exists(), "what is done needs no checkpoint");
        }
    }
}
