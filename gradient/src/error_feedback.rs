//! What becomes of an error buffer whose sent values nobody used.

use rayon::prelude::*;

use crate::codec::Update;
use crate::layout::{CHUNK, Layout};

/// Puts sent values back into an error buffer: e_i + v̂_i on the sent indices.
///
/// # Panics
/// When the buffer or the update belongs to another layout.
pub fn add_sent(layout: &Layout, error: &mut [f32], update: &Update) {
    layout.assert_covers(error, "the error buffer");
    assert_eq!(update.chunk_count(), layout.chunk_count(), "an update belongs to one layout");
    error
        .par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(chunk, error)| add_sent_to_chunk(error, update, chunk));
}

/// The same for one chunk, as whoever checks opened chunks needs it.
///
/// # Panics
/// When there is no such chunk, or `error` is shorter than one.
pub fn add_sent_to_chunk(error: &mut [f32], update: &Update, chunk: usize) {
    crate::ieee::assert_ieee();
    update.symbols(chunk).for_each(|index, value| error[index] += value);
}
