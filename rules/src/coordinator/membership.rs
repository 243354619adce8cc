//! Who takes part: addresses, measured speed, credibility, and what each holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use manyhands_proto::message::{
    Join, NumericClass, Possession, Refusal, RefusalCode, Role, SignedCommitment, Start,
};
use manyhands_proto::{Balance, Digest, NodeId, Round, Tick, WorkUnits};
use serde::{Deserialize, Serialize};

use crate::credibility::Credibility;

/// From so many on, members that left before they did anything are forgotten when another comes.
const MEMBERS_MAX: usize = 4_096;

/// A worker's last commitment in a CommitSet: its next round's error buffer and moments follow
/// from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) signed: SignedCommitment,
    /// Optimiser steps since the moments were zero, this round's included.
    pub(super) adam_step: u64,
    /// The sent values were not merged through no fault of the worker.
    pub(super) sent_values_returned: bool,
}

/// Rounds that were merged for one that was hidden.
const HIDING_FORGOTTEN_AFTER: u32 = 100;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Member {
    pub(super) role: Role,
    pub(super) class: NumericClass,
    pub(super) addresses: Vec<SocketAddr>,
    /// As it declared, then as its rounds showed.
    pub(super) tokens_per_second: u64,
    /// Whether a round has shown its speed.
    pub(super) is_measured: bool,
    pub(super) last_seen: Tick,
    /// Neither left nor silent.
    pub(super) present: bool,
    /// Takes no more work, and stays for its evidence.
    pub(super) leaving: bool,
    /// Its stake was gone: it has to come in through the door again.
    pub(super) must_join: bool,
    /// The round whose θ it proved to hold.
    pub(super) theta: Option<Round>,
    /// A proof that the shell is checking.
    pub(super) claimed: Option<Possession>,
    /// Its last proof was wrong; said once, with the next reply.
    pub(super) wrong_theta: bool,
    /// Wrong proofs of the θ of a round.
    pub(super) wrong_proofs: (Round, u32),
    pub(super) credibility: Credibility,
    pub(super) head: Option<Head>,
    pub(super) barred: Option<Refusal>,
    /// Workers whose replays led it nowhere, by its word, while two others ended somewhere; since the last one that did.
    pub(super) shown_nothing: BTreeSet<NodeId>,
    /// For that: it verifies nothing more.
    pub(super) sent_away: bool,
    /// Rounds of which it showed nothing and was held to it.
    pub(super) hid: u32,
    pub(super) steps_done: u32,
    pub(super) work: WorkUnits,
    pub(super) earned: Balance,
    pub(super) rounds_admitted: u32,
}

impl Member {
    /// Whether work can be expected of it.
    pub(super) fn is_at_work(&self) -> bool {
        self.present && !self.leaving && self.barred.is_none()
    }

    /// The speed that its share of a round follows. A newcomer's own word counts up to what is
    /// `typical` here: whoever declares more would be given everybody's work.
    pub(super) fn credible_speed(&self, typical: u64) -> u64 {
        if self.is_measured { self.tokens_per_second } else { self.tokens_per_second.min(typical) }
    }

    /// A round of it was merged. What it hid is forgotten with time.
    pub(super) fn note_admitted(&mut self) {
        self.rounds_admitted += 1;
        if self.rounds_admitted.is_multiple_of(HIDING_FORGOTTEN_AFTER) {
            self.hid = self.hid.saturating_sub(1);
        }
    }

    /// What it holds may not be what it says: it goes on from nothing, and every round of it is replayed for a while.
    pub(super) fn start_afresh(&mut self) {
        self.head = None;
        self.credibility.failed();
    }

    /// Notes what a round showed of its speed, whose share followed from `assumed`.
    pub(super) fn note_speed(&mut self, assumed: u64, tokens_per_second: u64) {
        // Half old, half new: one busy minute must not decide the next round. At most twice the
        // old: a commitment made out of nothing comes at once.
        let shown = tokens_per_second.min(assumed.saturating_mul(2));
        self.tokens_per_second = (assumed / 2 + shown.div_ceil(2)).max(1);
        self.is_measured = true;
    }

    /// It was given a share and nothing came of it: it gets a smaller one, or it could keep others from work
    /// for ever.
    pub(super) fn note_nothing_done(&mut self, assumed: u64) {
        self.tokens_per_second = (assumed / 2).max(1);
        self.is_measured = true;
    }

    /// Whether nothing would be lost with it.
    fn is_forgettable(&self, probation: u32) -> bool {
        !self.present
            && self.head.is_none()
            && self.barred.is_none()
            && !self.sent_away
            && self.hid == 0
            && self.earned.0 == 0
            && self.credibility == Credibility::on_probation(probation)
    }

