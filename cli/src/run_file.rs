//! A run's file, as commands read it.

use std::path::Path;

use manyhands_proto::run_file::RunFile;

use crate::failure::Failure;

/// The file, with the paths in it made relative to this process; another data set may take the place of its own.
pub(crate) fn read(path: &Path, dataset: Option<&Path>) -> Result<RunFile, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::new(
            "run_file",
            format!("cannot read {}: {error}", path.display()),
            "name a run's file; configs/ has some",
        )
    })?;
    let mut file = RunFile::parse(&text).map_err(|error| {
        let problems: Vec<_> = error.problems.iter().map(ToString::to_string).collect();
        let reason = format!("{}: {}", path.display(), problems.join("\n"));
        Failure::new("run_file", reason, "change the lines that are named")
    })?;
    let beside = path.parent().unwrap_or(Path::new("."));
    file.data.dataset = match dataset {
        Some(dataset) => dataset.to_owned(),
        None => beside.join(&file.data.dataset),
    };
    file.data.start_from = file.data.start_from.map(|folder| beside.join(folder));
    Ok(file)
}
