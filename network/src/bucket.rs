//! A token bucket: what a peer may take of something that refills. Bytes on the data plane, requests
//! and patience on the control plane.

use std::time::Duration;

use tokio::time::Instant;

/// How fast a bucket refills, and how much it holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    pub(crate) per_s: u64,
    pub(crate) burst: u64,
}

/// Refills at a steady rate up to a burst; a taker may run it into debt and waits the debt out.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    per_s: f64,
    burst: f64,
    available: f64,
    refilled: Instant,
}

impl TokenBucket {
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        let (per_s, burst) = (rate.per_s.max(1) as f64, rate.burst.max(1) as f64);
        Self { per_s, burst, available: burst, refilled: now }
    }

    /// How long to wait before using `amount`, which is taken; or, if that is longer than
    /// `patience`, takes nothing and says when to come back.
    pub(crate) fn take(
        &mut self,
        amount: u64,
        patience: Duration,
        now: Instant,
    ) -> Result<Duration, Duration> {
        let refill = now.duration_since(self.refilled).as_secs_f64() * self.per_s;
        self.available = (self.available + refill).min(self.burst);
        self.refilled = now;
        let left = self.available - amount as f64;
        let wait = Duration::from_secs_f64((-left / self.per_s).max(0.0));
        if wait > patience {
            return Err(wait - patience);
        }
        self.available = left;
        Ok(wait)
    }

    pub(crate) fn give_back(&mut self, amount: u64) {
        self.available = (self.available + amount as f64).min(self.burst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_bucket_gives_its_burst_then_its_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(Rate { per_s: MIB, burst: 2 * MIB }, start);
        let patience = Duration::from_millis(600);
        assert_eq!(bucket.take(2 * MIB, patience, start), Ok(Duration::ZERO));
        let half = Duration::from_millis(500);
        assert_eq!(bucket.take(MIB / 2, patience, start), Ok(half));
        assert_eq!(bucket.take(MIB / 2, patience, start), Err(Duration::from_millis(400)));
        let later = start + Duration::from_secs(1);
        assert_eq!(bucket.take(MIB / 2, patience, later), Ok(Duration::ZERO));
        let much_later = start + Duration::from_secs(100);
        assert_eq!(bucket.take(2 * MIB, patience, much_later), Ok(Duration::ZERO));
        assert!(bucket.take(2 * MIB, patience, much_later).is_err());
    }
}
