//! What checking costs, and below which stake cheating pays: from a run's file alone.
//!
//! The model: a cheat saves all of a round's cost, as what was never trained encodes as well as anything else, and no
//! cost is above the round's reward r. It does so in every round, with as much credibility as can be had, so that it is
//! replayed at the lowest rate q. A replay finds it with probability d; then it loses the round's reward and the slash s: that
//! of a fault, or of hiding when it is drawn, whichever is less. Cheating loses where r < q·d·(s + r), so where
//! s > r·(1/(q·d) − 1).

use manyhands_gradient::CHUNK;
use manyhands_proto::Balance;
use manyhands_proto::TokenCount;
use manyhands_proto::run_file::{ChainKind, Profile, Rule, RunFile};
use serde::Serialize;

use crate::coordinator::WEIGHERS_MAX;
use crate::credibility::Credibility;
use crate::reward::{layout, work};
use crate::sampling::WEIGHED_SEQUENCES;

/// d of a replay of the whole round. Every cheat that was tried was found; this leaves room for those that were not.
const DETECTION: f64 = 0.95;
/// A backward pass costs twice what a forward pass does.
const FORWARD_SHARE: f64 = 1.0 / 3.0;
/// Moments at the start of a round, two of 8 bits each.
const MOMENTS_BITS: f64 = 2.0 * 8.0;
/// Groups of 4,096 values of 32 bits that open one chunk of an end state: one of θ, and at most two of moments.
const GROUPS_PER_CHUNK: f64 = 3.0;
const F32_BITS: f64 = 32.0;

/// Of a worker of mean speed, where the number of workers matters with as few as the run starts with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Economics {
    pub parameters: u64,
    pub detection: Detection,
    pub deterrent: Deterrent,
    pub cost: Cost,
    pub traffic: Traffic,
}

/// How likely a cheat is found, at the lowest audit rate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Detection {
    /// q.
    pub audit_rate: f64,
    pub per_round: f64,
    pub over_ten_rounds: f64,
    /// A newcomer's rounds that are replayed whatever is drawn.
    pub probation_rounds: u32,
}

/// What a cheat stands to lose, beside what it has to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Deterrent {
    pub reward_per_round: Balance,
    /// What a fault takes of the smallest stake.
    pub slash: Balance,
    /// What it takes to commit and then show nothing, which a cheat would do when it is drawn.
    pub slash_for_hiding: Balance,
    /// The slash below which cheating pays.
    pub slash_needed: Balance,
    /// The `stake_min` that this takes; none where no stake helps, as nothing is replayed or slashed.
    pub stake_needed: Option<Balance>,
    /// Workers up to so many times the mean speed are deterred: what cheating saves grows with a worker's share. None
    /// where there is nothing to earn.
    pub speed_covered: Option<f64>,
    pub vesting_rounds: u32,
    /// Rounds in which a cheat is replayed once, on average; none where it never is.
    pub vesting_rounds_needed: Option<u32>,
}

/// Computing spent on checks, as shares of the computing spent on training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// Replays of workers with full credibility.
    pub replays_in_the_steady_state: f64,
    /// Replays of workers that are there from the first round to the last, probation included.
    pub replays_of_the_whole_run: f64,
    /// Measuring what each update does to held-out loss before the merge.
    pub weighing: f64,
}

/// Bits per parameter of the model, for one worker and round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Traffic {
    /// Its update, as real ones measure.
    pub update: f64,
    /// What the coordinator opens of its states in every round.
    pub codec_check: f64,
    /// What a verifier fetches for a replay and the coordinator opens to compare, where two machines do not end in the
    /// same bits, times how often there is one in the steady state.
    pub replays: f64,
}

