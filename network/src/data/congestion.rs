//! A rate-based congestion controller for quinn: the window follows what the path delivers, not
//! single losses.
//!
//! Loss-based controllers (cubic, NewReno) fall to a few percent of a home line that loses one
//! packet in two hundred; quinn's BBR keeps twice the path in flight and starves its neighbours.
//! This one measures, once per round trip, how many bytes were acknowledged per second, and keeps
//!
//! ```text
//! window = (1 + gain) · (largest delivery rate of the last 10 rounds) · (base round-trip time)
//! ```
//!
//! - **Rounds.** A round ends when a packet sent after its start is acknowledged.
//! - **Base round-trip time**: the smallest *mean* of a round. A mean, because on a jittery path
//!   (Wi-Fi) rate × minimum lies below what is in flight, and the window would spiral down. If it has
//!   not been seen for 10 seconds, the smallest since then takes its place, and one round runs at
//!   half the window, so that the path can show what it is without our queue.
//! - **Start-up**: the window doubles every round until 16 packets in a row have waited (an eighth
//!   of the base, 4 to 16 ms), the rate stops growing (less than a quarter in three rounds), or too
//!   much is lost.
//! - **Gain**: 4 / √(packets in flight), between 0.1 and 1.5. Smaller flows get the larger gain,
//!   which is what lets several of these share a line evenly: with one gain for all, any split is
//!   stable. Every eighth round probes with a quarter more and the next gives it back; a probe that
//!   found more is repeated at once.
//! - **Loss** up to 2 % of a round (5 % while no queue shows) is taken for noise. Above it, the
//!   window is capped at 85 % and the rate memory is cleared; the cap lifts by 5 % per round.
//! - **Short paths** (below 2 ms: loopback, a LAN): processes wake up later than packets arrive, so
//!   the base is taken as 2 ms and the window is at least 256 KiB.
//!
//! Related work: BBR (draft-ietf-ccwg-bbr) for rate sampling, start-up, drain and loss cap; HyStart++
//! (RFC 9406) for leaving start-up on delay; FAST TCP for the share-equalising gain.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Rounds that the largest delivery rate is taken from: longer than one probing cycle of 8.
const RATE_ROUNDS: usize = 10;
const PROBE_CYCLE_ROUNDS: u32 = 8;
const PROBE_GAIN: f64 = 1.25;
/// Gives back what the probe before it queued.
const DRAIN_GAIN: f64 = 0.9;
/// A probe that raised the rate by this much was not stopped by the path: probe again.
const PROBE_SUCCESS: f64 = 1.1;
const BASE_GAIN: f64 = 4.0;
const BASE_GAIN_MIN: f64 = 0.1;
const BASE_GAIN_MAX: f64 = 1.5;
const STARTUP_GROWTH: f64 = 1.25;
const STARTUP_FLAT_ROUNDS: u32 = 3;
/// RFC 9406's thresholds; twice its samples, because blocks are judged all the time.
const STARTUP_DELAY_SAMPLES: u32 = 16;
const STARTUP_DELAY_MIN: Duration = Duration::from_millis(4);
const STARTUP_DELAY_MAX: Duration = Duration::from_millis(16);
/// Four times the worst random loss we mean to ride through.
const LOSS_TOLERATED: f64 = 0.02;
const LOSS_TOLERATED_WITHOUT_QUEUE: f64 = 0.05;
/// A share of three packets says nothing about a path.
const LOSS_PACKETS_MIN: f64 = 4.0;
const LOSS_CAP: f64 = 0.85;
const CAP_GROWTH: f64 = 1.05;
const BASE_RTT_MEMORY: Duration = Duration::from_secs(10);
const BASE_RTT_TOLERANCE: f64 = 1.02;
const BASE_RTT_PROBE_GAIN: f64 = 0.5;
const QUEUE_SHARE: f64 = 0.25;
const QUEUE_MIN: Duration = Duration::from_millis(4);
const SHORT_PATH: Duration = Duration::from_millis(2);
const SHORT_PATH_WINDOW_MIN: f64 = 256.0 * 1024.0;
const WINDOW_PACKETS_MIN: f64 = 4.0;
/// RFC 9002's recommendation.
const INITIAL_WINDOW_PACKETS: u64 = 10;

/// Builds a [`RateController`] per connection.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RateControl;

impl ControllerFactory for RateControl {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(RateController::new(now, current_mtu))
    }
}

