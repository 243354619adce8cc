//! The demo's course, from text to report.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use manyhands_chain_client::ChainClient;
use manyhands_coordinator::RunManifest;
use manyhands_proto::run_file::RunFile;
use manyhands_proto::{Balance, Digest, NodeId, Round};
use serde_json::Value;
use tokio::sync::mpsc::Receiver;

use super::process::{Happening, Process, Stage};
use super::report::{OnChain, Recorded, Report, records};
use super::{Teller, baseline};
use crate::failure::{Explain, Failure};
use crate::folder;
use crate::progress::Progress;

/// Blocks come faster than on a real chain, so that windows elapse while somebody watches.
const BLOCK_TIME_MS: &str = "250";
/// Of the workers that are there from the start, the last is slowed down.
const WORKERS: usize = 3;
const SLOW_LOAD: &str = "25%";
/// Enough that a short run sees no text twice, little enough that it is prepared in seconds.
const TEXT_BYTES: u64 = 7_000_000;
const LOOPBACK: &str = "127.0.0.1:0";
/// How often a claim is tried until its reward has vested.
const CLAIM_ATTEMPTS: u32 = 60;
/// About so many rounds are told one by one.
const ROUNDS_TOLD: u32 = 20;
const PROMPT: &str = "/// Returns the ";

/// What the demo is given.
pub(super) struct Play {
    pub(super) teller: Teller,
    pub(super) folder: PathBuf,
    pub(super) run_path: PathBuf,
    pub(super) file: RunFile,
    pub(super) extra_workers: Vec<PathBuf>,
    pub(super) text: Vec<PathBuf>,
}

/// What is running, and what was heard of it.
struct Scene {
    stage: Stage,
    happenings: Receiver<Happening>,
    /// The first to be started is the last to be stopped.
    services: Vec<Process>,
    workers: Vec<Process>,
    invitation: String,
    /// The digests that each worker said it holds, by round.
    thetas: Vec<(String, Round, Digest)>,
    /// By round: how long the first to commit waited for the last, as a share of the round.
    waiting_shares: Vec<f64>,
    parameters: u64,
}

