//! Who judges a worker's round, and what follows from what they find. One verifier's word lets a round pass;
//! it takes two to find against it, where two were there to be asked.

use manyhands_proto::message::{Distances, NumericClass, SignedReplay, Work};
use manyhands_proto::run_file::Verification;
use manyhands_proto::{ChunkIndex, Digest, NodeId, Round};
use serde::{Deserialize, Serialize};

use crate::draw::Beacon;
use crate::record::Finding;

/// Verifiers that are asked about one worker's round, at most.
pub const JUDGES_MAX: usize = 3;

/// A verifier that was there before anything was drawn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attendee {
    pub verifier: NodeId,
    /// As it says.
    pub class: NumericClass,
}

/// What one verifier found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judgement {
    /// Where it ended, under its signature.
    pub replay: SignedReplay,
    pub verdict: Judged,
    /// The blob of chunks that the distances follow from ([`crate::evidence`]); kept where somebody accused.
    pub evidence: Option<Digest>,
    /// Of those that found a fault before it, whose ends are near its own; none unless it found one.
    pub near: Vec<NodeId>,
}

impl Judgement {
    pub fn verifier(&self) -> NodeId {
        self.replay.verifier
    }

    fn fault(&self) -> Option<Distances> {
        match self.verdict {
            Judged::Fault(distances) => Some(distances),
            Judged::Passed(_) | Judged::Withheld(_) => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "detail")]
pub enum Judged {
    /// Within the run's thresholds.
    Passed(Distances),
    Fault(Distances),
    /// The worker did not open what it committed to.
    Withheld(String),
}

/// The machines whose ends are compared.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    pub worker: &'a NumericClass,
    pub verifier: &'a NumericClass,
}

/// Whether a replay came out where the worker said, each vector by its own threshold: that of Δ is lower where both
/// machines are of a kind.
pub fn within(distances: &Distances, terms: &Verification, pair: Pair<'_>) -> bool {
    let delta_max = if pair.worker.device == pair.verifier.device {
        terms.same_kind_delta_distance_max
    } else {
        terms.delta_distance_max
    };
    distances.delta <= delta_max
        && distances.first_moment <= terms.first_moment_distance_max
        && distances.second_moment <= terms.second_moment_distance_max
}

impl Judged {
    pub fn by(distances: Distances, terms: &Verification, pair: Pair<'_>) -> Self {
        if within(&distances, terms, pair) {
            Self::Passed(distances)
        } else {
            Self::Fault(distances)
        }
    }

    pub fn accuses(&self) -> bool {
        match self {
            Self::Passed(_) => false,
            Self::Fault(_) | Self::Withheld(_) => true,
        }
    }

    /// Whether it is what was decided in the end. A draw contradicts nobody that has shown where it ended.
    pub fn agrees_with(&self, finding: &Finding) -> bool {
        match finding {
            Finding::Undecided => !matches!(self, Self::Withheld(_)),
            Finding::ReplayPassed(_) => !self.accuses(),
            // Whoever opens nothing to one verifier can have cheated towards another.
            Finding::ReplayFault(_) | Finding::Withheld(_) => self.accuses(),
            // An end that nobody else came near may as well be made up.
            Finding::Irreproducible | Finding::CodecPassed | Finding::CodecFault(_) => false,
        }
    }
}

/// What verifiers found of a worker's round, and all that it follows from: what whoever is accused by it, and whoever votes
/// on that, has to see.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    pub work: Work,
    /// The drawn chunks, ascending.
    pub chunks: Vec<ChunkIndex>,
    pub judgements: Vec<Judgement>,
    /// The verifiers that were there, and their machines.
    pub attending: Vec<Attendee>,
}

impl Case {
    pub fn round(&self) -> Round {
        self.work.round()
    }

    pub fn worker(&self) -> NodeId {
        self.work.worker()
    }

    /// The machines of the worker and of a verifier that was there.
    pub fn pair(&self, verifier: NodeId) -> Option<Pair<'_>> {
        let attendee = self.attending.iter().find(|it| it.verifier == verifier)?;
        Some(Pair { worker: &self.work.assignment.class, verifier: &attendee.class })
    }

    /// Compact JSON, fields in the order of their declaration.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain structs with string keys serialise")
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.canonical_bytes())
    }

    /// # Errors
    /// Bytes that are no case. Whether what it says was signed, [`crate::evidence::check_case`] tells.
    pub fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

