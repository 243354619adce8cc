//! Dot products between workers' updates, per tensor, as integers: partial sums of slices add exactly.

use std::ops::Range;

use rayon::prelude::*;

use super::norms::UNITS;
use crate::codec::{ChunkScratch, GROUP_CHUNKS, Update};
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
    /// When an update belongs to another layout or the slice ends past it.
    pub fn of_slice(layout: &Layout, updates: &[&Update], slice: Range<usize>) -> Self {
        assert!(slice.end <= layout.chunk_count(), "a slice of the layout");
        let firsts: Vec<usize> = slice.clone().step_by(GROUP_CHUNKS).collect();
        // Integers: whatever order the threads finish in, the sums are the same.
        firsts
            .into_par_iter()
            .map(|first| {
                let chunks = first..(first + GROUP_CHUNKS).min(slice.end);
                Self::of_group(layout, updates, chunks)
            })
            .reduce(
                || Self::zero(layout, updates.len()),
                |mut sum, part| {
                    sum.add(&part);
                    sum
                },
            )
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

    fn of_group(layout: &Layout, updates: &[&Update], chunks: Range<usize>) -> Self {
        let mut gram = Self::zero(layout, updates.len());
        let mut readers: Vec<_> =
            updates.iter().map(|update| update.reader(layout, chunks.start)).collect();
        let mut scratch = ChunkScratch::default();
        // What each worker sends of the chunk, and everything of one worker at its place.
        let mut sent: Vec<Vec<(u16, f32)>> = vec![Vec::new(); updates.len()];
        let mut dense = vec![0.0_f32; CHUNK];
        for chunk in chunks {
            for (sent, reader) in sent.iter_mut().zip(&mut readers) {
                sent.clear();
                let symbols = reader.next(&mut scratch);
                symbols.for_each(|index, value| sent.push((index as u16, value)));
            }
            let row = layout.places()[chunk].tensor * gram.pairs();
            for (a, own) in sent.iter().enumerate() {
                own.iter().for_each(|&(index, value)| dense[usize::from(index)] = value);
                for (b, other) in sent.iter().enumerate().skip(a) {
                    let pair = gram.pair(a, b);
                    gram.products[row + pair] += dot(&dense, other);
                }
                own.iter().for_each(|&(index, _)| dense[usize::from(index)] = 0.0);
            }
        }
        gram
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
