//! Where an experiment stands, on disk: an interrupted one goes on from here.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, ensure};
use manyhands_gradient::moments8::Moments;
use manyhands_gradient::vector;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::cluster::{ClusterState, Worker};
use crate::experiment::Experiment;
use crate::job::Place;
use crate::result::{Origin, Point};

/// A state and what it belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoint {
    pub(crate) experiment: Experiment,
    pub(crate) origin: Origin,
    pub(crate) points: Vec<Point>,
    /// Seconds of computing so far.
    pub(crate) seconds: f64,
    pub(crate) state: ClusterState,
}

#[derive(Serialize, Deserialize)]
struct Header {
    experiment: Experiment,
    origin: Origin,
    points: Vec<Point>,
    seconds: f64,
    round: u32,
    adam_steps: Vec<u64>,
}

const HEADER: &str = "header";

impl Checkpoint {
    pub(crate) fn belongs_to(&self, experiment: &Experiment, place: &Place) -> bool {
        self.experiment == *experiment && self.origin == place.origin
    }

    /// Written beside its place and renamed: a kill leaves the one before.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let header = Header {
            experiment: self.experiment.clone(),
            origin: self.origin.clone(),
            points: self.points.clone(),
            seconds: self.seconds,
            round: self.state.round,
            adam_steps: self.state.workers.iter().map(|worker| worker.adam_step).collect(),
        };
        let mut named = vec![
            ("theta".to_owned(), vector::to_bytes(&self.state.theta)),
            ("outer".to_owned(), vector::to_bytes(&self.state.outer)),
        ];
        for (number, worker) in self.state.workers.iter().enumerate() {
            named.push((format!("error.{number}"), vector::to_bytes(&worker.error)));
            named.push((format!("first_delta.{number}"), vector::to_bytes(&worker.first)));
            if let Some(Moments { first, second }) = &worker.moments {
                named.push((format!("first.{number}"), vector::to_bytes(first)));
                named.push((format!("second.{number}"), vector::to_bytes(second)));
            }
        }
        let views = named
            .iter()
            .map(|(name, bytes)| {
                Ok((name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let metadata = HashMap::from([(HEADER.to_owned(), serde_json::to_string(&header)?)]);
        let partial = path.with_extension("partial");
        let bytes = safetensors::serialize(views, Some(metadata))?;
        std::fs::write(&partial, bytes).with_context(|| format!("{}", partial.display()))?;
        std::fs::rename(&partial, path).with_context(|| format!("{}", path.display()))
    }

    /// None if there is none.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = std::fs::read(path)?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
        let header = metadata.metadata().as_ref().and_then(|all| all.get(HEADER));
        let header = header.with_context(|| format!("{} has no header", path.display()))?;
        let header: Header = serde_json::from_str(header)?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let read = |name: &str| anyhow::Ok(vector::floats(tensors.tensor(name)?.data()));
        let workers = header
            .adam_steps
            .iter()
            .enumerate()
            .map(|(number, &adam_step)| {
                let moments = match read(&format!("first.{number}")) {
                    Ok(first) => {
                        Some(Moments { first, second: read(&format!("second.{number}"))? })
                    }
                    Err(_) => None,
                };
                let error = read(&format!("error.{number}"))?;
                Ok(Worker {
                    moments,
                    adam_step,
                    error,
                    first: read(&format!("first_delta.{number}"))?,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let (theta, outer) = (read("theta")?, read("outer")?);
        ensure!(theta.len() == outer.len(), "{} is of two models", path.display());
        let Header { experiment, origin, points, seconds, round, .. } = header;
        let state = ClusterState { round, theta, outer, workers };
        Ok(Some(Self { experiment, origin, points, seconds, state }))
    }
}
