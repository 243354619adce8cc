//! What a fault of an update follows from, checked by arithmetic: that its payload is not what the codec can have written,
//! or that a chunk of it does not follow from the states that its worker committed to.

use manyhands_gradient::codec::{Endpoints, OpenedChunk, Update, UpdateCodec, payload_bytes_max};
use manyhands_gradient::error_feedback::add_sent_to_chunk;
use manyhands_gradient::{CHUNK, Layout, vector};
use manyhands_proto::message::{OpenedStates, UpdateEvidence, Work};
use manyhands_proto::run_file::Codec;
use manyhands_proto::tree::{GROUP_BYTES, Openings};
use manyhands_proto::{ChunkIndex, Digest, RunId};

/// One chunk of each of a worker's states.
#[derive(Debug, Clone, PartialEq)]
pub struct States {
    /// Of θ_t.
    pub start: Vec<f32>,
    /// Of θ_H.
    pub end: Vec<f32>,
    /// Of the head's error buffer, or zeros.
    pub error_in: Vec<f32>,
    /// As committed.
    pub error_next: Vec<f32>,
}

/// Whether a chunk of `update` and of e_next is what the states encode to. `returned`: the head's update, if its values
/// return to the error buffer.
///
/// # Errors
/// What differs, in words.
pub fn check_states(
    layout: &Layout,
    terms: &Codec,
    (update, returned): (&Update, Option<&Update>),
    (chunk, states): (ChunkIndex, &States),
) -> Result<(), String> {
    let codec = UpdateCodec::new(terms.profile, terms.error_decay)
        .expect("β was checked when the run's file was read");
    let mut error_in = states.error_in.clone();
    if let Some(returned) = returned {
        add_sent_to_chunk(layout, &mut error_in, returned, chunk);
    }
    let ends = Endpoints { start: &states.start, end: &states.end };
    let opened = OpenedChunk { error_in: &error_in, ends };
    let expected =
        codec.check_chunk(layout, update, chunk, opened).map_err(|error| error.to_string())?;
    let both = expected.iter().zip(&states.error_next);
    match both.map(|(one, other)| (one.to_bits(), other.to_bits())).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(index) => Err(format!(
            "chunk {}: e_next does not follow from its opened states, from index {index} on",
            chunk.0
        )),
    }
}

/// Whether bytes can be a payload of which so many were committed.
///
/// # Errors
/// Why not, in words.
pub fn parse_payload(
    layout: &Layout,
    terms: &Codec,
    committed: u64,
    bytes: &[u8],
) -> Result<Update, String> {
    if bytes.len() as u64 != committed {
        let sent = bytes.len();
        return Err(format!("it committed a payload of {committed} bytes and sent {sent}"));
    }
    Update::parse(bytes, layout, terms.profile).map_err(|error| error.to_string())
}

/// Whether a payload of so many bytes can be one.
///
/// # Errors
/// That it is too long, in words.
pub fn check_length(layout: &Layout, terms: &Codec, committed: u64) -> Result<(), String> {
    let most = payload_bytes_max(layout, terms.profile) as u64;
    if committed > most {
        return Err(format!("a payload has at most {most} bytes, it committed {committed}"));
    }
    Ok(())
}

/// No evidence about an update is larger.
pub fn bytes_max(layout: &Layout) -> u64 {
    let siblings = 32 * u64::from(u64::BITS - (layout.vector_len() as u64 * 4).leading_zeros());
    4 * (GROUP_BYTES + siblings + 64) + 16_384
}

/// The fault that evidence shows, in words, or why it shows none. `payload` and `returned` are the bytes of the work's own
/// payload and of [`Work::returned_payload`], as far as they are there.
///
/// # Errors
/// Why it shows none.
pub fn find_fault(
    evidence: &UpdateEvidence,
    run: RunId,
    (layout, terms): (&Layout, &Codec),
    (payload, returned): (Option<&[u8]>, Option<&[u8]>),
) -> Result<String, String> {
    let UpdateEvidence { work, opened } = evidence;
    work.check(run).map_err(|error| error.to_string())?;
    let commitment = &work.commitment.commitment;
    if let Err(fault) = check_length(layout, terms, commitment.payload_bytes) {
        return Ok(fault);
    }
    let is = |bytes: &&[u8], digest: Digest| Digest::of(bytes) == digest;
    let payload = payload.filter(|bytes| is(bytes, commitment.payload)).ok_or("no payload")?;
    let update = match parse_payload(layout, terms, commitment.payload_bytes, payload) {
        Ok(update) => update,
        Err(fault) => return Ok(fault),
    };
    let opened = opened.as_ref().ok_or("the payload is well-formed, and no chunk is opened")?;
    let returned = match work.returned_payload() {
        None => None,
        Some(digest) => {
            let bytes = returned.filter(|bytes| is(bytes, digest)).ok_or("no earlier payload")?;
            let parsed = Update::parse(bytes, layout, terms.profile);
            Some(parsed.map_err(|error| format!("the earlier payload: {error}"))?)
        }
    };
    let (chunk, states) = states(opened, work, layout)?;
    match check_states(layout, terms, (&update, returned.as_ref()), (chunk, &states)) {
        Ok(()) => Err("the opened chunk follows from its states".to_owned()),
        Err(fault) => Ok(fault),
    }
}

/// The chunk that was opened, each state proven.
fn states(
    opened: &OpenedStates,
    work: &Work,
    layout: &Layout,
) -> Result<(ChunkIndex, States), String> {
    let OpenedStates { start, end, error_in, error_next } = opened;
    let commitment = &work.commitment.commitment;
    let group = start.groups.first().map(|group| group.opening.group).unwrap_or_default();
    let chunk = u32::try_from(group).map_err(|error| error.to_string())?;
    let length = layout.vector_len() as u64 * 4;
    let proven = |opened: &Openings, digest: Digest| {
        let [only] = &opened.groups[..] else {
            return Err(format!("expected one group, got {}", opened.groups.len()));
        };
        if (opened.length, only.opening.group) != (length, group) {
            return Err("expected the same chunk of each state".to_owned());
        }
        opened.verify(digest).map_err(|error| error.to_string())?;
        Ok(vector::floats(&only.bytes))
    };
    let error_in = match (error_in, &work.head) {
        (None, None) => vec![0.0; CHUNK],
        (Some(opened), Some(head)) => proven(opened, head.error)?,
        (Some(_), None) | (None, Some(_)) => {
            return Err("expected the error buffer of the round that it started from".to_owned());
        }
    };
    let states = States {
        start: proven(start, work.assignment.theta)?,
        end: proven(end, commitment.theta)?,
        error_in,
        error_next: proven(error_next, commitment.error)?,
    };
    Ok((ChunkIndex(chunk), states))
}

#[cfg(test)]
mod tests;
