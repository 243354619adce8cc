//! The only place that reads the time of day.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use manyhands_proto::Tick;

/// Unix milliseconds that never go backwards, whatever the system's clock does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    last: Tick,
}

impl Clock {
    /// A clock that does not go behind `last`.
    pub(crate) fn from(last: Tick) -> Self {
        Self { last }
    }

    pub(crate) fn now(&mut self) -> Tick {
        self.last = self.last.max(unix_ms());
        self.last
    }

    /// How long to wait for `tick`.
    pub(crate) fn until(&mut self, tick: Tick) -> Duration {
        Duration::from_millis(tick.since(self.now()))
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