/// See the module's description.
#[derive(Debug, Clone)]
pub(super) struct RateController {
    packet_bytes: f64,
    window: f64,
    startup: Option<Startup>,
    round: RoundSample,
    last_sent_packet: u64,
    rates: RateMemory,
    base_rtt: BaseRtt,
    /// Rounds since the last probe began.
    cycle: u32,
    rate_before_probe: f64,
    cap: Option<f64>,
    idle: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Startup {
    best_rate: f64,
    flat_rounds: u32,
    /// The smallest round-trip time of the last few packets, and how many they are.
    block_rtt: Option<Duration>,
    block_count: u32,
    /// The path's queue shows: do not grow further, leave at the end of the round.
    held: bool,
}

/// What one round has shown so far.
#[derive(Debug, Clone, Copy)]
struct RoundSample {
    started: Instant,
    /// The round ends with the acknowledgement of this packet or a later one.
    end_packet: u64,
    delivered_bytes: f64,
    lost_bytes: f64,
    rtt_sum: Duration,
    rtt_count: u32,
    /// The application had nothing to send for part of the round: its rate is a lower bound.
    app_limited: bool,
    congestion_marked: bool,
}

impl RoundSample {
    fn new(started: Instant, end_packet: u64) -> Self {
        Self {
            started,
            end_packet,
            delivered_bytes: 0.0,
            lost_bytes: 0.0,
            rtt_sum: Duration::ZERO,
            rtt_count: 0,
            app_limited: false,
            congestion_marked: false,
        }
    }

    fn mean_rtt(&self) -> Option<Duration> {
        (self.rtt_count > 0).then(|| self.rtt_sum / self.rtt_count)
    }

    fn loss(&self) -> f64 {
        self.lost_bytes / (self.delivered_bytes + self.lost_bytes).max(1.0)
    }
}

/// The rates of the last rounds, bytes per second.
#[derive(Debug, Clone, Copy, Default)]
struct RateMemory {
    rates: [f64; RATE_ROUNDS],
    next: usize,
}

impl RateMemory {
    fn push(&mut self, rate: f64) {
        self.rates[self.next] = rate;
        self.next = (self.next + 1) % RATE_ROUNDS;
    }

    fn max(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn forget_all_but(&mut self, rate: f64) {
        *self = Self::default();
        self.push(rate);
    }
}

/// The smallest round mean seen in the last 10 seconds or so.
#[derive(Debug, Clone, Copy)]
struct BaseRtt {
    value: Option<Duration>,
    /// When a round was last as fast as `value`.
    seen: Instant,
    /// The smallest mean since then.
    since: Option<Duration>,
}

impl BaseRtt {
    /// Returns whether the base has not been seen for too long: then one round runs at half the
    /// window. All senders on a bottleneck see the dip, so their next ones come together and the
    /// queue really empties.
    fn observe(&mut self, now: Instant, mean: Duration) -> bool {
        let Some(value) = self.value.filter(|value| mean > value.mul_f64(BASE_RTT_TOLERANCE))
        else {
            self.value = Some(self.value.map_or(mean, |value| value.min(mean)));
            self.seen = now;
            self.since = None;
            return false;
        };
        let since = self.since.map_or(mean, |since| since.min(mean)).max(value);
        self.since = Some(since);
        if now.duration_since(self.seen) < BASE_RTT_MEMORY {
            return false;
        }
        self.value = Some(since);
        self.seen = now;
        self.since = None;
        true
    }

    fn get(&self) -> Option<Duration> {
        self.value
    }
}

impl RateController {
    pub(super) fn new(now: Instant, mtu: u16) -> Self {
        Self {
            packet_bytes: f64::from(mtu),
            window: (INITIAL_WINDOW_PACKETS * u64::from(mtu)) as f64,
            startup: Some(Startup::default()),
            round: RoundSample::new(now, 0),
            last_sent_packet: 0,
            rates: RateMemory::default(),
            base_rtt: BaseRtt { value: None, seen: now, since: None },
            // The round after start-up gives back what start-up queued.
            cycle: 0,
            rate_before_probe: 0.0,
            cap: None,
            idle: true,
        }
    }

    fn sent(&mut self, now: Instant, packet: u64) {
        if self.idle {
            // The time without traffic is not part of a round.
            self.idle = false;
            self.round = RoundSample::new(now, packet);
        }
        self.last_sent_packet = packet;
    }

    fn acknowledged(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool) {
        self.round.delivered_bytes += bytes as f64;
        self.round.rtt_sum += now.saturating_duration_since(sent);
        self.round.rtt_count += 1;
        self.round.app_limited |= app_limited;
        if let Some(startup) = &mut self.startup {
            let rtt = now.saturating_duration_since(sent);
            startup.watch_delay(rtt, self.base_rtt.get());
            if !app_limited && !startup.held {
                self.window += bytes as f64;
            }
        }
    }

    fn lost(&mut self, bytes: u64, persistent: bool) {
        if persistent {
            // Nothing of this path's past can be trusted: begin again.
            self.window = self.packet_bytes * INITIAL_WINDOW_PACKETS as f64;
            self.startup = Some(Startup::default());
            self.rates = RateMemory::default();
            self.cap = None;
        }
        // Zero bytes is how a congestion mark (ECN) is reported.
        self.round.congestion_marked |= bytes == 0;
        self.round.lost_bytes += bytes as f64;
    }

