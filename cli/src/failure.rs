//! Why a command did not do what it was asked: a code for programs, a reason and a remedy for people.

use std::fmt::Display;

use manyhands_chain_client::{ConnectError, FaucetError, ReadError, SubmitError};
use serde::Serialize;
use serde_json::{Map, Value};

/// What every refusal of every command is rendered from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Failure {
    /// Stable, for programs.
    pub(crate) code: String,
    /// In plain words, with what was expected and what came.
    pub(crate) reason: String,
    pub(crate) remedy: String,
    /// What was found before it failed: printed beside it where programs read.
    #[serde(skip)]
    pub(crate) document: Option<Box<Map<String, Value>>>,
}

impl Failure {
    pub(crate) fn new(code: &str, reason: impl Display, remedy: &str) -> Self {
        let (code, reason, remedy) = (code.to_owned(), reason.to_string(), remedy.to_owned());
        Self { code, reason, remedy, document: None }
    }

    pub(crate) fn with_document(self, document: Value) -> Self {
        let Value::Object(fields) = document else { return self };
        Self { document: Some(Box::new(fields)), ..self }
    }
}

/// Gives the errors of an operation a code and a remedy.
pub(crate) trait Explain<T> {
    fn explain(self, code: &str, remedy: &str) -> Result<T, Failure>;
}

impl<T, E: Display> Explain<T> for Result<T, E> {
    fn explain(self, code: &str, remedy: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(code, error, remedy))
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let (code, remedy) = match &error {
            ConnectError::Address { .. } => ("chain_address", "write it as ws://host:port"),
            ConnectError::Unreachable { .. } => (
                "chain_unreachable",
                "start one with `manyhands devnet`, or name another with --chain",
            ),
            ConnectError::OtherRuntime { .. } => {
                ("chain_version", "build this program and the chain from the same version")
            }
            ConnectError::Node { .. } => ("chain_answer", "name another node with --chain"),
        };
        Self::new(code, error, remedy)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::new("chain_read", error, "try again, or name another node with --chain")
    }
}

impl From<SubmitError> for Failure {
    fn from(error: SubmitError) -> Self {
        let (code, remedy) = match &error {
            SubmitError::Failed { .. } | SubmitError::Refused { .. } => {
                ("chain_refused", "the reason names what the chain expects")
            }
            SubmitError::MissingMoney { .. } => (
                "account_empty",
                "send money to this account; on a development chain: `manyhands keys fund`",
            ),
            SubmitError::NodeBehind { .. } => ("chain_behind", "wait until the node has caught up"),
            SubmitError::TimedOut { .. } => ("chain_slow", "look at the state before trying again"),
            SubmitError::KeyInUse { .. } => {
                ("key_in_use", "stop the other program that uses this key")
            }
            SubmitError::Read(_) => ("chain_read", "try again, or name another node with --chain"),
        };
        Self::new(code, error, remedy)
    }
}

impl From<FaucetError> for Failure {
    fn from(error: FaucetError) -> Self {
        match error {
            FaucetError::Read(error) => error.into(),
            FaucetError::Submit(error) => error.into(),
            FaucetError::NotDevelopment { .. } => {
                Self::new("no_faucet", error, "send money to this account from another")
            }
        }
    }
}
