//! How far a claimed round came out from a replay of it: relative L2, claimed against replayed. Cosine alone
//! accepts every cheat worth naming.
//!
//! The comparison is arithmetic on two end states, so whoever has both can make it, and nobody needs libtorch
//! to see that a verdict follows from them.

use manyhands_proto::message::Distances;

use crate::moments8::Moments;

/// Where a round ended, or a part of it: values of θ_H, and of the moments read back from their 8-bit blocks.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    pub theta: &'a [f32],
    pub first_moment: &'a [f32],
    pub second_moment: &'a [f32],
}

impl<'a> End<'a> {
    pub fn new(theta: &'a [f32], moments: &'a Moments) -> Self {
        Self { theta, first_moment: &moments.first, second_moment: &moments.second }
    }
}

/// Sums over the parts that have been compared.
#[derive(Debug, Clone, Copy, Default)]
pub struct Comparison {
    delta: Sums,
    first_moment: Sums,
    second_moment: Sums,
}

impl Comparison {
    /// Adds a part. `start`: the same values of θ_t, of which both took a round's steps.
    ///
    /// # Panics
    /// When the parts have not one length.
    pub fn add(&mut self, start: &[f32], claimed: End<'_>, replayed: End<'_>) {
        let lengths = [claimed, replayed]
            .map(|end| [end.theta.len(), end.first_moment.len(), end.second_moment.len()]);
        assert_eq!(lengths, [[start.len(); 3]; 2], "values of each vector");
        for (start, (claimed, replayed)) in
            start.iter().zip(claimed.theta.iter().zip(replayed.theta))
        {
            self.delta.add(start - claimed, start - replayed);
        }
        self.first_moment.add_all(claimed.first_moment, replayed.first_moment);
        self.second_moment.add_all(claimed.second_moment, replayed.second_moment);
    }

    /// |claimed − replayed| / |replayed| of each vector. 0 is the same bits; the largest number where a claimed
    /// value is not finite, or the replay did not move and the claim did.
    pub fn distances(&self) -> Distances {
        Distances {
            delta: self.delta.distance(),
            first_moment: self.first_moment.distance(),
            second_moment: self.second_moment.distance(),
        }
    }
}

/// The distances of one whole end state from another.
pub fn distances(start: &[f32], claimed: End<'_>, replayed: End<'_>) -> Distances {
    let mut comparison = Comparison::default();
    comparison.add(start, claimed, replayed);
    comparison.distances()
}

/// Sums of squares, in f64: some billions of f32 cannot overflow or lose them.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    difference: f64,
    replayed: f64,
}

impl Sums {
    fn add(&mut self, claimed: f32, replayed: f32) {
        self.difference += (f64::from(claimed) - f64::from(replayed)).powi(2);
        self.replayed += f64::from(replayed).powi(2);
    }

    fn add_all(&mut self, claimed: &[f32], replayed: &[f32]) {
        for (&claimed, &replayed) in claimed.iter().zip(replayed) {
            self.add(claimed, replayed);
        }
    }

    fn distance(&self) -> f64 {
        if self.difference == 0.0 {
            return 0.0;
        }
        let distance = (self.difference / self.replayed).sqrt();
        // From nothing, or to what is no number: as far as a record can say.
        if distance.is_finite() { distance } else { f64::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distance_says_how_far_and_is_always_a_number() {
        let distance = |claimed: f32, replayed: f32| {
            let mut sums = Sums::default();
            sums.add(claimed, replayed);
            sums.distance()
        };
        assert_eq!(distance(1.0, 1.0), 0.0);
        assert_eq!(distance(0.0, 0.0), 0.0);
        assert_eq!(distance(1.5, 1.0), 0.5);
        assert_eq!(distance(1.0, 0.0), f64::MAX);
        assert_eq!(distance(f32::NAN, 1.0), f64::MAX);
        assert_eq!(distance(f32::INFINITY, 1.0), f64::MAX);
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        let values = |seed: f32| -> Vec<f32> { (0..64).map(|i| (seed + i as f32).sin()).collect() };
        let (start, claimed, replayed) = (values(0.0), values(0.3), values(0.31));
        let end = |values: &'static [f32]| End {
            theta: values,
            first_moment: values,
            second_moment: values,
        };
        let (claimed, replayed): (&'static [f32], &'static [f32]) =
            (claimed.leak(), replayed.leak());
        let whole = distances(&start, end(claimed), end(replayed));
        let mut parts = Comparison::default();
        for at in (0..64).step_by(16) {
            let part = at..at + 16;
            let (claimed, replayed) = (&claimed[part.clone()], &replayed[part.clone()]);
            parts.add(&start[part], end(claimed), end(replayed));
        }
        assert_eq!(parts.distances(), whole);
        assert!(whole.delta > 0.0 && whole.delta < 0.1, "{whole:?}");
    }
}
