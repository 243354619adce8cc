//! How a run is named on the command line.

use std::path::{Path, PathBuf};

use manyhands_network::invitation::Invitation;
use manyhands_proto::Digest;
use manyhands_proto::run_file::RunSpec;

use crate::failure::{Explain, Failure};

/// The file in a run's folder that holds its invitation.
pub(crate) const INVITATION_FILE: &str = "invitation";

/// A run, by what is at hand of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RunReference {
    pub(crate) invitation: Invitation,
    /// The folder that `launch` keeps, if the run was named by it.
    pub(crate) folder: Option<PathBuf>,
}

/// What of a launch's folder others than the coordinator read.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct LaunchFolder {
    pub(crate) spec: RunSpec,
    /// The data set's files.
    pub(crate) served: Vec<ServedFile>,
}

#[derive(Debug, serde::Deserialize)]
pub(crate) struct ServedFile {
    pub(crate) digest: Digest,
    pub(crate) path: PathBuf,
}

impl LaunchFolder {
    pub(crate) fn read(folder: &Path) -> Result<Self, Failure> {
        const REMEDY: &str = "name the folder of a run's launch";
        let path = folder.join("run.json");
        let bytes = std::fs::read(&path).map_err(|error| {
            Failure::new("run_folder", format!("cannot read {}: {error}", path.display()), REMEDY)
        })?;
        serde_json::from_slice(&bytes).explain("run_folder", REMEDY)
    }
}

/// An invitation: the line itself, a file that holds it, or the folder of the run's launch.
pub(crate) fn parse(text: &str) -> Result<RunReference, Failure> {
    let path = Path::new(text);
    if path.is_dir() {
        let invitation = read(&path.join(INVITATION_FILE))?;
        return Ok(RunReference { invitation, folder: Some(path.to_owned()) });
    }
    let invitation = if path.is_file() { read(path)? } else { invitation(text)? };
    Ok(RunReference { invitation, folder: None })
}

fn read(path: &Path) -> Result<Invitation, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let reason = format!("cannot read {}: {error}", path.display());
        Failure::new(
            "no_invitation",
            reason,
            "name the invitation that `manyhands launch` printed, or the run's folder",
        )
    })?;
    invitation(&text)
}

/// The whole line that `launch` prints, `manyhands join` and all, is as good as the invitation in it.
fn invitation(text: &str) -> Result<Invitation, Failure> {
    let word = text.split_whitespace().find(|word| word.starts_with("manyhands1"));
    word.unwrap_or(text)
        .parse()
        .explain("invitation", "copy the line that `manyhands launch` printed, whole")
}

#[cfg(test)]
mod tests {
    use manyhands_proto::{NodeId, RunId};

    use super::*;

    #[test]
    fn a_run_is_named_by_its_invitation_by_a_file_or_by_its_folder() {
        let line = Invitation {
            run: RunId::new([1; 32]),
            coordinator: NodeId::new([2; 32]),
            control: Vec::new(),
            data: Vec::new(),
            chain_genesis: [3; 32],
            chain_url: None,
        }
        .to_string();
        let folder = tempfile::tempdir().expect("folder");
        let file = folder.path().join(INVITATION_FILE);
        let by_folder = || parse(folder.path().to_str().expect("a path"));
        assert_eq!(by_folder().expect_err("no invitation yet").code, "no_invitation");
        std::fs::write(&file, format!("{line}\n")).expect("write");
        let named = by_folder().expect("a run");
        assert_eq!(parse(&line).expect("a line").invitation, named.invitation);
        let whole = parse(&format!("manyhands join {line}"));
        assert_eq!(whole.expect("a whole line").invitation, named.invitation);
        assert_eq!(parse(file.to_str().expect("a path")).expect("a file").folder, None);
        assert_eq!(parse("nonsense").expect_err("nonsense").code, "invitation");
    }
}
