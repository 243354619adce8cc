//! What a worker is told at its start, and what it tells.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use manyhands_model::Device;
use manyhands_model::data::SequenceSource;
use manyhands_model::device::DeviceChoice;
use manyhands_model::{LocalTrainer, Trainer};
use manyhands_network::Multiaddr;
use manyhands_network::control::ControlHandle;
use manyhands_network::data::{DataHandle, FileStore, Source};
use manyhands_network::invitation::Invitation;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{NumericClass, Role, Situation, Source as Address};
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round, RunId};

use crate::disk::WorkerDisk;

/// Makes the trainer of a run on a device.
pub type Trainers =
    Box<dyn Fn(&RunSpec, Arc<dyn SequenceSource>, Device) -> Box<dyn Trainer> + Send + Sync>;

/// How a node takes part in a run.
pub struct WorkerConfig {
    pub folder: PathBuf,
    pub key: NodeKey,
    pub invitation: Invitation,
    pub role: Role,
    pub device: DeviceChoice,
    /// CPU threads of one operation.
    pub threads: u32,
    /// Share of the machine's time that training may take, above 0 and at most 1.
    pub load_max: f64,
    pub control_listen: Vec<Multiaddr>,
    pub data_listen: SocketAddr,
    /// Look for the run on the local network too.
    pub mdns: bool,
    /// Bytes of disk for blobs.
    pub store_bytes_max: u64,
    /// The chain to enrol with; none in a run without one.
    pub chain_url: Option<String>,
    /// What to put down if nothing is yet; none: what the run asks for.
    pub stake: Option<manyhands_proto::Balance>,
    /// None: [`LocalTrainer`].
    pub trainers: Option<Trainers>,
    /// Told what happens, from any thread; must not block.
    pub on_event: Arc<dyn Fn(WorkerEvent) + Send + Sync>,
}

/// What happens, for whoever shows it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum WorkerEvent {
    Described {
        run: RunId,
        name: String,
        parameters: u64,
        rounds: u32,
    },
    Measured {
        class: String,
        tokens_per_second: u64,
        memory_bytes: u64,
    },
    Enrolled {
        stake: manyhands_proto::Balance,
        development: bool,
        funded: bool,
    },
    Joined {
        round: Round,
    },
    /// What the coordinator wants of this node has changed.
    Duty {
        duty: String,
    },
    Fetching {
        what: String,
        done: u64,
        total: u64,
    },
    Synced {
        round: Round,
        theta: Digest,
    },
    Training {
        round: Round,
        step: u64,
        steps: u64,
        loss: Option<f32>,
    },
    Committed {
        round: Round,
        payload_bytes: u64,
        loss: f32,
        bits_per_parameter: f64,
    },
    Replaying {
        round: Round,
        worker: NodeId,
        step: u64,
        steps: u64,
    },
    /// Where it ended is compared by the coordinator.
    Replayed {
        round: Round,
        worker: NodeId,
    },
    /// This node has objected to what it is accused of on the chain.
    Objected {
        round: Round,
    },
    /// This verifier has voted on what somebody is accused of on the chain.
    Voted {
        round: Round,
        accused: NodeId,
        guilty: bool,
        reason: String,
    },
    Evaluated {
        round: Round,
        loss: f64,
    },
    /// What these updates do to held-out loss was measured.
    Weighed {
        round: Round,
        updates: usize,
    },
    Trouble {
        text: String,
    },
}

/// What the parts of the service share.
pub(crate) struct Context {
    pub(crate) key: NodeKey,
    pub(crate) run: RunId,
    pub(crate) spec: RunSpec,
    pub(crate) coordinator: Source,
    pub(crate) control: ControlHandle,
    pub(crate) data: DataHandle,
    pub(crate) store: Arc<FileStore>,
    pub(crate) disk: WorkerDisk,
    pub(crate) folder: PathBuf,
    pub(crate) device: Device,
    pub(crate) threads: u32,
    pub(crate) class: NumericClass,
    pub(crate) load_max: f64,
    pub(crate) trainers: Option<Trainers>,
    pub(crate) chain: Option<manyhands_chain_client::ChainClient>,
    pub(crate) on_event: Arc<dyn Fn(WorkerEvent) + Send + Sync>,
}

impl Context {
    pub(crate) fn tell(&self, event: WorkerEvent) {
        (self.on_event)(event);
    }

    pub(crate) fn trouble(&self, text: String) {
        tracing::warn!("{text}");
        self.tell(WorkerEvent::Trouble { text });
    }

    pub(crate) fn trainer(&self, source: Arc<dyn SequenceSource>) -> Box<dyn Trainer> {
        match &self.trainers {
            Some(trainers) => trainers(&self.spec, source, self.device),
            None => {
                let RunSpec { model, training, .. } = &self.spec;
                let steps = self.spec.total_steps();
                let trainer = LocalTrainer::new(model, training, steps, source, self.device);
                Box::new(trainer.expect("the size of a run's model was checked when it was read"))
            }
        }
    }

    /// The coordinator, and then others that may have a blob.
    pub(crate) fn sources(&self, others: &[Address]) -> Vec<Source> {
        let others = others
            .iter()
            .map(|other| Source { peer: other.node, addresses: other.addresses.clone() });
        // Peers first: the coordinator's upload must not grow with the number of workers.
        others.chain([self.coordinator.clone()]).collect()
    }
}

/// A duty in a few words.
pub(crate) fn describe(situation: &Situation) -> String {
    use manyhands_proto::message::Duty;
    match &situation.duty {
        Duty::Gathering { workers, workers_min } => {
            format!("waiting for workers: {workers} of {workers_min} are here")
        }
        Duty::Train(assignment) => {
            format!("round {}: training on {} sequences", assignment.round, assignment.sequences)
        }
        Duty::Upload(set) => format!("round {}: serving the update", set.round),
        Duty::Wait { round, reason } => {
            use manyhands_proto::message::WaitReason;
            let what = match reason {
                WaitReason::Commitments => "others are still training",
                WaitReason::Uploads => "updates are uploaded",
                WaitReason::Checks => "updates are checked",
                WaitReason::Merge => "updates are merged",
                WaitReason::Others => "others fetch the new parameters",
                WaitReason::NextRound => "work starts with the next round",
                WaitReason::Paused => "the run is paused",
                WaitReason::Tasks => "the last audits are done",
            };
            format!("round {round}: {what}")
        }
        Duty::Sync(sync) => format!("round {}: fetching the parameters", sync.round),
        Duty::Tasks(tasks) => {
            let weigh = tasks.weigh.as_ref().map_or(0, |weigh| weigh.updates.len());
            let (replays, evaluations) = (tasks.replays.len(), tasks.evaluations.len());
            format!(
                "{replays} replays, {weigh} updates to weigh and {evaluations} evaluations to do"
            )
        }
        Duty::Complete { .. } => "the run is complete".to_owned(),
        Duty::Dismissed(refusal) => format!("dismissed: {}", refusal.reason),
    }
}