    pub(super) fn start(&self) -> Start {
        match &self.head {
            None => Start::Fresh,
            Some(head) => Start::Head {
                round: head.signed.commitment.round,
                commitment: head.signed.digest(),
                sent_values_returned: head.sent_values_returned,
                adam_step: head.adam_step,
            },
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Membership {
    members: BTreeMap<NodeId, Member>,
    /// The highest nonce of each member: a request that was seen before is refused.
    nonces: BTreeMap<NodeId, u64>,
}

impl Membership {
    pub(super) fn get(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node)
    }

    pub(super) fn get_mut(&mut self, node: NodeId) -> Option<&mut Member> {
        self.members.get_mut(&node)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (NodeId, &Member)> {
        self.members.iter().map(|(&node, member)| (node, member))
    }

    pub(super) fn present_workers(&self) -> impl Iterator<Item = (NodeId, &Member)> {
        self.iter().filter(|(_, member)| member.is_at_work() && member.role == Role::Worker)
    }

    pub(super) fn present_verifiers(&self) -> impl Iterator<Item = (NodeId, &Member)> {
        self.iter().filter(|(_, member)| {
            member.present && member.barred.is_none() && member.role == Role::Verifier
        })
    }

    /// Workers that are there and proved θ of `round`.
    pub(super) fn ready_workers(&self, round: Round) -> impl Iterator<Item = (NodeId, &Member)> {
        self.present_workers().filter(move |(_, member)| member.theta == Some(round))
    }

    /// Notes a request's nonce.
    ///
    /// # Errors
    /// A nonce that does not grow is a repeated or a reordered request.
    pub(super) fn note_nonce(&mut self, node: NodeId, nonce: u64) -> Result<(), Refusal> {
        match self.nonces.get_mut(&node) {
            Some(last) if nonce <= *last => Err(Refusal {
                code: RefusalCode::Replayed,
                reason: format!("expected a nonce above {last}, got {nonce}"),
            }),
            Some(last) => {
                *last = nonce;
                Ok(())
            }
            // Strangers are not remembered: their number is theirs to choose.
            None => Ok(()),
        }
    }

    /// Lets `node` in, or back in. What it earned and how it is trusted stays; its optimiser state
    /// counts only if it still has it.
    pub(super) fn join(&mut self, now: Tick, node: NodeId, nonce: u64, join: Join, probation: u32) {
        self.nonces.insert(node, nonce);
        if self.members.len() >= MEMBERS_MAX {
            self.members.retain(|_, member| !member.is_forgettable(probation));
            self.nonces.retain(|other, _| *other == node || self.members.contains_key(other));
        }
        let Join { role, class, addresses, tokens_per_second, head_rounds, .. } = join;
        let earlier = self.members.remove(&node);
        let was_barred = earlier.as_ref().is_some_and(|member| member.barred.is_some());
        let head = earlier
            .as_ref()
            .and_then(|member| member.head.clone())
            .filter(|head| !was_barred && head_rounds.contains(&head.signed.commitment.round));
        // What was measured is not undone by coming again, but a machine may have become slower. Replays are not training.
        let measured = earlier.as_ref().filter(|it| it.is_measured && role == Role::Worker);
        let tokens_per_second = measured
            .map_or(tokens_per_second, |member| tokens_per_second.min(member.tokens_per_second));
        let member = Member {
            role,
            class,
            addresses,
            tokens_per_second,
            is_measured: measured.is_some(),
            last_seen: now,
            present: true,
            leaving: false,
            must_join: false,
            theta: None,
            claimed: None,
            wrong_theta: false,
            wrong_proofs: earlier.as_ref().map_or((Round(0), 0), |member| member.wrong_proofs),
            credibility: earlier
                .as_ref()
                .map_or(Credibility::on_probation(probation), |member| member.credibility),
            head,
            barred: None,
            shown_nothing: earlier
                .as_ref()
                .map(|member| member.shown_nothing.clone())
                .unwrap_or_default(),
            sent_away: earlier.as_ref().is_some_and(|member| member.sent_away),
            hid: earlier.as_ref().map_or(0, |member| member.hid),
            steps_done: 0,
            work: earlier.as_ref().map_or(WorkUnits(0), |member| member.work),
            earned: earlier.as_ref().map_or(Balance(0), |member| member.earned),
            rounds_admitted: earlier.as_ref().map_or(0, |member| member.rounds_admitted),
        };
        self.members.insert(node, member);
    }

    /// Marks who was silent for longer than `silence_ms` as gone.
    pub(super) fn expire(&mut self, now: Tick, silence_ms: u64) {
        for member in self.members.values_mut() {
            if member.present && now.since(member.last_seen) >= silence_ms {
                member.present = false;
            }
        }
    }

    /// When the next member will have been silent for too long.
    pub(super) fn next_expiry(&self, silence_ms: u64) -> Option<Tick> {
        let seen = self.members.values().filter(|member| member.present);
        seen.map(|member| member.last_seen.after_ms(silence_ms)).min()
    }

    /// What the possession of θ has to be checked against.
    pub(super) fn claims(&self) -> impl Iterator<Item = (NodeId, Round, Digest)> {
        self.iter().filter_map(|(node, member)| {
            member.claimed.map(|claim| (node, claim.round, claim.proof))
        })
    }
}

/// The lower median of what all of them have declared or shown, tokens per second.
pub(super) fn typical_speed(workers: &[(NodeId, &Member)]) -> u64 {
    let mut speeds: Vec<u64> = workers.iter().map(|(_, member)| member.tokens_per_second).collect();
    speeds.sort_unstable();
    speeds.get(speeds.len().saturating_sub(1) / 2).copied().unwrap_or_default()
}
