//! `keys`: the one key of a node.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use manyhands_chain_client::ChainClient;
use manyhands_network::identity::peer_id;
use manyhands_proto::Balance;
use manyhands_proto::keys::NodeKey;
use serde::Serialize;

use super::ChainArg;
use crate::amount::Amount;
use crate::failure::Failure;
use crate::folder;
use crate::output::Output;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// Make a key. The folder must not have one.
    New(Folder),
    /// Show a key's account and peer id and, with --chain, what that chain holds for it.
    Show {
        #[command(flatten)]
        folder: Folder,
        #[command(flatten)]
        chain: ChainArg,
    },
    /// Fill the account up, on a development chain.
    Fund {
        #[command(flatten)]
        folder: Folder,
        #[command(flatten)]
        chain: ChainArg,
        /// Fill up to so many tokens.
        #[arg(long, value_name = "TOKENS", default_value = "1000")]
        amount: Amount,
    },
}

#[derive(Debug, clap::Args)]
struct Folder {
    /// The folder whose `node.key` is meant [default: $MANYHANDS_HOME/worker; a verifier's is
    /// $MANYHANDS_HOME/verifier].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Shown {
    file: PathBuf,
    account: String,
    peer_id: String,
    chain: Option<Account>,
}

#[derive(Debug, Serialize)]
struct Account {
    url: String,
    development: bool,
    free: Balance,
    held: Balance,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    match args.command {
        KeysCommand::New(folder) => new(&folder.choose()?, output),
        KeysCommand::Show { folder, chain } => show(&folder.choose()?, &chain, output).await,
        KeysCommand::Fund { folder, chain, amount } => {
            fund(&folder.choose()?, &chain, amount, output).await
        }
    }
}

impl Folder {
    fn choose(self) -> Result<PathBuf, Failure> {
        folder::choose(self.dir, "worker")
    }
}

fn new(folder: &Path, output: Output) -> Result<(), Failure> {
    let (key, made) = folder::key(folder)?;
    if !made {
        let reason = format!("{} holds a key already", folder::key_path(folder).display());
        return Err(Failure::new(
            "key_exists",
            reason,
            "show it with `manyhands keys show`, or choose another folder with --dir",
        ));
    }
    print(folder, &key, None, output);
    Ok(())
}

async fn show(folder: &Path, chain: &ChainArg, output: Output) -> Result<(), Failure> {
    let key = folder::existing_key(folder)?;
    let account = match &chain.chain {
        Some(url) => Some(account(&ChainClient::connect(url).await?, &key).await?),
        None => None,
    };
    print(folder, &key, account, output);
    Ok(())
}

async fn fund(
    folder: &Path,
    chain: &ChainArg,
    amount: Amount,
    output: Output,
) -> Result<(), Failure> {
    let key = folder::existing_key(folder)?;
    let client = ChainClient::connect(chain.url()).await?;
    client.fund_from_faucet(&key.node_id(), amount.0).await?;
    print(folder, &key, Some(account(&client, &key).await?), output);
    Ok(())
}

async fn account(chain: &ChainClient, key: &NodeKey) -> Result<Account, Failure> {
    let balance = chain.balance(&key.node_id()).await?;
    Ok(Account {
        url: chain.url().to_owned(),
        development: chain.is_development(),
        free: balance.free,
        held: balance.held,
    })
}

fn print(folder: &Path, key: &NodeKey, chain: Option<Account>, output: Output) {
    let shown = Shown {
        file: folder::key_path(folder),
        account: key.node_id().to_string(),
        peer_id: peer_id(&key.node_id()).to_string(),
        chain,
    };
    output.document(&shown, || {
        let mut text = format!(
            "key      {}\naccount  0x{}\npeer id  {}",
            shown.file.display(),
            shown.account,
            shown.peer_id
        );
        if let Some(account) = &shown.chain {
            let kind = if account.development {
                ", a development chain: its money is worthless"
            } else {
                ""
            };
            text += &format!("\nfree     {}", account.free);
            text += &format!(
                "\nheld     {} (stakes and bonds)\nchain    {}{kind}",
                account.held, account.url
            );
        }
        text
    });
}
