//! A worker or verifier that cheats, to see it caught. What it claims to have trained it did not train; everything
//! else it does as it should, with the same library.
//!
//! ```text
//! manyhands demo --extra-worker target/debug/cheating-worker
//! cheating-worker ADDRESS --dir DIR --cheat other-data
//! cheating-worker ADDRESS --dir DIR --role verifier --cheat no-training
//! ```
//!
//! It takes the arguments of `manyhands join` that it needs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use manyhands_gradient::Layout;
use manyhands_gradient::moments8::Moments8;
use manyhands_model::data::{SequenceId, SequenceSource};
use manyhands_model::device::DeviceChoice;
use manyhands_model::{
    Control, Device, LocalTrainer, Progress, TrainError, TrainOutcome, TrainTask, Trainer,
};
use manyhands_network::Multiaddr;
use manyhands_network::invitation::Invitation;
use manyhands_proto::TokenCount;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::Role;
use manyhands_proto::run_file::{RunSpec, Training};
use manyhands_rules::worker::Exit;
use manyhands_worker::{WorkerConfig, WorkerEvent};
use tokio::sync::watch;

/// The share of the steps that is really trained is one over this.
const LAZINESS: usize = 5;

/// What it does instead of its work; as a verifier, instead of repeating another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Cheat {
    /// Trains a fifth of the steps and stretches what came of them to the length of an honest update.
    Stretch,
    /// Trains nine tenths of the steps.
    SkipSteps,
    /// Trains on other sequences than were assigned.
    OtherData,
    /// Takes steps a tenth longer than the run's.
    LearningRate,
    /// Trains nothing: says that the parameters are what they were.
    NoTraining,
    /// Trains nothing, and makes an update up.
    MadeUp,
    /// Trains, commits, and is gone when it is to show what it did.
    Hide,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Worker,
    Verifier,
}

/// Work for a run, and cheat.
#[derive(Debug, Parser)]
struct Arguments {
    /// The invitation that `manyhands launch` printed.
    address: Invitation,
    /// Folder of this node.
    #[arg(long)]
    dir: PathBuf,
    /// How it cheats.
    #[arg(long, value_enum, default_value = "stretch")]
    cheat: Cheat,
    /// What it takes part as.
    #[arg(long, value_enum, default_value = "worker")]
    role: Part,
    /// CPU threads of one operation.
    #[arg(long, default_value = "1")]
    threads: u32,
    /// A node of the run's chain, if the invitation names none.
    #[arg(long)]
    chain: Option<String>,
    /// Where peers reach this node.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let (key, _) = NodeKey::load_or_create(&arguments.dir.join("node.key"))?;
    let cheat = arguments.cheat;
    println!("{} will cheat: {cheat:?}", key.node_id());
    let control: Multiaddr = match arguments.listen {
        SocketAddr::V4(address) => format!("/ip4/{}/udp/0/quic-v1", address.ip()).parse()?,
        SocketAddr::V6(address) => format!("/ip6/{}/udp/0/quic-v1", address.ip()).parse()?,
    };
    let config = WorkerConfig {
        folder: arguments.dir,
        key,
        invitation: arguments.address,
        role: match arguments.role {
            Part::Worker => Role::Worker,
            Part::Verifier => Role::Verifier,
        },
        device: DeviceChoice::Cpu,
        threads: arguments.threads,
        load_max: 1.0,
        control_listen: vec![control],
        data_listen: arguments.listen,
        mdns: false,
        store_bytes_max: 4 << 30,
        chain_url: arguments.chain,
        stake: None,
        trainers: Some(Box::new(move |spec, source, device| {
            Box::new(CheatingTrainer::new(cheat, spec, source, device))
        })),
        on_event: Arc::new(move |event| {
            println!("{event:?}");
            let is_to_show =
                matches!(&event, WorkerEvent::Duty { duty } if duty.contains("serving"));
            if cheat == Cheat::Hide && is_to_show {
                std::process::exit(1);
            }
        }),
    };
    let (_stop, stopping) = watch::channel(false);
    match manyhands_worker::run(config, stopping).await.context("cannot take part")? {
        Exit::Refused(refusal) => bail!("caught: {}", refusal.reason),
        exit @ (Exit::Complete { .. } | Exit::Left) => println!("not caught: {exit:?}"),
    }
    Ok(())
}

