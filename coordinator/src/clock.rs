//! The only place that reads the time of day.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use manyhands_proto::Tick;

/// The run's own clock: Unix milliseconds, less the time in which no coordinator ran. So nobody is
/// silent, late or timed out because the coordinator was down. It never goes backwards, whatever the
/// system's clock does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    last: Tick,
    behind_ms: u64,
}

impl Clock {
    /// Goes on from `last`.
    pub(crate) fn from(last: Tick) -> Self {
        Self { last, behind_ms: unix_ms().since(last) }
    }

    pub(crate) fn now(&mut self) -> Tick {
        let now = Tick(unix_ms().0.saturating_sub(self.behind_ms));
        self.last = self.last.max(now);
        self.last
    }

    /// How long to wait for `tick`.
    pub(crate) fn until(&mut self, tick: Tick) -> Duration {
        Duration::from_millis(tick.since(self.now()))
    }

    /// What is to be added to a tick of this process to get the time of day.
    pub(crate) fn behind_ms(&self) -> u64 {
        self.behind_ms
    }
}

pub(crate) fn unix_ms() -> Tick {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Tick(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// How long something took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn seconds(self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_a_coordinator_does_not_count_and_none_is_taken_back() {
        let long_ago = Tick(unix_ms().0 - 3_600_000);
        let mut clock = Clock::from(long_ago);
        assert!(clock.now().since(long_ago) < 60_000);
        assert!(clock.behind_ms() >= 3_600_000);
        let ahead = Tick(unix_ms().0 + 3_600_000);
        let mut clock = Clock::from(ahead);
        assert_eq!((clock.now(), clock.behind_ms()), (ahead, 0));
    }
}