impl Economics {
    pub fn of(file: &RunFile) -> Self {
        let layout = layout(&file.model);
        let parameters = layout.parameter_count().0;
        let RunFile { run, training, verification, chain, .. } = file;
        let rate = |credibility: Credibility| {
            let (numerator, denominator) =
                credibility.audit_rate(verification.audit_rate_per_mille);
            (numerator as f64 / denominator as f64).min(1.0)
        };
        let audit_rate = rate(Credibility::full());
        let per_round = audit_rate * DETECTION;

        let sequences = u64::from(training.batch_sequences) * u64::from(training.steps_per_round);
        let tokens = TokenCount(sequences * u64::from(file.model.context_length));
        let reward = work(&file.model, tokens).0 as f64 * chain.price_per_work_unit.0 as f64;
        let share = |per_mille: u32| f64::from(per_mille) / 1_000.0;
        let slash_of = |per_mille: u32| chain.stake_min.0 as f64 * share(per_mille);
        let (slash, hiding) =
            (slash_of(chain.slash_per_mille), slash_of(chain.withheld_slash_per_mille));
        // A cheat takes what costs it less.
        let slashed = share(chain.slash_per_mille.min(chain.withheld_slash_per_mille));
        let slash_needed = if reward > 0.0 { reward * (1.0 / per_round - 1.0) } else { 0.0 };
        let stake_needed = if slash_needed > 0.0 { slash_needed / slashed } else { 0.0 };
        let balance = |amount: f64| Balance(amount.ceil() as u128);

        let workers = f64::from(run.workers_min.max(1));
        let is_weighed = file.aggregation.rules.contains(&Rule::LossGate);
        let weighed = WEIGHERS_MAX as f64 * (workers + 1.0) * WEIGHED_SEQUENCES as f64;
        let chunks = layout.chunk_count() as f64;
        let per_parameter = |values: f64| values * F32_BITS / parameters as f64;
        // Of θ_H, e_in and e_next.
        let opened = 3.0 * chunks.min(f64::from(verification.codec_chunks)) * CHUNK as f64;
        let compared = if verification.fingerprint.is_some() {
            // Digests are compared; a verifier shows that it has what it names.
            chunks.min(f64::from(verification.codec_chunks)) * CHUNK as f64
        } else {
            // Of the worker's end and the verifier's.
            2.0 * GROUPS_PER_CHUNK
                * chunks.min(f64::from(verification.replay_chunks))
                * CHUNK as f64
        };
        Self {
            parameters,
            detection: Detection {
                audit_rate,
                per_round,
                over_ten_rounds: 1.0 - (1.0 - per_round).powi(10),
                probation_rounds: verification.probation_checks,
            },
            deterrent: Deterrent {
                reward_per_round: balance(reward),
                slash: balance(slash),
                slash_for_hiding: balance(hiding),
                slash_needed: balance(slash_needed),
                stake_needed: stake_needed.is_finite().then(|| balance(stake_needed)),
                speed_covered: (slash_needed > 0.0).then(|| slash.min(hiding) / slash_needed),
                vesting_rounds: chain.vesting_rounds,
                vesting_rounds_needed: (audit_rate > 0.0).then(|| (1.0 / audit_rate).ceil() as u32),
            },
            cost: Cost {
                replays_in_the_steady_state: audit_rate,
                replays_of_the_whole_run: expected_replays(
                    run.rounds,
                    Credibility::on_probation(verification.probation_checks),
                    &rate,
                ) / f64::from(run.rounds.max(1)),
                weighing: if is_weighed {
                    FORWARD_SHARE * weighed / (workers * sequences as f64)
                } else {
                    0.0
                },
            },
            traffic: Traffic {
                update: typical_bits(file.codec.profile),
                codec_check: per_parameter(opened),
                replays: audit_rate * (MOMENTS_BITS + per_parameter(compared)),
            },
        }
    }

    /// Whether a worker of mean speed earns more by cheating. Without a chain nobody earns anything.
    pub fn cheating_pays(&self, file: &RunFile) -> bool {
        file.chain.kind == ChainKind::Substrate
            && self.deterrent.slash.min(self.deterrent.slash_for_hiding)
                < self.deterrent.slash_needed
    }
}

/// Replays of an honest worker in so many rounds, on average.
fn expected_replays(rounds: u32, newcomer: Credibility, rate: &dyn Fn(Credibility) -> f64) -> f64 {
    // How likely a worker is to have each credibility. There are few that differ in their rate.
    let mut likely = vec![(newcomer, 1.0)];
    let mut replays = 0.0;
    for _ in 0..rounds {
        let mut next: Vec<(Credibility, f64)> = Vec::with_capacity(likely.len() + 1);
        let mut add = |credibility, share: f64| match next.iter_mut().find(|it| it.0 == credibility)
        {
            Some(found) => found.1 += share,
            None => next.push((credibility, share)),
        };
        for (before, share) in likely {
            let replayed = share * rate(before);
            replays += replayed;
            let mut after = before;
            after.passed();
            // With full credibility nothing changes any more.
            let after =
                if rate(after) < rate(before) || before.is_on_probation() { after } else { before };
            add(after, replayed);
            add(before, share - replayed);
        }
        likely = next;
    }
    replays
}