/// The library's trainer, and what is done with it or without it.
struct CheatingTrainer {
    cheat: Cheat,
    inner: LocalTrainer,
    layout: Layout,
    /// Sequences there are.
    sequences: u64,
    /// Targets of a sequence.
    context: u32,
}

impl CheatingTrainer {
    fn new(cheat: Cheat, spec: &RunSpec, source: Arc<dyn SequenceSource>, device: Device) -> Self {
        let (context, sequences) = (source.context_length(), source.sequence_count());
        let factor = if cheat == Cheat::LearningRate { 1.1 } else { 1.0 };
        let learning_rate = factor * spec.training.learning_rate;
        let training = Training { learning_rate, ..spec.training.clone() };
        let inner = LocalTrainer::new(&spec.model, &training, spec.total_steps(), source, device);
        let inner = inner.expect("the size of a run's model was checked when it was read");
        let layout = Layout::of(&spec.model).expect("it was checked when it was read");
        Self { cheat, inner, layout, sequences, context }
    }

    /// An end that nothing was trained for.
    fn without_training(&self, task: &TrainTask<'_>, theta: Vec<f32>) -> TrainOutcome {
        TrainOutcome {
            theta,
            moments: task.moments.cloned().unwrap_or_else(|| Moments8::zero(&self.layout)),
            adam_step: task.adam_step + task.batches.len() as u64,
            tokens: self.all_tokens(task),
            losses: vec![4.0; task.batches.len()],
        }
    }

    fn all_tokens(&self, task: &TrainTask<'_>) -> TokenCount {
        let sequences: usize = task.batches.iter().map(Vec::len).sum();
        TokenCount(sequences as u64 * u64::from(self.context))
    }

    /// Trains the first `steps`, and claims all of them.
    fn train_some(
        &mut self,
        task: &TrainTask<'_>,
        steps: usize,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<TrainOutcome, TrainError> {
        let lazy = TrainTask { batches: &task.batches[..steps], ..task.clone() };
        let mut outcome = self.inner.train(&lazy, progress)?;
        outcome.tokens = self.all_tokens(task);
        outcome.adam_step += (task.batches.len() - steps) as u64;
        Ok(outcome)
    }
}

impl Trainer for CheatingTrainer {
    fn train(
        &mut self,
        task: &TrainTask<'_>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<TrainOutcome, TrainError> {
        let steps = task.batches.len();
        match self.cheat {
            Cheat::LearningRate | Cheat::Hide => self.inner.train(task, progress),
            Cheat::SkipSteps => self.train_some(task, (steps * 9 / 10).max(1), progress),
            Cheat::Stretch => {
                let trained = steps.div_ceil(LAZINESS);
                let mut outcome = self.train_some(task, trained, progress)?;
                // As if the other steps had gone on in the same direction.
                let stretch = steps as f32 / trained as f32;
                for (end, start) in outcome.theta.iter_mut().zip(task.theta) {
                    *end = start + (*end - start) * stretch;
                }
                Ok(outcome)
            }
            Cheat::OtherData => {
                let other =
                    |id: &SequenceId| SequenceId((id.0 + self.sequences / 2) % self.sequences);
                let batches: Vec<Vec<SequenceId>> =
                    task.batches.iter().map(|step| step.iter().map(other).collect()).collect();
                self.inner.train(&TrainTask { batches: &batches, ..task.clone() }, progress)
            }
            Cheat::NoTraining => Ok(self.without_training(task, task.theta.to_vec())),
            Cheat::MadeUp => {
                let mut noise = task.first_step.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                let mut theta = task.theta.to_vec();
                // What is 0 is padding.
                for value in theta.iter_mut().filter(|value| **value != 0.0) {
                    noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *value += if noise >> 63 == 0 { 1e-3 } else { -1e-3 };
                }
                Ok(self.without_training(task, theta))
            }
        }
    }
}
