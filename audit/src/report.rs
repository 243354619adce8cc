//! What an audit found, link by link.

use std::collections::BTreeMap;
use std::fmt;

use manyhands_proto::{Balance, Digest, NodeId, Round, RunId};
use serde::Serialize;

/// A hostile record must not make the report grow without end; the counts go on.
const FINDINGS_MAX: usize = 1_000;

/// One link of the chain of trust, or one thing that is recomputed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// Specification ↔ run id ↔ the terms on chain.
    Specification,
    /// Each record names the one before, the first names the specification, and the newest is the
    /// one that the chain names.
    RecordChain,
    /// Who trained on what from which state follows from the candidates.
    Assignments,
    /// Each commitment is its worker's, for its assignment.
    CommitmentSignature,
    CommitSetAnchor,
    AdmittedSetAnchor,
    /// Randomness is the hash of a block that came after the anchor.
    EntropyBlock,
    /// Who was replayed follows from randomness and recorded verdicts.
    AuditDraw,
    /// What became of each worker follows from the recorded checks.
    Outcomes,
    /// What was found after a merge is taken back in a later one.
    Revocations,
    /// The merged update follows from the payloads.
    Aggregate,
    /// θ follows from θ₀ and the merged updates.
    Theta,
    /// Work, rewards and cumulative earnings follow from the outcomes.
    Rewards,
    /// The committed root is that of the leaves that follow from the earnings.
    LeafRoot,
    /// What the chain holds leads to the block's state root.
    StorageProof,
    /// The block is final, and so is what was committed.
    Finality,
    /// Leaves sum to the committed totals.
    Totals,
    /// What came into the escrow is there, was claimed or went back.
    Escrow,
    /// Nobody was paid anything but what a final leaf says.
    Claims,
    /// Every fault on chain is on record.
    Slashes,
}

impl Link {
    pub const ALL: [Self; 20] = [
        Self::Specification,
        Self::RecordChain,
        Self::Assignments,
        Self::CommitmentSignature,
        Self::CommitSetAnchor,
        Self::AdmittedSetAnchor,
        Self::EntropyBlock,
        Self::AuditDraw,
        Self::Outcomes,
        Self::Revocations,
        Self::Aggregate,
        Self::Theta,
        Self::Rewards,
        Self::LeafRoot,
        Self::StorageProof,
        Self::Finality,
        Self::Totals,
        Self::Escrow,
        Self::Claims,
        Self::Slashes,
    ];

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Specification => "specification",
            Self::RecordChain => "chain of records",
            Self::Assignments => "assignments",
            Self::CommitmentSignature => "commitments",
            Self::CommitSetAnchor => "anchored commitments",
            Self::AdmittedSetAnchor => "anchored admissions",
            Self::EntropyBlock => "randomness",
            Self::AuditDraw => "audit draws",
            Self::Outcomes => "outcomes",
            Self::Revocations => "revocations",
            Self::Aggregate => "aggregates",
            Self::Theta => "parameters",
            Self::Rewards => "rewards",
            Self::LeafRoot => "leaf roots",
            Self::StorageProof => "storage proofs",
            Self::Finality => "finality",
            Self::Totals => "totals",
            Self::Escrow => "escrow",
            Self::Claims => "claims",
            Self::Slashes => "slashes",
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Ok,
    /// It cannot be checked, and nobody is to blame: there is no chain, or it is too early.
    Unchecked,
    /// The evidence is gone, as it may be.
    Expired,
    /// It does not hold.
    Failed,
}

/// Something that is not as it should be, or could not be checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub link: Link,
    pub status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub round: Option<Round>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<NodeId>,
    pub expected: String,
    pub found: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            Status::Ok => write!(f, "{} ok", self.link)?,
            Status::Unchecked => write!(f, "{} not checked", self.link)?,
            Status::Expired => write!(f, "{}: evidence expired", self.link)?,
            Status::Failed => write!(f, "{} FAILED", self.link)?,
        }
        if let Some(round) = self.round {
            write!(f, ", round {round}")?;
        }
        if let Some(worker) = self.worker {
            write!(f, ", worker {worker}")?;
        }
        write!(f, ": expected {}, found {}", self.expected, self.found)
    }
}

/// How many checks of one link came out how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub ok: u64,
    pub failed: u64,
    pub expired: u64,
    pub unchecked: u64,
}

impl Counts {
    /// The worst of them; not checked if there was nothing to check.
    fn status(&self) -> Status {
        if self.failed > 0 {
            Status::Failed
        } else if self.expired > 0 {
            Status::Expired
        } else if self.ok > 0 {
            Status::Ok
        } else {
            Status::Unchecked
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinkSummary {
    pub link: Link,
    pub status: Status,
    #[serde(flatten)]
    pub counts: Counts,
}

/// What an audit comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Ok,
    /// Nothing failed, and something that was to be checked is gone.
    EvidenceExpired,
    Failed,
}

impl Verdict {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::EvidenceExpired => "evidence expired",
            Self::Failed => "failed",
        }
    }
}

/// The finalised block whose state was audited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AuditedBlock {
    pub number: u32,
    pub hash: Digest,
}

