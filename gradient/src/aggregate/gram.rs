//! Dot products between workers' updates, per tensor, as integers: partial sums of slices add exactly.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::norms::UNITS;
use crate::codec::{ChunkReader, ChunkScratch, GROUP_CHUNKS, Update};
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};

/// For each tensor the dot products of all pairs of updates, in units of 2⁻⁷², each product of two values
/// rounded toward 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gram {
    workers: usize,
    /// Tensor after tensor; of each the pairs (r, s) with r ≤ s, row after row.
    products: Vec<i128>,
}

impl Gram {
    /// The products of whole updates.
    ///
    /// # Panics
    /// When an update belongs to another layout.
    pub fn of(layout: &Layout, updates: &[&Update]) -> Self {
        Self::of_slice(layout, updates, 0..layout.chunk_count())
    }

    /// The part that a slice (an interval of chunks that begins with a group) contributes.
    ///
    /// # Panics
    /// When there is no update, one belongs to another layout, or the slice ends past it.
    pub fn of_slice(layout: &Layout, updates: &[&Update], slice: Range<usize>) -> Self {
        assert!(slice.end <= layout.chunk_count(), "a slice of the layout");
        let mut gram = Self::zero(layout, updates.len());
        // Integers: whatever order the threads finish in, the sums are the same.
        assert!(!updates.is_empty(), "products of somebody's updates");
        let pairs = gram.pairs();
        let rows: Vec<_> = gram.products.chunks_mut(pairs).map(Mutex::new).collect();
        let firsts: Vec<usize> = slice.clone().step_by(GROUP_CHUNKS).collect();
        firsts.into_par_iter().for_each_init(Room::default, |room, first| {
            assert_ieee();
            let chunks = first..(first + GROUP_CHUNKS).min(slice.end);
            room.add_group(layout, updates, chunks, &rows);
        });
        gram
    }

    /// Adds another slice's part.
    ///
    /// # Panics
    /// When the two belong to different layouts or sets.
    pub fn add(&mut self, part: &Self) {
        assert_eq!(self.workers, part.workers, "products of one set");
        assert_eq!(self.products.len(), part.products.len(), "products of one layout");
        for (sum, part) in self.products.iter_mut().zip(&part.products) {
            *sum += part;
        }
    }

    pub fn workers(&self) -> usize {
        self.workers
    }

    pub fn tensors(&self) -> usize {
        self.products.len() / self.pairs()
    }

    /// The dot product of two workers' updates of a tensor, in units of 2⁻⁷².
    ///
    /// # Panics
    /// When there is no such tensor or worker.
    pub fn product(&self, tensor: usize, (a, b): (usize, usize)) -> i128 {
        assert!(a < self.workers && b < self.workers, "a worker of the set");
        self.products[tensor * self.pairs() + self.pair(a.min(b), a.max(b))]
    }

    fn zero(layout: &Layout, workers: usize) -> Self {
        let mut gram = Self { workers, products: Vec::new() };
        gram.products.resize(layout.tensors().len() * gram.pairs(), 0);
        gram
    }

    fn pairs(&self) -> usize {
        self.workers * (self.workers + 1) / 2
    }

    /// The place of a pair with a ≤ b.
    fn pair(&self, a: usize, b: usize) -> usize {
        a * self.workers - a * (a + 1) / 2 + b
    }
}

/// What a thread works in.
#[derive(Debug)]
struct Room {
    scratch: ChunkScratch,
    /// What each worker sends of the chunk.
    sent: Vec<Vec<(u16, f32)>>,
    /// Everything that one worker sends, at its place; zeros between workers.
    dense: Box<[f32; CHUNK]>,
    /// Products of a chunk's tensor, pair after pair.
    row: Vec<i128>,
}

impl Default for Room {
    fn default() -> Self {
        let (scratch, dense) = (ChunkScratch::default(), Box::new([0.0; CHUNK]));
        Self { scratch, sent: Vec::new(), dense, row: Vec::new() }
    }
}

impl Room {
    /// Adds the products of a group's chunks to its tensors' rows.
    fn add_group(
        &mut self,
        layout: &Layout,
        updates: &[&Update],
        chunks: Range<usize>,
        rows: &[Mutex<&mut [i128]>],
    ) {
        let mut readers: Vec<_> =
            updates.iter().map(|update| update.reader(layout, chunks.start)).collect();
        for of_tensor in layout.places()[chunks].chunk_by(|a, b| a.tensor == b.tensor) {
            self.row.clear();
            self.row.resize(updates.len() * (updates.len() + 1) / 2, 0);
            of_tensor.iter().for_each(|_| self.add_chunk(&mut readers));
            let mut row = rows[of_tensor[0].tensor].lock().expect("no thread panicked");
            row.iter_mut().zip(&self.row).for_each(|(sum, part)| *sum += part);
        }
    }

    fn add_chunk(&mut self, readers: &mut [ChunkReader<'_>]) {
        let Self { scratch, sent, dense, row } = self;
        sent.resize(readers.len(), Vec::new());
        for (sent, reader) in sent.iter_mut().zip(readers) {
            sent.clear();
            let symbols = reader.next(scratch);
            symbols.for_each(|index, value| sent.push((index as u16, value)));
        }
        let mut row = row.iter_mut();
        for (a, own) in sent.iter().enumerate() {
            own.iter().for_each(|&(index, value)| dense[usize::from(index)] = value);
            for (other, product) in sent[a..].iter().zip(&mut row) {
                *product += dot(&dense[..], other);
            }
            own.iter().for_each(|&(index, _)| dense[usize::from(index)] = 0.0);
        }
    }
}

/// A product of two floats is exact as an f64, and so is its product with a power of two.
fn dot(dense: &[f32], sent: &[(u16, f32)]) -> i128 {
    let mut sum = 0;
    for &(index, value) in sent {
        let other = dense[usize::from(index)];
        if other != 0.0 {
            sum += (f64::from(value) * f64::from(other) * UNITS) as i128;
        }
    }
    sum
}
