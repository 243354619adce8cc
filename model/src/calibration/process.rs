//! Another process, whose numerics are not this one's: libtorch reads which kernels it may use once.
//!
//! The one side writes a line of JSON, [`Header`], and then starts of rounds; the other answers each with its end.

use std::io::{BufRead, ErrorKind, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use manyhands_gradient::moments8::Moments8;
use manyhands_gradient::{Layout, vector};
use serde::{Deserialize, Serialize};

use super::{CalibrationError, End, Laboratory, Numerics, Start, Trial};
use crate::determinism;

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    trial: Trial,
    numerics: Numerics,
}

/// Trains the rounds that come on `from`, until it ends.
///
/// # Errors
/// When the other side sends something else, or a round cannot be trained.
pub fn serve(mut from: impl BufRead, mut to: impl Write) -> Result<(), CalibrationError> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    let Header { trial, numerics } = serde_json::from_str(&line).map_err(std::io::Error::from)?;
    let laboratory = Laboratory::open(trial)?;
    determinism::use_onednn(!numerics.without_onednn);
    while let Some(start) = read_start(&mut from, laboratory.layout())? {
        let end = laboratory.train(&start, numerics)?;
        write_state(&mut to, &end.theta, &end.moments)?;
        to.flush()?;
    }
    Ok(())
}

/// Such a process.
pub struct Replayer {
    child: Child,
    to: Option<ChildStdin>,
    from: ChildStdout,
}

impl Replayer {
    /// `command` starts a program that calls [`serve`] with its standard input and output; `kernels` is a value of
    /// `ATEN_CPU_CAPABILITY`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(
        mut command: Command,
        kernels: &str,
        trial: &Trial,
        numerics: Numerics,
    ) -> Result<Self, CalibrationError> {
        let mut child = command
            .env("ATEN_CPU_CAPABILITY", kernels)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let from = from.expect("its output is piped");
        let mut replayer = Self { child, to, from };
        let header = Header { trial: trial.clone(), numerics };
        let line = serde_json::to_string(&header).expect("plain structs serialise");
        writeln!(replayer.input(), "{line}")?;
        Ok(replayer)
    }

    /// Trains the assigned round of `start` there: one waits for it with [`Replayer::answer`].
    ///
    /// # Errors
    /// When the process is gone.
    pub fn ask(&mut self, start: &Start) -> Result<(), CalibrationError> {
        let to = self.input();
        to.write_all(&start.seed.to_le_bytes())?;
        to.write_all(&[u8::from(start.moments.is_some())])?;
        to.write_all(&vector::to_bytes(&start.theta))?;
        if let Some(moments) = &start.moments {
            to.write_all(moments.as_bytes())?;
        }
        Ok(to.flush()?)
    }

    /// Where the round ended that was asked for first.
    ///
    /// # Errors
    /// When the process is gone, or sent something else.
    pub fn answer(&mut self, layout: &Layout) -> Result<End, CalibrationError> {
        let end = self.read_end(layout);
        match (end, self.child.try_wait()) {
            (Err(_), Ok(Some(status))) => Err(CalibrationError::Ended(status.to_string())),
            (end, _) => end,
        }
    }

    fn read_end(&mut self, layout: &Layout) -> Result<End, CalibrationError> {
        let theta = read_theta(&mut self.from, layout)?;
        let moments = read_moments(&mut self.from, layout)?;
        Ok(End { theta, moments })
    }

    fn input(&mut self) -> &mut ChildStdin {
        self.to.as_mut().expect("it is taken when this is dropped")
    }
}

impl Drop for Replayer {
    fn drop(&mut self) {
        // It ends where its input does; after an error it may still wait for somebody to read.
        self.to = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_start(from: &mut impl Read, layout: &Layout) -> Result<Option<Start>, CalibrationError> {
    let mut seed = [0; 8];
    match from.read_exact(&mut seed) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        done => done?,
    }
    let mut is_warm = [0];
    from.read_exact(&mut is_warm)?;
    let theta = read_theta(from, layout)?;
    let moments = if is_warm == [0] { None } else { Some(read_moments(from, layout)?) };
    Ok(Some(Start { seed: u64::from_le_bytes(seed), theta, moments }))
}

fn write_state(to: &mut impl Write, theta: &[f32], moments: &Moments8) -> std::io::Result<()> {
    to.write_all(&vector::to_bytes(theta))?;
    to.write_all(moments.as_bytes())
}

fn read_theta(from: &mut impl Read, layout: &Layout) -> Result<Vec<f32>, CalibrationError> {
    let mut bytes = vec![0; 4 * layout.vector_len()];
    from.read_exact(&mut bytes)?;
    vector::from_bytes(&bytes, layout).map_err(|_| CalibrationError::NoEnd)
}

fn read_moments(from: &mut impl Read, layout: &Layout) -> Result<Moments8, CalibrationError> {
    let mut bytes = vec![0; Moments8::bytes_len(layout)];
    from.read_exact(&mut bytes)?;
    Moments8::parse(bytes, layout).map_err(|_| CalibrationError::NoEnd)
}
