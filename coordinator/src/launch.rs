//! Making a run: its specification, its id, its record on chain, and the file that a restart goes on
//! from. Every step can be repeated after a crash.

use std::io;
use std::path::{Path, PathBuf};

use manyhands_chain_client::types::{RunState, RunTerms, SlashTerms};
use manyhands_chain_client::{ChainClient, ConnectError, FaucetError, ReadError, SubmitError};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::run_file::{ChainKind, DataSet, RunFile, RunSpec};
use manyhands_proto::{Balance, Digest, NodeId, RunId};
use manyhands_rules::run_id::run_id;
use serde::{Deserialize, Serialize};

use crate::files::write_whole;
use crate::store::ServedFile;

const MANIFEST_FILE: &str = "run.json";

/// Blocks without a committed round after which anybody may close the run: a week of six-second blocks.
const IDLE_TIMEOUT_BLOCKS: u32 = 100_800;
/// Blocks after the end in which rewards can be claimed: the same.
const CLAIM_WINDOW_BLOCKS: u32 = 100_800;
/// One token, in the chain's smallest unit.
const TOKEN: u128 = 1_000_000_000_000;
/// What an owner needs beside budget and bond: fees and the deposits of a run, in tokens, and for
/// each round in hundredths of one.
const FEES_TOKENS: u128 = 10;
const FEES_PER_ROUND: u128 = TOKEN / 100;

/// A run in a folder: all that a coordinator needs to go on with it, but for its key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunManifest {
    pub run: RunId,
    pub coordinator: NodeId,
    /// All zeros in a run without a chain.
    pub chain_genesis: Digest,
    pub chain_url: Option<String>,
    pub spec: RunSpec,
    /// The data set's files, on this machine.
    pub served: Vec<ServedFile>,
}

/// Why a run's folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot use {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is not a run's manifest: {source}", path.display())]
    Syntax { path: PathBuf, source: serde_json::Error },
    #[error("{} names run {got}, its specification is that of {expected}", path.display())]
    RunId { path: PathBuf, expected: RunId, got: RunId },
}

/// Why the run's chain cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChainRefusal {
    #[error(
        "this run settles on a chain: name one with --chain, start one with `manyhands devnet`, or set \
         chain.kind = \"none\""
    )]
    NoAddress,
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(
        "the chain at {url} begins with block {got}, this run was launched on {expected}: name that chain"
    )]
    OtherGenesis { url: String, expected: Digest, got: Digest },
    #[error(
        "the chain at {url} does not know run {run}: launch it there, or name the chain it is on"
    )]
    NoRun { url: String, run: RunId },
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What is to be launched.
#[derive(Debug, Clone)]
pub struct LaunchOrder {
    /// Made if it is not there.
    pub folder: PathBuf,
    /// The owner's and coordinator's.
    pub key: NodeKey,
    pub file: RunFile,
    /// What the caller found in the data set, and θ₀.
    pub data: DataSet,
    /// The data set's files.
    pub served: Vec<ServedFile>,
    pub chain_url: Option<String>,
}

/// A run that is ready to be coordinated.
#[derive(Debug, Clone)]
pub struct Launched {
    pub manifest: RunManifest,
    /// The folder held it already.
    pub resumed: bool,
    /// Play money that the owner's account was given, on a development chain.
    pub funded: Option<Balance>,
}