impl Play {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (stage, happenings) = Stage::new(self.folder.join("logs"))?;
        self.teller
            .tell(format!("logs of every process are in {}", self.folder.join("logs").display()));
        let unigram_loss = self.prepare(&stage).await?;
        let mut scene = Scene {
            stage,
            happenings,
            services: Vec::new(),
            workers: Vec::new(),
            invitation: String::new(),
            thetas: Vec::new(),
            waiting_shares: Vec::new(),
            parameters: 0,
        };
        let chain_url = self.raise_curtain(&mut scene).await?;
        self.train(&mut scene).await?;
        scene.workers.clear();
        let report = self.settle(&mut scene, &chain_url, unigram_loss).await?;
        for service in std::mem::take(&mut scene.services).into_iter().rev() {
            service.stop(&mut scene.happenings).await;
        }
        self.conclude(&report)
    }

    /// Text to token shards; gives the loss that token frequencies alone have.
    async fn prepare(&self, stage: &Stage) -> Result<f64, Failure> {
        self.teller.tell("preparing the text");
        let mut arguments: Vec<OsString> = vec!["prepare".into()];
        if self.text.is_empty() {
            arguments.extend(["--dependencies".into(), TEXT_BYTES.to_string().into()]);
        } else {
            arguments.push("--text".into());
            arguments.extend(self.text.iter().map(OsString::from));
            arguments.extend(["--extensions", "rs,md"].map(OsString::from));
        }
        arguments.extend(["--out".into(), self.data_folder().into()]);
        arguments
            .extend(["--vocabulary".into(), self.file.model.vocabulary_size.to_string().into()]);
        arguments
            .extend(["--held-out-per-mille", "40", "--shard-tokens", "262144"].map(OsString::from));
        let prepared = stage.run_own("prepare", &arguments).await?;
        let unigram_loss = number(&prepared, "unigram_loss")?;
        self.teller.tell(format!(
            "{} tokens of {} documents; token frequencies alone give a loss of {unigram_loss:.3}",
            prepared["train_tokens"], prepared["documents"]
        ));
        Ok(unigram_loss)
    }

    /// Chain, coordinator, verifier and the first workers.
    async fn raise_curtain(&self, scene: &mut Scene) -> Result<String, Failure> {
        let path = |name: &str| OsString::from(self.folder.join(name));
        let arguments = [
            "devnet".into(),
            "--dir".into(),
            path("chain"),
            "--listen".into(),
            LOOPBACK.into(),
            "--block-time-ms".into(),
            BLOCK_TIME_MS.into(),
        ];
        scene.serve("chain", &arguments)?;
        let chain_url = word(&self.hear(scene, "chain", "serving").await?, "url")?;
        self.teller.tell(format!("a development chain is served at {chain_url}"));

        let arguments: Vec<OsString> = vec![
            "launch".into(),
            self.run_path.clone().into(),
            "--dataset".into(),
            self.data_folder().into(),
            "--dir".into(),
            self.coordinator_folder().into(),
            "--chain".into(),
            chain_url.clone().into(),
            "--listen".into(),
            LOOPBACK.into(),
            "--page-port".into(),
            "0".into(),
        ];
        scene.serve("coordinator", &arguments)?;
        let launched = self.hear(scene, "coordinator", "launched").await?;
        scene.invitation = word(&launched, "invitation")?;
        scene.parameters = launched["parameters"].as_u64().unwrap_or_default();
        self.teller.tell(format!(
            "the run is registered and funded: {} parameters\n         live page: {}",
            scene.parameters,
            word(&launched, "page")?
        ));
        scene.serve("verifier", &self.node("verify", scene, "verifier", &[]))?;
        for number in 1..=WORKERS {
            let slow = number == WORKERS;
            let extra: &[&str] = if slow { &["--max-load", SLOW_LOAD] } else { &[] };
            self.join(scene, &format!("worker-{number}"), extra)?;
        }
        for (number, program) in (1..).zip(&self.extra_workers) {
            let name = format!("extra-{number}");
            let arguments = self.node("join", scene, &name, &[])[1..].to_vec();
            // It need not know our other options.
            scene.workers.push(scene.stage.start(&name, program, &arguments)?);
        }
        self.teller.tell(format!(
            "a verifier and {WORKERS} workers come in, the last at {SLOW_LOAD} of its speed; foreign workers: {}",
            self.extra_workers.len()
        ));
        Ok(chain_url)
    }

    fn join(&self, scene: &mut Scene, name: &str, extra: &[&str]) -> Result<(), Failure> {
        let arguments = self.node("join", scene, name, extra);
        let process = scene.stage.start_own(name, &arguments)?;
        scene.workers.push(process);
        Ok(())
    }

    /// The arguments of a worker or verifier; the command comes first.
    fn node(&self, command: &str, scene: &Scene, name: &str, extra: &[&str]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec![
            command.into(),
            scene.invitation.clone().into(),
            "--dir".into(),
            self.folder.join(name).into(),
            // So many processes share the machine's cores.
            "--threads".into(),
            "1".into(),
            "--listen".into(),
            LOOPBACK.into(),
        ];
        arguments.extend(extra.iter().map(OsString::from));
        arguments
    }

    /// Until everything is trained, settled and final.
    async fn train(&self, scene: &mut Scene) -> Result<(), Failure> {
        let mut late = Some("worker-late");
        loop {
            let (process, value) = self.next(scene).await?;
            match (process.as_str(), value["event"].as_str().unwrap_or_default()) {
                ("coordinator", "round") => {
                    let round = number_of(&value);
                    self.tell_round(&value);
                    scene.waiting_shares.extend(waiting_share(&value));
                    if round + 1 >= u64::from(self.file.run.rounds / 2)
                        && let Some(name) = late.take()
                    {
                        self.join(scene, name, &[])?;
                        self.teller.tell("one more worker joins, in the middle of the run");
                    }
                }
                ("coordinator", "complete") => {
                    self.teller.tell(
                        "all rounds are trained and settled; waiting for the chain's windows",
                    );
                }
                ("coordinator", "final") => return Ok(()),
                _ => {}
            }
        }
    }

    fn tell_round(&self, value: &Value) {
        if value["results"].as_array().is_none_or(Vec::is_empty) {
            self.teller.tell("what was found about the last rounds is on record");
            return;
        }
        let is_whole =
            value["admitted"].as_u64() == value["results"].as_array().map(|all| all.len() as u64);
        if is_whole && !self.is_told(number_of(value) + 1) {
            return;
        }
        let loss = value["train_loss"]
            .as_f64()
            .map_or(String::new(), |loss| format!(", training loss {loss:.3}"));
        let bits = value["payload_bytes"].as_u64().unwrap_or_default();
        self.teller.tell(format!(
            "{} of {} rounds done: {} of {} updates merged{loss}, {} KiB sent, {:.1} s",
            number_of(value) + 1,
            self.file.run.rounds,
            value["admitted"],
            value["results"].as_array().map_or(0, Vec::len),
            bits >> 10,
            value["duration_ms"].as_f64().unwrap_or_default() / 1e3
        ));
    }

    /// Of many rounds only some are told, by how many rounds are over.
    fn is_told(&self, rounds: u64) -> bool {
        let every = u64::from(self.file.run.rounds.div_ceil(ROUNDS_TOLD));
        rounds <= 1 || rounds.is_multiple_of(every)
    }

    /// Waits for an event of one process.
    async fn hear(&self, scene: &mut Scene, process: &str, event: &str) -> Result<Value, Failure> {
        loop {
            let (from, value) = self.next(scene).await?;
            if from == process && value["event"] == event {
                return Ok(value);
            }
        }
    }

    /// The next event of any process. What is told in any case is told here, and a process that ends too
    /// early is a failure here.
    async fn next(&self, scene: &mut Scene) -> Result<(String, Value), Failure> {
        loop {
            let happening = scene.happenings.recv().await;
            match happening.expect("the stage keeps a sender") {
                Happening::Event { process, value } => {
                    self.note(scene, &process, &value);
                    return Ok((process, value));
                }
                Happening::Refused { failure } => return Err(failure),
                Happening::Ended { process, status } if process.starts_with("extra-") => {
                    self.teller.tell(format!("{process} ended with {status}"));
                }
                Happening::Ended { process, status }
                    if status.success() && process.starts_with("worker-") => {}
                Happening::Ended { process, status: _ } if process == "verifier" => {}
                Happening::Ended { process, status } => {
                    return Err(scene.stage.failed(&process, status));
                }
            }
        }
    }

    fn note(&self, scene: &mut Scene, process: &str, value: &Value) {
        let field = |name: &str| value[name].as_str().unwrap_or_default();
        let short = |name: &str| field(name).get(..8).unwrap_or_default().to_owned();
        match (process, field("event")) {
            // Dozens of them; the page shows all.
            ("coordinator", "note") if field("kind") == "audit" => {}
            ("coordinator", "note") => self.teller.tell(field("text")),
            ("coordinator", "problem") => {
                self.teller.tell(format!("{}: {}", field("what"), field("why")))
            }
            ("coordinator", "held_out_loss") if !self.is_told(number_of(value)) => {}
            ("coordinator", "held_out_loss") => self.teller.tell(format!(
                "θ of round {}: held-out loss {:.3}",
                value["round"],
                value["loss"].as_f64().unwrap_or_default()
            )),
            ("coordinator", "slashed") => self.teller.tell(format!(
                ">>> {} is slashed for round {}: {}",
                short("worker"),
                value["round"],
                field("reason")
            )),
            ("verifier", "voted") => self.teller.tell(format!(
                ">>> the verifier votes on {}'s round {}: {}",
                short("accused"),
                value["round"],
                field("reason")
            )),
            (_, "trouble") => self.teller.tell(format!("{process}: {}", field("text"))),
            (_, "synced") => {
                let round = value["round"].as_u64().and_then(|round| u32::try_from(round).ok());
                if let (Some(round), Ok(theta)) = (round, field("theta").parse()) {
                    scene.thetas.push((process.to_owned(), Round(round), theta));
                }
            }
            _ => {}
        }
    }

    /// Everything after the last round: audit, claims, export, sample, baseline.
    async fn settle(
        &self,
        scene: &mut Scene,
        chain_url: &str,
        unigram_loss: f64,
    ) -> Result<Report, Failure> {
        let folder = self.coordinator_folder();
        let manifest = RunManifest::read(&folder).explain("demo_folder", "run the demo again")?;
        let manifest = manifest.ok_or_else(|| {
            Failure::new("demo_folder", "the run has no manifest", "run the demo again")
        })?;
        let records = records(&folder)?;
        let recorded = Recorded::of(&records, scene.parameters);

        let arguments: Vec<OsString> =
            vec!["audit".into(), folder.clone().into(), "--chain".into(), chain_url.into()];
        let audit = match scene.stage.run_own("audit", &arguments).await {
            Ok(document) => word(&document, "audit")?,
            Err(failure) => failure.reason,
        };
        self.teller.tell(format!("audit: {audit}"));
        let rewards_paid = self.claim(scene, chain_url).await?;
        let sample = self.sample(scene).await?;
        let one_process = self.baseline(&manifest, &records).await?;

        let chain = ChainClient::connect(chain_url).await?;
        let on_chain = OnChain::of(&chain, manifest.run).await?;
        let extra = self.extra_ids()?;
        let cheaters = on_chain.cheaters(&records);
        let honest_workers_slashed =
            cheaters.iter().filter(|cheater| !extra.contains(&cheater.worker)).count();
        let loss_at = |at: Option<(&Round, &f64)>| {
            at.map(|(_, loss)| *loss).ok_or_else(|| {
                Failure::new(
                    "demo_loss",
                    "no verifier measured a held-out loss",
                    "read the verifier's log",
                )
            })
        };
        let (waiting_share_median, waiting_share_max) = middle_and_worst(&scene.waiting_shares);
        let validation_loss_last = loss_at(recorded.losses.last_key_value())?;
        let equal =
            scene.thetas.iter().all(|(_, round, theta)| recorded.thetas.get(round) == Some(theta));
        Ok(Report {
            rounds: manifest.spec.run.rounds,
            workers: recorded.workers,
            parameters: scene.parameters,
            tokens: recorded.tokens,
            validation_loss_first: loss_at(recorded.losses.first_key_value())?,
            validation_loss_last,
            validation_loss_one_process: one_process,
            loss_above_one_process: validation_loss_last / one_process - 1.0,
            unigram_loss,
            bits_per_parameter: recorded.bits_per_parameter,
            theta_digests_equal: equal,
            theta_digests_compared: scene.thetas.len(),
            theta: recorded
                .thetas
                .last_key_value()
                .map_or(manifest.spec.data.theta, |(_, theta)| *theta),
            waiting_share_max,
            waiting_share_median,
            contributions_on_chain: on_chain.contributions,
            rewards_paid,
            cheaters,
            honest_workers_slashed,
            audit,
            chain_finalized_block: on_chain.finalized_block,
            sample,
            seconds: self.teller.seconds(),
        })
    }

    /// Claims for everybody who is ours; gives what was paid.
    async fn claim(&self, scene: &Scene, chain_url: &str) -> Result<Balance, Failure> {
        let names = (1..=WORKERS).map(|number| format!("worker-{number}"));
        let mut paid = 0;
        for name in names.chain(["worker-late".to_owned(), "verifier".to_owned()]) {
            let folder = self.folder.join(&name);
            let arguments: Vec<OsString> = vec![
                "claim".into(),
                scene.invitation.clone().into(),
                "--dir".into(),
                folder.into(),
                "--chain".into(),
                chain_url.into(),
            ];
            let mut attempt = 0;
            let claimed = loop {
                match scene.stage.run_own(&format!("claim-{name}"), &arguments).await {
                    Err(failure)
                        if failure.code == "nothing_vested" && attempt < CLAIM_ATTEMPTS =>
                    {
                        attempt += 1;
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    outcome => break outcome,
                }
            };
            match claimed {
                Ok(claimed) => {
                    let amount = |name: &str| {
                        serde_json::from_value(claimed[name].clone()).unwrap_or(Balance(0))
                    };
                    paid += amount("paid").0;
                    self.teller.tell(format!(
                        "{name} claimed {}; its account went from {} to {}",
                        amount("paid"),
                        amount("before"),
                        amount("after")
                    ));
                }
                Err(failure) if failure.code == "nothing_to_claim" => {
                    self.teller.tell(format!("{name} has nothing to claim"));
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(Balance(paid))
    }

    async fn sample(&self, scene: &Scene) -> Result<String, Failure> {
        let model = self.folder.join("model");
        let arguments: Vec<OsString> = vec![
            "export".into(),
            scene.invitation.clone().into(),
            "--to".into(),
            model.clone().into(),
        ];
        scene.stage.run_own("export", &arguments).await?;
        let arguments: Vec<OsString> = vec![
            "generate".into(),
            model.clone().into(),
            "--prompt".into(),
            PROMPT.into(),
            "--tokens".into(),
            "120".into(),
            "--device".into(),
            "cpu".into(),
        ];
        let generated = scene.stage.run_own("generate", &arguments).await?;
        self.teller.tell(format!("the model is exported to {}", model.display()));
        Ok(format!("{PROMPT}{}", word(&generated, "text")?))
    }

    async fn baseline(
        &self,
        manifest: &RunManifest,
        records: &[manyhands_rules::record::RoundRecord],
    ) -> Result<f64, Failure> {
        self.teller.tell("training the same in one process, for comparison");
        let (spec, records, data) = (manifest.spec.clone(), records.to_vec(), self.data_folder());
        let training = tokio::task::spawn_blocking(move || {
            let mut progress = Progress::default();
            baseline::held_out_loss(&spec, &records, &data, &mut |done, total| {
                progress.set("training in one process", done, total);
            })
        });
        let loss = training.await.explain("demo_baseline", "report this")??;
        self.teller.tell(format!("one process comes to a held-out loss of {loss:.3}"));
        Ok(loss)
    }

    /// The node ids of the workers that are not ours.
    fn extra_ids(&self) -> Result<Vec<NodeId>, Failure> {
        let names = (1..=self.extra_workers.len()).map(|number| format!("extra-{number}"));
        names.map(|name| Ok(folder::existing_key(&self.folder.join(name))?.node_id())).collect()
    }

    fn conclude(&self, report: &Report) -> Result<(), Failure> {
        let path = self.folder.join("report.json");
        let json = serde_json::to_string_pretty(report).explain("demo_report", "report this")?;
        std::fs::write(&path, json + "\n").explain("demo_folder", "make room on the disk")?;
        let summary: BTreeMap<&str, String> = BTreeMap::from([
            (
                "held-out loss",
                format!(
                    "{:.3} at first, {:.3} at last; one process {:.3} ({:+.1} %); token frequencies {:.3}",
                    report.validation_loss_first,
                    report.validation_loss_last,
                    report.validation_loss_one_process,
                    report.loss_above_one_process * 100.0,
                    report.unigram_loss
                ),
            ),
            ("updates", format!("{:.4} bits per parameter", report.bits_per_parameter)),
            (
                "waiting",
                format!(
                    "the worker that waited longest for the others did so for {:.0} % of a round in the \
                     middle, {:.0} % at worst",
                    report.waiting_share_median * 100.0,
                    report.waiting_share_max * 100.0
                ),
            ),
            ("paid", report.rewards_paid.to_string()),
            ("audit", report.audit.clone()),
        ]);
        for (what, found) in summary {
            self.teller.tell(format!("{what}: {found}"));
        }
        for cheater in &report.cheaters {
            self.teller.tell(format!(
                "cheater {} lost {} of its stake: {}",
                cheater.worker.short(),
                cheater.amount_slashed,
                cheater.reason
            ));
        }
        self.teller.tell(format!("a sample of the model:\n\n{}\n", report.sample));
        self.teller.tell(format!("report: {}", path.display()));
        let broken = report.broken_promises(&self.extra_ids()?);
        if broken.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            "demo_facts",
            broken.join("; "),
            &format!("read {} and the logs beside it", path.display()),
        ))
    }

    fn data_folder(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn coordinator_folder(&self) -> PathBuf {
        self.folder.join("coordinator")
    }
}

impl Scene {
    fn serve(&mut self, name: &str, arguments: &[OsString]) -> Result<(), Failure> {
        let process = self.stage.start_own(name, arguments)?;
        self.services.push(process);
        Ok(())
    }
}

fn number_of(event: &Value) -> u64 {
    event["round"].as_u64().unwrap_or_default()
}

/// None for a round in which nobody trained.
fn waiting_share(round: &Value) -> Option<f64> {
    let waited = round["waiting_ms_max"].as_f64()?;
    let duration = round["duration_ms"].as_f64().filter(|duration| *duration > 0.0)?;
    round["results"].as_array().filter(|results| !results.is_empty())?;
    Some(waited / duration)
}

fn middle_and_worst(shares: &[f64]) -> (f64, f64) {
    let mut shares = shares.to_vec();
    shares.sort_by(f64::total_cmp);
    let middle = shares.get(shares.len() / 2).copied().unwrap_or_default();
    (middle, shares.last().copied().unwrap_or_default())
}

fn word(value: &Value, field: &str) -> Result<String, Failure> {
    value[field].as_str().map(str::to_owned).ok_or_else(|| unexpected(value, field))
}

fn number(value: &Value, field: &str) -> Result<f64, Failure> {
    value[field].as_f64().ok_or_else(|| unexpected(value, field))
}

fn unexpected(value: &Value, field: &str) -> Failure {
    Failure::new("demo_process", format!("expected the field {field} in {value}"), "report this")
}
