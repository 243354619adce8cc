//! Two magnitudes per chunk: an 8-bit logarithmic scale for the larger, an 8-bit ratio for the
//! smaller. All of it by table, multiplication and comparison, so the same bits everywhere.

/// Smallest exponent of the scale: level 0 is 2⁻³⁰, about 10⁻⁹.
const EXPONENT_MIN: i32 = -30;

/// 2^(n/8) for n = 0…7, each the nearest f32, by its bits.
const EIGHTH_POWERS: [u32; 8] = [
    0x3f80_0000,
    0x3f8b_95c2,
    0x3f98_37f0,
    0x3fa5_fed7,
    0x3fb5_04f3,
    0x3fc5_672a,
    0x3fd7_44fd,
    0x3fea_c0c7,
];

/// The scales: 2^(n/8 − 30), up to 3.67; what is beyond stays in the error buffer. A step is 9 %.
pub(crate) const SCALES: [f32; 256] = scales();

/// Where one scale becomes nearer than the one before it.
const SCALE_BOUNDS: [f32; 255] = scale_bounds();

/// What is smaller counts as zero and is not sent: no scale could express it.
pub(crate) const MAGNITUDE_MIN: f32 = SCALES[0];

const fn scales() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut n = 0;
    while n < 256 {
        // Adding to the exponent field multiplies by a power of two exactly.
        let exponent = (EXPONENT_MIN + (n / 8) as i32) << 23;
        table[n] = f32::from_bits((EIGHTH_POWERS[n % 8] as i32 + exponent) as u32);
        n += 1;
    }
    table
}

const fn scale_bounds() -> [f32; 255] {
    let mut table = [0.0; 255];
    let mut n = 0;
    while n < 255 {
        table[n] = (SCALES[n] + SCALES[n + 1]) * 0.5;
        n += 1;
    }
    table
}

/// A chunk's two magnitudes, as they travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Levels {
    /// The larger magnitude is `SCALES[scale]`.
    pub(crate) scale: u8,
    /// The smaller is the larger × (ratio + 1) / 256.
    pub(crate) ratio: u8,
}

impl Levels {
    pub(crate) fn larger(self) -> f32 {
        SCALES[usize::from(self.scale)]
    }

    pub(crate) fn smaller(self) -> f32 {
        self.larger() * ((f32::from(self.ratio) + 1.0) * (1.0 / 256.0))
    }

    /// The four values by code: bit 0 is the sign, bit 1 chooses the larger magnitude.
    pub(crate) fn values(self) -> [f32; 4] {
        let (larger, smaller) = (self.larger(), self.smaller());
        [smaller, -smaller, larger, -larger]
    }

    /// Magnitudes from here on take the larger level.
    pub(crate) fn boundary(self) -> f32 {
        (self.larger() + self.smaller()) * 0.5
    }

    /// The two levels that leave the least squared error on `magnitudes`, which are sorted, not
    /// empty, finite and at least [`MAGNITUDE_MIN`].
    ///
    /// One-dimensional 2-means solved exactly: of all splits of the sorted values the one with the
    /// largest S₁²/n₁ + S₂²/n₂ (the first of equals), sums in f64 from the smallest value up.
    pub(crate) fn fit(magnitudes: &[f32]) -> Self {
        let total: f64 = magnitudes.iter().fold(0.0, |sum, &value| sum + f64::from(value));
        let count = magnitudes.len();
        let mut below = 0.0_f64;
        let mut best = (total * total / count as f64, total / count as f64, total / count as f64);
        for (split, &value) in (1..count).zip(magnitudes) {
            below += f64::from(value);
            let above = total - below;
            let mean_below = below / split as f64;
            let mean_above = above / (count - split) as f64;
            let explained = below * mean_below + above * mean_above;
            if explained > best.0 {
                best = (explained, mean_below, mean_above);
            }
        }
        let (_, smaller, larger) = best;
        let scale = SCALE_BOUNDS.partition_point(|&bound| f64::from(bound) <= larger);
        let share = smaller / f64::from(SCALES[scale]) * 256.0;
        // Round half up; clamped, so the cast loses nothing.
        let ratio = (share + 0.5).floor().clamp(1.0, 256.0) as u16 - 1;
        Self { scale: scale as u8, ratio: ratio as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scales_rise_by_a_ninth_and_double_every_eight() {
        assert_eq!(MAGNITUDE_MIN.to_bits(), 0x3080_0000);
        for n in 1..256 {
            let step = SCALES[n] / SCALES[n - 1];
            assert!((1.0905..1.0906).contains(&step), "{n}: {step}");
            if n >= 8 {
                assert_eq!(SCALES[n], SCALES[n - 8] * 2.0);
            }
        }
    }

    #[test]
    fn the_eighth_powers_are_the_nearest_floats() {
        for (n, &power) in EIGHTH_POWERS.iter().enumerate() {
            // Compared as powers: power⁸ = 2ⁿ. f64 is exact enough to tell neighbouring floats apart.
            let distance =
                |bits: u32| (f64::from(f32::from_bits(bits)).powi(8) - f64::from(1_u32 << n)).abs();
            assert!(distance(power - 1) > distance(power) && distance(power + 1) > distance(power));
        }
    }

    #[test]
    fn two_clusters_are_found_and_one_value_needs_one_level() {
        let levels = Levels::fit(&[1.0, 1.0, 1.0, 2.0, 2.0]);
        assert_eq!(levels.values(), [1.0, -1.0, 2.0, -2.0]);
        let levels = Levels::fit(&[0.5]);
        assert_eq!((levels.larger(), levels.smaller()), (0.5, 0.5));
        let levels = Levels::fit(&[1e-3, 100.0]);
        assert_eq!(levels.larger(), SCALES[255]);
    }
}
