//! The program's answers: help, refusals, JSON.

use std::process::{Command, Output};

fn manyhands(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_manyhands"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .env_remove("MANYHANDS_CHAIN")
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[test]
fn help_lists_what_there_is_and_nothing_else() {
    let help = text(&manyhands(&["--help"]).stdout);
    for command in [
        "doctor",
        "launch",
        "join",
        "verify",
        "status",
        "audit",
        "claim",
        "export",
        "generate",
        "devnet",
        "keys",
        "prepare",
        "demo",
        "plan",
        "calibrate",
        "fingerprint",
    ] {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(command)),
            "{command} in {help}"
        );
    }
    let join = text(&manyhands(&["join", "--help"]).stdout);
    let audit = text(&manyhands(&["audit", "--help"]).stdout);
    for later in ["simulate ", "--ask", "--bundle", "--offline"] {
        let listed = |help: &str| help.lines().any(|line| line.trim_start().starts_with(later));
        assert!(!listed(&help) && !listed(&join) && !listed(&audit), "{later}");
    }
}

#[test]
fn a_refusal_has_a_code_a_reason_and_a_remedy() {
    let output = manyhands(&["status", "nonsense", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let error = &json(&output)["error"];
    assert_eq!(error["code"], "invitation");
    assert!(error["reason"].as_str().is_some_and(|reason| reason.contains("nonsense")), "{error}");
    assert!(error["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{error}");
    let output = manyhands(&["status", "nonsense"]);
    assert!(text(&output.stderr).contains("error [invitation]"), "{output:?}");
    assert!(text(&output.stderr).contains("what to do: "), "{output:?}");
}

/// The smallest recipe with this in the place of that, in a file of its own.
fn changed_recipe(folder: &std::path::Path, from: &str, to: &str) -> String {
    let recipe = include_str!("../../configs/1m.toml");
    assert!(recipe.contains(from), "{recipe}");
    let path = folder.join("run.toml");
    std::fs::write(&path, recipe.replace(from, to)).expect("written");
    path.to_str().expect("a path").to_owned()
}

#[test]
fn a_plan_says_what_deters_and_what_checks_cost() {
    let folder = tempfile::tempdir().expect("folder");
    let file = changed_recipe(folder.path(), "[data]", "[data]");
    let plan = json(&manyhands(&["plan", &file, "--json"]));
    assert_eq!(plan["cheating_pays"], false, "{plan}");
    assert_eq!(plan["detection"]["audit_rate"], 0.05, "{plan}");
    let text = text(&manyhands(&["plan", &file]).stdout);
    for line in ["in ten rounds", "38.5 %", "stake_min that takes", "replays, whole run"] {
        assert!(text.contains(line), "{line} in {text}");
    }
}

#[cfg(feature = "coordinator")]
#[test]
fn a_run_in_which_cheating_pays_is_not_launched_unless_its_file_says_so() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("launched");
    let dir = dir.to_str().expect("a path");
    let launch = |file: &str| json(&manyhands(&["launch", file, "--dir", dir, "--json"]));
    let file = changed_recipe(
        folder.path(),
        "[verification]",
        "[chain]\nstake_min = 1_000_000\n\n[verification]",
    );
    let refusal = &launch(&file)["error"];
    assert_eq!(refusal["code"], "cheating_pays", "{refusal}");
    assert!(refusal["remedy"].as_str().is_some_and(|text| text.contains("stake_min")), "{refusal}");
    assert!(!folder.path().join("launched").exists(), "nothing was begun");
    let text = std::fs::read_to_string(&file).expect("text");
    let open = text.replace("[verification]", "[verification]\ncheating_may_pay = true");
    std::fs::write(&file, open).expect("written");
    // Its data set is not there: the next thing that is looked at.
    assert_ne!(launch(&file)["error"]["code"], "cheating_pays");
}

#[test]
fn a_key_is_made_once_and_shown() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("node");
    let dir = dir.to_str().expect("a path");
    assert_eq!(
        json(&manyhands(&["keys", "show", "--dir", dir, "--json"]))["error"]["code"],
        "no_key"
    );
    let made = json(&manyhands(&["keys", "new", "--dir", dir, "--json"]));
    let shown = json(&manyhands(&["keys", "show", "--dir", dir, "--json"]));
    assert_eq!(made["account"], shown["account"]);
    assert_eq!(
        json(&manyhands(&["keys", "new", "--dir", dir, "--json"]))["error"]["code"],
        "key_exists"
    );
}

#[cfg(feature = "coordinator")]
#[test]
fn a_run_file_with_an_unknown_field_is_refused_with_line_and_field() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("run.toml");
    let recipe =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/1m.toml"));
    let wrong = recipe.expect("a recipe").replace("layers = 4", "layer_count = 4");
    std::fs::write(&path, wrong).expect("write");
    let output = manyhands(&["launch", path.to_str().expect("a path"), "--json"]);
    let error = &json(&output)["error"];
    assert_eq!((output.status.code(), &error["code"]), (Some(1), &"run_file".into()));
    let reason = error["reason"].as_str().expect("a reason");
    assert!(reason.contains("line ") && reason.contains("layer_count"), "{reason}");
}

