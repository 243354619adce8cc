//! Making a run: its specification, its id, its record on chain, and the file that a restart goes on
//! from. Every step can be repeated after a crash.

use std::io;
use std::path::{Path, PathBuf};

use manyhands_chain_client::types::{PauseReason, Run, RunState, RunTerms};
use manyhands_chain_client::{
    ChainClient, ChainState, ConnectError, FaucetError, ReadError, RunMismatch, SubmitError,
};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::run_file::{ChainKind, DataSet, RunFile, RunSpec};
use manyhands_proto::{Balance, Digest, NodeId, RunId};
use manyhands_rules::run_id::run_id;
use serde::{Deserialize, Serialize};

use crate::files::write_whole;
use crate::store::ServedFile;

const MANIFEST_FILE: &str = "run.json";

/// One token, in the chain's smallest unit.
const TOKEN: u128 = 1_000_000_000_000;
/// What an owner needs beside budget and bond: fees and the deposits of a run, in tokens, and for
/// each round in hundredths of one.
const FEES_TOKENS: u128 = 10;
const FEES_PER_ROUND: u128 = TOKEN / 100;
/// The least that is added to an escrow: the chain takes no dust.
const REFILL_MIN: Balance = Balance(TOKEN);

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
    #[error("the run of this id on chain is not this run: {0}")]
    OtherRun(#[from] RunMismatch),
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
    /// What was added to the escrow of a run that stood still for want of money: it goes on.
    pub refilled: Option<Balance>,
}

/// Money that moved while the run was made, or made to go on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Moved {
    funded: Option<Balance>,
    refilled: Option<Balance>,
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
    #[error("this very run was launched before, from another folder, and is over")]
    Over,
    #[error(
        "the run stands still on chain, its escrow lacks {missing}; account {account} has {free}, \
         it needs {needed}: send it the rest and launch again"
    )]
    Unfunded { missing: Balance, account: NodeId, free: Balance, needed: Balance },
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
    let Moved { funded, refilled } = match &chain {
        Some(chain) => {
            Register { chain, key: &key, run: &run, spec: &spec, resumed }.ensure().await?
        }
        None => Moved::default(),
    };
    let coordinator = key.node_id();
    let manifest = RunManifest { run, coordinator, chain_genesis, chain_url, spec, served };
    manifest.write(&folder)?;
    Ok(Launched { manifest, resumed, funded, refilled })
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
            let Some(on_chain) = chain.state().await?.run(&manifest.run).await? else {
                let url = chain.url().to_owned();
                return Err(ChainRefusal::NoRun { url, run: manifest.run });
            };
            on_chain.check(&manifest.coordinator, &manifest.spec)?;
            Ok(Some(chain))
        }
    }
}

/// The run's record on chain, to be made or to be made ready.
struct Register<'a> {
    chain: &'a ChainClient,
    key: &'a NodeKey,
    run: &'a RunId,
    spec: &'a RunSpec,
    resumed: bool,
}

impl Register<'_> {
    /// Makes the run on chain unless it is there, with play money if the chain gives any. If it is
    /// there and stands still for want of money, puts in what it lacks.
    async fn ensure(&self) -> Result<Moved, LaunchError> {
        let state = self.chain.state().await.map_err(ChainRefusal::from)?;
        let Some(known) = state.run(self.run).await.map_err(ChainRefusal::from)? else {
            return self.create(&state).await;
        };
        known.check(&self.key.node_id(), self.spec).map_err(ChainRefusal::from)?;
        match known.state {
            RunState::Paused(PauseReason::InsufficientFunds { required }) => {
                self.refill(&state, &known, required).await
            }
            RunState::Active
            | RunState::Paused(
                PauseReason::Owner | PauseReason::ChallengeUpheld | PauseReason::NotAttested,
            ) => Ok(Moved::default()),
            // Claims and audits still need what the folder holds.
            RunState::Closed { .. } | RunState::Settled if self.resumed => Ok(Moved::default()),
            RunState::Closed { .. } | RunState::Settled => Err(LaunchError::Over),
        }
    }

    async fn create(&self, state: &ChainState) -> Result<Moved, LaunchError> {
        let needed = owner_needs(self.spec);
        let funded =
            if self.chain.is_development() { self.fund_owner(state, needed).await? } else { None };
        let terms = RunTerms::of(self.spec);
        self.chain.create_run(self.key, self.run, terms, self.spec.chain.budget).await?;
        Ok(Moved { funded, refilled: None })
    }

    /// Puts into the escrow what the chain says that it lacks, which resumes the run.
    async fn refill(
        &self,
        state: &ChainState,
        known: &Run,
        required: Balance,
    ) -> Result<Moved, LaunchError> {
        let missing = Balance(required.0.saturating_sub(known.escrow.0));
        let development = self.chain.is_development();
        // Play money costs nobody anything: a whole budget, lest the next commit stop it again.
        let budget = if development { self.spec.chain.budget } else { Balance(0) };
        let amount = missing.max(REFILL_MIN).max(budget);
        let needed = Balance(amount.0.saturating_add(fees(self.spec)));
        let funded = if development {
            self.fund_owner(state, needed).await?
        } else {
            let account = self.key.node_id();
            let free = state.balance(&account).await.map_err(ChainRefusal::from)?.free;
            if free < needed {
                return Err(LaunchError::Unfunded { missing, account, free, needed });
            }
            None
        };
        self.chain.fund_run(self.key, self.run, amount).await?;
        // Whoever funds a run enough resumes it. This does nothing, or says why it was not enough.
        self.chain.resume_run(self.key, self.run).await?;
        tracing::info!(run = %self.run, %amount, "the run stood still for want of money and goes on");
        Ok(Moved { funded, refilled: Some(amount) })
    }

    /// Fills the owner's account up from the faucet; what it was given.
    async fn fund_owner(
        &self,
        state: &ChainState,
        needed: Balance,
    ) -> Result<Option<Balance>, LaunchError> {
        let owner = self.key.node_id();
        let before = state.balance(&owner).await.map_err(ChainRefusal::from)?.free;
        if before >= needed {
            return Ok(None);
        }
        self.chain.fund_from_faucet(&owner, needed).await?;
        Ok(Some(Balance(needed.0 - before.0)))
    }
}

/// What the owner's account should hold before launch: budget, bond, deposits and fees.
fn owner_needs(spec: &RunSpec) -> Balance {
    let terms = &spec.chain;
    Balance(terms.budget.0.saturating_add(terms.coordinator_bond.0).saturating_add(fees(spec)))
}

/// Deposits and fees of a whole run.
fn fees(spec: &RunSpec) -> u128 {
    FEES_TOKENS * TOKEN + u128::from(spec.run.rounds) * FEES_PER_ROUND
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_run;

    #[test]
    fn an_owner_needs_more_than_budget_and_bond() {
        let spec = test_run::spec();
        assert!(owner_needs(&spec).0 > spec.chain.budget.0 + spec.chain.coordinator_bond.0);
    }
}
