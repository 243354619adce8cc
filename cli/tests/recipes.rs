//! Every recipe is complete, and what its comments say of it is computed.

use std::path::{Path, PathBuf};

use manyhands_gradient::Layout;
use manyhands_proto::TokenCount;
use manyhands_proto::run_file::RunFile;
use manyhands_rules::economics::Economics;
use manyhands_rules::reward;

fn recipes() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut recipes: Vec<_> = std::fs::read_dir(folder)
        .expect("configs/")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| (path.clone(), std::fs::read_to_string(path).expect("text")))
        .collect();
    recipes.sort();
    recipes
}

/// The number after `# name: ` in a recipe's comments.
fn stated(text: &str, name: &str) -> Option<u64> {
    let prefix = format!("# {name}: ");
    let rest = text.lines().find_map(|line| line.strip_prefix(&prefix))?;
    rest.split(' ').next()?.trim_end_matches('.').parse().ok()
}

#[test]
fn every_recipe_is_a_run_of_the_size_that_it_states() {
    let mut sizes = Vec::new();
    for (path, text) in recipes() {
        let file =
            RunFile::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let parameters = Layout::of(&file.model).expect("a layout").parameter_count().0;
        assert_eq!(stated(&text, "parameters"), Some(parameters), "{}", path.display());
        sizes.push(parameters);
    }
    for about in [1_000_000_u64, 10_000_000, 125_000_000, 350_000_000, 1_000_000_000] {
        assert!(
            sizes.iter().any(|size| size.abs_diff(about) < about / 10),
            "no recipe of about {about}"
        );
    }
}

#[test]
fn every_budget_pays_for_its_run_with_four_times_the_workers_that_it_needs() {
    for (path, text) in recipes() {
        let file = RunFile::parse(&text).expect("parsed by the other test");
        let (run, training) = (&file.run, &file.training);
        let sequences = u64::from(run.rounds)
            * u64::from(4 * run.workers_min)
            * u64::from(training.batch_sequences)
            * u64::from(training.steps_per_round);
        let tokens = TokenCount(sequences * u64::from(file.model.context_length));
        let work = reward::work(&file.model, tokens);
        let trained = u128::from(work.0) * file.chain.price_per_work_unit.0;
        // A replay is paid like training; a tenth is what audits begin with.
        let cost = trained + trained / 10;
        assert!(cost <= file.chain.budget.0, "{}: {cost}", path.display());
    }
}

#[test]
fn in_no_recipe_cheating_pays_not_even_for_a_worker_of_four_times_the_mean_speed() {
    for (path, text) in recipes() {
        let file = RunFile::parse(&text).expect("parsed by the other test");
        let economics = Economics::of(&file);
        assert!(!economics.cheating_pays(&file), "{}", path.display());
        let covered = economics.deterrent.speed_covered;
        assert!(covered.is_some_and(|times| times >= 4.0), "{}: {covered:?}", path.display());
    }
}

#[cfg(feature = "worker")]
#[test]
fn every_recipe_fits_the_gpu_that_it_names() {
    use manyhands_model::device::MemoryNeed;
    for (path, text) in recipes() {
        let file = RunFile::parse(&text).expect("parsed by the other test");
        let training = &file.training;
        let need = MemoryNeed::of(&file.model, training.micro_batch_sequences, training.precision);
        let need = need.expect("a layout").device_bytes();
        assert_eq!(stated(&text, "device memory"), Some(need >> 20), "{}", path.display());
        if let Some(gigabytes) = stated(&text, "Smallest GPU") {
            // A card of 8 GB has a little less than 8 GiB.
            assert!(need < (gigabytes << 30) / 100 * 95, "{}", path.display());
        }
    }
}