/// Why a run was not launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(
        "the folder {} holds the run {name:?} with another specification: choose another folder, or undo the change",
        path.display()
    )]
    AnotherRun { path: PathBuf, name: String },
    #[error("the folder {} holds a run of {expected}, the key is that of {got}", path.display())]
    AnotherOwner { path: PathBuf, expected: NodeId, got: NodeId },
    #[error(transparent)]
    Chain(#[from] ChainRefusal),
    #[error(
        "this very run was launched before and is over ({state:?}): change its name or its seed"
    )]
    Over { state: RunState },
    #[error("cannot get play money: {0}")]
    Faucet(#[from] FaucetError),
    #[error("cannot make the run on chain: {0}")]
    Submit(#[from] SubmitError),
}

impl RunManifest {
    /// The manifest in a run's folder; none if there is none.
    ///
    /// # Errors
    /// [`ManifestError`] if there is one that cannot be used.
    pub fn read(folder: &Path) -> Result<Option<Self>, ManifestError> {
        let path = folder.join(MANIFEST_FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ManifestError::Io { path, source }),
        };
        let manifest: Self = serde_json::from_slice(&bytes)
            .map_err(|source| ManifestError::Syntax { path: path.clone(), source })?;
        let digest = manifest.spec.digest();
        let expected = run_id(*manifest.chain_genesis.as_bytes(), manifest.coordinator, digest);
        if expected != manifest.run {
            return Err(ManifestError::RunId { path, expected, got: manifest.run });
        }
        Ok(Some(manifest))
    }

    fn write(&self, folder: &Path) -> Result<(), ManifestError> {
        let path = folder.join(MANIFEST_FILE);
        let json = serde_json::to_vec_pretty(self).expect("plain structs serialise");
        std::fs::create_dir_all(folder)
            .and_then(|()| write_whole(&path, &json))
            .map_err(|source| ManifestError::Io { path, source })
    }
}

/// Makes the run, or finds that the folder holds it already.
///
/// # Errors
/// [`LaunchError`]; what was done before it is not repeated by the next attempt.
pub async fn launch(order: LaunchOrder) -> Result<Launched, LaunchError> {
    let LaunchOrder { folder, key, file, data, served, chain_url } = order;
    let spec = file.resolve(data);
    let earlier = RunManifest::read(&folder)?;
    if let Some(earlier) = &earlier {
        check_same(&folder, earlier, &spec, key.node_id())?;
    }
    let resumed = earlier.is_some();
    let chain_url = chain_url.or_else(|| earlier.as_ref().and_then(|run| run.chain_url.clone()));
    let (chain, chain_url) = match spec.chain.kind {
        ChainKind::None => (None, None),
        ChainKind::Substrate => (Some(connect(chain_url.as_deref()).await?), chain_url),
    };
    let chain_genesis = chain.as_ref().map_or(Digest::new([0; 32]), ChainClient::genesis_hash);
    if let Some((earlier, chain)) = earlier.as_ref().zip(chain.as_ref()) {
        check_genesis(chain, earlier.chain_genesis)?;
    }
    let run = run_id(*chain_genesis.as_bytes(), key.node_id(), spec.digest());
    let funded = match &chain {
        Some(chain) => create(chain, &key, &run, &spec).await?,
        None => None,
    };
    let coordinator = key.node_id();
    let manifest = RunManifest { run, coordinator, chain_genesis, chain_url, spec, served };
    manifest.write(&folder)?;
    Ok(Launched { manifest, resumed, funded })
}

fn check_same(
    folder: &Path,
    earlier: &RunManifest,
    spec: &RunSpec,
    owner: NodeId,
) -> Result<(), LaunchError> {
    let path = folder.to_owned();
    if earlier.spec != *spec {
        return Err(LaunchError::AnotherRun { path, name: earlier.spec.run.name.clone() });
    }
    if earlier.coordinator != owner {
        let expected = earlier.coordinator;
        return Err(LaunchError::AnotherOwner { path, expected, got: owner });
    }
    Ok(())
}

async fn connect(url: Option<&str>) -> Result<ChainClient, ChainRefusal> {
    Ok(ChainClient::connect(url.ok_or(ChainRefusal::NoAddress)?).await?)
}

fn check_genesis(chain: &ChainClient, expected: Digest) -> Result<(), ChainRefusal> {
    let got = chain.genesis_hash();
    if got == expected {
        return Ok(());
    }
    Err(ChainRefusal::OtherGenesis { url: chain.url().to_owned(), expected, got })
}

/// The chain of a launched run, which must know it; none if it settles on no chain.
pub(crate) async fn reach_chain(
    manifest: &RunManifest,
) -> Result<Option<ChainClient>, ChainRefusal> {
    match manifest.spec.chain.kind {
        ChainKind::None => Ok(None),
        ChainKind::Substrate => {
            let chain = connect(manifest.chain_url.as_deref()).await?;
            check_genesis(&chain, manifest.chain_genesis)?;
            if chain.state().await?.run(&manifest.run).await?.is_none() {
                let url = chain.url().to_owned();
                return Err(ChainRefusal::NoRun { url, run: manifest.run });
            }
            Ok(Some(chain))
        }
    }
}

