//! From phase to phase, as far as what is known allows.

use manyhands_proto::message::{Role, Start};
use manyhands_proto::run_file::ChainKind;
use manyhands_proto::{NodeId, Round, Tick};

use super::Coordinator;
use super::input::CodecResult;
use super::membership::{Head, Member, Membership, typical_speed};
use super::round::{OpenRound, Phase};
use super::status::EventKind;
use crate::assignment::{Candidate, Opening, plan, repeated_in_time};
use crate::draw::Beacon;
use crate::panel::Attendee;

impl Coordinator {
    /// Moves on as far as what is known allows.
    pub(super) fn advance(&mut self, now: Tick) {
        self.membership.expire(now, self.spec.round.silence_ms);
        loop {
            self.audits.distribute(now, &self.verifiers(), self.spec.round.check_ms);
            let decided = self.end_replays(now);
            if !self.advance_phase(now) && !decided {
                break;
            }
        }
    }

    /// Draws the consequences of replays that have been decided; whether there were any.
    fn end_replays(&mut self, now: Tick) -> bool {
        let (present, patience_ms) = (self.verifiers(), self.spec.round.check_ms);
        let ended = self.audits.ended(now, &present, patience_ms, self.audited_from());
        let any = !ended.is_empty();
        for (task, finding) in ended {
            self.handle_replayed(now, task, finding);
        }
        any
    }

    /// One step from phase to phase; whether there was one.
    fn advance_phase(&mut self, now: Tick) -> bool {
        let times = self.spec.round.clone();
        match self.round.phase {
            Phase::Gathering { deadline } => {
                let open = self.may_open(now >= deadline);
                if open {
                    self.open_round(now);
                }
                open
            }
            Phase::Training { deadline } => {
                let awaited = self.round.assignments.keys().any(|worker| {
                    !self.round.commitments.contains_key(worker)
                        && !self.round.excused.contains(worker)
                        && self.membership.get(*worker).is_some_and(Member::is_at_work)
                });
                if awaited && now < deadline {
                    return false;
                }
                if self.round.commitments.is_empty() {
                    self.reopen_round(now);
                    // Whoever missed the deadline must first be heard of again.
                    return false;
                }
                self.close_commitments();
                let deadline = now.after_ms(times.upload_ms);
                self.round.enter(Phase::Uploading { deadline }, now);
                true
            }
            Phase::Uploading { deadline } => {
                let done = self.round.uploads_missing().next().is_none() || now >= deadline;
                if done {
                    self.round.enter(Phase::Checking { deadline: None }, now);
                }
                done
            }
            Phase::Checking { deadline } => {
                let Some(entropy) = self.round.commitments_entropy else { return false };
                if deadline.is_none() {
                    let deadline = Some(now.after_ms(times.check_ms));
                    self.round.phase = Phase::Checking { deadline };
                }
                self.ask_replays_before_merge(entropy);
                self.ask_weighings(now, entropy);
                let over = deadline.is_some_and(|deadline| now >= deadline);
                let done = self.round.is_checked() && self.is_weighed() || over;
                if done {
                    self.close_checks(now);
                }
                done
            }
            Phase::Merging => false,
            Phase::Finishing { deadline } => self.finish(now, now >= deadline),
            Phase::Complete => false,
        }
    }

    fn may_open(&self, deadline_passed: bool) -> bool {
        let ready = self.membership.ready_workers(self.round.number).count();
        let present = self.membership.present_workers().count();
        let first = self.round.number == Round(0);
        let needed = if first { self.spec.run.workers_min as usize } else { 1 };
        let verifiers = if first { self.spec.verification.verifiers_min as usize } else { 0 };
        // A round that opens again waits for those it had: they may all have been cut off at once.
        let complete = ready == present && ready >= self.round.awaited;
        ready >= needed && self.verifiers().len() >= verifiers && (complete || deadline_passed)
    }

