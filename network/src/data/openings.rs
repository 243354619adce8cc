//! Opens single 16 KiB groups against a blob's digest without reading the blob: one MiB that holds
//! the group, and the chunk list for everything above it.

use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root};
use manyhands_proto::tree::{CHUNK_BYTES, ChunkList, GROUP_BYTES, Opening};

pub(super) const GROUPS_PER_CHUNK: u64 = CHUNK_BYTES / GROUP_BYTES;

/// Opens the groups of one chunk. What they share is hashed once.
pub(super) struct ChunkOpener {
    chunk: u64,
    /// Of the chunk's groups.
    values: Vec<ChainingValue>,
    /// From the chunk up to the root.
    above: Vec<ChainingValue>,
}

impl ChunkOpener {
    /// `bytes` are those of `chunk`.
    pub(super) fn new(list: &ChunkList, chunk: u64, bytes: &[u8]) -> Self {
        let values = bytes
            .chunks(GROUP_BYTES as usize)
            .zip(0_u64..)
            .map(|(piece, index)| {
                let mut hasher = blake3::Hasher::new();
                hasher.set_input_offset(chunk * CHUNK_BYTES + index * GROUP_BYTES);
                hasher.update(piece);
                hasher.finalize_non_root()
            })
            .collect();
        let mut above = Vec::new();
        siblings_of(list.values(), chunk as usize, &mut above);
        Self { chunk, values, above }
    }

    /// # Panics
    /// If `group` does not lie in the chunk.
    pub(super) fn open(&self, group: u64) -> Opening {
        let within = (group % GROUPS_PER_CHUNK) as usize;
        // An empty blob has one group, of no bytes.
        let lies_in = group / GROUPS_PER_CHUNK == self.chunk && within < self.values.len().max(1);
        assert!(lies_in, "group {group} in chunk {} of {} groups", self.chunk, self.values.len());
        let mut siblings = Vec::new();
        siblings_of(&self.values, within, &mut siblings);
        siblings.extend_from_slice(&self.above);
        Opening { group, siblings }
    }
}

/// Appends the siblings on the way from `index` up, lowest first.
fn siblings_of(values: &[ChainingValue], index: usize, siblings: &mut Vec<ChainingValue>) {
    if values.len() < 2 {
        return;
    }
    // BLAKE3: the largest power of two that leaves something to the right.
    let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
    if index < left.len() {
        siblings_of(left, index, siblings);
        siblings.push(merge(right));
    } else {
        siblings_of(right, index - left.len(), siblings);
        siblings.push(merge(left));
    }
}

fn merge(values: &[ChainingValue]) -> ChainingValue {
    if let [value] = values {
        return *value;
    }
    let (left, right) = values.split_at(values.len().next_power_of_two() / 2);
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use manyhands_proto::tree::GroupTree;

    #[test]
    fn an_opening_from_one_chunk_is_the_opening_from_the_whole_blob() {
        for length in [0, 1, 16_384, 16_385, 1 << 20, (1 << 20) + 1, (3 << 20) + 40_000] {
            let blob: Vec<u8> = (0..length).map(|i: usize| (i / 3 + i / 1000) as u8).collect();
            let (list, tree) = (ChunkList::of(&blob), GroupTree::of(&blob));
            for group in [0, tree.group_count() / 2, tree.group_count() - 1] {
                let chunk = group / GROUPS_PER_CHUNK;
                let start = (chunk * CHUNK_BYTES) as usize;
                let end = length.min(start + CHUNK_BYTES as usize);
                let opening = ChunkOpener::new(&list, chunk, &blob[start..end]).open(group);
                assert_eq!(
                    Ok(&opening),
                    tree.open(group).as_ref(),
                    "group {group} of {length} bytes"
                );
            }
        }
    }
}
