//! Dot products between workers' updates, per tensor, as integers: partial sums of slices add exactly.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::norms::UNITS;
use crate::codec::{ChunkReader, ChunkScratch, GROUP_CHUNKS, Update};
use crate::ieee::assert_ieee;
use crate::layout::{CHUNK, Layout};

/// For each tensor the dot products of all pairs of different updates, in units of 2⁻⁷², each product of two values
/// rounded toward 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gram {
    workers: usize,
    /// Tensor after tensor; of each the pairs of workers.
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
    /// When an update belongs to another layout, or the slice ends past it.
    pub fn of_slice(layout: &Layout, updates: &[&Update], slice: Range<usize>) -> Self {
        assert!(slice.end <= layout.chunk_count(), "a slice of the layout");
        let mut gram = Self::zero(layout, updates.len());
        // Integers: whatever order the threads finish in, the sums are the same.
        if updates.len() < 2 {
            return gram;
        }
        let rows: Vec<_> = gram.products.chunks_mut(pairs(updates.len())).map(Mutex::new).collect();
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

    /// The dot product of two different workers' updates of a tensor, in units of 2⁻⁷². An update's product with
    /// itself is its squared norm.
    ///
    /// # Panics
    /// When there is no such tensor or worker, or the two are one.
    pub fn product(&self, tensor: usize, (a, b): (usize, usize)) -> i128 {
        assert!(a != b && a.max(b) < self.workers, "two workers of the set");
        self.products[tensor * pairs(self.workers) + pair(a.min(b), a.max(b))]
    }

    fn zero(layout: &Layout, workers: usize) -> Self {
        let mut gram = Self { workers, products: Vec::new() };
        gram.products.resize(layout.tensors().len() * pairs(workers), 0);
        gram
    }
}

fn pairs(workers: usize) -> usize {
    workers * workers.saturating_sub(1) / 2
}

/// The place of a pair with a < b: by b, then by a.
fn pair(a: usize, b: usize) -> usize {
    b * (b - 1) / 2 + a
}

/// What a thread works in.
#[derive(Debug)]
struct Room {
    scratch: ChunkScratch,
    /// What was sent of the chunk, worker after worker.
    sent: Vec<Sent>,
    /// One more than where `sent` has the last of each index; 0 where nobody sent it. All 0 between chunks.
    last: Box<[u32; CHUNK]>,
    /// Products of a chunk's tensor, pair after pair.
    row: Vec<i128>,
}

/// One value of one worker.
#[derive(Debug, Clone, Copy)]
struct Sent {
    worker: u32,
    index: u16,
    value: f32,
    /// One more than where the same index was sent before; 0 if it was not.
    before: u32,
}

impl Default for Room {
    fn default() -> Self {
        let (scratch, last) = (ChunkScratch::default(), Box::new([0; CHUNK]));
        Self { scratch, sent: Vec::new(), last, row: Vec::new() }
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
            self.row.resize(pairs(updates.len()), 0);
            of_tensor.iter().for_each(|_| self.add_chunk(&mut readers));
            let mut row = rows[of_tensor[0].tensor].lock().expect("no thread panicked");
            row.iter_mut().zip(&self.row).for_each(|(sum, part)| *sum += part);
        }
    }

    /// Sparse updates rarely meet: every value looks for those before it at its own index, and nowhere else.
    fn add_chunk(&mut self, readers: &mut [ChunkReader<'_>]) {
        let Self { scratch, sent, last, row } = self;
        for (worker, reader) in (0_u32..).zip(readers) {
            reader.next(scratch).for_each(|index, value| {
                // What dense profiles send everywhere adds nothing.
                if value == 0.0 {
                    return;
                }
                let last = &mut last[index];
                let own = Sent { worker, index: index as u16, value, before: *last };
                if own.before != 0 {
                    add_products(row, sent, own);
                }
                sent.push(own);
                *last = sent.len() as u32;
            });
        }
        sent.drain(..).for_each(|it| last[usize::from(it.index)] = 0);
    }
}

/// Adds a value's products with all that was sent at its index before. Out of line, as most values meet none.
#[inline(never)]
fn add_products(row: &mut [i128], sent: &[Sent], own: Sent) {
    let mut before = own.before;
    while let Some(other) = before.checked_sub(1).map(|at| sent[at as usize]) {
        debug_assert!(other.worker < own.worker, "no update sends an index twice");
        // A product of two floats is exact as an f64, and so is its product with a power of two.
        let product = f64::from(other.value) * f64::from(own.value) * UNITS;
        // The processor rounds to 64 bits in one instruction, to 128 in a long function.
        let is_small = product.abs() < (1_u64 << 62) as f64;
        let rounded = if is_small { i128::from(product as i64) } else { product as i128 };
        row[pair(other.worker as usize, own.worker as usize)] += rounded;
        before = other.before;
    }
}
