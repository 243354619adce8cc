//! How peers behave: how many requests each may make, and when our patience with it ends. Time is an
//! argument.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use libp2p::PeerId;
use tokio::time::Instant;

use super::ControlLimits;
use crate::bucket::{Rate, TokenBucket};

/// Peers whose conduct is remembered; beyond it the one unheard for longest is forgotten.
const PEERS_MAX: usize = 4096;
/// Peers that are blocked at the same time; beyond it the one whose time ends first is let off.
const BLOCKED_MAX: usize = 4096;
/// A peer may try it as often at once, and regains one a second: nine pieces of nonsense in a minute,
/// or 65 requests too many, are not an accident.
const PATIENCE: Rate = Rate { per_s: 1, burst: 64 };

/// Why a request is not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("more than {per_s} requests a second")]
    TooFast { per_s: u32 },
    #[error("{limit} of its requests wait already")]
    Waiting { limit: usize },
    #[error("expected a request of at most {limit} bytes, {announced} were announced")]
    TooLong { limit: usize, announced: u32 },
    /// In the owner's words.
    #[error("{0}")]
    Nonsense(String),
}

impl Fault {
    /// For metrics.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::TooFast { .. } => "dropped_rate",
            Self::Waiting { .. } => "dropped_full",
            Self::TooLong { .. } | Self::Nonsense(_) => "nonsense",
        }
    }

    /// What it takes of [`PATIENCE`].
    fn cost(&self) -> u64 {
        match self {
            // A burst of honest questions may meet a slow owner.
            Self::Waiting { .. } => 0,
            Self::TooFast { .. } => 1,
            Self::TooLong { .. } | Self::Nonsense(_) => 8,
        }
    }
}

#[derive(Debug)]
struct Account {
    requests: TokenBucket,
    patience: TokenBucket,
    heard: Instant,
}

#[derive(Debug)]
pub(super) struct Conduct {
    requests_per_s: u32,
    request_burst: u32,
    penalty: Duration,
    accounts: HashMap<PeerId, Account>,
    /// In the order in which they are let off.
    blocked: VecDeque<(Instant, PeerId)>,
}

impl Conduct {
    pub(super) fn new(limits: &ControlLimits) -> Self {
        Self {
            requests_per_s: limits.requests_per_s,
            request_burst: limits.request_burst,
            penalty: limits.penalty,
            accounts: HashMap::new(),
            blocked: VecDeque::new(),
        }
    }

    /// Counts one request.
    pub(super) fn admit(&mut self, peer: PeerId, now: Instant) -> Result<(), Fault> {
        let per_s = self.requests_per_s;
        let taken = self.account(peer, now).requests.take(1, Duration::ZERO, now);
        taken.map(drop).map_err(|_| Fault::TooFast { per_s })
    }

    /// Takes a fault from the patience with a peer; true if none is left: block it.
    pub(super) fn is_too_much(&mut self, peer: PeerId, fault: &Fault, now: Instant) -> bool {
        let cost = fault.cost();
        self.account(peer, now).patience.take(cost, Duration::ZERO, now).is_err()
    }

    /// Notes that a peer is blocked from now on; false if it was already.
    pub(super) fn block(&mut self, peer: PeerId, now: Instant) -> bool {
        if self.blocked.iter().any(|(_, blocked)| *blocked == peer) {
            return false;
        }
        if self.blocked.len() >= BLOCKED_MAX
            && let Some((until, _)) = self.blocked.front_mut()
        {
            *until = now;
        }
        self.blocked.push_back((now + self.penalty, peer));
        true
    }

    /// When the next peer is let off.
    pub(super) fn next_pardon(&self) -> Option<Instant> {
        self.blocked.front().map(|(until, _)| *until)
    }

    /// The next peer whose time is over.
    pub(super) fn pardon(&mut self, now: Instant) -> Option<PeerId> {
        if self.next_pardon()? > now {
            return None;
        }
        self.blocked.pop_front().map(|(_, peer)| peer)
    }

    fn account(&mut self, peer: PeerId, now: Instant) -> &mut Account {
        if self.accounts.len() >= PEERS_MAX && !self.accounts.contains_key(&peer) {
            let unheard = self.accounts.iter().min_by_key(|(_, account)| account.heard);
            if let Some(unheard) = unheard.map(|(peer, _)| *peer) {
                self.accounts.remove(&unheard);
            }
        }
        let requests = Rate { per_s: self.requests_per_s.into(), burst: self.request_burst.into() };
        let account = self.accounts.entry(peer).or_insert_with(|| Account {
            requests: TokenBucket::new(requests, now),
            patience: TokenBucket::new(PATIENCE, now),
            heard: now,
        });
        account.heard = now;
        account
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conduct() -> (Conduct, Instant) {
        let limits = ControlLimits {
            requests_per_s: 2,
            request_burst: 3,
            penalty: Duration::from_secs(10),
            ..Default::default()
        };
        (Conduct::new(&limits), Instant::now())
    }

    fn nonsense() -> Fault {
        Fault::Nonsense("not an envelope".to_owned())
    }

    #[test]
    fn a_peer_over_its_rate_is_refused_and_others_are_not() {
        let (mut conduct, now) = conduct();
        let (hasty, calm) = (PeerId::random(), PeerId::random());
        for _ in 0..3 {
            assert_eq!(conduct.admit(hasty, now), Ok(()));
        }
        assert_eq!(conduct.admit(hasty, now), Err(Fault::TooFast { per_s: 2 }));
        assert_eq!(conduct.admit(calm, now), Ok(()));
        assert_eq!(conduct.admit(hasty, now + Duration::from_millis(500)), Ok(()));
    }

    #[test]
    fn the_ninth_nonsense_is_too_much_and_forgotten_after_a_while() {
        let (mut conduct, now) = conduct();
        let peer = PeerId::random();
        for _ in 0..8 {
            assert!(!conduct.is_too_much(peer, &nonsense(), now));
        }
        assert!(conduct.is_too_much(peer, &nonsense(), now));
        assert!(!conduct.is_too_much(peer, &Fault::Waiting { limit: 1 }, now));
        assert!(!conduct.is_too_much(peer, &nonsense(), now + Duration::from_secs(8)));
    }

    #[test]
    fn the_blocked_are_let_off_in_time_and_their_number_is_bounded() {
        let (mut conduct, now) = conduct();
        let first = PeerId::random();
        assert!(conduct.block(first, now));
        assert!(!conduct.block(first, now), "once is enough");
        assert_eq!(conduct.pardon(now), None);
        let later = conduct.next_pardon().expect("one is blocked");
        assert_eq!(later, now + Duration::from_secs(10));
        for _ in 0..BLOCKED_MAX {
            conduct.block(PeerId::random(), now);
        }
        assert_eq!(conduct.pardon(now), Some(first), "there was no room for one more");
        assert_eq!(conduct.pardon(now), None);
    }

    #[test]
    fn strangers_do_not_fill_the_memory() {
        let (mut conduct, now) = conduct();
        for age in 0..PEERS_MAX as u64 + 10 {
            let _ = conduct.admit(PeerId::random(), now + Duration::from_millis(age));
        }
        assert_eq!(conduct.accounts.len(), PEERS_MAX);
    }
}
