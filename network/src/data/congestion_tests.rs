//! The controller on a modelled bottleneck: one drop-tail queue, paced senders with endless data,
//! seeded random loss. Deterministic: the same numbers on every machine.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::*;

const PACKET: u64 = 1200;

/// Who decides a sender's window.
enum Sender {
    Rate(Box<RateController>),
    /// NewReno: half on a loss (once per round trip), one packet more per round trip otherwise.
    Reno {
        window: f64,
        threshold: f64,
        recovery_until: Duration,
    },
    /// Sends in bursts: this many packets, then a pause.
    Bursts {
        controller: Box<RateController>,
        packets: u64,
        pause: Duration,
    },
}

struct Flow {
    sender: Sender,
    in_flight: u64,
    next_packet: u64,
    smoothed_rtt: Duration,
    next_send: Duration,
    burst_left: u64,
    delivered: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Link {
    bytes_per_s: f64,
    round_trip: Duration,
    buffer_bytes: f64,
    /// One packet in so many is lost at random; 0 for none.
    lose_one_in: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Send { flow: usize },
    Acknowledge { flow: usize, packet: u64, sent: Duration },
    Lose { flow: usize },
}

struct Model {
    link: Link,
    flows: Vec<Flow>,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    sequence: u64,
    epoch: Instant,
    queue_empty_at: Duration,
    random: u64,
    queued_bytes_max: f64,
    dropped: u64,
    sent: u64,
}

impl Model {
    fn new(link: Link) -> Self {
        Self {
            link,
            flows: Vec::new(),
            events: BinaryHeap::new(),
            sequence: 0,
            epoch: Instant::now(),
            queue_empty_at: Duration::ZERO,
            random: 0x9e37_79b9_7f4a_7c15,
            queued_bytes_max: 0.0,
            dropped: 0,
            sent: 0,
        }
    }

    fn add(&mut self, starts: Duration, sender: Sender) {
        let flow = self.flows.len();
        let burst_left = match &sender {
            Sender::Bursts { packets, .. } => *packets,
            Sender::Rate(_) | Sender::Reno { .. } => u64::MAX,
        };
        self.flows.push(Flow {
            sender,
            in_flight: 0,
            next_packet: 0,
            smoothed_rtt: self.link.round_trip,
            next_send: starts,
            burst_left,
            delivered: Vec::new(),
        });
        self.at(starts, Event::Send { flow });
    }

    fn rate(&self) -> Sender {
        Sender::Rate(Box::new(RateController::new(self.epoch, PACKET as u16)))
    }

    fn at(&mut self, time: Duration, event: Event) {
        self.sequence += 1;
        self.events.push(Reverse((time, self.sequence, event)));
    }

    fn run(&mut self, until: Duration) {
        while let Some(Reverse((now, sequence, event))) = self.events.pop() {
            if now > until {
                self.events.push(Reverse((now, sequence, event)));
                break;
            }
            match event {
                Event::Send { flow } => self.send(now, flow),
                Event::Acknowledge { flow, packet, sent } => {
                    self.acknowledge(now, flow, packet, sent);
                }
                Event::Lose { flow } => self.lose(now, flow),
            }
        }
    }

    fn send(&mut self, now: Duration, index: usize) {
        let instant = self.epoch + now;
        let flow = &mut self.flows[index];
        if now < flow.next_send || flow.in_flight + PACKET > flow.window() || flow.burst_left == 0 {
            return;
        }
        flow.burst_left -= 1;
        let packet = flow.next_packet;
        flow.next_packet += 1;
        flow.in_flight += PACKET;
        if let Some(controller) = flow.controller() {
            controller.sent(instant, packet);
        }
        // quinn's pacer: a window and a quarter per smoothed round trip.
        let pause = flow.smoothed_rtt.as_secs_f64() * PACKET as f64 / (1.25 * flow.window() as f64);
        flow.next_send = now + Duration::from_secs_f64(pause);
        let next_send = flow.next_send;
        self.at(next_send, Event::Send { flow: index });
        self.transmit(now, index, packet);
    }

    fn transmit(&mut self, now: Duration, flow: usize, packet: u64) {
        self.sent += 1;
        let wait = self.queue_empty_at.saturating_sub(now);
        let queued = wait.as_secs_f64() * self.link.bytes_per_s;
        self.queued_bytes_max = self.queued_bytes_max.max(queued);
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let unlucky =
            self.link.lose_one_in > 0 && (self.random >> 33).is_multiple_of(self.link.lose_one_in);
        if unlucky || queued + PACKET as f64 > self.link.buffer_bytes {
            self.dropped += 1;
            let noticed = now + wait + self.link.round_trip + Duration::from_millis(1);
            self.at(noticed, Event::Lose { flow });
            return;
        }
        let service = Duration::from_secs_f64(PACKET as f64 / self.link.bytes_per_s);
        self.queue_empty_at = now.max(self.queue_empty_at) + service;
        let arrives = self.queue_empty_at + self.link.round_trip;
        self.at(arrives, Event::Acknowledge { flow, packet, sent: now });
    }

