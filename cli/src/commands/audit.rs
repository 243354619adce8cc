//! `audit`: from a run's evidence to a finalised block.

use manyhands_audit::{
    AuditOptions, AuditReport, Evidence, EvidenceError, FolderEvidence, Progress as At,
    RoundSelection, Subject, audit_run, newest_record,
};
use manyhands_chain_client::ChainClient;
use manyhands_proto::run_file::{ChainKind, RunSpec};
use manyhands_proto::{Digest, Round};

use super::RunChainArg;
use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::progress::Progress;
use crate::remote::{Blobs, Remote};
use crate::run_reference::{self, LaunchFolder, RunReference};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invitation, a file that holds it, or the folder of the run's launch.
    run: String,
    #[command(flatten)]
    chain: RunChainArg,
    /// Recompute aggregates only of these rounds, as 7 or 3..9, both included; the first is 0 [default: all].
    #[arg(long, value_name = "ROUNDS", value_parser = parse_rounds, conflicts_with = "latest")]
    rounds: Option<(u32, u32)>,
    /// Recompute aggregates only of the newest so many rounds.
    #[arg(long, value_name = "N")]
    latest: Option<u32>,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let reference = run_reference::parse(&args.run)?;
    let rounds = match (args.rounds, args.latest) {
        (Some((first, last)), _) => {
            RoundSelection::Range { first: Round(first), last: Round(last) }
        }
        (None, Some(count)) => RoundSelection::Latest(count),
        (None, None) => RoundSelection::All,
    };
    let coordinator = Some(reference.invitation.coordinator);
    let mut options = AuditOptions { rounds, newest_record: None, coordinator };
    let report = match reference.folder.clone() {
        Some(folder) => {
            let spec = LaunchFolder::read(&folder)?.spec;
            if spec.chain.kind == ChainKind::None {
                options.newest_record = newest_record(&folder.join("records"))
                    .explain("evidence", "name the folder of a run's launch")?;
            }
            let evidence = FolderEvidence::new(folder.join("blobs"));
            audit(&reference, &spec, &evidence, &args.chain, &options).await?
        }
        None => {
            let mut remote = Remote::connect(reference.invitation.clone()).await?;
            let spec = remote.describe().await?;
            let evidence = RemoteEvidence(remote.blobs());
            let report = audit(&reference, &spec, &evidence, &args.chain, &options).await;
            remote.close().await;
            report?
        }
    };
    conclude(&report, output)
}

async fn audit(
    reference: &RunReference,
    spec: &RunSpec,
    evidence: &impl Evidence,
    chain: &RunChainArg,
    options: &AuditOptions,
) -> Result<AuditReport, Failure> {
    let chain = match spec.chain.kind {
        ChainKind::None => None,
        ChainKind::Substrate => {
            let url = chain.chain.clone().or_else(|| reference.invitation.chain_url.clone());
            let Some(url) = url else {
                let reason = "the invitation names no node of the run's chain";
                return Err(Failure::new("no_chain", reason, "name one with --chain"));
            };
            Some(ChainClient::connect(&url).await?)
        }
    };
    let spec = spec.canonical_bytes();
    let subject =
        Subject { run: reference.invitation.run, spec: &spec, evidence, chain: chain.as_ref() };
    let mut progress = Progress::default();
    let mut show = |at| match at {
        At::Records { round } => tracing::debug!(%round, "read a record"),
        At::Chain => tracing::debug!("proving what the chain holds"),
        At::Rules { round, of } => {
            progress.set("recomputing decisions", u64::from(round.0) + 1, of.into())
        }
        At::Parameters { round, of } => {
            progress.set("recomputing parameters", u64::from(round.0) + 1, of.into());
        }
    };
    audit_run(subject, options, &mut show)
        .await
        .explain("audit_stopped", "check that chain and evidence can be reached, and start again")
}

fn conclude(report: &AuditReport, output: Output) -> Result<(), Failure> {
    let mut document = serde_json::to_value(report).explain("audit_report", "report this")?;
    document["audit"] = report.verdict.name().into();
    if report.ok() || !output.is_json() {
        output.document(&document, || report.to_string());
    }
    if report.ok() {
        return Ok(());
    }
    let findings: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    let reason = format!("the audit says: {}; {}", report.verdict.name(), findings.join("; "));
    let remedy =
        "ask the run's owner for what is named, and do not rely on the run until it is explained";
    Err(Failure::new("audit_failed", reason, remedy).with_document(document))
}

/// What the coordinator serves, as evidence.
struct RemoteEvidence(Blobs);

impl Evidence for RemoteEvidence {
    async fn blob(&self, digest: Digest, bytes_max: u64) -> Result<Option<Vec<u8>>, EvidenceError> {
        // The data plane has checked the hash.
        let found = self.0.find(digest, bytes_max).await;
        found.map_err(|error| EvidenceError::Unreachable { digest, reason: error.to_string() })
    }
}

/// `7` or `3..9`, both ends included.
fn parse_rounds(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        (Ok(_) | Err(_), Ok(_) | Err(_)) => {
            Err(format!("expected a round or a range as 3..9, got {text:?}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_one_or_a_range() {
        assert_eq!(parse_rounds("7"), Ok((7, 7)));
        assert_eq!(parse_rounds("3..9"), Ok((3, 9)));
        for text in ["", "9..3", "x", "1..", "1...2"] {
            assert!(parse_rounds(text).is_err(), "{text}");
        }
    }
}
