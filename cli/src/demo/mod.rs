//! `demo`: everything on this machine, as separate processes, because that is how they run in the world.

mod baseline;
mod play;
mod process;
mod report;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use manyhands_proto::run_file::RunFile;

use self::play::Play;
use crate::failure::{Explain, Failure};
use crate::output::Output;
use crate::stop;

/// What the demo trains, unless it is told otherwise.
const RUN_FILE: &str = include_str!("../../../configs/demo.toml");
/// Marks a folder as ours to remove.
const MARKER: &str = ".manyhands-demo";
/// Nothing here takes a fraction of this; something hangs.
const TIME_MAX: Duration = Duration::from_secs(30 * 60);

/// A chain, a coordinator, a verifier and five workers, one slowed down and one late, train a small model on
/// the sources of this project's dependencies; what came of it is in `report.json` of the demo's folder.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the demo; what an earlier demo left there is removed.
    #[arg(long, value_name = "DIR", default_value = "runs/demo")]
    dir: PathBuf,
    /// Another worker, not ours: this program is started with the arguments of `join`. If it cheats, it has to
    /// be caught.
    #[arg(long, value_name = "PROGRAM")]
    extra_worker: Vec<PathBuf>,
    /// Another run file.
    #[arg(long, value_name = "FILE")]
    run_file: Option<PathBuf>,
    /// Train on the `.rs` and `.md` files under these folders instead.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    text: Vec<PathBuf>,
}

pub(crate) async fn run(args: Args, output: Output) -> Result<(), Failure> {
    let stop = stop::requested(false);
    let teller = Teller { output, began: Instant::now() };
    let run_text = match &args.run_file {
        None => RUN_FILE.to_owned(),
        Some(path) => std::fs::read_to_string(path)
            .explain("run_file", "name a run's file with --run-file")?,
    };
    let file = RunFile::parse(&run_text).explain("run_file", "change the lines that are named")?;
    let extra_workers = args.extra_worker.iter().map(|program| {
        program.canonicalize().map_err(|error| {
            let reason = format!("{}: {error}", program.display());
            Failure::new(
                "extra_worker",
                reason,
                "name a program that is built; `make build` builds the examples",
            )
        })
    });
    let extra_workers = extra_workers.collect::<Result<Vec<_>, _>>()?;
    let folder = fresh_folder(&args.dir)?;
    let run_path = folder.join("run.toml");
    std::fs::write(&run_path, &run_text).explain("demo_folder", "make room on the disk")?;
    let play = Play { teller, folder, run_path, file, extra_workers, text: args.text };
    tokio::select! {
        // Dropping the play kills every child.
        () = stop::wait(stop) => Err(Failure::new("interrupted", "the demo was interrupted", "start it again; it begins anew")),
        () = tokio::time::sleep(TIME_MAX) => {
            let reason = format!("the demo did not end in {} minutes", TIME_MAX.as_secs() / 60);
            Err(Failure::new("demo_hangs", reason, "read the logs in its folder"))
        }
        outcome = play.run() => outcome,
    }
}

/// An empty folder, where nothing but an earlier demo was.
fn fresh_folder(folder: &Path) -> Result<PathBuf, Failure> {
    const REMEDY: &str = "choose another folder with --dir";
    let failed = |error: std::io::Error| {
        Failure::new("demo_folder", format!("cannot use {}: {error}", folder.display()), REMEDY)
    };
    let marker = folder.join(MARKER);
    let is_empty = std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
    if !is_empty {
        if !marker.exists() {
            let reason = format!("{} holds something that is not a demo's", folder.display());
            return Err(Failure::new("demo_folder", reason, REMEDY));
        }
        std::fs::remove_dir_all(folder).map_err(failed)?;
    }
    std::fs::create_dir_all(folder).map_err(failed)?;
    std::fs::write(&marker, "a demo's folder: the next demo removes it\n").map_err(failed)?;
    folder.canonicalize().map_err(failed)
}

/// Tells the viewer what happens, and when.
#[derive(Debug, Clone, Copy)]
struct Teller {
    output: Output,
    began: Instant,
}

impl Teller {
    fn tell(&self, text: impl Display) {
        let seconds = self.seconds();
        let text = text.to_string();
        let value = serde_json::json!({ "event": "note", "seconds": seconds, "text": text });
        self.output.event(&value, || Some(format!("[{seconds:>4} s] {text}")));
    }

    fn seconds(&self) -> u64 {
        self.began.elapsed().as_secs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_demo_is_removed() {
        let parent = tempfile::tempdir().expect("folder");
        let folder = parent.path().join("demo");
        let made = fresh_folder(&folder).expect("made");
        std::fs::write(made.join("old"), "old").expect("write");
        fresh_folder(&folder).expect("an earlier demo's");
        assert!(!made.join("old").exists());
        std::fs::remove_file(made.join(MARKER)).expect("removed");
        std::fs::write(made.join("thesis"), "precious").expect("write");
        assert_eq!(fresh_folder(&folder).expect_err("not ours").code, "demo_folder");
        assert!(made.join("thesis").exists());
    }

    #[test]
    fn the_run_file_that_is_built_in_is_good() {
        assert!(RunFile::parse(RUN_FILE).is_ok());
    }
}