/// Of updates of real runs, everything counted: docs/experiments.
fn typical_bits(profile: Profile) -> f64 {
    match profile {
        Profile::Standard => 0.135,
        Profile::Quality => 0.237,
        Profile::Wide => 0.48,
        Profile::Flat12 => 0.225,
        Profile::DenseFp16 => 16.0,
        Profile::DenseInt8 => 8.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(sections: &str) -> RunFile {
        let text = format!(
            "[run]\nname = \"x\"\nrounds = 100\nworkers_min = 4\n\
             [model]\nvocabulary_size = 512\nhidden_size = 64\nlayers = 2\nheads = 4\nkey_value_heads = 2\n\
             feed_forward_size = 128\ncontext_length = 64\n\
             [training]\nsteps_per_round = 10\nbatch_sequences = 8\nmicro_batch_sequences = 8\nlearning_rate = 1e-3\n\
             [data]\ndataset = \"x\"\n{sections}"
        );
        RunFile::parse(&text).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn a_stake_deters_from_where_the_formula_says() {
        let economics = Economics::of(&file(""));
        let Detection { audit_rate, per_round, over_ten_rounds, .. } = economics.detection;
        assert_eq!((audit_rate, per_round), (0.05, 0.05 * 0.95));
        assert!((over_ten_rounds - (1.0 - 0.9525_f64.powi(10))).abs() < 1e-12);
        let Deterrent {
            reward_per_round, slash_needed, stake_needed, vesting_rounds_needed, ..
        } = economics.deterrent;
        // 1 / .0475 − 1 rounds of reward; half of a stake is the least that is slashed.
        let needed = reward_per_round.0 as f64 * (1.0 / 0.0475 - 1.0);
        assert!((slash_needed.0 as f64 - needed).abs() <= 1.0);
        let stake_needed = stake_needed.expect("a stake helps");
        assert!(stake_needed.0.abs_diff(2 * slash_needed.0) <= 2);
        assert_eq!(vesting_rounds_needed, Some(20));

        let with_stake = |stake: u128| file(&format!("[chain]\nstake_min = {stake}"));
        for (stake, pays) in [(stake_needed.0, false), (stake_needed.0 - 4, true)] {
            let file = with_stake(stake);
            assert_eq!(Economics::of(&file).cheating_pays(&file), pays, "{stake}");
        }
        let free = file("[chain]\nkind = \"none\"\nstake_min = 0");
        assert!(!Economics::of(&free).cheating_pays(&free), "nobody is paid");
    }

    #[test]
    fn where_nothing_is_replayed_slashed_or_paid_no_stake_is_named() {
        let deterrent = |sections: &str| {
            let file = file(sections);
            let economics = Economics::of(&file);
            (economics.cheating_pays(&file), economics.deterrent)
        };
        let (pays, never) = deterrent("[verification]\naudit_rate_per_mille = 0");
        assert!(pays && never.stake_needed.is_none() && never.vesting_rounds_needed.is_none());
        let (pays, spared) = deterrent("[chain]\nslash_per_mille = 0");
        assert!(pays && spared.stake_needed.is_none());
        let (pays, hidden) = deterrent("[chain]\nwithheld_slash_per_mille = 0");
        assert!(pays && hidden.stake_needed.is_none(), "a cheat would hide");
        let (pays, unpaid) = deterrent("[chain]\nprice_per_work_unit = 0");
        assert!(!pays && unpaid.speed_covered.is_none());
        assert_eq!(unpaid.stake_needed, Some(Balance(0)));
    }

    #[test]
    fn replays_are_counted_as_they_are_drawn() {
        let cost = |sections: &str| Economics::of(&file(sections)).cost;
        // All of them while on probation.
        assert_eq!(cost("[verification]\nprobation_checks = 100").replays_of_the_whole_run, 1.0);
        let usual = cost("").replays_of_the_whole_run;
        // Five of a hundred at once, the others at most a tenth and at least a twentieth of the time.
        assert!((0.05 + 0.95 * 0.05..0.05 + 0.95 * 0.1).contains(&usual), "{usual}");
        let always = cost("[verification]\naudit_rate_per_mille = 1000\nprobation_checks = 0");
        assert_eq!(always.replays_in_the_steady_state, 0.5);
    }

    #[test]
    fn the_more_is_opened_the_more_travels() {
        let traffic = |sections: &str| Economics::of(&file(sections)).traffic;
        let few = traffic("[verification]\ncodec_chunks = 1");
        let many = traffic("[verification]\ncodec_chunks = 2");
        assert!((many.codec_check / few.codec_check - 2.0).abs() < 1e-9);
        assert!(few.replays > 0.05 * 16.0, "moments are fetched whole");
        assert_eq!(traffic("[codec]\nprofile = \"dense_fp16\"").update, 16.0);
    }
}
