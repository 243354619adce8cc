//! A coordinator in a folder, and the peers around it.

use std::path::Path;
use std::time::Duration;

use manyhands_coordinator::{CoordinatorConfig, Handle, LaunchOrder, LiveStatus, launch, start};
use manyhands_gradient::{Layout, initial_theta, vector};
use manyhands_network::invitation::Invitation;
use manyhands_proto::Digest;
use manyhands_proto::message::Role;
use manyhands_proto::run_file::{DataSet, RunFile, RunSpec};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::peer::{Conduct, Ended, Peer, Place, Told, key};

const COORDINATOR: u8 = 100;

pub(crate) struct World {
    folder: TempDir,
    pub(crate) spec: RunSpec,
    pub(crate) coordinator: Option<Handle>,
    invitations: watch::Sender<Invitation>,
    told: mpsc::Sender<Told>,
    telling: mpsc::Receiver<Told>,
}

/// Fails instead of hanging.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(60), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} took more than a minute"),
    }
}

pub(crate) fn run_file() -> RunFile {
    let text = r#"
        [run]
        name = "noise"
        rounds = 2
        workers_min = 2
        [model]
        vocabulary_size = 300
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
        [verification]
        verifiers_min = 1
        [chain]
        kind = "none"
    "#;
    RunFile::parse(text).expect("a good file")
}

pub(crate) fn order(folder: &Path, file: RunFile) -> LaunchOrder {
    let layout = Layout::of(&file.model).expect("layout");
    let theta = initial_theta(&layout, &file.model, file.run.seed);
    LaunchOrder {
        folder: folder.to_owned(),
        key: key(COORDINATOR),
        data: DataSet {
            manifest: Digest::of(b"manifest"),
            train_sequences: 10_000,
            held_out_sequences: 2,
            theta: vector::digest(&theta),
            theta_is_given: false,
        },
        file,
        served: Vec::new(),
        chain_url: None,
    }
}

impl World {
    pub(crate) async fn new(file: RunFile) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let launched = launch(order(folder.path(), file)).await.expect("launched");
        assert!(!launched.resumed);
        let spec = launched.manifest.spec.clone();
        let config =
            CoordinatorConfig::new(folder.path().to_owned(), key(COORDINATOR), launched.manifest);
        let coordinator = within("the start", start(config)).await.expect("started");
        let invitation = coordinator.invitation().parse().expect("an invitation");
        let (told, telling) = mpsc::channel(64);
        Self {
            folder,
            spec,
            coordinator: Some(coordinator),
            invitations: watch::Sender::new(invitation),
            told,
            telling,
        }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.coordinator.as_ref().expect("the coordinator runs")
    }

    pub(crate) async fn status(&self) -> LiveStatus {
        self.handle().status().await.expect("the coordinator runs")
    }

    pub(crate) async fn peer(&self, seed: u8, role: Role, conduct: Conduct) -> Peer {
        self.gated_peer(seed, role, conduct, watch::channel(true).1).await
    }

    pub(crate) async fn gated_peer(
        &self,
        seed: u8,
        role: Role,
        conduct: Conduct,
        gate: watch::Receiver<bool>,
    ) -> Peer {
        let place = Place {
            spec: self.spec.clone(),
            invitations: self.invitations.subscribe(),
            gate,
            told: self.told.clone(),
        };
        Peer::start(seed, role, conduct, place).await
    }

    pub(crate) async fn join(&self, seed: u8, role: Role, conduct: Conduct) -> JoinHandle<Ended> {
        tokio::spawn(self.peer(seed, role, conduct).await.run())
    }

    /// What a peer tells next.
    pub(crate) async fn told(&mut self) -> Told {
        within("a peer's news", self.telling.recv()).await.expect("peers run")
    }

    /// As `kill -9`: nothing is said, nothing is flushed.
    pub(crate) fn kill(&mut self) {
        drop(self.coordinator.take());
    }

    /// Starts the coordinator with the same folder. A killed one may hold its files for a moment.
    pub(crate) async fn restart(&mut self) {
        let launched = launch(order(self.folder.path(), run_file())).await.expect("the same run");
        assert!(launched.resumed);
        let folder = self.folder.path().to_owned();
        let config = CoordinatorConfig::new(folder, key(COORDINATOR), launched.manifest);
        let restarting = async {
            loop {
                match start(config.clone()).await {
                    Ok(handle) => return handle,
                    Err(error) => {
                        let in_use = error.to_string().contains("another coordinator uses");
                        assert!(in_use, "{error}");
                        tokio::task::yield_now().await;
                    }
                }
            }
        };
        let handle = within("the restart", restarting).await;
        let invitation = handle.invitation().parse().expect("an invitation");
        self.invitations.send_replace(invitation);
        self.coordinator = Some(handle);
    }
}
