//! One magnitude per chunk, as an 8-bit logarithm. By table, multiplication and comparison, so the same
//! bits everywhere.

/// Smallest exponent of a scale: the first is 2⁻³⁰, about 10⁻⁹.
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

/// The magnitudes: 2^(n/8 − 30), up to 3.67; what is beyond stays in the error buffer. A step is 9 %.
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

/// The magnitude that all sent values of a chunk share, as it travels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Scale(pub(crate) u8);

impl Scale {
    pub(crate) fn magnitude(self) -> f32 {
        SCALES[usize::from(self.0)]
    }

    /// The scale nearest to the mean of some magnitudes: of all single values the mean leaves the least
    /// squared error.
    pub(crate) fn nearest(mean: f64) -> Self {
        Self(SCALE_BOUNDS.partition_point(|&bound| f64::from(bound) <= mean) as u8)
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
    fn the_nearest_scale_is_chosen_and_the_ends_hold_what_is_beyond() {
        assert_eq!(Scale::nearest(1.0).magnitude(), 1.0);
        assert_eq!(Scale::nearest(1.04).magnitude(), 1.0);
        assert_eq!(Scale::nearest(1.05).magnitude(), SCALES[241]);
        assert_eq!(Scale::nearest(0.0), Scale(0));
        assert_eq!(Scale::nearest(1e9), Scale(255));
    }
}
