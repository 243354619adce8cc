//! A worker that cheats, to see it caught: it trains the first fifth of its steps and stretches what came of
//! them to the length of an honest update. Everything else it does as it should, with the same library.
//!
//! ```text
//! manyhands demo --extra-worker target/debug/cheating-worker
//! cheating-worker ADDRESS --dir DIR
//! ```
//!
//! It takes the arguments of `manyhands join` that it needs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Parser;
use manyhands_model::device::DeviceChoice;
use manyhands_model::{
    Control, LocalTrainer, Progress, TrainError, TrainOutcome, TrainTask, Trainer,
};
use manyhands_network::Multiaddr;
use manyhands_network::invitation::Invitation;
use manyhands_proto::TokenCount;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::Role;
use manyhands_proto::run_file::RunSpec;
use manyhands_rules::worker::Exit;
use manyhands_worker::{Trainers, WorkerConfig};
use tokio::sync::watch;

/// The share of the steps that is really trained is one over this.
const LAZINESS: usize = 5;

/// Work for a run, and cheat.
#[derive(Debug, Parser)]
struct Arguments {
    /// The invitation that `manyhands launch` printed.
    address: Invitation,
    /// Folder of this node.
    #[arg(long)]
    dir: PathBuf,
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
    println!("{} will cheat", key.node_id());
    let control: Multiaddr = match arguments.listen {
        SocketAddr::V4(address) => format!("/ip4/{}/udp/0/quic-v1", address.ip()).parse()?,
        SocketAddr::V6(address) => format!("/ip6/{}/udp/0/quic-v1", address.ip()).parse()?,
    };
    let config = WorkerConfig {
        folder: arguments.dir,
        key,
        invitation: arguments.address,
        role: Role::Worker,
        device: DeviceChoice::Cpu,
        threads: arguments.threads,
        load_max: 1.0,
        control_listen: vec![control],
        data_listen: arguments.listen,
        mdns: false,
        store_bytes_max: 4 << 30,
        chain_url: arguments.chain,
        stake: None,
        trainers: Some(lazy_trainers()),
        on_event: Arc::new(|event| println!("{event:?}")),
    };
    let (_stop, stopping) = watch::channel(false);
    match manyhands_worker::run(config, stopping).await.context("cannot take part")? {
        Exit::Refused(refusal) => bail!("caught: {}", refusal.reason),
        exit @ (Exit::Complete { .. } | Exit::Left) => println!("not caught: {exit:?}"),
    }
    Ok(())
}

fn lazy_trainers() -> Trainers {
    Box::new(|spec: &RunSpec, source, device| {
        let context = source.context_length();
        let trainer =
            LocalTrainer::new(&spec.model, &spec.training, spec.total_steps(), source, device);
        let honest = trainer.expect("the size of a run's model was checked when it was read");
        Box::new(LazyTrainer { honest, context })
    })
}

/// Does a fifth of the work and claims all of it.
struct LazyTrainer {
    honest: LocalTrainer,
    /// Targets of a sequence.
    context: u32,
}

impl Trainer for LazyTrainer {
    fn train(
        &mut self,
        task: &TrainTask<'_>,
        progress: &mut dyn FnMut(Progress) -> Control,
    ) -> Result<TrainOutcome, TrainError> {
        let steps = task.batches.len().div_ceil(LAZINESS);
        let lazy = TrainTask { batches: &task.batches[..steps], ..task.clone() };
        let mut outcome = self.honest.train(&lazy, progress)?;

        // As if the other steps had gone on in the same direction.
        let stretch = task.batches.len() as f32 / steps as f32;
        for (end, start) in outcome.theta.iter_mut().zip(task.theta) {
            *end = start + (*end - start) * stretch;
        }
        let sequences: usize = task.batches.iter().map(Vec::len).sum();
        outcome.tokens = TokenCount(sequences as u64 * u64::from(self.context));
        outcome.adam_step += (task.batches.len() - steps) as u64;
        Ok(outcome)
    }
}