    fn open_round(&mut self, now: Tick) {
        let ready: Vec<_> = self.membership.ready_workers(self.round.number).collect();
        let typical = typical_speed(&ready);
        let candidates: Vec<_> = ready
            .iter()
            .map(|(worker, member)| Candidate {
                worker: *worker,
                tokens_per_second: member.credible_speed(typical),
                class: member.class.clone(),
                start: member.start(),
            })
            .collect();
        let verifiers = self.membership.present_verifiers();
        let speeds = verifiers.map(|(_, verifier)| verifier.tokens_per_second).collect();
        let round = &mut self.round;
        round.sequences_max = repeated_in_time(&self.spec, speeds);
        let opening = Opening {
            round: round.number,
            theta: round.theta,
            first_sequence: round.first_sequence,
            left_out: &self.quarantine.left_out(),
            sequences_max: round.sequences_max,
        };
        round.attending = attending(&self.membership);
        round.verified = !round.attending.is_empty();
        round.probation = ready
            .iter()
            .filter(|(_, member)| round.verified && member.credibility.is_on_probation())
            .map(|(worker, _)| *worker)
            .collect();
        round.heads = ready
            .iter()
            .filter_map(|(worker, member)| member.head.clone().map(|head| (*worker, head)))
            .collect();
        round.assignments = plan(&self.spec, opening, &candidates)
            .into_iter()
            .map(|assignment| (assignment.worker, assignment))
            .collect();
        round.candidates = candidates;
        let most = round.sequences_max;
        let limited = round.assignments.values().any(|it| Some(it.sequences) == most);
        if limited && !self.shares_limited {
            let text = "the fastest workers get less than they could do: verifiers could not repeat more in time";
            self.history.note(now, EventKind::Round, text.to_owned());
        }
        self.shares_limited = limited;
        if self.spec.chain.kind == ChainKind::Substrate {
            let verifiers = self.membership.present_verifiers();
            round.stakes_unchecked = verifiers.map(|(node, _)| (node, Role::Verifier)).collect();
            let workers = round.candidates.iter().map(|candidate| (candidate.worker, Role::Worker));
            round.stakes_unchecked.extend(workers);
        }
        round.opened_at = now;
        let deadline = now.after_ms(self.spec.round.commit_ms);
        round.enter(Phase::Training { deadline }, now);
    }

    /// Nobody committed: the same round is tried again with whoever is there then.
    fn reopen_round(&mut self, now: Tick) {
        let OpenRound { number, first_sequence, .. } = self.round;
        let parameters = self.round.parameters();
        let awaited = self.round.candidates.len();
        let text = format!("round {number} opens again: nobody committed");
        self.history.note(now, EventKind::Round, text);
        let deadline = now.after_ms(self.spec.round.sync_ms);
        self.round = OpenRound::new(number, parameters, first_sequence, now, deadline);
        self.round.awaited = awaited;
    }

    /// From here on a commitment is a worker's head, whatever becomes of its update.
    fn close_commitments(&mut self) {
        let present = attending(&self.membership);
        if !present.is_empty() {
            self.round.attending = present;
        }
        for (worker, signed) in &self.round.commitments {
            let Some(member) = self.membership.get_mut(*worker) else { continue };
            let assignment = &self.round.assignments[worker];
            let before = match assignment.start {
                Start::Fresh => 0,
                Start::Head { adam_step, .. } => adam_step,
            };
            member.steps_done = 0;
            if self.round.afresh.contains(worker) {
                continue;
            }
            member.head = Some(Head {
                signed: signed.clone(),
                adam_step: before + u64::from(assignment.steps),
                sent_values_returned: false,
            });
        }
    }

    fn ask_replays_before_merge(&mut self, entropy: crate::record::Entropy) {
        let beacon = Beacon::new(self.committed(), entropy.value);
        let ready: Vec<NodeId> = self
            .round
            .uploaded()
            .filter(|worker| self.round.probation.contains(worker))
            .filter(|worker| self.round.codec.get(worker) == Some(&CodecResult::Passed))
            .filter(|worker| !self.round.replay_asked.contains(worker))
            .collect();
        for worker in ready {
            let round = &self.round;
            let asked = self.replay_of(
                (&round.assignments[&worker], &round.commitments[&worker]),
                round.heads.get(&worker),
                (&round.attending, beacon),
            );
            self.audits.ask_replay(asked, true);
            self.round.replay_asked.insert(worker);
        }
    }
}

/// The verifiers that are there, in the order of their ids.
fn attending(membership: &Membership) -> Vec<Attendee> {
    let there = membership.present_verifiers();
    there.map(|(verifier, member)| Attendee { verifier, class: member.class.clone() }).collect()
}
