//! The chain client against the embedded chain: the runtime, the devnet and subxt together.

mod connection;
mod enrol;
mod launch;
mod leave;
mod money;
mod proofs;
mod settlement;
mod verdicts;

use std::num::NonZeroU64;
use std::path::Path;

use manyhands_chain_client::types::{RunTerms, SlashTerms};
use manyhands_chain_client::{ChainClient, WorkerCard};
use manyhands_chain_devnet::{Devnet, DevnetConfig, DevnetHandle};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};
use manyhands_proto::{Balance, Digest, RunId};
use manyhands_rules::run_id::run_id;
use tempfile::TempDir;

/// One token, in the chain's smallest unit.
const UNIT: u128 = 1_000_000_000_000;
const RUN: RunId = RunId::new([42; 32]);

fn units(amount: u128) -> Balance {
    Balance(amount * UNIT)
}

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed([seed; 32])
}

async fn start(data_dir: &Path, listen: &str) -> DevnetHandle {
    let config = DevnetConfig {
        data_dir: data_dir.to_owned(),
        listen: listen.parse().expect("an address"),
        // Windows are counted in blocks: here they take milliseconds.
        block_time_ms: NonZeroU64::new(25).expect("not zero"),
    };
    Devnet::start(config).await.expect("the devnet starts")
}

/// A chain of its own, and a client.
struct Chain {
    devnet: DevnetHandle,
    client: ChainClient,
    folder: TempDir,
}

impl Chain {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let devnet = start(folder.path(), "127.0.0.1:0").await;
        let client = ChainClient::connect(devnet.url()).await.expect("it answers");
        Self { devnet, client, folder }
    }

    /// A key with money.
    async fn rich(&self, seed: u8) -> NodeKey {
        let key = key(seed);
        let funded = self.client.fund_from_faucet(&key.node_id(), units(1_000)).await;
        funded.expect("a development chain has a faucet");
        key
    }

    /// A registered worker that has joined the run.
    async fn worker(&self, seed: u8) -> NodeKey {
        let key = self.rich(seed).await;
        let card = WorkerCard { peer_id: vec![seed; 38], capability_digest: digest(seed) };
        self.client.register_worker(&key, card, units(50)).await.expect("registered");
        self.client.join_run(&key, &RUN).await.expect("joined");
        key
    }

    /// The id of the run that `owner` makes of a specification on this chain.
    fn run_id(&self, owner: &NodeKey, spec: &RunSpec) -> RunId {
        run_id(*self.client.genesis_hash().as_bytes(), owner.node_id(), spec.digest())
    }

    /// Waits until the chain has reached a block.
    async fn reach(&self, number: u32) {
        let mut blocks = self.client.watch_finalized().await.expect("it answers");
        while blocks.next().await.expect("a block").number < number {}
    }
}

fn digest(seed: u8) -> Digest {
    Digest::new([seed; 32])
}

/// Terms of a run whose windows are a few blocks.
fn terms() -> RunTerms {
    RunTerms {
        config_digest: digest(1),
        price_per_unit: Balance(UNIT / 100),
        vesting_rounds: 1,
        challenge_window: 3,
        contest_window: 3,
        resolution_window: 4,
        claim_window: 1_000,
        idle_timeout: 2_000,
        unbonding_period: 10,
        minimum_stake: units(50),
        coordinator_bond: units(10),
        verifier_bond: units(20),
        contest_bond: units(5),
        challenge_bond: units(5),
        verifiers: Vec::new(),
        attestation_quorum: 0,
        fault_quorum: 1,
        slashes: SlashTerms {
            replay: units(20),
            codec: units(20),
            withheld: units(5),
            equivocation: units(20),
            coordinator: units(10),
            reporter_share: 50,
        },
    }
}

/// A run's file with a budget of one token, that is small in every other respect too.
fn run_file(name: &str) -> RunFile {
    let text = format!(
        r#"
        [run]
        name = "{name}"
        rounds = 2
        [model]
        vocabulary_size = 512
        hidden_size = 32
        layers = 1
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
        [chain]
        budget = {UNIT}
        "#
    );
    RunFile::parse(&text).expect("a good file")
}

fn data_set() -> DataSet {
    DataSet {
        manifest: digest(1),
        train_sequences: 10_000,
        held_out_sequences: 2,
        theta: digest(2),
        theta_is_given: false,
    }
}
