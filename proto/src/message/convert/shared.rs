//! What both requests and replies hold.

use super::MessageError;
use super::field::{
    at_most, check, digest, explain, name, reason, required, round, signature, unexpected,
};
use crate::message::class::precision_name;
use crate::message::limits::{BLOB_BYTES_MAX, COUNT_MAX};
use crate::message::{
    Commitment, DeviceKind, NumericClass, Refusal, RefusalCode, SignedCommitment, wire,
};
use crate::run_file::Precision;
use crate::{NodeId, RunId, TokenCount};

impl From<&Commitment> for wire::Commitment {
    fn from(commitment: &Commitment) -> Self {
        let Commitment { round, first_sequence, payload, payload_bytes, .. } = commitment;
        let Commitment { theta, moments, error, assignment, tokens, loss, .. } = commitment;
        Self {
            round: round.0,
            payload: payload.as_bytes().to_vec(),
            payload_bytes: *payload_bytes,
            theta: theta.as_bytes().to_vec(),
            moments: moments.as_bytes().to_vec(),
            error: error.as_bytes().to_vec(),
            tokens: tokens.0,
            loss: *loss,
            first_sequence: *first_sequence,
            assignment: assignment.as_bytes().to_vec(),
        }
    }
}

impl TryFrom<wire::Commitment> for Commitment {
    type Error = MessageError;

    fn try_from(wire: wire::Commitment) -> Result<Self, MessageError> {
        let bytes = at_most("commitment.payload_bytes", wire.payload_bytes, BLOB_BYTES_MAX)?;
        Ok(Self {
            round: round("commitment.round", wire.round)?,
            first_sequence: at_most("commitment.first_sequence", wire.first_sequence, COUNT_MAX)?,
            payload: digest("commitment.payload", &wire.payload)?,
            payload_bytes: bytes,
            theta: digest("commitment.theta", &wire.theta)?,
            moments: digest("commitment.moments", &wire.moments)?,
            error: digest("commitment.error", &wire.error)?,
            assignment: digest("commitment.assignment", &wire.assignment)?,
            tokens: TokenCount(at_most("commitment.tokens", wire.tokens, COUNT_MAX)?),
            loss: check("commitment.loss", "a finite number", wire.loss, wire.loss.is_finite())?,
        })
    }
}

impl From<&SignedCommitment> for wire::SignedCommitment {
    fn from(signed: &SignedCommitment) -> Self {
        Self { commitment: Some((&signed.commitment).into()), signature: signed.signature.to_vec() }
    }
}

impl SignedCommitment {
    /// Of the run and worker that the envelope names.
    pub(in crate::message) fn parse(
        wire: wire::SignedCommitment,
        run: RunId,
        worker: NodeId,
    ) -> Result<Self, MessageError> {
        let commitment = required("commit.commitment", wire.commitment)?.try_into()?;
        let signature = signature("commit.signature", &wire.signature)?;
        let signed = Self { commitment, run, worker, signature };
        let holds = signed.verify();
        check("commit.signature", "the worker's over run, round and commitment", (), holds)?;
        Ok(signed)
    }
}

impl From<&NumericClass> for wire::NumericClass {
    fn from(class: &NumericClass) -> Self {
        Self {
            libtorch: class.libtorch.clone(),
            device: class.device.name().to_owned(),
            device_name: class.device_name.clone(),
            kernels: class.kernels.clone(),
            precision: precision_name(class.precision).to_owned(),
            threads: class.threads,
            deterministic: class.deterministic,
            fingerprint: class.fingerprint.map(|it| it.as_bytes().to_vec()),
        }
    }
}

pub(super) fn class(
    field: &'static str,
    wire: Option<wire::NumericClass>,
) -> Result<NumericClass, MessageError> {
    let wire = required(field, wire)?;
    let precision = [Precision::F32, Precision::Bf16]
        .into_iter()
        .find(|precision| precision_name(*precision) == wire.precision);
    Ok(NumericClass {
        libtorch: name(field, wire.libtorch)?,
        device: DeviceKind::of_name(&wire.device)
            .ok_or_else(|| unexpected(field, "a known kind of device", &wire.device))?,
        device_name: name(field, wire.device_name)?,
        kernels: name(field, wire.kernels)?,
        precision: precision
            .ok_or_else(|| unexpected(field, "a known precision", &wire.precision))?,
        threads: wire.threads,
        deterministic: wire.deterministic,
        fingerprint: wire.fingerprint.map(|it| digest(field, &it)).transpose()?,
    })
}

impl From<&Refusal> for wire::Refusal {
    fn from(refusal: &Refusal) -> Self {
        Self { code: refusal.code.code(), reason: explain(&refusal.reason) }
    }
}

impl TryFrom<wire::Refusal> for Refusal {
    type Error = MessageError;

    fn try_from(wire: wire::Refusal) -> Result<Self, MessageError> {
        let code = RefusalCode::of_code(wire.code)
            .ok_or_else(|| unexpected("refusal.code", "a known code", wire.code))?;
        Ok(Self { code, reason: reason("refusal.reason", wire.reason)? })
    }
}
