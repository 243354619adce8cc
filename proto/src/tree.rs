//! The BLAKE3 tree of a byte string, cut at two levels.
//!
//! A *chunk list* holds one chaining value per MiB: it merges to the ordinary BLAKE3 hash, so a
//! receiver that knows only a blob's digest can check the list first and then every MiB as it
//! arrives. A *group tree* holds one per 16 KiB (4,096 f32 values: one codec chunk): single groups
//! open against the digest with a logarithmic number of siblings.
//!
//! Source of the construction: the BLAKE3 paper, section 2.1, through `blake3::hazmat`.

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::Digest;

/// Bytes of one transfer chunk.
pub const CHUNK_BYTES: u64 = 1 << 20;
/// Bytes of one opened group: one codec chunk of 4,096 f32 values.
pub const GROUP_BYTES: u64 = 1 << 14;

/// Why a chunk list, a chunk or an opening was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    #[error("expected {expected} chaining values for {length} bytes, got {got}")]
    Count { length: u64, expected: u64, got: u64 },
    #[error("the chaining values merge to {got:?}, expected {expected:?}")]
    Root { expected: Digest, got: Digest },
    #[error("piece {index} of {count} does not exist")]
    Index { index: u64, count: u64 },
    #[error("piece {index} has {got} bytes, expected {expected}")]
    Length { index: u64, expected: u64, got: u64 },
    #[error("piece {index} does not hash to its chaining value")]
    Piece { index: u64 },
}

/// Length and chaining values of a blob, one per [`CHUNK_BYTES`]; known to merge to its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkList(Pieces<CHUNK_BYTES>);

/// Length and chaining values of a blob, one per [`GROUP_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupTree(Pieces<GROUP_BYTES>);

impl ChunkList {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Pieces::of(bytes))
    }

    /// The list of a blob whose chunks were hashed one at a time with [`chunk_value`].
    ///
    /// # Errors
    /// [`TreeError::Count`] and [`TreeError::Root`] if the values are not those of `digest`.
    pub fn parse(digest: Digest, length: u64, values: Vec<[u8; 32]>) -> Result<Self, TreeError> {
        let pieces = Pieces { length, values, digest };
        pieces.validate()?;
        Ok(Self(pieces))
    }

    /// The list of a blob that fits one chunk: it has no values, the digest itself checks it.
    pub fn length(&self) -> u64 {
        self.0.length
    }

    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    pub fn values(&self) -> &[[u8; 32]] {
        &self.0.values
    }

    pub fn chunk_count(&self) -> u64 {
        piece_count(self.0.length, CHUNK_BYTES)
    }

    /// Bytes of chunk `index`: a full MiB but for the last.
    pub fn chunk_length(&self, index: u64) -> u64 {
        piece_length(self.0.length, CHUNK_BYTES, index)
    }

    /// Checks chunk `index` as it arrived.
    ///
    /// # Errors
    /// Any [`TreeError`] but `Count` and `Root`.
    pub fn verify(&self, index: u64, bytes: &[u8]) -> Result<(), TreeError> {
        let count = self.chunk_count();
        if index >= count {
            return Err(TreeError::Index { index, count });
        }
        let expected = self.chunk_length(index);
        if bytes.len() as u64 != expected {
            return Err(TreeError::Length { index, expected, got: bytes.len() as u64 });
        }
        let matches = match self.0.values.get(index as usize) {
            Some(value) => chunk_value(index, bytes) == *value,
            None => Digest::of(bytes) == self.0.digest,
        };
        if matches { Ok(()) } else { Err(TreeError::Piece { index }) }
    }
}

/// Chaining value of chunk `index` of a blob of more than one chunk.
pub fn chunk_value(index: u64, bytes: &[u8]) -> [u8; 32] {
    subtree(index * CHUNK_BYTES, bytes)
}

/// How many chaining values a blob's chunk list has: none if it fits one chunk.
pub fn chunk_value_count(length: u64) -> u64 {
    value_count(length, CHUNK_BYTES)
}

/// The siblings that lead from one group to the digest, leaf first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    pub group: u64,
    pub siblings: Vec<[u8; 32]>,
}

impl GroupTree {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Pieces::of(bytes))
    }

    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    pub fn group_count(&self) -> u64 {
        piece_count(self.0.length, GROUP_BYTES)
    }

    /// # Errors
    /// [`TreeError::Index`] if there is no such group.
    pub fn open(&self, group: u64) -> Result<Opening, TreeError> {
        let count = self.group_count();
        if group >= count {
            return Err(TreeError::Index { index: group, count });
        }
        let mut siblings = Vec::new();
        descend(&self.0.values, group as usize, &mut siblings);
        siblings.reverse();
        Ok(Opening { group, siblings })
    }
}

