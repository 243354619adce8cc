//! Who is drawn: the product's own draws and credibility, over many workers.

use manyhands_proto::{Digest, NodeId, Round};
use manyhands_rules::credibility::Credibility;
use manyhands_rules::draw::Beacon;
use manyhands_rules::panel::JUDGES_MAX;

use super::Report;
use super::page::Replayed;

/// q₀ of a run that says nothing else, in thousandths, and its probation.
const BASE_RATE: u32 = 100;
const PROBATION: u32 = 5;
/// Of passes that are looked over, in thousandths.
const RECHECK: u32 = 50;
const CHEATERS: u32 = 20_000;
const ROUNDS: u32 = 10;
/// Honest workers and rounds of which costs are told, and the last rounds that are the steady state.
const HONEST: u32 = 500;
const HONEST_ROUNDS: u32 = 400;
const STEADY: u32 = 100;

pub(super) fn run(report: &mut Report) {
    let pinned = found(Credibility::on_probation(0));
    let expected = 1.0 - (1.0 - f64::from(BASE_RATE) / 1_000.0).powi(ROUNDS as i32);
    let share = "of cheaters in every one of ten rounds";
    report.add("detection.rounds10", pinned, share, Some(expected));
    report.add("detection.rounds10_error", (pinned - expected).abs(), "against the formula", None);
    report.add(
        "detection.rounds10_default",
        found(Credibility::on_probation(PROBATION)),
        share,
        None,
    );
    report.add("detection.rounds10_at_the_floor", found(Credibility::full()), share, None);
    let (cheat, accomplice) = with_an_accomplice();
    report.add("detection.rounds10_with_an_accomplice", cheat, share, Some(pinned));
    let passes = "of verifiers that let a cheat pass ten times";
    let expected = 1.0 - (1.0 - f64::from(RECHECK) / 1_000.0).powi(ROUNDS as i32);
    report.add("verifiers.accomplices_found", accomplice, passes, Some(expected));

    let (steady, whole) = replayed();
    let computing = "replayed over trained";
    report.add("verification.cost_share", steady, computing, None);
    report.add("verification.cost_share_of_the_whole_run", whole, computing, None);
}

fn beacon(round: u32) -> Beacon {
    Beacon::new(Digest::of(&round.to_le_bytes()), Digest::of(b"entropy of a benchmark"))
}

fn worker(number: u32) -> NodeId {
    NodeId::new(*Digest::of(&number.to_le_bytes()).as_bytes())
}

/// The share of cheaters that are replayed at least once. A replay of a cheat rejects it: that is measured apart.
fn found(begins_with: Credibility) -> f64 {
    let beacons: Vec<Beacon> = (0..ROUNDS).map(beacon).collect();
    let is_found = |number: &u32| {
        let worker = worker(*number);
        beacons.iter().any(|beacon| beacon.audits(worker, begins_with, BASE_RATE))
    };
    (0..CHEATERS).filter(is_found).count() as f64 / f64::from(CHEATERS)
}

/// One of three verifiers passes whatever the cheat does, at a pinned rate: the share of cheaters found in ten rounds, and of
/// accomplices found in ten passes. Second looks are drawn by the beacon of the round after.
fn with_an_accomplice() -> (f64, f64) {
    let beacons: Vec<Beacon> = (0..=2 * ROUNDS).map(beacon).collect();
    let verifiers = [1, 2, 3].map(|number| worker(CHEATERS + number));
    let accomplice = verifiers[0];
    let (mut found, mut unmasked) = (0_u32, 0_u32);
    for number in 0..CHEATERS {
        let worker = worker(number);
        let looked_over =
            |round: u32| beacons[round as usize + 1].looks_again(Round(round), worker, RECHECK);
        let is_found = |round: u32| {
            let beacon = beacons[round as usize];
            beacon.audits(worker, Credibility::on_probation(0), BASE_RATE)
                && (beacon.panel(worker, &verifiers)[0] != accomplice || looked_over(round))
        };
        found += u32::from((0..ROUNDS).any(is_found));
        unmasked += u32::from((ROUNDS..2 * ROUNDS).any(looked_over));
    }
    let share = |count: u32| f64::from(count) / f64::from(CHEATERS);
    (share(found), share(unmasked))
}

/// Replays per round of honest workers: in the last rounds, and in all.
fn replayed() -> (f64, f64) {
    let beacons: Vec<Beacon> = (0..HONEST_ROUNDS).map(beacon).collect();
    let (mut steady, mut whole) = (0_u32, 0_u32);
    for number in 0..HONEST {
        let worker = worker(number);
        let mut credibility = Credibility::on_probation(PROBATION);
        for (round, beacon) in (0..).zip(&beacons) {
            if beacon.audits(worker, credibility, BASE_RATE) {
                credibility.passed();
                let replays = 1 + u32::from(beacon.looks_again(Round(round), worker, RECHECK));
                whole += replays;
                steady += if round >= HONEST_ROUNDS - STEADY { replays } else { 0 };
            }
        }
    }
    let share = |count: u32, rounds: u32| f64::from(count) / f64::from(HONEST * rounds);
    (share(steady, STEADY), share(whole, HONEST_ROUNDS))
}

/// Worker-rounds of honest workers among honest verifiers, whose replays come out as far as measured ones did.
const HONEST_WORKER_ROUNDS: u32 = 100_000;

/// How many honest workers are slashed when every one of their rounds is judged by three verifiers, and how many
/// would be accused by the first.
pub(super) fn honest_workers(measured: &[Replayed], report: &mut Report) {
    let over: Vec<f64> =
        measured.iter().flat_map(|row| row.over_threshold.iter().copied()).collect();
    if over.is_empty() {
        return;
    }
    let (mut accused, mut slashed) = (0_u32, 0_u32);
    for round in 0..HONEST_WORKER_ROUNDS {
        let found = |judge: usize| {
            let draw = Digest::of(&[round.to_le_bytes(), (judge as u32).to_le_bytes()].concat());
            let number = u64::from_le_bytes(draw.as_bytes()[..8].try_into().expect("8 bytes"));
            over[(number % over.len() as u64) as usize] > 1.0
        };
        let against = (0..JUDGES_MAX).filter(|judge| found(*judge)).count();
        accused += u32::from(found(0));
        slashed += u32::from(against >= 2);
    }
    let of = "of 100,000 honest worker-rounds, each replayed";
    report.add("detection.honest_accused", accused.into(), of, None);
    report.add("detection.honest_slashed", slashed.into(), of, None);
}
