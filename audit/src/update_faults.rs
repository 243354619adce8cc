//! Whether updates that were found faulty are: by what their workers stand for, their payloads, and the chunk that was
//! opened.

use manyhands_gradient::Layout;
use manyhands_gradient::codec::payload_bytes_max;
use manyhands_proto::message::UpdateEvidence;
use manyhands_proto::run_file::RunSpec;
use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::record::{CodecFault, Outcome, RoundRecord};
use manyhands_rules::reward::layout;
use manyhands_rules::update_evidence::{bytes_max, find_fault};

use crate::AuditError;
use crate::evidence::Evidence;
use crate::records::{Fetched, Records, fetch};
use crate::report::{At, Findings, Link};

/// Finds each fault of an update again.
pub(crate) async fn recompute<E: Evidence>(
    spec: &RunSpec,
    records: &Records,
    evidence: &E,
    findings: &mut Findings,
) -> Result<(), AuditError> {
    let layout = layout(&spec.model);
    for record in &records.all {
        for (worker, fault) in faults(record) {
            let at = Link::Outcomes.at(record.round).of(worker);
            let mut blobs = Blobs { evidence, findings, at };
            let Some(shown) = blobs.shown(spec, records, (record.round, worker, fault)).await?
            else {
                continue;
            };
            let payload_max = payload_bytes_max(&layout, spec.codec.profile) as u64;
            let commitment = &shown.work.commitment.commitment;
            let payload = if commitment.payload_bytes > payload_max {
                None
            } else {
                let Some(bytes) = blobs.fetch(commitment.payload, payload_max).await? else {
                    continue;
                };
                Some(bytes)
            };
            let returned = match shown.work.returned_payload().filter(|_| shown.opened.is_some()) {
                None => None,
                Some(digest) => {
                    let Some(bytes) = blobs.fetch(digest, payload_max).await? else { continue };
                    Some(bytes)
                }
            };
            check(spec, &layout, &shown, (payload, returned), (findings, at));
        }
    }
    Ok(())
}

/// The workers whose updates were found faulty; of a chunk, with what shows it.
fn faults(record: &RoundRecord) -> impl Iterator<Item = (NodeId, Option<&CodecFault>)> {
    record.results.iter().filter_map(|result| match &result.outcome {
        Outcome::Malformed(_) => Some((result.worker, None)),
        Outcome::CodecFault(fault) => Some((result.worker, Some(fault))),
        Outcome::Admitted
        | Outcome::Late
        | Outcome::NotCommitted
        | Outcome::NotUploaded
        | Outcome::ReplayFault(_)
        | Outcome::Withheld(_)
        | Outcome::Unverified
        | Outcome::Irreproducible => None,
    })
}

/// What is fetched of one fault.
struct Blobs<'a, E> {
    evidence: &'a E,
    findings: &'a mut Findings,
    at: At,
}

impl<E: Evidence> Blobs<'_, E> {
    /// What is there; what is not is among the findings.
    async fn fetch(
        &mut self,
        digest: Digest,
        bytes_max: u64,
    ) -> Result<Option<Vec<u8>>, AuditError> {
        match fetch(self.evidence, self.findings, self.at, (digest, bytes_max)).await? {
            Fetched::Bytes(bytes) => Ok(Some(bytes)),
            Fetched::Gone => {
                self.findings.expired(self.at, format!("evidence {digest}"));
                Ok(None)
            }
            Fetched::Wrong => Ok(None),
        }
    }

    async fn shown(
        &mut self,
        spec: &RunSpec,
        records: &Records,
        (round, worker, fault): (Round, NodeId, Option<&CodecFault>),
    ) -> Result<Option<UpdateEvidence>, AuditError> {
        // Without a plan or a commitment, other checks have failed.
        let Some(work) = records.work(spec, round, worker) else { return Ok(None) };
        let Some(fault) = fault else { return Ok(Some(UpdateEvidence { work, opened: None })) };
        let bytes_max = bytes_max(&layout(&spec.model));
        let Some(bytes) = self.fetch(fault.evidence, bytes_max).await? else { return Ok(None) };
        match UpdateEvidence::parse(&bytes) {
            Ok(shown) if shown.work == work => return Ok(Some(shown)),
            Ok(_) => self.findings.failed(self.at, "evidence of this worker's round", "of another"),
            Err(error) => self.findings.failed(self.at, "evidence", error.to_string()),
        }
        Ok(None)
    }
}

fn check(
    spec: &RunSpec,
    layout: &Layout,
    shown: &UpdateEvidence,
    (payload, returned): (Option<Vec<u8>>, Option<Vec<u8>>),
    (findings, at): (&mut Findings, At),
) {
    let payloads = (payload.as_deref(), returned.as_deref());
    let run = shown.work.commitment.run;
    let found = find_fault(shown, run, (layout, &spec.codec), payloads);
    findings.require(
        at,
        found.is_ok(),
        || "an update that is faulty, as recorded",
        || found.clone().err().unwrap_or_default(),
    );
}