    fn acknowledged_batch(&mut self, now: Instant, in_flight: u64, largest: Option<u64>) {
        self.idle = in_flight == 0;
        if largest.is_none_or(|largest| largest < self.round.end_packet) {
            return;
        }
        let elapsed = now.saturating_duration_since(self.round.started);
        let base = self.base_rtt.get().unwrap_or(Duration::ZERO);
        // A round cut short by a single early acknowledgement measures the burst, not the path.
        if elapsed < base / 2 || elapsed.is_zero() {
            return;
        }
        let Some(mean_rtt) = self.round.mean_rtt() else { return };
        self.end_round(now, elapsed, mean_rtt);
        self.round = RoundSample::new(now, self.last_sent_packet + 1);
    }

    fn end_round(&mut self, now: Instant, elapsed: Duration, mean_rtt: Duration) {
        let rate = self.round.delivered_bytes / elapsed.as_secs_f64();
        let refresh_base = self.base_rtt.observe(now, mean_rtt);
        let base = self.base_rtt.get().unwrap_or(mean_rtt);
        let queue = mean_rtt.saturating_sub(base) > QUEUE_MIN.max(base.mul_f64(QUEUE_SHARE));
        let congested = self.congested(queue);
        if congested {
            self.rates.forget_all_but(rate);
            self.cap = Some(self.window * LOSS_CAP);
        } else {
            // An application's own pauses must not look like a slower path.
            if !self.round.app_limited || rate > self.rates.max() {
                self.rates.push(rate);
            }
            self.cap = self.cap.map(|cap| cap * CAP_GROWTH).filter(|cap| *cap < 2.0 * self.window);
        }
        match &mut self.startup {
            Some(startup) => {
                if congested || queue || startup.is_over(rate, self.round.app_limited) {
                    self.startup = None;
                    self.cruise(base, DRAIN_GAIN);
                }
            }
            None => {
                let gain = self.next_gain(refresh_base, congested);
                self.cruise(base, gain);
            }
        }
    }

    fn congested(&self, queue: bool) -> bool {
        let tolerated = if queue { LOSS_TOLERATED } else { LOSS_TOLERATED_WITHOUT_QUEUE };
        let enough = self.round.lost_bytes >= LOSS_PACKETS_MIN * self.packet_bytes;
        self.round.congestion_marked || (enough && self.round.loss() > tolerated)
    }

    /// The gain of the round that begins now.
    fn next_gain(&mut self, refresh_base: bool, congested: bool) -> f64 {
        if refresh_base {
            self.cycle = 1;
            return BASE_RTT_PROBE_GAIN;
        }
        self.cycle += 1;
        let best = self.rates.max();
        // Rate samples trail the window by a round: the probe of round 0 shows at the end of round 1.
        let found_more =
            self.cycle == 2 && !congested && best > self.rate_before_probe * PROBE_SUCCESS;
        if found_more || self.cycle >= PROBE_CYCLE_ROUNDS {
            self.cycle = 0;
            self.rate_before_probe = best;
            return PROBE_GAIN;
        }
        if self.cycle == 1 { DRAIN_GAIN } else { 1.0 }
    }

    fn cruise(&mut self, base: Duration, gain: f64) {
        let path_bytes = self.rates.max() * base.max(SHORT_PATH).as_secs_f64();
        let packets = (path_bytes / self.packet_bytes).max(1.0);
        let share = (BASE_GAIN / packets.sqrt()).clamp(BASE_GAIN_MIN, BASE_GAIN_MAX);
        let target = gain * (1.0 + share) * path_bytes;
        let floor = if base < SHORT_PATH {
            SHORT_PATH_WINDOW_MIN
        } else {
            WINDOW_PACKETS_MIN * self.packet_bytes
        };
        self.window = target.min(self.cap.unwrap_or(f64::INFINITY)).max(floor);
    }
}

impl Startup {
    /// Like HyStart++, but on any block of packets, not only a round's first: once every one of
    /// them has waited, a queue stands.
    fn watch_delay(&mut self, rtt: Duration, base: Option<Duration>) {
        let smallest = self.block_rtt.map_or(rtt, |smallest| smallest.min(rtt));
        self.block_rtt = Some(smallest);
        self.block_count += 1;
        if self.block_count < STARTUP_DELAY_SAMPLES {
            return;
        }
        let threshold = |base: Duration| (base / 8).clamp(STARTUP_DELAY_MIN, STARTUP_DELAY_MAX);
        self.held |= base.is_some_and(|base| smallest > base + threshold(base));
        self.block_rtt = None;
        self.block_count = 0;
    }

    fn is_over(&mut self, rate: f64, app_limited: bool) -> bool {
        if rate > self.best_rate * STARTUP_GROWTH {
            self.best_rate = rate;
            self.flat_rounds = 0;
        } else if !app_limited {
            self.flat_rounds += 1;
        }
        self.held || self.flat_rounds >= STARTUP_FLAT_ROUNDS
    }
}

impl Controller for RateController {
    fn on_sent(&mut self, now: Instant, _bytes: u64, last_packet_number: u64) {
        self.sent(now, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.acknowledged(now, sent, bytes, app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.acknowledged_batch(now, in_flight, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost(lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.packet_bytes = f64::from(new_mtu);
    }

    fn window(&self) -> u64 {
        self.window as u64
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW_PACKETS * self.packet_bytes as u64
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
#[path = "congestion_tests.rs"]
mod tests;