/// The outcome of an audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AuditReport {
    pub run: RunId,
    pub verdict: Verdict,
    /// None without a chain.
    pub block: Option<AuditedBlock>,
    /// Recorded rounds that were walked.
    pub rounds: u32,
    /// Rounds in which nobody could replay anything, as no verifier was there.
    pub rounds_unverified: u32,
    /// Rounds whose aggregate was recomputed from payloads.
    pub rounds_recomputed: Vec<Round>,
    /// Worker-rounds that were paid, per the records.
    pub contributions: u64,
    /// Leaves in final commits on chain.
    pub leaves_on_chain: u64,
    /// Sum of the cumulative earnings in the newest record.
    pub earned: Balance,
    /// What the chain has paid out.
    pub claimed: Balance,
    /// Faults that the chain has slashed for.
    pub slashes: u32,
    /// θ after the newest record.
    pub theta: Option<Digest>,
    /// Every link, in order.
    pub links: Vec<LinkSummary>,
    /// All that is not ok, up to a thousand.
    pub findings: Vec<Finding>,
}

impl AuditReport {
    /// Nothing failed and nothing that was to be checked is gone. What could not be checked for
    /// want of a chain or of time is listed and does not count.
    pub fn ok(&self) -> bool {
        self.verdict == Verdict::Ok
    }
}

impl fmt::Display for AuditReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "audit of run {}: {}", self.run, self.verdict.name())?;
        for LinkSummary { link, status, counts } in &self.links {
            let said = match status {
                Status::Ok => "ok",
                Status::Unchecked => "not checked",
                Status::Expired => "evidence expired",
                Status::Failed => "FAILED",
            };
            let done = counts.ok + counts.failed;
            // What was not checked must not hide behind what was.
            let skipped = if done > 0 && counts.unchecked > 0 {
                format!(", {} not made", counts.unchecked)
            } else {
                String::new()
            };
            writeln!(f, "  {:<22} {said} ({done} checks{skipped})", link.name())?;
        }
        for finding in &self.findings {
            writeln!(f, "  - {finding}")?;
        }
        Ok(())
    }
}

/// What a check is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct At {
    link: Link,
    round: Option<Round>,
    worker: Option<NodeId>,
}

impl Link {
    pub(crate) fn of_run(self) -> At {
        At { link: self, round: None, worker: None }
    }

    pub(crate) fn at(self, round: Round) -> At {
        At { link: self, round: Some(round), worker: None }
    }

    pub(crate) fn of_worker(self, worker: NodeId) -> At {
        At { link: self, round: None, worker: Some(worker) }
    }
}

impl At {
    pub(crate) fn of(self, worker: NodeId) -> Self {
        Self { worker: Some(worker), ..self }
    }
}

/// Collects the findings of an audit.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    counts: BTreeMap<Link, Counts>,
    listed: Vec<Finding>,
}

impl Findings {
    pub(crate) fn passed(&mut self, at: At) {
        self.counts.entry(at.link).or_default().ok += 1;
    }

    /// Notes whether two values are the same, and returns it.
    pub(crate) fn same<T: PartialEq + fmt::Display>(
        &mut self,
        at: At,
        what: &str,
        (expected, found): (T, T),
    ) -> bool {
        let holds = expected == found;
        self.require(at, holds, || format!("{what} {expected}"), || found.to_string())
    }

    pub(crate) fn require<E: Into<String>, F: Into<String>>(
        &mut self,
        at: At,
        holds: bool,
        expected: impl FnOnce() -> E,
        found: impl FnOnce() -> F,
    ) -> bool {
        if holds {
            self.passed(at);
        } else {
            self.failed(at, expected(), found());
        }
        holds
    }

    pub(crate) fn failed(&mut self, at: At, expected: impl Into<String>, found: impl Into<String>) {
        self.counts.entry(at.link).or_default().failed += 1;
        self.list(at, Status::Failed, expected.into(), found.into());
    }

    pub(crate) fn expired(&mut self, at: At, expected: impl Into<String>) {
        self.counts.entry(at.link).or_default().expired += 1;
        self.list(at, Status::Expired, expected.into(), "nothing: it is no longer kept".to_owned());
    }

    pub(crate) fn unchecked(
        &mut self,
        at: At,
        expected: impl Into<String>,
        why: impl Into<String>,
    ) {
        self.counts.entry(at.link).or_default().unchecked += 1;
        self.list(at, Status::Unchecked, expected.into(), why.into());
    }

    fn list(&mut self, at: At, status: Status, expected: String, found: String) {
        let At { link, round, worker } = at;
        if self.listed.len() < FINDINGS_MAX {
            self.listed.push(Finding { link, status, round, worker, expected, found });
        }
    }

    pub(crate) fn verdict(&self) -> Verdict {
        let any = |wanted| self.counts.values().any(|counts| counts.status() == wanted);
        if any(Status::Failed) {
            Verdict::Failed
        } else if any(Status::Expired) {
            Verdict::EvidenceExpired
        } else {
            Verdict::Ok
        }
    }

    pub(crate) fn finish(mut self) -> (Verdict, Vec<LinkSummary>, Vec<Finding>) {
        let verdict = self.verdict();
        let links = Link::ALL
            .into_iter()
            .map(|link| {
                let counts = self.counts.remove(&link).unwrap_or_default();
                LinkSummary { link, status: counts.status(), counts }
            })
            .collect();
        // Failures first: they are what the report is read for.
        self.listed.sort_by_key(|finding| std::cmp::Reverse(finding.status));
        (verdict, links, self.listed)
    }
}