/// The verifiers that may judge `worker`'s round, in the order in which they are asked: of all that attended it,
/// whoever is judged excepted.
pub fn panel(beacon: Beacon, worker: NodeId, attending: &[Attendee]) -> Vec<NodeId> {
    let able = attending.iter().map(|it| it.verifier).filter(|node| *node != worker);
    beacon.panel(worker, &able.collect::<Vec<_>>())
}

/// Whether another looks over whatever one lets pass in the time of `record`: no later draw comes that could say so.
pub fn all_is_looked_over(record: Round, rounds: u32) -> bool {
    record.0.saturating_add(1) >= rounds
}

/// How many let a round pass if nobody accuses: one, and another where it is looked over.
const fn enough(looked_over: bool) -> usize {
    if looked_over { 2 } else { 1 }
}

/// How many have to be asked by now.
pub fn judges_needed(looked_over: bool, judgements: &[Judgement]) -> usize {
    let accused = judgements.iter().any(|judgement| judgement.verdict.accuses());
    if accused { JUDGES_MAX } else { enough(looked_over) }
}

/// Whether a worker showed everything to all that judged it: only then a pass speaks for it.
pub fn shown_to_all(judgements: &[Judgement]) -> bool {
    !judgements.iter().any(|judgement| matches!(judgement.verdict, Judged::Withheld(_)))
}

/// What the first of two says who both ended elsewhere, and near each other: a round that ends somewhere else in every replay
/// shows nothing of its worker.
pub fn agreed(judgements: &[Judgement]) -> Option<Distances> {
    judgements.iter().find_map(|one| {
        let joins = |other: &Judgement| other.near.contains(&one.verifier());
        let found = one.fault()?;
        judgements.iter().any(|other| other.fault().is_some() && joins(other)).then_some(found)
    })
}

/// What follows from `judgements`, in the order in which they came; none while there is nothing to follow, or
/// `more` are to come and could change it.
pub fn decide(looked_over: bool, judgements: &[Judgement], more: bool) -> Option<Finding> {
    let mut passed = Vec::new();
    let mut faults = Vec::new();
    let mut withheld = Vec::new();
    for judgement in judgements {
        match &judgement.verdict {
            Judged::Passed(distances) => passed.push(*distances),
            Judged::Fault(distances) => faults.push(*distances),
            Judged::Withheld(reason) => withheld.push(reason.clone()),
        }
    }
    let accusing = faults.len() + withheld.len();
    let enough = if accusing == 0 { enough(looked_over) } else { 2 };
    if passed.len() >= enough {
        return Some(Finding::ReplayPassed(passed[0]));
    }
    if let Some(distances) = agreed(judgements) {
        return Some(Finding::ReplayFault(distances));
    }
    if withheld.len() >= 2 {
        return Some(Finding::Withheld(withheld.swap_remove(0)));
    }
    if more {
        return None;
    }
    match (passed.first(), faults.first(), withheld.first()) {
        (None, None, None) => None,
        (None, Some(_), None) if faults.len() >= 2 => Some(Finding::Irreproducible),
        (Some(passed), None, None) => Some(Finding::ReplayPassed(*passed)),
        (None, Some(fault), None) => Some(Finding::ReplayFault(*fault)),
        (None, _, Some(reason)) => Some(Finding::Withheld(reason.clone())),
        // Whoever shows one verifier nothing and another a cheat is no better than who shows nobody anything.
        (Some(_), Some(_), Some(reason)) => Some(Finding::Withheld(reason.clone())),
        (Some(_), _, _) => Some(Finding::Undecided),
    }
}

#[cfg(test)]
mod tests {
    use manyhands_proto::keys::NodeKey;
    use manyhands_proto::message::{DeviceKind, ReplayEnd, Replayed};
    use manyhands_proto::{Round, RunId};

    use super::*;

    fn distances(delta: f64) -> Distances {
        Distances { delta, first_moment: 0.0, second_moment: 0.0 }
    }