    fn acknowledge(&mut self, now: Duration, index: usize, packet: u64, sent: Duration) {
        let epoch = self.epoch;
        let flow = &mut self.flows[index];
        flow.in_flight -= PACKET;
        flow.smoothed_rtt = (flow.smoothed_rtt * 7 + (now - sent)) / 8;
        let second = now.as_secs() as usize;
        flow.delivered.resize(flow.delivered.len().max(second + 1), 0);
        flow.delivered[second] += PACKET;
        let in_flight = flow.in_flight;
        let app_limited = flow.burst_left == 0;
        match &mut flow.sender {
            Sender::Reno { window, threshold, .. } => {
                let whole = *window < *threshold;
                *window += if whole { PACKET as f64 } else { (PACKET * PACKET) as f64 / *window };
            }
            Sender::Rate(controller) | Sender::Bursts { controller, .. } => {
                controller.acknowledged(epoch + now, epoch + sent, PACKET, app_limited);
                controller.acknowledged_batch(epoch + now, in_flight, Some(packet));
            }
        }
        if let Sender::Bursts { packets, pause, .. } = flow.sender
            && app_limited
            && in_flight == 0
        {
            flow.burst_left = packets;
            flow.next_send = now + pause;
        }
        let next = flow.next_send.max(now);
        self.at(next, Event::Send { flow: index });
    }

    fn lose(&mut self, now: Duration, index: usize) {
        let flow = &mut self.flows[index];
        flow.in_flight -= PACKET;
        let rtt = flow.smoothed_rtt;
        match &mut flow.sender {
            Sender::Reno { window, threshold, recovery_until } => {
                if now > *recovery_until {
                    *window = (*window / 2.0).max(2.0 * PACKET as f64);
                    *threshold = *window;
                    *recovery_until = now + rtt;
                }
            }
            Sender::Rate(controller) | Sender::Bursts { controller, .. } => {
                controller.lost(PACKET, false);
            }
        }
        self.at(now, Event::Send { flow: index });
    }

    /// Share of the line that a flow had in these seconds.
    fn share(&self, flow: usize, seconds: std::ops::Range<usize>) -> f64 {
        let count = seconds.len() as f64;
        let bytes: u64 = self.flows[flow].delivered[seconds].iter().sum();
        bytes as f64 / count / self.link.bytes_per_s
    }
}

impl Flow {
    fn window(&self) -> u64 {
        match &self.sender {
            Sender::Rate(controller) | Sender::Bursts { controller, .. } => controller.window(),
            Sender::Reno { window, .. } => *window as u64,
        }
    }

