//! The codec check: forgeries of an update, which it finds without training anything, and what it costs.

use std::time::Instant;

use manyhands_gradient::codec::{Endpoints, OpenedChunk, Update, UpdateCodec};
use manyhands_gradient::{CHUNK, Layout, chunk_energies, initial_theta, vector};
use manyhands_model::calibration::{End, Laboratory, Start};
use manyhands_proto::run_file::{Codec, RunFile, Verification};
use manyhands_proto::tree::Openings;
use manyhands_proto::{ChunkIndex, Digest, NodeId};
use manyhands_rules::draw::Beacon;
use manyhands_rules::evidence::theta_groups;

use super::super::Report;
use super::replays::ASSIGNED;
use crate::bench::median_seconds;

/// What a worker may have sent.
#[derive(Debug, Clone, Copy)]
enum Forgery {
    /// An honest round: it has to pass.
    Nothing,
    /// What was sent does not follow from θ_t − θ_H.
    OtherDelta,
    /// What is kept for the next round is not what sending left over.
    OtherErrorBuffer,
}

const FORGERIES: [(&str, Forgery); 3] = [
    ("honest", Forgery::Nothing),
    ("delta_is_not_theirs", Forgery::OtherDelta),
    ("forged_error_buffer", Forgery::OtherErrorBuffer),
];

/// Every forgery in as many rounds.
pub(super) fn forgeries(
    laboratory: &Laboratory,
    seeds: u64,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut found = [0_u64; FORGERIES.len()];
    for seed in 0..seeds {
        let start = laboratory.begin_warm(seed, ASSIGNED)?;
        let honest = laboratory.train(&start, ASSIGNED)?;
        for (found, (_, forgery)) in found.iter_mut().zip(FORGERIES) {
            *found += u64::from(is_rejected(laboratory.layout(), forgery, &start, &honest)?);
        }
    }
    for (found, (name, _)) in found.into_iter().zip(FORGERIES) {
        let share = found as f64 / seeds as f64;
        report.add(&format!("codec.{name}.rejected"), share, "of rounds", None);
    }
    Ok(())
}

/// As the coordinator checks a round whose error buffer was empty.
fn is_rejected(
    layout: &Layout,
    forgery: Forgery,
    start: &Start,
    honest: &End,
) -> anyhow::Result<bool> {
    let Codec { profile, error_decay } = Codec::default();
    let codec = UpdateCodec::new(profile, error_decay)?;
    let ends = Endpoints { start: &start.theta, end: &honest.theta };
    let sent = match forgery {
        Forgery::OtherDelta => Endpoints { start: &honest.theta, end: &start.theta },
        Forgery::Nothing | Forgery::OtherErrorBuffer => ends,
    };
    let mut error_next = vec![0.0; layout.vector_len()];
    let payload = codec.encode(layout, &mut error_next, sent)?;
    if let Forgery::OtherErrorBuffer = forgery {
        error_next.iter_mut().for_each(|value| *value *= 2.0);
    }
    let update = Update::parse(payload.as_bytes(), layout, profile)?;
    let beacon = Beacon::new(Digest::of(payload.as_bytes()), Digest::of(&start.seed.to_le_bytes()));
    let drawn = draw(&beacon, layout, &update);
    let empty = vec![0.0; CHUNK];
    Ok(drawn.into_iter().any(|chunk| {
        let range = of(chunk);
        let ends = Endpoints { start: &ends.start[range.clone()], end: &ends.end[range.clone()] };
        let opened = OpenedChunk { error_in: &empty, ends };
        let expected = codec.check_chunk(layout, &update, chunk, opened);
        expected.map_or(true, |expected| expected != error_next[range])
    }))
}

fn draw(beacon: &Beacon, layout: &Layout, update: &Update) -> Vec<ChunkIndex> {
    let energies = chunk_energies(layout, update);
    beacon.codec_chunks(NodeId::new([1; 32]), Verification::default().codec_chunks, &energies)
}

fn of(chunk: ChunkIndex) -> std::ops::Range<usize> {
    chunk.0 as usize * CHUNK..(chunk.0 as usize + 1) * CHUNK
}

/// What one check costs the coordinator in a run: reading the update, drawing, verifying what was opened in e_in, θ_H and
/// e_next, and encoding it again. What it waits for is left out.
pub(super) fn cost(file: &RunFile, report: &mut Report) -> anyhow::Result<()> {
    let layout = Layout::of(&file.model)?;
    let Codec { profile, error_decay } = file.codec.clone();
    let codec = UpdateCodec::new(profile, error_decay)?;
    let start = initial_theta(&layout, &file.model, 1);
    let end = initial_theta(&layout, &file.model, 2);
    let mut error_next = vec![0.0; layout.vector_len()];
    let ends = Endpoints { start: &start, end: &end };
    let began = Instant::now();
    let payload = codec.encode(&layout, &mut error_next, ends)?;
    let encoding = began.elapsed().as_secs_f64();
    let update = Update::parse(payload.as_bytes(), &layout, profile)?;
    let beacon = Beacon::new(Digest::of(payload.as_bytes()), Digest::of(b"entropy"));
    let drawn = draw(&beacon, &layout, &update);
    let empty = vec![0.0; CHUNK];
    let states = [&vec![0.0; layout.vector_len()], &end, &error_next].map(|state| {
        let bytes = vector::to_bytes(state);
        let opened = Openings::of(&bytes, &theta_groups(&drawn)).expect("chunks of the vector");
        (Digest::of(&bytes), opened)
    });
    let mut passed = true;
    let seconds = median_seconds(|| {
        let update = Update::parse(payload.as_bytes(), &layout, profile).expect("just encoded");
        let drawn = draw(&beacon, &layout, &update);
        for (digest, opened) in &states {
            passed &= opened.verify(*digest).is_ok();
        }
        for chunk in drawn {
            let ends = Endpoints { start: &start[of(chunk)], end: &end[of(chunk)] };
            let opened = OpenedChunk { error_in: &empty, ends };
            let expected = codec.check_chunk(&layout, &update, chunk, opened);
            passed &= expected.is_ok_and(|expected| expected == error_next[of(chunk)]);
        }
    });
    anyhow::ensure!(passed, "an honest update passes its codec check");
    let unit = "ms of one core per update, against encoding it";
    report.add("verification.codec_check", seconds * 1e3, unit, Some(encoding * 1e3));
    Ok(())
}
