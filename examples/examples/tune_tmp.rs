//! temporary
use std::path::Path;
use std::sync::Arc;
use manyhands_gradient::aggregate::WorkerUpdate;
use manyhands_gradient::codec::{Endpoints, Update, UpdateCodec};
use manyhands_gradient::{Admitted, Layout, initial_theta, merge, outer_learning_rate};
use manyhands_model::data::{Dataset, SequenceId, SequenceSource, ShardSet, Split};
use manyhands_model::{Control, Device, EvaluateTask, LocalTrainer, TrainTask, Trainer, Transformer, evaluate};
use manyhands_proto::{NodeId, Round};
use manyhands_proto::run_file::RunFile;
use manyhands_rules::sampling::sequence_at;
fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let text = std::fs::read_to_string(&args[1])?;
    let data = Path::new(&args[2]);
    let workers: usize = args[3].parse()?;
    let file = RunFile::parse(&text)?;
    let dense = args.get(4).is_some_and(|a| a == "dense");
    let layout = Layout::of(&file.model)?;
    let mut theta = initial_theta(&layout, &file.model, file.run.seed);
    let ds = Dataset::open(data)?;
    let mk = |split| { let d = ds.clone(); let l = move |g: &_| d.shard_path(g); Arc::new(ShardSet::new(ds.manifest().clone(), split, file.model.context_length, l)) };
    let (train, held) = (mk(Split::Train), mk(Split::HeldOut));
    let n = train.sequence_count();
    let h = u64::from(file.training.steps_per_round); let b = u64::from(file.training.batch_sequences);
    let total = h * u64::from(file.run.rounds);
    let codec = UpdateCodec::new(file.codec.profile, file.codec.error_decay)?;
    let mut errors = vec![vec![0f32; layout.vector_len()]; workers];
    let mut moments = vec![None; workers]; let mut adam = vec![0u64; workers];
    let held_ids: Vec<_> = (0..u64::from(file.data.held_out_sequences)).map(SequenceId).collect();
    println!("unigram {:.3} parameters {} train seqs {} tokens/run {}", ds.manifest().unigram_loss(), layout.parameter_count(), n, total * b * workers as u64 * u64::from(file.model.context_length));
    let start = std::time::Instant::now();
    let mut at = 0u64;
    for round in 0..file.run.rounds {
        let mut updates = Vec::new();
        let mut train_loss = 0.0;
        for w in 0..workers {
            let batches: Vec<Vec<SequenceId>> = (0..h).map(|_| (0..b).map(|_| { at += 1; SequenceId(sequence_at(7, at, n)) }).collect()).collect();
            let mut t = LocalTrainer::new(&file.model, &file.training, total, train.clone(), Device::Cpu)?;
            let o = t.train(&TrainTask { theta: &theta, moments: moments[w].as_ref(), adam_step: adam[w], first_step: u64::from(round) * h, batches: &batches, micro_batch_sequences: file.training.micro_batch_sequences, precision: file.training.precision, threads: 1 }, &mut |_| Control::Continue)?;
            train_loss += o.losses.iter().sum::<f32>() / o.losses.len() as f32 / workers as f32;
            adam[w] = o.adam_step; moments[w] = Some(o.moments.clone());
            if dense { theta = o.theta.clone(); continue; }
            let p = codec.encode(&layout, &mut errors[w], Endpoints { start: &theta, end: &o.theta })?;
            updates.push((NodeId::new([w as u8; 32]), Update::parse(&p.into_bytes(), &layout, file.codec.profile)?, o.tokens));
        }
        if !dense {
            let alpha = outer_learning_rate(&file.aggregation, Round(round), file.run.rounds);
            let refs: Vec<_> = updates.iter().map(|(worker, update, tokens)| (WorkerUpdate { worker: *worker, update }, *tokens)).collect();
            merge(&layout, &file.aggregation, Admitted { updates: &refs, alpha }, &[])?.apply(&mut theta);
        }
        if round % 4 == 3 || round + 1 == file.run.rounds {
            let model = Transformer::new(&file.model, file.training.precision, &theta, Device::Cpu)?;
            let e = evaluate(&model, held.as_ref(), EvaluateTask { sequences: &held_ids, batch_sequences: 8, threads: 1 }, &mut |_| Control::Continue)?;
            println!("round {} train {train_loss:.3} held {:.3} {:.0}s", round + 1, e.loss, start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}