    fn told(story: &str) -> Vec<Judgement> {
        let judged = |letter| match letter {
            'p' => Judged::Passed(distances(0.0)),
            'f' | 'x' => Judged::Fault(distances(0.5)),
            _ => Judged::Withheld("nothing".to_owned()),
        };
        let judge = |number| NodeKey::from_seed([number; 32]).node_id();
        // Whoever finds "f" ends where others do that find it, and "x" is an end of its own.
        let near = |number: u8, letter| -> Vec<NodeId> {
            let before = (0..).zip(story.chars()).take(usize::from(number));
            before.filter(|it| letter == 'f' && it.1 == 'f').map(|it| judge(it.0)).collect()
        };
        let judgement = |(number, letter)| {
            let replayed = Replayed {
                round: Round(1),
                worker: NodeId::new([9; 32]),
                assignment: Digest::of(b"assignment"),
                end: ReplayEnd::Nowhere,
            };
            let key = NodeKey::from_seed([number; 32]);
            let replay = SignedReplay::sign(&key, RunId::new([5; 32]), replayed);
            Judgement {
                replay,
                verdict: judged(letter),
                evidence: None,
                near: near(number, letter),
            }
        };
        (0..).zip(story.chars()).map(judgement).collect()
    }

    #[test]
    fn one_word_lets_pass_and_two_find_against() {
        let passed = Some(Finding::ReplayPassed(distances(0.0)));
        let fault = Some(Finding::ReplayFault(distances(0.5)));
        let withheld = Some(Finding::Withheld("nothing".to_owned()));
        let undecided = Some(Finding::Undecided);
        let irreproducible = Some(Finding::Irreproducible);
        let stories = [
            // While others can be asked, and when nobody else can.
            ("", None, None),
            ("p", passed.clone(), passed.clone()),
            ("f", None, fault.clone()),
            ("w", None, withheld.clone()),
            ("fp", None, undecided.clone()),
            ("pw", None, undecided.clone()),
            ("ff", fault.clone(), fault.clone()),
            ("fw", None, withheld.clone()),
            ("ww", withheld.clone(), withheld.clone()),
            ("fpf", fault.clone(), fault.clone()),
            ("fpp", passed.clone(), passed.clone()),
            ("fwp", None, withheld.clone()),
            ("wp", None, undecided.clone()),
            ("fwf", fault.clone(), fault.clone()),
            // Ends that are nobody else's.
            ("fx", None, irreproducible.clone()),
            ("fxf", fault.clone(), fault),
            ("fxx", None, irreproducible),
            ("fxw", None, withheld.clone()),
            ("fxp", None, undecided.clone()),
            ("pwp", passed.clone(), passed),
        ];
        for (story, with_others, alone) in stories {
            assert_eq!(decide(false, &told(story), true), with_others, "{story}");
            assert_eq!(decide(false, &told(story), false), alone, "{story}, nobody else");
        }
        assert_eq!(decide(true, &told("p"), true), None, "another is to look");
        assert_eq!(judges_needed(true, &told("p")), 2);
        assert_eq!(judges_needed(false, &told("f")), JUDGES_MAX);
    }

    #[test]
    fn machines_of_a_kind_are_held_to_less() {
        let terms = Verification::default();
        let [cpu, cuda] = [DeviceKind::Cpu, DeviceKind::Cuda].map(NumericClass::unknown);
        // What bf16 in the place of f32 gave at the least.
        let found = distances(9e-4);
        let held = |worker, verifier| within(&found, &terms, Pair { worker, verifier });
        assert!(!held(&cpu, &cpu) && !held(&cuda, &cuda));
        assert!(held(&cpu, &cuda) && held(&cuda, &cpu));
    }

    #[test]
    fn nobody_judges_itself_and_everybody_comes_first_at_times() {
        let attendee = |number: u8| Attendee {
            verifier: NodeId::new([number; 32]),
            class: NumericClass::unknown(DeviceKind::Cpu),
        };
        let attending: Vec<Attendee> = (0..5).map(attendee).collect();
        let worker = attending[2].verifier;
        let first = |i: u32| {
            let beacon = Beacon::new(Digest::of(b"set"), Digest::of(&i.to_le_bytes()));
            let panel = panel(beacon, worker, &attending);
            assert_eq!(panel.len(), 4);
            assert!(!panel.contains(&worker));
            panel[0]
        };
        let mut times = std::collections::BTreeMap::<NodeId, u32>::new();
        (0..400).for_each(|i| *times.entry(first(i)).or_default() += 1);
        assert!(times.len() == 4 && times.values().all(|times| (60..140).contains(times)));
    }
}