/// Makes the run on chain unless it is there, with play money if the chain gives any.
async fn create(
    chain: &ChainClient,
    key: &NodeKey,
    run: &RunId,
    spec: &RunSpec,
) -> Result<Option<Balance>, LaunchError> {
    let state = chain.state().await.map_err(ChainRefusal::from)?;
    match state.run(run).await.map_err(ChainRefusal::from)?.map(|run| run.state) {
        Some(RunState::Active | RunState::Paused(_)) => return Ok(None),
        Some(state @ (RunState::Closed { .. } | RunState::Settled)) => {
            return Err(LaunchError::Over { state });
        }
        None => {}
    }
    let mut funded = None;
    if chain.is_development() {
        let owner = key.node_id();
        let before = state.balance(&owner).await.map_err(ChainRefusal::from)?.free;
        let needed = owner_needs(spec);
        if before < needed {
            chain.fund_from_faucet(&owner, needed).await?;
            funded = Some(Balance(needed.0 - before.0));
        }
    }
    chain.create_run(key, run, run_terms(spec), spec.chain.budget).await?;
    Ok(funded)
}

/// What the owner's account should hold before launch: budget, bond, deposits and fees.
pub fn owner_needs(spec: &RunSpec) -> Balance {
    let terms = &spec.chain;
    let fees = FEES_TOKENS * TOKEN + u128::from(spec.run.rounds) * FEES_PER_ROUND;
    Balance(terms.budget.0.saturating_add(terms.coordinator_bond.0).saturating_add(fees))
}

/// The terms that the chain enforces, as they follow from the run's specification.
pub fn run_terms(spec: &RunSpec) -> RunTerms {
    let chain = &spec.chain;
    let share = |amount: Balance| Balance(amount.0 / 1_000 * u128::from(chain.slash_per_mille));
    let slash = share(chain.stake_min);
    let bond_min = chain.verifier_bond.min(chain.coordinator_bond);
    let resolution_window = chain.contest_window_blocks;
    let windows = [chain.challenge_window_blocks, chain.contest_window_blocks, resolution_window];
    RunTerms {
        config_digest: spec.digest(),
        price_per_unit: chain.price_per_work_unit,
        vesting_rounds: chain.vesting_rounds,
        challenge_window: chain.challenge_window_blocks,
        contest_window: chain.contest_window_blocks,
        resolution_window,
        claim_window: CLAIM_WINDOW_BLOCKS,
        idle_timeout: IDLE_TIMEOUT_BLOCKS,
        // A stake must still be there when the last fault of its rounds is decided.
        unbonding_period: windows.iter().fold(0, |sum: u32, window| sum.saturating_add(*window)),
        minimum_stake: chain.stake_min,
        coordinator_bond: chain.coordinator_bond,
        verifier_bond: chain.verifier_bond,
        // Enough that nobody contests for fun, little enough that everybody can.
        contest_bond: Balance(bond_min.0 / 10),
        challenge_bond: bond_min,
        verifiers: Vec::new(),
        // Rounds become final when nobody challenges them: verifiers attest nothing by default.
        attestation_quorum: 0,
        fault_quorum: chain.fault_quorum.max(1),
        slashes: SlashTerms {
            replay: slash,
            codec: slash,
            withheld: slash,
            equivocation: slash,
            coordinator: share(chain.coordinator_bond),
            reporter_share: u8::try_from(chain.reporter_share_per_mille.min(1_000) / 10)
                .unwrap_or(100),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_run;

    #[test]
    fn terms_keep_the_chains_own_limits() {
        let spec = test_run::spec();
        let terms = run_terms(&spec);
        assert_eq!(terms.config_digest, spec.digest());
        assert!(terms.slashes.replay <= terms.minimum_stake);
        assert!(terms.slashes.coordinator <= terms.coordinator_bond);
        assert!(terms.contest_bond <= terms.verifier_bond);
        let windows = terms.challenge_window + terms.contest_window + terms.resolution_window;
        assert!(terms.unbonding_period >= windows);
        assert!(owner_needs(&spec).0 > spec.chain.budget.0 + spec.chain.coordinator_bond.0);
    }
}