#[cfg(all(feature = "worker", feature = "coordinator"))]
#[test]
fn text_becomes_a_data_set_that_is_not_overwritten_and_a_run_is_calibrated_on_it() {
    let folder = tempfile::tempdir().expect("folder");
    let text = folder.path().join("text");
    std::fs::create_dir(&text).expect("folder");
    for file in 0..200 {
        let lines: String = (0..40)
            .map(|line| format!("many hands make light work, {} of {file}\n", line * file))
            .collect();
        std::fs::write(text.join(format!("{file}.txt")), lines).expect("write");
    }
    let (text, out) = (text, folder.path().join("data"));
    let arguments = [
        "prepare",
        "--text",
        text.to_str().expect("a path"),
        "--out",
        out.to_str().expect("a path"),
        "--vocabulary",
        "300",
        "--held-out-per-mille",
        "100",
        "--json",
    ];
    let prepared = json(&manyhands(&arguments));
    assert_eq!(prepared["documents"], 200);
    assert!(prepared["train_tokens"].as_u64() > prepared["held_out_tokens"].as_u64(), "{prepared}");
    assert!(
        prepared["unigram_loss"].as_f64().is_some_and(|loss| loss > 1.0 && loss < 6.0),
        "{prepared}"
    );
    assert_eq!(json(&manyhands(&arguments))["error"]["code"], "folder_exists");

    // What a run with this text may hold its workers to.
    let recipe = include_str!("../../configs/1m.toml");
    let run = folder.path().join("run.toml");
    let smaller = recipe.replace("vocabulary_size = 2048", "vocabulary_size = 300");
    std::fs::write(&run, smaller).expect("written");
    let [run, data] = [&run, &out].map(|path| path.to_str().expect("a path"));
    let calibrated = json(&manyhands(&[
        "calibrate",
        run,
        "--dataset",
        data,
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--steps",
        "4",
        "--sequences",
        "2",
        "--json",
    ]));
    let over = |name: &str| calibrated[name].as_f64().expect("a number");
    assert!(over("honest_over_threshold") < 1.0 / 3.0, "{calibrated}");
    assert!(over("cheat_over_threshold") > 3.0, "{calibrated}");
    let rows = calibrated["rows"].as_array().expect("rows");
    let honest = rows.iter().filter(|row| row["honest"] == true).count();
    assert!(honest >= 3 && rows.len() - honest == 4, "{calibrated}");
    assert!(calibrated["suggested"]["same_kind_delta_distance_max"].as_f64() < Some(1e-3));
    let other = recipe.replace("vocabulary_size = 2048", "vocabulary_size = 299");
    std::fs::write(run, other).expect("written");
    let refused = json(&manyhands(&["calibrate", run, "--dataset", data, "--json"]));
    let reason = refused["error"]["reason"].as_str().expect("a reason");
    assert!(reason.contains("299") && reason.contains("300"), "{reason}");
}
