//! All that leads from θ_t to θ_{t+1}, as one blob: what earlier merges take back, then the round's
//! own aggregate, each with the outer learning rate of its round.
//!
//! ```text
//! version (1) ‖ number of terms (4) ‖ for each: α (4) ‖ length (8) ‖ aggregate
//! ```
//! Numbers are little-endian.

use crate::aggregate::{Aggregate, ParseAggregateError};
use crate::layout::Layout;
use crate::outer::outer_step;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 5;
const TERM_HEADER_BYTES: usize = 12;
/// A round takes back at most this many updates; more wait for the next.
pub const TERMS_MAX: usize = 256;

/// An aggregate over the whole vector, and its outer learning rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    pub alpha: f32,
    pub aggregate: Aggregate,
}

/// The steps from θ_t to θ_{t+1}, in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OuterUpdate {
    pub terms: Vec<Term>,
}

/// Why bytes are not an outer update of the layout.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ParseOuterUpdateError {
    #[error("expected version {VERSION}, got {got}")]
    Version { got: u8 },
    #[error("expected at most {TERMS_MAX} terms, got {got}")]
    Terms { got: u32 },
    #[error("expected {expected} more bytes, got {got}")]
    Length { expected: u64, got: usize },
    #[error("expected a learning rate above 0 and at most 1, got {got}")]
    LearningRate { got: f32 },
    #[error("term {term}: {source}")]
    Aggregate { term: usize, source: ParseAggregateError },
    #[error("{got} bytes follow the last term")]
    Trailing { got: usize },
}

impl OuterUpdate {
    /// θ_t becomes θ_{t+1}.
    ///
    /// # Panics
    /// When `theta` is shorter than the layout.
    pub fn apply(&self, theta: &mut [f32]) {
        for term in &self.terms {
            outer_step(theta, &term.aggregate, term.alpha);
        }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let count = u32::try_from(self.terms.len()).expect("terms fit 32 bits");
        let mut bytes = vec![VERSION];
        bytes.extend(count.to_le_bytes());
        for term in &self.terms {
            let aggregate = term.aggregate.to_bytes();
            bytes.extend(term.alpha.to_le_bytes());
            bytes.extend((aggregate.len() as u64).to_le_bytes());
            bytes.extend(aggregate);
        }
        bytes
    }

    /// # Errors
    /// When the bytes are not what [`Self::to_bytes`] writes for some update of this layout.
    pub fn parse(bytes: &[u8], layout: &Layout) -> Result<Self, ParseOuterUpdateError> {
        let (header, mut rest) = split(bytes, HEADER_BYTES as u64)?;
        let (version, count) = (header[0], u32_of(&header[1..]));
        if version != VERSION {
            return Err(ParseOuterUpdateError::Version { got: version });
        }
        if count as usize > TERMS_MAX {
            return Err(ParseOuterUpdateError::Terms { got: count });
        }
        let mut terms = Vec::new();
        for term in 0..count as usize {
            let (header, after) = split(rest, TERM_HEADER_BYTES as u64)?;
            let alpha = f32::from_bits(u32_of(header));
            if !(alpha > 0.0 && alpha <= 1.0) {
                return Err(ParseOuterUpdateError::LearningRate { got: alpha });
            }
            let length = u64::from(u32_of(&header[4..])) | u64::from(u32_of(&header[8..])) << 32;
            let (body, after) = split(after, length)?;
            let aggregate = Aggregate::parse(body, layout, 0..layout.chunk_count())
                .map_err(|source| ParseOuterUpdateError::Aggregate { term, source })?;
            terms.push(Term { alpha, aggregate });
            rest = after;
        }
        match rest.len() {
            0 => Ok(Self { terms }),
            got => Err(ParseOuterUpdateError::Trailing { got }),
        }
    }
}

fn split(bytes: &[u8], at: u64) -> Result<(&[u8], &[u8]), ParseOuterUpdateError> {
    let short = || ParseOuterUpdateError::Length { expected: at, got: bytes.len() };
    bytes.split_at_checked(usize::try_from(at).map_err(|_| short())?).ok_or_else(short)
}

/// The first four bytes, of at least four.
fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