    fn controller(&mut self) -> Option<&mut RateController> {
        match &mut self.sender {
            Sender::Rate(controller) | Sender::Bursts { controller, .. } => Some(controller),
            Sender::Reno { .. } => None,
        }
    }
}

/// 40 Mbit/s and a buffer of one bandwidth-delay product.
fn line(round_trip_ms: u64, lose_one_in: u64) -> Link {
    let round_trip = Duration::from_millis(round_trip_ms);
    let bytes_per_s = 5e6;
    Link {
        bytes_per_s,
        round_trip,
        buffer_bytes: bytes_per_s * round_trip.as_secs_f64(),
        lose_one_in,
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_clean_line_is_filled_without_a_standing_full_queue() {
    for round_trip_ms in [20, 50, 100] {
        let mut model = Model::new(line(round_trip_ms, 0));
        let sender = model.rate();
        model.add(Duration::ZERO, sender);
        model.run(10 * SECOND);
        let share = model.share(0, 2..10);
        let dropped = model.dropped as f64 / model.sent as f64;
        assert!(share > 0.93, "{round_trip_ms} ms: {share:.3} of the line");
        assert!(dropped < 0.02, "{round_trip_ms} ms: {dropped:.4} dropped");
    }
}

#[test]
fn one_loss_in_two_hundred_does_not_slow_it_down() {
    for round_trip_ms in [50, 100] {
        let mut model = Model::new(line(round_trip_ms, 200));
        let sender = model.rate();
        model.add(Duration::ZERO, sender);
        model.run(10 * SECOND);
        let share = model.share(0, 2..10);
        assert!(share > 0.9, "{round_trip_ms} ms: {share:.3} of the line");
    }
}

#[test]
fn reno_falls_on_the_same_line_so_the_model_is_not_too_kind() {
    let mut model = Model::new(line(50, 200));
    let reno = Sender::Reno { window: 12_000.0, threshold: 1e9, recovery_until: Duration::ZERO };
    model.add(Duration::ZERO, reno);
    model.run(10 * SECOND);
    assert!(model.share(0, 2..10) < 0.3);
}

#[test]
fn two_of_a_kind_come_to_share_a_line() {
    for lose_one_in in [0, 200] {
        let mut model = Model::new(line(50, lose_one_in));
        let (first, second) = (model.rate(), model.rate());
        model.add(Duration::ZERO, first);
        model.add(3 * SECOND, second);
        model.run(30 * SECOND);
        let shares = [model.share(0, 15..30), model.share(1, 15..30)];
        assert!(shares.iter().sum::<f64>() > 0.9, "{lose_one_in}: {shares:.3?}");
        assert!(shares.iter().all(|share| *share > 0.3), "{lose_one_in}: {shares:.3?}");
    }
}

#[test]
fn of_five_that_come_one_after_another_none_starves() {
    let mut model = Model::new(line(50, 0));
    for index in 0..5 {
        let sender = model.rate();
        model.add(index * SECOND, sender);
    }
    model.run(30 * SECOND);
    let shares: Vec<_> = (0..5).map(|flow| model.share(flow, 15..30)).collect();
    assert!(shares.iter().all(|share| *share > 0.1), "{shares:.3?}");
    assert!(shares.iter().sum::<f64>() > 0.95, "{shares:.3?}");
}

#[test]
fn a_loss_based_neighbour_is_not_starved() {
    let mut model = Model::new(line(50, 0));
    let rate = model.rate();
    model.add(Duration::ZERO, rate);
    let reno = Sender::Reno { window: 12_000.0, threshold: 1e9, recovery_until: Duration::ZERO };
    model.add(SECOND, reno);
    model.run(30 * SECOND);
    let shares = [model.share(0, 10..30), model.share(1, 10..30)];
    assert!(shares.iter().sum::<f64>() > 0.9, "{shares:.3?}");
    assert!(shares[0] > 0.15 && shares[1] > 0.15, "{shares:.3?}");
}

#[test]
fn a_slow_and_a_shallow_line_are_not_flooded() {
    let slow = Link { bytes_per_s: 125_000.0, buffer_bytes: 30_000.0, ..line(80, 0) };
    let shallow = Link { buffer_bytes: 40_000.0, ..line(50, 0) };
    for link in [slow, shallow] {
        let mut model = Model::new(link);
        let sender = model.rate();
        model.add(Duration::ZERO, sender);
        model.run(20 * SECOND);
        let share = model.share(0, 5..20);
        let dropped = model.dropped as f64 / model.sent as f64;
        assert!(share > 0.85, "{share:.3} of {} bytes/s", link.bytes_per_s);
        assert!(dropped < 0.06, "{dropped:.4} dropped at {} bytes/s", link.bytes_per_s);
    }
}

#[test]
fn an_application_that_pauses_keeps_what_it_learned() {
    let mut model = Model::new(line(50, 0));
    let controller = Box::new(RateController::new(model.epoch, PACKET as u16));
    let pause = Duration::from_millis(400);
    model.add(Duration::ZERO, Sender::Bursts { controller, packets: 400, pause });
    model.run(12 * SECOND);
    let window = model.flows[0].window();
    assert!(window > 100_000, "the window shrank to {window} bytes while the application paused");
}

#[test]
fn a_short_path_keeps_room_for_late_wake_ups() {
    let round_trip = Duration::from_micros(200);
    let link = Link { bytes_per_s: 20e6, round_trip, buffer_bytes: 1e6, lose_one_in: 0 };
    let mut model = Model::new(link);
    let sender = model.rate();
    model.add(Duration::ZERO, sender);
    model.run(2 * SECOND);
    assert!(model.flows[0].window() >= 256 * 1024);
    assert!(model.share(0, 1..2) > 0.95);
}

#[test]
fn persistent_congestion_starts_over() {
    let now = Instant::now();
    let mut controller = RateController::new(now, 1200);
    controller.acknowledged(now + SECOND, now, 500_000, false);
    assert!(controller.window() > controller.initial_window());
    controller.lost(1200, true);
    assert_eq!(controller.window(), controller.initial_window());
}
