//! What becomes of an error buffer whose sent values nobody used.

use manyhands_proto::ChunkIndex;

use crate::codec::{ChunkScratch, Update};
use crate::layout::Layout;

/// Puts sent values back into an error buffer: e_i + v̂_i on the sent indices.
///
/// # Panics
/// When the buffer or the update belongs to another layout.
pub fn add_sent(layout: &Layout, error: &mut [f32], update: &Update) {
    update.for_each_chunk(layout, error, |symbols, error| {
        symbols.for_each(|index, value| error[index] += value);
    });
}

/// The same for one chunk, as whoever checks opened chunks needs it.
///
/// # Panics
/// When there is no such chunk, or `error` is shorter than one.
pub fn add_sent_to_chunk(layout: &Layout, error: &mut [f32], update: &Update, chunk: ChunkIndex) {
    crate::ieee::assert_ieee();
    let mut scratch = ChunkScratch::default();
    let symbols = update.chunk(layout, chunk, &mut scratch).expect("a chunk of the layout");
    symbols.for_each(|index, value| error[index] += value);
}