impl Opening {
    /// Checks that `bytes` are this group of the blob with that digest and length (in bytes).
    ///
    /// # Errors
    /// Any [`TreeError`]: a wrong number of siblings is `Count`, a wrong path `Root`.
    pub fn verify(&self, digest: Digest, length: u64, bytes: &[u8]) -> Result<(), TreeError> {
        let count = piece_count(length, GROUP_BYTES);
        if self.group >= count {
            return Err(TreeError::Index { index: self.group, count });
        }
        let expected = piece_length(length, GROUP_BYTES, self.group);
        if bytes.len() as u64 != expected {
            return Err(TreeError::Length { index: self.group, expected, got: bytes.len() as u64 });
        }
        let depth = path_length(self.group, count);
        if self.siblings.len() as u64 != depth {
            let got = self.siblings.len() as u64;
            return Err(TreeError::Count { length, expected: depth, got });
        }
        let got = if count == 1 {
            Digest::of(bytes)
        } else {
            let leaf = subtree(self.group * GROUP_BYTES, bytes);
            let mut siblings = self.siblings.iter().rev();
            Digest::new(*climb(self.group, count, leaf, &mut siblings).as_bytes())
        };
        if got == digest { Ok(()) } else { Err(TreeError::Root { expected: digest, got }) }
    }
}

/// One opened group: 16 KiB of a blob (less at its end), and the way from it to the digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedGroup {
    pub opening: Opening,
    pub bytes: Vec<u8>,
}

/// Opened groups, and the length of the blob that the source stated. Proven bytes prove of the length only that
/// it leads to the same paths, so compare it to the one you expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Openings {
    pub length: u64,
    pub groups: Vec<OpenedGroup>,
}

impl Openings {
    /// Groups of a blob that is here, in the order asked.
    ///
    /// # Errors
    /// [`TreeError::Index`] if there is no such group.
    pub fn of(bytes: &[u8], groups: &[u64]) -> Result<Self, TreeError> {
        let tree = GroupTree::of(bytes);
        let open = |&group: &u64| {
            let opening = tree.open(group)?;
            let start = (group * GROUP_BYTES) as usize;
            let end = bytes.len().min(start + GROUP_BYTES as usize);
            Ok(OpenedGroup { opening, bytes: bytes[start..end].to_vec() })
        };
        let groups = groups.iter().map(open).collect::<Result<_, TreeError>>()?;
        Ok(Self { length: bytes.len() as u64, groups })
    }

    /// Checks every group against the blob's digest.
    ///
    /// # Errors
    /// As [`Opening::verify`]'s.
    pub fn verify(&self, digest: Digest) -> Result<(), TreeError> {
        let mut groups = self.groups.iter();
        groups.try_for_each(|group| group.opening.verify(digest, self.length, &group.bytes))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pieces<const BYTES: u64> {
    length: u64,
    /// Empty for a blob of one piece: its only value would be the digest itself.
    values: Vec<ChainingValue>,
    digest: Digest,
}

impl<const BYTES: u64> Pieces<BYTES> {
    fn of(bytes: &[u8]) -> Self {
        let length = bytes.len() as u64;
        if value_count(length, BYTES) == 0 {
            return Self { length, values: Vec::new(), digest: Digest::of(bytes) };
        }
        let values: Vec<_> = bytes
            .chunks(BYTES as usize)
            .zip(0_u64..)
            .map(|(piece, index)| subtree(index * BYTES, piece))
            .collect();
        let digest = Digest::new(*merge_root(&values).as_bytes());
        Self { length, values, digest }
    }

    fn validate(&self) -> Result<(), TreeError> {
        let expected = value_count(self.length, BYTES);
        let got = self.values.len() as u64;
        if got != expected {
            return Err(TreeError::Count { length: self.length, expected, got });
        }
        if self.values.is_empty() {
            return Ok(());
        }
        let got = Digest::new(*merge_root(&self.values).as_bytes());
        if got != self.digest {
            return Err(TreeError::Root { expected: self.digest, got });
        }
        Ok(())
    }
}

fn piece_count(length: u64, piece: u64) -> u64 {
    length.div_ceil(piece).max(1)
}

fn value_count(length: u64, piece: u64) -> u64 {
    match piece_count(length, piece) {
        1 => 0,
        count => count,
    }
}

fn piece_length(length: u64, piece: u64, index: u64) -> u64 {
    length.saturating_sub(index.saturating_mul(piece)).min(piece)
}

fn subtree(offset: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset);
    hasher.update(bytes);
    hasher.finalize_non_root()
}

/// BLAKE3 puts the largest power of two of pieces that leaves at least one to the right on the left.
fn left_count(count: u64) -> u64 {
    count.next_power_of_two() / 2
}

fn merge(values: &[ChainingValue]) -> ChainingValue {
    if let [value] = values {
        return *value;
    }
    let (left, right) = values.split_at(left_count(values.len() as u64) as usize);
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

fn merge_root(values: &[ChainingValue]) -> blake3::Hash {
    let (left, right) = values.split_at(left_count(values.len() as u64) as usize);
    merge_subtrees_root(&merge(left), &merge(right), Mode::Hash)
}

/// Collects the siblings from the root down to `index`.
fn descend(values: &[ChainingValue], index: usize, siblings: &mut Vec<ChainingValue>) {
    if values.len() < 2 {
        return;
    }
    let (left, right) = values.split_at(left_count(values.len() as u64) as usize);
    if index < left.len() {
        siblings.push(merge(right));
        descend(left, index, siblings);
    } else {
        siblings.push(merge(left));
        descend(right, index - left.len(), siblings);
    }
}

fn path_length(mut index: u64, mut count: u64) -> u64 {
    let mut depth = 0;
    while count > 1 {
        let left = left_count(count);
        if index < left {
            count = left;
        } else {
            index -= left;
            count -= left;
        }
        depth += 1;
    }
    depth
}

/// The root above `leaf`, taking siblings from the root down. Their number was checked.
fn climb<'a>(
    index: u64,
    count: u64,
    leaf: ChainingValue,
    siblings: &mut impl Iterator<Item = &'a ChainingValue>,
) -> blake3::Hash {
    let (own, sibling, goes_left) = step(index, count, leaf, siblings);
    if goes_left {
        merge_subtrees_root(&own, &sibling, Mode::Hash)
    } else {
        merge_subtrees_root(&sibling, &own, Mode::Hash)
    }
}

fn climb_inner<'a>(
    index: u64,
    count: u64,
    leaf: ChainingValue,
    siblings: &mut impl Iterator<Item = &'a ChainingValue>,
) -> ChainingValue {
    if count == 1 {
        return leaf;
    }
    let (own, sibling, goes_left) = step(index, count, leaf, siblings);
    if goes_left {
        merge_subtrees_non_root(&own, &sibling, Mode::Hash)
    } else {
        merge_subtrees_non_root(&sibling, &own, Mode::Hash)
    }
}

