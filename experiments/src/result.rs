//! What came of an experiment, as it is kept in the repository.

use std::path::{Path, PathBuf};

use anyhow::Context;
use manyhands_gradient::vector;
use manyhands_model::Device;
use manyhands_proto::Digest;
use serde::{Deserialize, Serialize};

use crate::cluster::{Cluster, Text};
use crate::experiment::Experiment;
use crate::plan;

/// What a result follows from beside its experiment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Digest of the data set, as hex.
    text: String,
    /// Digest of the θ that this build makes of a tiny experiment on that text: kernels, rounding and rules show in it.
    build: String,
    /// Where models were trained, if not on the CPU. No two runs on a GPU have the same bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
}

impl Origin {
    /// The first digits of what this build is recognised by.
    pub(crate) fn build(&self) -> &str {
        self.build.get(..8).unwrap_or(&self.build)
    }

    pub(crate) fn of(text: &Text, device: Device) -> anyhow::Result<Self> {
        let mut cluster = Cluster::new(&plan::tiny(), text, Device::Cpu, None)?;
        while cluster.state().round < plan::tiny().rounds {
            cluster.step()?;
        }
        let theta = vector::to_bytes(&cluster.state().theta);
        Ok(Self {
            text: text.digest().to_string(),
            build: Digest::of(&theta).to_string(),
            device: match device {
                Device::Cpu => None,
                Device::Cuda(_) => Some("cuda".to_owned()),
                Device::Mps | Device::Vulkan => Some("mps".to_owned()),
            },
        })
    }
}

/// A finished experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExperimentResult {
    pub(crate) experiment: Experiment,
    pub(crate) origin: Origin,
    pub(crate) parameters: u64,
    /// Held-out loss at the end, nats per token.
    pub(crate) held_out_loss: f64,
    /// Means over the whole run.
    pub(crate) bits_up: f64,
    pub(crate) bits_down: f64,
    /// Of one core.
    pub(crate) seconds: f64,
    pub(crate) points: Vec<Point>,
}

/// Where a run stood after some rounds. Bits are means over the rounds since the point before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) rounds: u32,
    pub(crate) tokens: u64,
    pub(crate) train_loss: f64,
    pub(crate) held_out_loss: f64,
    pub(crate) bits_up: f64,
    pub(crate) bits_down: f64,
}

impl ExperimentResult {
    /// The result of this very experiment here, if it is there.
    pub(crate) fn find(
        folder: &Path,
        experiment: &Experiment,
        origin: &Origin,
    ) -> anyhow::Result<Option<Self>> {
        Ok(Self::load(folder, experiment)?.filter(|found| found.origin == *origin))
    }

    /// The result of this very experiment, of whatever text and build.
    pub(crate) fn load(folder: &Path, experiment: &Experiment) -> anyhow::Result<Option<Self>> {
        let path = path_of(folder, &experiment.name);
        if !path.exists() {
            return Ok(None);
        }
        let found: Self = serde_json::from_str(&std::fs::read_to_string(&path)?)
            .with_context(|| format!("{} is not a result", path.display()))?;
        Ok((found.experiment == *experiment).then_some(found))
    }

    pub(crate) fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let path = path_of(folder, &self.experiment.name);
        let parent = path.parent().context("a result lies in a folder")?;
        std::fs::create_dir_all(parent)?;
        let partial = path.with_extension("partial");
        std::fs::write(&partial, serde_json::to_string_pretty(self)? + "\n")?;
        std::fs::rename(&partial, &path).with_context(|| format!("{}", path.display()))
    }
}

fn path_of(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.json"))
}
