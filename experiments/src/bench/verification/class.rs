//! Another process, whose numerics are not this one's: libtorch reads which kernels it may use once.

use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context;
use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{Layout, vector};
use manyhands_model::determinism;
use manyhands_model::device::DeviceChoice;
use manyhands_proto::run_file::Precision;

use super::replays::{Bench, End, Numerics, Start};
use crate::cluster::Text;

/// What a process of another class is told on its command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    text: PathBuf,
    #[arg(long)]
    threads: u32,
    #[arg(long)]
    micro_batch_sequences: u32,
    #[arg(long)]
    bf16: bool,
    #[arg(long)]
    without_onednn: bool,
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
}

/// Trains the rounds that come on standard input, until it ends.
pub(crate) fn serve(options: &Options) -> anyhow::Result<()> {
    let precision = if options.bf16 { Precision::Bf16 } else { Precision::F32 };
    let bench = Bench::new(&Text::open(&options.text)?)?;
    if options.without_onednn {
        determinism::use_onednn(false);
    }
    let numerics = Numerics {
        threads: options.threads,
        micro_batch_sequences: options.micro_batch_sequences,
        precision,
        without_onednn: options.without_onednn,
        device: options.device,
    };
    let (mut from, mut to) = (std::io::stdin().lock(), std::io::stdout().lock());
    while let Some(start) = read_start(&mut from, &bench.layout)? {
        let end = bench.train(&start, numerics)?;
        to.write_all(&vector::to_bytes(&end.theta))?;
        to.write_all(end.moments.as_bytes())?;
        to.flush()?;
    }
    Ok(())
}

/// Such a process.
pub(super) struct Class {
    child: Child,
    to: Option<ChildStdin>,
    from: ChildStdout,
}

impl Class {
    /// `kernels` is a value of `ATEN_CPU_CAPABILITY`.
    pub(super) fn start(text: &Path, kernels: &str, numerics: Numerics) -> anyhow::Result<Self> {
        let Numerics { threads, micro_batch_sequences, precision, without_onednn, device } =
            numerics;
        let program = std::env::current_exe().context("this program's own path")?;
        let mut child = Command::new(program)
            .arg("replay-class")
            .args(["--text".as_ref(), text.as_os_str()])
            .args(["--threads", &threads.to_string()])
            .args(["--micro-batch-sequences", &micro_batch_sequences.to_string()])
            .args((precision == Precision::Bf16).then_some("--bf16"))
            .args(without_onednn.then_some("--without-onednn"))
            .args(["--device", &device.to_string()])
            .env("ATEN_CPU_CAPABILITY", kernels)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a process of another class")?;
        let to = child.stdin.take();
        let from = child.stdout.take().context("its output is piped")?;
        Ok(Self { child, to, from })
    }

    pub(super) fn ask(&mut self, start: &Start) -> anyhow::Result<()> {
        let to = self.to.as_mut().context("its input is piped")?;
        to.write_all(&start.seed.to_le_bytes())?;
        to.write_all(&vector::to_bytes(&start.theta))?;
        to.write_all(start.moments.as_bytes())?;
        Ok(to.flush()?)
    }

    pub(super) fn answer(&mut self, layout: &Layout) -> anyhow::Result<End> {
        read_state(&mut self.from, layout)
    }
}

impl Drop for Class {
    fn drop(&mut self) {
        // It ends where its input does; after an error it may still wait for somebody to read.
        self.to = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_start(from: &mut impl Read, layout: &Layout) -> anyhow::Result<Option<Start>> {
    let mut seed = [0; 8];
    match from.read_exact(&mut seed) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        done => done?,
    }
    let End { theta, moments } = read_state(from, layout)?;
    Ok(Some(Start { seed: u64::from_le_bytes(seed), theta, moments }))
}

fn read_state(from: &mut impl Read, layout: &Layout) -> anyhow::Result<End> {
    let mut theta = vec![0; 4 * layout.vector_len()];
    from.read_exact(&mut theta)?;
    let mut moments = vec![0; Moments8::zero(layout).as_bytes().len()];
    from.read_exact(&mut moments)?;
    Ok(End {
        theta: vector::from_bytes(&theta, layout)?,
        moments: Moments8::parse(moments, layout)?,
    })
}