fn step<'a>(
    index: u64,
    count: u64,
    leaf: ChainingValue,
    siblings: &mut impl Iterator<Item = &'a ChainingValue>,
) -> (ChainingValue, ChainingValue, bool) {
    let sibling = *siblings.next().expect("the number of siblings was checked against the depth");
    let left = left_count(count);
    if index < left {
        (climb_inner(index, left, leaf, siblings), sibling, true)
    } else {
        (climb_inner(index - left, count - left, leaf, siblings), sibling, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blob(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    #[test]
    fn both_levels_merge_to_the_ordinary_hash() {
        for length in [0, 1, 1 << 14, (1 << 14) + 1, 1 << 20, (1 << 20) + 5, 3 << 20] {
            let bytes = blob(length);
            assert_eq!(ChunkList::of(&bytes).digest(), Digest::of(&bytes), "{length} bytes");
            assert_eq!(GroupTree::of(&bytes).digest(), Digest::of(&bytes), "{length} bytes");
        }
    }

    #[test]
    fn a_received_list_is_believed_only_if_it_merges_to_the_digest() {
        let bytes = blob((2 << 20) + 77);
        let list = ChunkList::of(&bytes);
        let parsed = ChunkList::parse(list.digest(), list.length(), list.values().to_vec());
        assert_eq!(parsed.as_ref(), Ok(&list));
        for (index, chunk) in bytes.chunks(1 << 20).enumerate() {
            list.verify(index as u64, chunk).expect("honest chunk");
        }
        assert_eq!(list.verify(1, &bytes[..1 << 20]), Err(TreeError::Piece { index: 1 }));
        let mut values = list.values().to_vec();
        values[2][0] ^= 1;
        assert!(ChunkList::parse(list.digest(), list.length(), values).is_err());
        assert!(ChunkList::parse(list.digest(), u64::MAX, Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn every_group_opens_and_no_other_byte_string_does(
            length in 1_usize..200_000, pick in any::<prop::sample::Index>(), flip in any::<prop::sample::Index>(),
        ) {
            let bytes = blob(length);
            let tree = GroupTree::of(&bytes);
            let group = pick.index(tree.group_count() as usize);
            let opening = tree.open(group as u64).expect("group exists");
            let start = group << 14;
            let mut piece = bytes[start..length.min(start + (1 << 14))].to_vec();
            prop_assert_eq!(opening.verify(tree.digest(), length as u64, &piece), Ok(()));
            let at = flip.index(piece.len());
            piece[at] ^= 1;
            prop_assert!(opening.verify(tree.digest(), length as u64, &piece).is_err());
        }
    }
}
